//! A range of anonymous memory: the arena, the staging area, a page of zeros.
//!
//! The host's page tables are made of these. What must never happen here: a call of the C library's `mmap`.

use core::ptr::{self, NonNull};

use pgmap_core::addr::PAGE_SIZE;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// Areas start at multiples of this, so that a block of pages never straddles two tables of the machine.
const ALIGN: usize = 2 << 20;

/// Whether the children of forks have the memory too.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum OnFork {
    /// They share it, copy-on-write.
    Inherit,
    /// They do not have it: an access there is a SIGSEGV, and pages stay the parent's alone.
    Leave,
    /// They have zeros there.
    Wipe,
}

/// Anonymous private memory.
///
/// # Invariants
///
/// `start..start + len` is mapped, and nobody else's; except in children that were to leave it.
#[derive(Debug)]
pub(crate) struct Area {
    start: NonNull<u8>,
    len: usize,
    /// If children do not have the memory: how they know that they are children.
    left: Option<Box<ForkMark>>,
}

// SAFETY: an area is a range of addresses; what is done to the memory behind them is up to who uses it.
unsafe impl Send for Area {}
// SAFETY: as above.
unsafe impl Sync for Area {}

impl Area {
    /// Reserves `len` bytes, made up to whole pages. They cost RAM only where they are touched, a page at a time.
    ///
    /// # Errors
    ///
    /// What the machine answers if it has not that many addresses.
    pub(crate) fn reserve(len: usize, protection: ProtFlags, fork: OnFork) -> Result<Self, Errno> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let len = len
            .checked_next_multiple_of(PAGE_SIZE)
            .ok_or(Errno::NOMEM)?;
        let wide = len.checked_add(ALIGN).ok_or(Errno::NOMEM)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
        let mapped = unsafe { mmap_anonymous(ptr::null_mut(), wide, protection, flags) }?;
        let mapped = mapped.cast::<u8>();
        let head = mapped.align_offset(ALIGN);
        let tail = mapped.wrapping_add(head + len);
        // SAFETY: the bytes before the area are of the mapping just made, which nobody uses yet.
        unsafe { unmap(mapped, head) };
        // SAFETY: the same is true of those after it.
        unsafe { unmap(tail, ALIGN - head) };
        let start = NonNull::new(mapped.wrapping_add(head)).ok_or(Errno::NOMEM)?;
        // INVARIANT: these bytes of the fresh mapping are still there.
        let left = match fork {
            OnFork::Leave => Some(Box::new(ForkMark::new()?)),
            OnFork::Inherit | OnFork::Wipe => None,
        };
        let area = Self { start, len, left };
        // Kernels without huge pages refuse, and need nothing.
        let _ = area.advise(Advice::LinuxNoHugepage);
        match fork {
            OnFork::Inherit => {}
            OnFork::Leave => area.advise(Advice::LinuxDontFork)?,
            OnFork::Wipe => area.advise(Advice::LinuxWipeOnFork)?,
        }
        Ok(area)
    }

    /// Asks for huge pages. Machines without refuse, and small ones will do.
    pub(crate) fn prefer_huge_pages(&self) {
        let _ = self.advise(Advice::LinuxHugepage);
    }

    fn advise(&self, advice: Advice) -> Result<(), Errno> {
        // SAFETY: the advice given here changes no contents, and by the type invariant the memory is ours.
        unsafe { madvise(self.start.as_ptr().cast(), self.len, advice) }
    }

    pub(crate) fn address(&self) -> usize {
        self.start.as_ptr() as usize
    }

    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.start.as_ptr()
    }

    pub(crate) fn as_mut_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// In bytes.
    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    /// Drops the pages from `offset` on, whatever they hold.
    ///
    /// # Safety
    ///
    /// The range is in the area, no reference to its bytes lives, and its owner wants them gone.
    pub(crate) unsafe fn drop_pages(&self, offset: usize, count: usize) {
        let start = self.start.as_ptr().wrapping_add(offset).cast();
        loop {
            // SAFETY: by this function's contract the bytes are ours and may go.
            match unsafe { madvise(start, count * PAGE_SIZE, Advice::LinuxDontNeed) } {
                Err(Errno::AGAIN | Errno::INTR) => std::thread::yield_now(),
                // It fails for locked memory only, whose pages stay: mm sees them as what they are.
                Ok(()) | Err(_) => return,
            }
        }
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        if self.left.as_ref().is_some_and(|mark| mark.is_forked()) {
            // The addresses are somebody else's by now.
            return;
        }
        // SAFETY: by the type invariant the area is ours, and its owner is going away.
        unsafe { unmap(self.start.as_ptr(), self.len) };
    }
}

/// # Safety
///
/// The bytes are mapped, the caller's, and used by nobody any more.
unsafe fn unmap(start: *mut u8, len: usize) {
    if len > 0 {
        // SAFETY: by this function's contract. It fails only if the process has too many mappings, and then the
        // addresses stay taken.
        let _ = unsafe { munmap(start.cast(), len) };
    }
}

/// Tells a fork's child from the process that made the mark, without a system call.
#[derive(Debug)]
pub(crate) struct ForkMark {
    page: Area,
}

impl ForkMark {
    /// # Errors
    ///
    /// What the machine answers if it has no page, or cannot clear one on fork.
    pub(crate) fn new() -> Result<Self, Errno> {
        let page = Area::reserve(PAGE_SIZE, ProtFlags::READ | ProtFlags::WRITE, OnFork::Wipe)?;
        // SAFETY: the page is writable, and nobody else knows it yet.
        unsafe { page.start.write_volatile(1) };
        Ok(Self { page })
    }

    pub(crate) fn is_forked(&self) -> bool {
        // SAFETY: the page is readable, and written by nobody but the kernel, in a child that does not run yet.
        unsafe { self.page.start.read_volatile() == 0 }
    }
}
