//! Files as memory: opened, mapped, pinned, written back.
//!
//! ```no_run
//! use pgmap::{Device, Memory, Pin, Prot, Writeback};
//!
//! let memory = Memory::builder().ram(64 << 20).device(Device::compressed(1 << 30)).build()?;
//! let file = memory.open("data.bin")?;
//! let map = memory.space().map_file(&file, 0..file.len_bytes(), Prot::ReadWrite)?;
//! map.write(0, b"through the mapping");
//! let pins = memory.space().pin_user_pages(map.range(), &Pin::WRITE.label("rx ring"))?;
//! // A device may write to the pages now, behind everybody's back.
//! file.sync_range(0..file.len_bytes(), Writeback::Integrity)?; // bounded, even though they are pinned
//! drop(pins);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! While a file is open here, its pages are ours: what others write to it by other ways is not seen, and a lock keeps other
//! pgmaps away. What must never happen here: bytes that are only in RAM dropped because somebody lets go of a handle.

mod errors;
mod options;

use core::marker::PhantomData;
use core::ops::{ControlFlow, Range};
use core::ptr;
use core::time::Duration;
use std::fs;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use pgmap_core::addr::{PAGE_SIZE, VirtAddr};
use pgmap_host::file_backing::FileBacking;
use pgmap_host::file_memory::{FileMemory, Prot, most_bytes};
use pgmap_mm::backing::{Backing, BackingError};
use pgmap_mm::errseq::Seen;
use pgmap_mm::page_cache::{
    CacheParts, FileVma, Lost, OnPinned, PageCache, TruncateError, VmaAccess, Written,
};
use pgmap_sync::Mutex;
use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use crate::memory::{Memory, PLATFORM};
use crate::space::AddressSpace;
use crate::writer::write_back;

pub use errors::{MapFileError, OpenError, SyncError};
pub use options::OpenOptions;

/// How long a file may become while it is open: so many times as long as it is, and this many bytes at least. It costs
/// addresses only.
const ROOM_FACTOR: u64 = 4;
const ROOM_BYTES: u64 = 16 << 30;
/// What a file is opened with, as a number.
const NONBLOCK: i32 = OFlags::NONBLOCK.bits().cast_signed();
/// Between two looks whether somebody still uses a file that is being closed.
const CLOSING: Duration = Duration::from_micros(50);
const CLOSING_LOOKS: u32 = 1000;
/// Between two looks at a pin that somebody waits for.
const PIN_POLL: Duration = Duration::from_micros(200);

/// How pages are written back that somebody has pinned (WB-1, WB-2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Writeback {
    /// Not at all: they stay dirty. Nothing is made durable.
    Background,
    /// A copy of each is written, and they stay dirty. Everything is made durable.
    Integrity,
    /// As `Integrity`, after waiting for so long at most for pins to end.
    IntegrityAfterPins(Duration),
}

/// The file, for as long as anybody has a handle or a mapping.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) space: Arc<AddressSpace>,
    pub(crate) cache: Arc<PageCache>,
    memory: Arc<FileMemory>,
    /// What its mappings may allow.
    prot: Prot,
    /// Why nothing can be made durable any more.
    flush_failed: Mutex<Option<BackingError>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.memory.is_inherited() {
            // A fork's child: what is dirty is the parent's to write.
            return;
        }
        self.space.inner().files().close(&self.cache);
        // Who is still reading ahead or writing back ends with that soon. Then the file is closed, and whoever opens it again does not
        // find it locked, unless pins keep it.
        for _ in 0..CLOSING_LOOKS {
            if Arc::strong_count(&self.cache) == 1 {
                break;
            }
            std::thread::sleep(CLOSING);
        }
    }
}

/// An open file whose pages are memory.
///
/// Dropping the last handle, the last mapping and the last pin writes back what is dirty, without saying whether that worked, and
/// without making it durable: [`sync_all`](Self::sync_all) does both. That drop waits for the writing. While the file is open here,
/// what others do to it by other ways is not seen: where somebody has cut it, what is not in RAM is SIGBUS for who touches it.
#[derive(Debug)]
pub struct File<'m> {
    inner: Arc<Inner>,
    seen: Mutex<Seen>,
    /// Whose pager serves the pages.
    memory: PhantomData<&'m Memory>,
}

impl Memory {
    /// Opens a file that there is for reading and writing, to be mapped. It may be empty. An advisory lock (`flock`) keeps it from
    /// being opened once more, here or by another process: [`File::another`] gives further handles.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub fn open(&self, path: impl AsRef<Path>) -> Result<File<'_>, OpenError> {
        self.open_with(path, &OpenOptions::new())
    }

    /// Opens a file to be mapped.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub fn open_with(
        &self,
        path: impl AsRef<Path>,
        options: &OpenOptions,
    ) -> Result<File<'_>, OpenError> {
        let path = path.as_ref();
        if self.space().is_inherited() {
            return Err(OpenError::Inherited(path.to_owned()));
        }
        let prot = options.prot.unwrap_or(Prot::ReadWrite);
        let writes = prot == Prot::ReadWrite;
        let failed = |error| OpenError::Open {
            path: path.to_owned(),
            error,
        };
        let mut how = fs::OpenOptions::new();
        // Nobody waits for the other end of a pipe, only to be told that it is no file.
        how.read(true).write(writes).custom_flags(NONBLOCK);
        let file = how.open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !fs::FileType::is_file(&metadata.file_type()) {
            return Err(OpenError::NotRegular(path.to_owned()));
        }
        let lock = match prot {
            Prot::Read => FlockOperation::NonBlockingLockShared,
            Prot::ReadWrite => FlockOperation::NonBlockingLockExclusive,
        };
        flock(&file, lock).map_err(|errno| match errno {
            Errno::WOULDBLOCK => OpenError::Locked(path.to_owned()),
            errno => failed(errno.into()),
        })?;
        // It ends the lock if the rest fails.
        let backing = FileBacking::new(file);
        let memory = self.file_memory(path, metadata.len())?;
        let backing = Arc::new(backing.with_memory(Arc::clone(&memory)));
        self.open_in(path, memory, backing, metadata.len(), options)
    }

    /// Opens something else than a file of the machine, so many bytes long, of which errors speak as `path`: an image in a format
    /// of one's own, or an object that comes over a network.
    ///
    /// # Errors
    ///
    /// [`OpenError::TooLong`], or what the machine lacks.
    pub fn open_over(
        &self,
        path: impl AsRef<Path>,
        backing: Arc<dyn Backing>,
        size_bytes: u64,
        options: &OpenOptions,
    ) -> Result<File<'_>, OpenError> {
        let path = path.as_ref();
        if self.space().is_inherited() {
            return Err(OpenError::Inherited(path.to_owned()));
        }
        let memory = self.file_memory(path, size_bytes)?;
        self.open_in(path, memory, backing, size_bytes, options)
    }

    /// Memory for the pages of a file of this length.
    fn file_memory(&self, path: &Path, size_bytes: u64) -> Result<Arc<FileMemory>, OpenError> {
        let pages = most_pages(size_bytes).ok_or_else(|| OpenError::TooLong {
            path: path.to_owned(),
            bytes: size_bytes,
        })?;
        let memory = FileMemory::new(Arc::clone(&self.pager().mmu), pages);
        memory.map(Arc::new).map_err(|errno| no_memory(path, errno))
    }

    fn open_in(
        &self,
        path: &Path,
        memory: Arc<FileMemory>,
        backing: Arc<dyn Backing>,
        size_bytes: u64,
        options: &OpenOptions,
    ) -> Result<File<'_>, OpenError> {
        let space = self.space();
        let cache = PageCache::new(CacheParts {
            platform: &PLATFORM,
            number: space.inner().files().next_number(),
            map: Arc::clone(space.inner().map_of_frames()),
            ram: Arc::clone(space.inner().ram()),
            mmu: Arc::clone(&memory) as _,
            backing,
            memcg: options.memcg.clone(),
            size_bytes,
            most_pages: memory.most_pages(),
            stats: self.stats(),
        })?;
        let cache = Arc::new(cache);
        self.start_file_threads().map_err(|error| {
            no_memory(path, Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))
        })?;
        space.inner().files().open(Arc::clone(&cache));
        let seen = Mutex::new(cache.errors().sample());
        let inner = Arc::new(Inner {
            space: Arc::clone(space),
            cache,
            memory,
            prot: options.prot.unwrap_or(Prot::ReadWrite),
            flush_failed: Mutex::new(None),
        });
        Ok(File {
            inner,
            seen,
            memory: PhantomData,
        })
    }
}

fn no_memory(path: &Path, errno: Errno) -> OpenError {
    let path = path.to_owned();
    match errno {
        // The process may not have files that long (`RLIMIT_FSIZE`), which counts for their memory, too.
        Errno::FBIG => OpenError::Open {
            path,
            error: errno.into(),
        },
        errno => OpenError::Memory { path, errno },
    }
}

impl File<'_> {
    /// How long the file is, in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.inner.cache.size_bytes()
    }

    /// Another handle to the same file, which is told of errors on its own: of those from now on.
    #[must_use]
    pub fn another(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
            seen: Mutex::new(self.inner.cache.errors().sample()),
            memory: PhantomData,
        }
    }

    /// Pages of the file that are in RAM, and how many of them the file does not have yet.
    #[must_use]
    pub fn pages(&self) -> (u64, u64) {
        (
            self.inner.cache.cached_pages(),
            self.inner.cache.dirty_pages(),
        )
    }

    /// Writes the dirty pages that hold any of these bytes. Unless it is background writeback, they are on the medium when this
    /// returns, even if somebody has them pinned (PMEM-4, WB-2). A range that ends before it begins has the page of its first byte at most.
    ///
    /// # Errors
    ///
    /// [`SyncError`]: of writeback at any time since this handle was last told.
    pub fn sync_range(
        &self,
        bytes: Range<u64>,
        writeback: Writeback,
    ) -> Result<Written, SyncError> {
        if self.inner.memory.is_inherited() {
            return Err(SyncError::Inherited);
        }
        let page = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
        let start = page(bytes.start / PAGE_SIZE as u64);
        let range = start..page(bytes.end.div_ceil(PAGE_SIZE as u64)).max(start);
        let (cache, began) = (&self.inner.cache, Instant::now());
        let written = match writeback {
            Writeback::Background => write_back(cache, range, OnPinned::Skip),
            Writeback::Integrity => write_back(cache, range, OnPinned::Bounce),
            Writeback::IntegrityAfterPins(patience) => {
                let mut wait = |_| keep_waiting(began, patience);
                write_back(cache, range, OnPinned::Wait(&mut wait))
            }
        };
        if writeback != Writeback::Background {
            self.inner.flush().map_err(SyncError::Flush)?;
        }
        let mut seen = self.seen.lock();
        let told = cache.errors().check_and_advance(&mut seen);
        told.map_err(SyncError::Writeback)?;
        Ok(written)
    }

    /// Makes the whole file durable: `fsync`.
    ///
    /// # Errors
    ///
    /// See [`sync_range`](Self::sync_range).
    pub fn sync_all(&self) -> Result<(), SyncError> {
        self.sync_range(0..u64::MAX, Writeback::Integrity).map(drop)
    }

    /// Makes the file shorter or longer: to sixteen GiB, or to four times what it had when it was opened, if that is more. Waits for
    /// so long at most while somebody has a page pinned that would go as a whole: in the page that the file ends in bytes become zeros
    /// whoever has it pinned. Who touches a mapping behind the new end gets SIGBUS.
    /// [`sync_all`](Self::sync_all) makes the new length durable.
    ///
    /// # Errors
    ///
    /// [`TruncateError`]: the file is as it was.
    pub fn set_len(&self, bytes: u64, patience: Duration) -> Result<(), TruncateError> {
        let began = Instant::now();
        self.may_change()?;
        self.inner
            .cache
            .set_len(bytes, |_| keep_waiting(began, patience))
    }

    /// Makes bytes of the file zeros, and gives their room back. Waits for so long at most while somebody has a page pinned that
    /// lies in the range as a whole. Nothing is done where the range has no bytes of the file, as when it ends before it begins.
    ///
    /// # Errors
    ///
    /// [`TruncateError`]: the file is as it was.
    pub fn punch(&self, bytes: Range<u64>, patience: Duration) -> Result<(), TruncateError> {
        let began = Instant::now();
        self.may_change()?;
        self.inner
            .cache
            .punch(bytes, |_| keep_waiting(began, patience))
    }

    fn may_change(&self) -> Result<(), TruncateError> {
        if self.inner.memory.is_inherited() {
            return Err(TruncateError::Inherited);
        }
        match self.inner.prot {
            Prot::ReadWrite => Ok(()),
            Prot::Read => Err(TruncateError::ReadOnly),
        }
    }
}

impl File<'_> {
    /// Says that the RAM of the page with this byte has lost its bytes, to be told by whoever learns of it (`BUS_MCEERR_AO`, a
    /// checksum, a scrubber; not from inside a signal handler). Its frame is never used again. A page that the file has too is
    /// read anew when it is touched. If it had bytes that only RAM had, who touches it gets SIGBUS until it is truncated or punched,
    /// and each handle is told of the loss once, when it syncs (WB-6).
    #[doc(alias = "MADV_HWPOISON")]
    pub fn memory_failure(&self, at_bytes: u64) -> Lost {
        let page = u32::try_from(at_bytes / PAGE_SIZE as u64).unwrap_or(u32::MAX);
        self.inner.cache.memory_failure(page)
    }
}

impl Inner {
    /// Makes durable what was written. A failure is not forgotten: the machine tells of it once.
    fn flush(&self) -> Result<(), BackingError> {
        let mut failed = self.flush_failed.lock();
        if let Some(error) = *failed {
            return Err(error);
        }
        let synced = self.cache.backing().sync();
        *failed = synced.err();
        synced
    }
}

/// How many pages a file may come to have while it is open.
fn most_pages(size_bytes: u64) -> Option<u32> {
    // The table ends behind it, at a group's end.
    let most = u32::MAX - 255;
    let pages = |bytes: u64| {
        let pages = u32::try_from(bytes.div_ceil(PAGE_SIZE as u64)).ok();
        pages.filter(|pages| *pages <= most)
    };
    let least = pages(size_bytes)?;
    let wanted = size_bytes.saturating_mul(ROOM_FACTOR).max(ROOM_BYTES);
    let wanted = wanted.min(most_bytes() / PAGE_SIZE as u64 * PAGE_SIZE as u64);
    Some(pages(wanted).unwrap_or(least).max(least))
}

fn keep_waiting(began: Instant, patience: Duration) -> ControlFlow<()> {
    if began.elapsed() >= patience {
        return ControlFlow::Break(());
    }
    std::thread::sleep(PIN_POLL);
    ControlFlow::Continue(())
}

/// A part of a file, mapped: shared with all other mappings of it.
///
/// Others may write to the same bytes at any time, so no reference to them is given out. A fork's child does not have it.
///
/// # Invariants
///
/// `vma` is a mapping of the file, entered with the pager, that nobody else removes.
#[derive(Debug)]
pub struct FileMapping<'m> {
    inner: Arc<Inner>,
    vma: FileVma,
    prot: Prot,
    memory: PhantomData<&'m Memory>,
}

impl AddressSpace {
    /// Maps bytes of a file, which begin at a multiple of the page size. The last page is mapped whole; behind the end of the
    /// file its bytes are zeros that reach nobody, and further pages answer with SIGBUS. So does a page that the file cannot give; a
    /// later access reads it again.
    ///
    /// A fork's child does not have the mapping: it dies of SIGSEGV where it touches these addresses. A child that is to see the file
    /// maps it itself.
    ///
    /// # Errors
    ///
    /// [`MapFileError`].
    pub fn map_file<'m>(
        &self,
        file: &File<'m>,
        bytes: Range<u64>,
        prot: Prot,
    ) -> Result<FileMapping<'m>, MapFileError> {
        let inner = Arc::clone(&file.inner);
        if !ptr::eq(self, Arc::as_ptr(&inner.space)) {
            return Err(MapFileError::OtherMemory);
        }
        if self.is_inherited() {
            return Err(MapFileError::Inherited);
        }
        let most_bytes = inner.cache.most_bytes();
        let bad = MapFileError::BadRange { most_bytes };
        let page = |bytes: u64| u32::try_from(bytes / PAGE_SIZE as u64).ok();
        let aligned = bytes.start.is_multiple_of(PAGE_SIZE as u64);
        if !aligned || bytes.is_empty() || bytes.end > most_bytes {
            return Err(bad);
        }
        let pages = page(bytes.start).zip(page(bytes.end.next_multiple_of(PAGE_SIZE as u64)));
        let (first, end) = pages.ok_or(bad)?;
        if prot == Prot::ReadWrite && inner.prot == Prot::Read {
            return Err(MapFileError::ReadOnly);
        }
        let at = inner.memory.map(&(first..end), prot)?;
        let vma = FileVma {
            at,
            first,
            pages: end - first,
            access: match prot {
                Prot::Read => VmaAccess::Read,
                Prot::ReadWrite => VmaAccess::ReadWrite,
            },
        };
        self.inner().files().map(&inner.cache, vma);
        // INVARIANT: just mapped and entered.
        Ok(FileMapping {
            inner,
            vma,
            prot,
            memory: PhantomData,
        })
    }
}

impl FileMapping<'_> {
    /// The mapped addresses.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.vma.at.get()..self.vma.at.get() + self.len_bytes()
    }

    /// Mapped bytes.
    #[must_use]
    pub const fn len_bytes(&self) -> usize {
        self.vma.pages as usize * PAGE_SIZE
    }

    /// Copies bytes out of the mapping. If others write them meanwhile, each is an old one or a new one.
    ///
    /// # Panics
    ///
    /// If the mapping is not so long.
    pub fn read(&self, offset: usize, to: &mut [u8]) {
        let from = self.place(offset, to.len()).get() as *const u8;
        // SAFETY: by the type invariant the bytes are mapped; they are memory that others may write, like that of another
        // process, and only copied.
        unsafe { ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
    }

    /// Copies bytes into the mapping.
    ///
    /// # Panics
    ///
    /// If the mapping is not so long, or may not be written.
    pub fn write(&self, offset: usize, from: &[u8]) {
        let may_write = self.prot == Prot::ReadWrite;
        assert!(
            may_write,
            "the mapping is to be read only: map it with Prot::ReadWrite"
        );
        let to = self.place(offset, from.len()).get() as *mut u8;
        // SAFETY: as in `read`; and it may be written.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
    }

    fn place(&self, offset: usize, len: usize) -> VirtAddr {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.len_bytes()),
            "{len} bytes from {offset} on are not in the mapping, which has {}",
            self.len_bytes()
        );
        self.vma.at.checked_add(offset).unwrap_or(self.vma.at)
    }
}

impl Drop for FileMapping<'_> {
    fn drop(&mut self) {
        if self.inner.memory.is_inherited() {
            // A fork's child does not have it.
            return;
        }
        let space = &self.inner.space;
        let mapped = Mapped {
            memory: Arc::clone(&self.inner.memory),
            vma: self.vma,
        };
        if let Err(mapped) = mapped.end(space.inner()) {
            space.linger(mapped);
        }
    }
}

/// A mapping that nobody has any more. While pages of it are pinned its addresses stay: a device may be using them.
///
/// # Invariants
///
/// As those of [`FileMapping`]; `memory` is the file's.
#[derive(Debug)]
pub(crate) struct Mapped {
    memory: Arc<FileMemory>,
    vma: FileVma,
}

impl Mapped {
    /// The pager is gone. Who has pages of the mapping pinned may still use them by their addresses: they are in RAM.
    pub(crate) fn leave(&self) {
        self.memory.leave(self.vma.at, self.vma.pages);
    }

    /// Ends the mapping, unless it is pinned.
    pub(crate) fn end(self, space: &pgmap_mm::space::AddressSpace) -> Result<(), Self> {
        if space.unmap_file(&self.vma).is_err() {
            return Err(self);
        }
        // SAFETY: by the type invariant it is a mapping of the file, which the pager has just forgotten; nobody has a reference
        // to its bytes, or a page of it pinned.
        unsafe { self.memory.unmap(self.vma.at, self.vma.pages) };
        Ok(())
    }
}
