//! A file as the page cache's backing: read and written past the kernel's own cache where the file system can (`O_DIRECT`).
//!
//! Only the end of the file, which is seldom a whole block, goes through the kernel's cache. What goes to or comes from a memory file
//! goes through a buffer, which is quicker: see `buffers`.

use core::ops::Range;
use core::ptr::NonNull;
use core::slice;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use pgmap_core::addr::PAGE_SIZE;
use pgmap_mm::backing::{Backing, BackingError, Transfer};
use rustix::fs::{self, FallocateFlags, FlockOperation, OFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, madvise};
use rustix::process::{Pid, getpid};

use crate::file_memory::FileMemory;

/// What direct transfers begin and end at, in bytes: every device's block.
const BLOCK: usize = PAGE_SIZE;

/// An open file.
#[derive(Debug)]
pub struct FileBacking {
    file: File,
    /// The same file, past the kernel's cache, if its file system can do that.
    direct: Option<OwnedFd>,
    /// Who opened it.
    process: Pid,
    /// Where the file's pages are, if their bytes may go through its buffers.
    memory: Option<Arc<FileMemory>>,
}

impl Drop for FileBacking {
    fn drop(&mut self) {
        // A fork's child has the same lock: it keeps it for as long as it lives, unless we give it up, and is not to give up ours.
        if self.process == getpid() {
            let _ = fs::flock(&self.file, FlockOperation::Unlock);
        }
    }
}

impl FileBacking {
    /// A file that is open for reading, and for writing if it is to be written.
    #[must_use]
    pub fn new(file: File) -> Self {
        let direct = reopen_direct(&file);
        Self {
            file,
            direct,
            process: getpid(),
            memory: None,
        }
    }

    /// The same, of whose transfers those to and from this memory go through its buffers.
    #[must_use]
    pub fn with_memory(mut self, memory: Arc<FileMemory>) -> Self {
        self.memory = Some(memory);
        self
    }

    /// Whether bytes go past the kernel's cache.
    #[must_use]
    pub const fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// Makes all transfers. Those that follow one another, in the file and in memory, are one request, as large ones are what
    /// devices are fast at; if it fails, each is made alone.
    fn transfer(&self, transfers: &mut [Transfer<'_>], way: Way) {
        for group in transfers.chunk_by_mut(is_followed_by) {
            if group.len() > 1 && self.transfer_span(&Span::of(group), way).is_ok() {
                continue;
            }
            for transfer in group {
                let span = Span::of(slice::from_ref(transfer));
                transfer.outcome = self.transfer_span(&span, way);
            }
        }
    }

    /// Through a buffer, if the pages are those of our memory, and one is free.
    fn transfer_span(&self, span: &Span, way: Way) -> Result<(), BackingError> {
        let ours = self.memory.as_ref();
        let ours = ours.and_then(|memory| Some((memory, memory.place_of(span.at)?)));
        let buffer = ours.and_then(|(memory, _)| memory.buffers().take());
        match (ours, buffer, way) {
            (Some((memory, place)), Some(mut buffer), Way::Read)
                if memory.may_fill(place + span.whole_pages() as u64) =>
            {
                let bytes = buffer.bytes();
                for start in (0..span.len_bytes).step_by(bytes.len()) {
                    let part = span.part(start, bytes);
                    self.transfer_one(&part, way)?;
                    let whole = part.whole_pages();
                    bytes[part.len_bytes..whole].fill(0);
                    let filled = memory.fill(place + start as u64, &bytes[..whole]);
                    filled.map_err(error)?;
                }
                Ok(())
            }
            (Some((memory, place)), Some(mut buffer), Way::Write) => {
                let bytes = buffer.bytes();
                for start in (0..span.len_bytes).step_by(bytes.len()) {
                    let len = span.part(start, bytes).len_bytes;
                    let copied = memory.copy_out(place + start as u64, &mut bytes[..len]);
                    copied.map_err(error)?;
                    self.transfer_one(&span.part(start, bytes), way)?;
                }
                Ok(())
            }
            (_, _, Way::Read) => {
                span.populate();
                self.transfer_one(span, way)
            }
            (_, _, Way::Write) => self.transfer_one(span, way),
        }
    }

    fn transfer_one(&self, span: &Span, way: Way) -> Result<(), BackingError> {
        let whole = span.len_bytes / BLOCK * BLOCK;
        let direct = self.direct.as_ref().map(AsRawFd::as_raw_fd);
        let file = self.file.as_raw_fd();
        Self::move_bytes(span, way, 0..whole, direct.unwrap_or(file))?;
        Self::move_bytes(span, way, whole..span.len_bytes, file)
    }

    fn move_bytes(
        span: &Span,
        way: Way,
        mut bytes: Range<usize>,
        fd: i32,
    ) -> Result<(), BackingError> {
        while !bytes.is_empty() {
            let at = span.at.as_ptr().wrapping_add(bytes.start);
            let offset = span.offset_bytes + bytes.start as u64;
            let offset = libc::off_t::try_from(offset).map_err(|_| error(Errno::FBIG))?;
            let len = bytes.len();
            let moved = match way {
                // SAFETY: the bytes are those of some transfers' pages, which may be written by anybody at any time.
                Way::Read => unsafe { libc::pread(fd, at.cast(), len, offset) },
                // SAFETY: and read.
                Way::Write => unsafe { libc::pwrite(fd, at.cast(), len, offset) },
            };
            match usize::try_from(moved) {
                Ok(0) if way == Way::Read => return Err(BackingError::Cut),
                Ok(0) => return Err(error(Errno::NOSPC)),
                Ok(moved) => bytes.start += moved,
                Err(_) => match last_errno() {
                    Errno::INTR => {}
                    errno => return Err(error(errno)),
                },
            }
        }
        Ok(())
    }
}

/// Bytes in memory, and their place in the file.
#[derive(Debug)]
struct Span {
    at: NonNull<u8>,
    offset_bytes: u64,
    len_bytes: usize,
}

impl Span {
    /// The bytes of transfers each of which follows the one before; there is at least one.
    fn of(transfers: &[Transfer<'_>]) -> Self {
        Self {
            at: transfers[0].pages.as_ptr(),
            offset_bytes: transfers[0].offset_bytes,
            len_bytes: transfers.iter().map(|transfer| transfer.len_bytes).sum(),
        }
    }

    /// Bytes from `start` on, as many as are left and go into a buffer, which is where they are in memory.
    fn part(&self, start: usize, buffer: &mut [u8]) -> Self {
        Self {
            len_bytes: (self.len_bytes - start).min(buffer.len()),
            offset_bytes: self.offset_bytes + start as u64,
            at: NonNull::from(buffer).cast(),
        }
    }

    const fn whole_pages(&self) -> usize {
        self.len_bytes.next_multiple_of(PAGE_SIZE)
    }

    /// Finds memory for all pages at once: while the kernel has them pinned for a transfer, it does so one by one.
    fn populate(&self) {
        if self.len_bytes > PAGE_SIZE {
            let at = self.at.as_ptr().cast();
            // If it fails, the transfer says why.
            // SAFETY: the pages are memory that anybody may write at any time, and it changes none of their bytes.
            let _ = unsafe { madvise(at, self.whole_pages(), Advice::LinuxPopulateWrite) };
        }
    }
}

/// Whether a transfer goes on where another ends, in the file and in memory.
fn is_followed_by(one: &Transfer<'_>, next: &Transfer<'_>) -> bool {
    let end = one.pages.as_ptr().as_ptr().wrapping_add(one.len_bytes);
    end == next.pages.as_ptr().as_ptr()
        && one.offset_bytes + one.len_bytes as u64 == next.offset_bytes
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Read,
    Write,
}

impl Backing for FileBacking {
    fn read(&self, transfers: &mut [Transfer<'_>]) {
        self.transfer(transfers, Way::Read);
    }

    fn write(&self, transfers: &mut [Transfer<'_>]) {
        self.transfer(transfers, Way::Write);
    }

    fn sync(&self) -> Result<(), BackingError> {
        fs::fdatasync(&self.file).map_err(error)
    }

    fn set_len(&self, bytes: u64) -> Result<(), BackingError> {
        fs::ftruncate(&self.file, bytes).map_err(error)
    }

    fn punch(&self, bytes: Range<u64>) -> Result<(), BackingError> {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fs::fallocate(&self.file, how, bytes.start, bytes.end - bytes.start) {
            Err(Errno::OPNOTSUPP) => self.write_zeros(bytes).map_err(error),
            punched => punched.map_err(error),
        }
    }
}

impl FileBacking {
    /// For file systems without holes.
    fn write_zeros(&self, mut bytes: Range<u64>) -> Result<(), Errno> {
        static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
        while !bytes.is_empty() {
            let len = usize::try_from(bytes.end - bytes.start).unwrap_or(usize::MAX);
            let zeros = &ZEROS[..len.min(ZEROS.len())];
            match rustix::io::pwrite(&self.file, zeros, bytes.start) {
                Ok(written) => bytes.start += written as u64,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }
}

/// Opens a file once more, so that nobody shares the flag with us.
fn reopen_direct(file: &File) -> Option<OwnedFd> {
    let flags = fs::fcntl_getfl(file).ok()? & OFlags::RWMODE;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    fs::open(
        path,
        flags | OFlags::DIRECT | OFlags::CLOEXEC,
        fs::Mode::empty(),
    )
    .ok()
}

const fn error(errno: Errno) -> BackingError {
    let number = errno.raw_os_error();
    match errno {
        Errno::NOSPC | Errno::DQUOT | Errno::FBIG => BackingError::NoSpace(number),
        _ => BackingError::Io(number),
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pgmap_core::addr::Page;
    use pgmap_mm::shared_mmu::Bounce;
    use std::os::unix::fs::FileExt;

    /// The pages of a file that a transfer begins at, and the places in memory of all of its pages.
    type Runs = [(u32, Range<usize>); 4];
    /// The second goes on where the first ends; the third does so in memory only, and the fourth in the file only.
    const RUNS: Runs = [(0, 0..2), (2, 2..4), (5, 4..6), (7, 8..9)];

    fn transfers<'a>(memory: &'a Bounce, runs: &Runs) -> [Transfer<'a>; 4] {
        let transfer = |(first, places): &(u32, Range<usize>)| {
            Transfer::new(*first, memory.pages(places.clone()), u64::MAX)
        };
        runs.each_ref().map(transfer)
    }

    /// Transfers that follow one another, or do not, bring each page to its place, and back.
    #[test]
    fn every_transfer_has_its_place() {
        let file = tempfile::tempfile().unwrap();
        // Each page of the file begins with another number.
        let numbers: Vec<_> = (1..10u8).flat_map(|nth| [nth; PAGE_SIZE]).collect();
        file.write_all_at(&numbers, 0).unwrap();
        let backing = FileBacking::new(file);
        let written = Bounce::new(9);
        let mut all = [Transfer::new(0, written.pages(0..9), u64::MAX)];
        backing.read(&mut all);
        backing.punch(0..9 * PAGE_SIZE as u64).unwrap();
        let mut out = transfers(&written, &RUNS);
        backing.write(&mut out);
        assert!(out.iter().all(|transfer| transfer.outcome.is_ok()));
        let read = Bounce::new(9);
        let mut back = transfers(&read, &RUNS);
        backing.read(&mut back);
        assert!(back.iter().all(|transfer| transfer.outcome.is_ok()));
        for (_, places) in RUNS {
            for place in places {
                let (mut one, mut other) = (Page::ZERO, Page::ZERO);
                written.pages(place..place + 1).copy_page(0, &mut one);
                read.pages(place..place + 1).copy_page(0, &mut other);
                assert!(one.0 == other.0 && one.0[0] != 0, "page {place}");
            }
        }
    }

    /// A request that fails says so for each of its transfers.
    #[test]
    fn a_failure_is_told_of_every_transfer() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read_only = File::open(file.path()).unwrap();
        let memory = Bounce::new(9);
        let mut out = transfers(&memory, &RUNS);
        FileBacking::new(read_only).write(&mut out);
        assert!(out.iter().all(|transfer| transfer.outcome.is_err()));
    }
}
