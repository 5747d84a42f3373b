//! The memory of a mapped file's cached pages: a memory file, whose mappings are under userfaultfd.
//!
//! Page `n` of the file is page `n` of the memory file, which has room only where it was touched. One mapping of all of it is
//! ours alone, and never faults to us: through it pages are read and written back. What must never happen here: a mapping that
//! a fork's child has too, as it would read zeros where the parent reads the file (FLT-3).

use core::ops::Range;
use core::ptr::{self, NonNull};
use std::os::fd::AsFd;
use std::sync::Arc;

use pgmap_core::addr::{PAGE_SIZE, VirtAddr};
use pgmap_mm::mmu::{Progress, Protect};
use pgmap_mm::shared_mmu::{SharedMmu, SharedPages};
use rustix::fs::{self, FallocateFlags, MemfdFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};
use rustix::process::{Resource, getrlimit};

use crate::buffers::Buffers;
use crate::fds::OurFd;
use crate::mmu::HostMmu;
use crate::uffd::Done;

/// The memory of one file's pages.
///
/// # Invariants
///
/// `start` is a mapping of the first `pages` pages of `fd`, which is ours until `drop`. No reference to its bytes is ever made.
#[derive(Debug)]
pub struct FileMemory {
    fd: OurFd,
    start: NonNull<u8>,
    pages: u32,
    /// Whether a page that is written by a system call gets a page of memory, and no huge one.
    writes_small_pages: bool,
    mmu: Arc<HostMmu>,
}

// SAFETY: the mapping is a range of addresses; what is done to the bytes behind them is what `SharedPages` allows.
unsafe impl Send for FileMemory {}
// SAFETY: as above.
unsafe impl Sync for FileMemory {}

/// What a mapping of a file allows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Prot {
    /// Loads.
    Read,
    /// Loads and stores.
    ReadWrite,
}

impl FileMemory {
    /// Room for the pages of a file that never has more than `pages`.
    ///
    /// # Errors
    ///
    /// What the machine answers.
    pub fn new(mmu: Arc<HostMmu>, pages: u32) -> Result<Self, Errno> {
        let fd = fs::memfd_create("pgmap-file", MemfdFlags::CLOEXEC)?;
        let bytes = pages as usize * PAGE_SIZE;
        if bytes as u64 > most_bytes() {
            return Err(Errno::FBIG);
        }
        fs::ftruncate(&fd, bytes as u64)?;
        let start = map_shared(&fd, 0..bytes, Prot::ReadWrite)?;
        // INVARIANT: just mapped.
        Ok(Self {
            fd: OurFd::new(fd),
            start,
            pages,
            writes_small_pages: writes_small_pages(),
            mmu,
        })
    }

    /// How many pages there is room for.
    #[must_use]
    pub const fn most_pages(&self) -> u32 {
        self.pages
    }

    /// The place of a page in the memory file, in bytes, if `pages` gave it out.
    pub(crate) fn place_of(&self, page: NonNull<u8>) -> Option<u64> {
        let offset = page.addr().get().checked_sub(self.start.addr().get())?;
        (offset < self.pages as usize * PAGE_SIZE).then_some(offset as u64)
    }

    /// Whether pages up to this place may be [filled](Self::fill).
    pub(crate) fn may_fill(&self, end: u64) -> bool {
        self.writes_small_pages && end <= most_bytes()
    }

    /// Writes bytes to their place in the memory file, below [`most_bytes`]; a page that has no memory yet gets some.
    ///
    /// # Errors
    ///
    /// What the machine answers if it has no memory for them.
    pub(crate) fn fill(&self, mut place: u64, mut bytes: &[u8]) -> Result<(), Errno> {
        while !bytes.is_empty() {
            match rustix::io::pwrite(&self.fd, bytes, place) {
                Ok(written) => {
                    bytes = &bytes[written..];
                    place += written as u64;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Reads bytes from their place in the memory file. Bytes that the machine has lost are an error here; a load would end the process.
    ///
    /// # Errors
    ///
    /// What the machine answers.
    pub(crate) fn copy_out(&self, mut place: u64, mut to: &mut [u8]) -> Result<(), Errno> {
        while !to.is_empty() {
            match rustix::io::pread(&self.fd, &mut *to, place) {
                Ok(0) => return Err(Errno::IO),
                Ok(read) => {
                    to = &mut to[read..];
                    place += read as u64;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Buffers for transfers of its pages.
    pub(crate) fn buffers(&self) -> &Buffers {
        &self.mmu.buffers
    }

    /// Maps pages of the file. The pager is to know of the mapping before anybody touches it.
    ///
    /// # Errors
    ///
    /// What the machine answers; `ESRCH` in a fork's child, whose faults nobody serves.
    ///
    /// # Panics
    ///
    /// If there is no room for these pages.
    pub fn map(&self, pages: &Range<u32>, prot: Prot) -> Result<VirtAddr, Errno> {
        assert!(pages.end <= self.pages, "{pages:?} of {} pages", self.pages);
        if self.is_inherited() {
            return Err(Errno::SRCH);
        }
        let bytes = pages.start as usize * PAGE_SIZE..pages.end as usize * PAGE_SIZE;
        let len = bytes.len();
        let start = map_shared(&self.fd, bytes, prot)?;
        let at = start.as_ptr() as usize;
        let registered = self.mmu.uffd.register_shared(at, len);
        if let Err(errno) = registered {
            // SAFETY: just mapped, and nobody knows of it.
            let _ = unsafe { munmap(start.as_ptr().cast(), len) };
            return Err(errno);
        }
        Ok(VirtAddr::new(at))
    }

    /// Whether this is a fork's child, which has neither the mappings nor a say in the parent's memory.
    #[must_use]
    pub fn is_inherited(&self) -> bool {
        self.mmu.is_foreign()
    }

    /// Leaves a mapping to the kernel, as nobody serves its faults any more: who touches a page of it that is in RAM finds that
    /// page, and what is stored there is reported to nobody.
    pub fn leave(&self, at: VirtAddr, pages: u32) {
        if !self.is_inherited() {
            // It cannot fail for a range that is registered.
            let _ = self
                .mmu
                .uffd
                .unregister(at.get(), pages as usize * PAGE_SIZE);
        }
    }

    /// Ends a mapping that [`map`](Self::map) made. The pager is to have forgotten it before.
    ///
    /// # Safety
    ///
    /// The addresses are those of such a mapping, and nobody uses them any more.
    pub unsafe fn unmap(&self, at: VirtAddr, pages: u32) {
        if self.is_inherited() {
            // The addresses are somebody else's by now.
            return;
        }
        // SAFETY: by this function's contract. It fails only if the process has too many mappings, and then the addresses
        // stay taken.
        let _ = unsafe { munmap(at.get() as *mut _, pages as usize * PAGE_SIZE) };
    }
}

/// How long a memory file may be. Behind the limit that a process has set itself for its files (`RLIMIT_FSIZE`) it would be killed by
/// SIGXFSZ.
#[must_use]
pub fn most_bytes() -> u64 {
    getrlimit(Resource::Fsize).current.unwrap_or(u64::MAX)
}

/// Whether the machine gives memory files pages of their own where nobody has mapped them: what mappings are advised does not count there,
/// and a huge page would cost RAM that nobody counts.
fn writes_small_pages() -> bool {
    let huge = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    let gives_huge = |mode: String| {
        let modes = ["[always]", "[within_size]", "[force]"];
        modes.iter().any(|huge| mode.contains(huge))
    };
    !huge.is_ok_and(gives_huge)
}

/// A mapping of a part of a memory file, which children do not have.
fn map_shared(fd: impl AsFd, bytes: Range<usize>, prot: Prot) -> Result<NonNull<u8>, Errno> {
    let protection = match prot {
        Prot::Read => ProtFlags::READ,
        Prot::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
    };
    let (flags, offset) = (MapFlags::SHARED | MapFlags::NORESERVE, bytes.start as u64);
    // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
    let at = unsafe { mmap(ptr::null_mut(), bytes.len(), protection, flags, fd, offset)? };
    // SAFETY: the advice changes no contents, and the mapping is ours.
    let left = unsafe { madvise(at, bytes.len(), Advice::LinuxDontFork) };
    // Kernels without huge pages refuse, and need nothing.
    // SAFETY: as above.
    let _ = unsafe { madvise(at, bytes.len(), Advice::LinuxNoHugepage) };
    if let Err(errno) = left {
        // SAFETY: just mapped, and nobody knows of it.
        let _ = unsafe { munmap(at, bytes.len()) };
        return Err(errno);
    }
    NonNull::new(at.cast()).ok_or(Errno::NOMEM)
}

// SAFETY: all addresses at which a page is mapped are known to mm, except for those of our own mapping, which only `pages`
// hands out.
unsafe impl SharedMmu for FileMemory {
    fn pages(&self, first: u32, count: usize) -> SharedPages<'_> {
        let end = first as usize + count;
        assert!(end <= self.pages as usize, "page {end} of {}", self.pages);
        // SAFETY: by the type invariant and the check above the first page is in the mapping, or at its end.
        let start = unsafe { self.start.add(first as usize * PAGE_SIZE) };
        // SAFETY: the pages are in the mapping, which lives as long as the borrow. The memory file is never shortened.
        unsafe { SharedPages::new(start, count) }
    }

    fn map(&self, at: VirtAddr, count: usize, protect: Protect) -> Progress {
        self.mmu.repeat(count * PAGE_SIZE, |offset, len| {
            self.mmu.uffd.map_shared(at.get() + offset, len, protect)
        })
    }

    fn protect(&self, at: VirtAddr, count: usize) -> Progress {
        self.mmu.repeat(count * PAGE_SIZE, |offset, len| {
            let protected = self.mmu.uffd.protect(at.get() + offset, len);
            Done {
                bytes: if protected.is_ok() { len } else { 0 },
                error: protected.err(),
            }
        })
    }

    fn unprotect(&self, at: VirtAddr, count: usize) {
        let len = count * PAGE_SIZE;
        // What cannot be done is done when the access faults again.
        let _ = self.mmu.repeat(len, |offset, len| {
            let ended = self.mmu.uffd.unprotect(at.get() + offset, len);
            Done {
                bytes: if ended.is_ok() { len } else { 0 },
                error: ended.err(),
            }
        });
    }

    fn unmap(&self, at: VirtAddr, count: usize) {
        if self.is_inherited() {
            return;
        }
        let (at, len) = (at.get() as *mut _, count * PAGE_SIZE);
        loop {
            // Locked pages, too: whoever finds a page unmapped takes its bytes for unchanging. They are mapped again when they
            // are touched.
            // SAFETY: the addresses are those of a mapping of the file, whose bytes stay in the memory file.
            match unsafe { madvise(at, len, Advice::LinuxDontneedLocked) } {
                Err(Errno::AGAIN | Errno::INTR) => std::thread::yield_now(),
                Ok(()) => return,
                Err(errno) => {
                    debug_assert!(false, "a mapping of ours: {errno}");
                    return;
                }
            }
        }
    }

    fn poison(&self, at: VirtAddr, count: usize) -> Progress {
        // The kernel remembers that a page was protected when it was unmapped, and poisons no address of which it remembers
        // something.
        self.unprotect(at, count);
        self.mmu.repeat(count * PAGE_SIZE, |offset, len| {
            self.mmu.uffd.poison(at.get() + offset, len)
        })
    }

    fn wake(&self, at: VirtAddr, count: usize) {
        // It cannot fail for a range that is registered.
        let _ = self.mmu.uffd.wake(at.get(), count * PAGE_SIZE);
    }

    fn free(&self, first: u32, count: usize) {
        if self.is_inherited() {
            // The memory file is the parent's, too.
            return;
        }
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let (offset, len) = (u64::from(first), count as u64);
        let page = PAGE_SIZE as u64;
        // It can fail for nothing but a signal, and then is to be repeated.
        while fs::fallocate(&self.fd, how, offset * page, len * page) == Err(Errno::INTR) {}
    }
}

impl Drop for FileMemory {
    fn drop(&mut self) {
        if self.is_inherited() {
            // The addresses are somebody else's by now.
            return;
        }
        // SAFETY: by the type invariant the mapping is ours, and nobody has a reference to its bytes.
        let unmapped =
            unsafe { munmap(self.start.as_ptr().cast(), self.pages as usize * PAGE_SIZE) };
        debug_assert_eq!(unmapped, Ok(()), "a mapping of ours");
    }
}
