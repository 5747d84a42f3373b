//! Pages of the program that may not be written, on their way out of the arena.
//!
//! `UFFDIO_MOVE` takes pages from writable memory only, and it is the only call that refuses pages that somebody has
//! pinned. To make the memory writable where it is, for a moment, would be seen: a store would succeed that has to get its SIGSEGV, a
//! load of a forbidden page too, code would not run, and a child forked in that moment would keep what was
//! allowed. So the pages themselves go, page tables and all, to addresses that nobody knows (`mremap` with
//! `MREMAP_DONTUNMAP`), are made writable there, and are moved to staging from there. The arena keeps its protection all
//! the time, and is missing pages meanwhile: whoever may touch them waits for the fault thread, and who may not gets
//! his SIGSEGV.
//!
//! What was refused on the way to staging goes back by the same call, so that a pinned page is never another one
//! than before. Called by the host's page tables alone.

use pgmap_core::addr::PAGE_SIZE;
use rustix::io::Errno;
use rustix::mm::{Advice, MprotectFlags, MremapFlags, madvise, mprotect, mremap_fixed, munmap};

use crate::protection::READ_WRITE;

/// Pages of the arena at another address.
///
/// # Invariants
///
/// `start..start + len` is mapped, may be read (and written, if `is_open`), is known to nobody else, and nobody is told of its
/// faults. The page at its beginning came from `home`, where memory has this `protection`.
#[derive(Debug)]
pub(crate) struct Transit {
    start: *mut u8,
    len: usize,
    home: usize,
    protection: MprotectFlags,
    is_open: bool,
}

impl Transit {
    /// Takes the pages of `len` bytes at `home`, where memory has this protection, away from there.
    ///
    /// # Errors
    ///
    /// They lie in more than one of the machine's mappings, are locked, or there are too many mappings: everything is as it was.
    ///
    /// # Safety
    ///
    /// The bytes are in the arena, and the caller puts back what it does not move on.
    ///
    /// # Panics
    ///
    /// If the machine does not let memory be read that nobody else uses.
    pub(crate) unsafe fn take(
        home: usize,
        len: usize,
        protection: MprotectFlags,
    ) -> Result<Self, Errno> {
        let old = home as *mut _;
        // Taking a part of a locked mapping away would unlock all of it. This advice is refused there, and does nothing
        // elsewhere but to call the page cold, which it is.
        // SAFETY: the advice changes no contents.
        unsafe { madvise(old, PAGE_SIZE, Advice::LinuxCold) }?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
        // (rustix passes four arguments, and with this flag the kernel reads the fifth: its wish is an address of zero.)
        // SAFETY: by this function's contract the pages may go; the kernel chooses free addresses for them.
        let new = unsafe { libc::syscall(libc::SYS_mremap, old, len, len, flags, 0usize) };
        let start = usize::try_from(new).map_err(|_| last_error())? as *mut u8;
        // INVARIANT: the kernel has just mapped them there, told nobody, and without userfaultfd's interest in them.
        let mut transit = Self {
            start,
            len,
            home,
            protection,
            is_open: true,
        };
        if transit.allow(0, READ_WRITE).is_err() {
            // The program has set itself a limit of writable memory (RLIMIT_DATA).
            transit.is_open = false;
            let allowed = transit.allow(0, MprotectFlags::READ);
            assert!(
                allowed.is_ok(),
                "pages on their way out may not be read: {allowed:?}"
            );
        }
        Ok(transit)
    }

    /// Whether the pages can be moved on: they may be written here.
    pub(crate) const fn is_open(&self) -> bool {
        self.is_open
    }

    /// In bytes.
    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    /// The address of the byte with this number.
    pub(crate) const fn address(&self, offset: usize) -> *const u8 {
        self.start.wrapping_add(offset)
    }

    /// Ends the sharing of the pages from `offset` on with children of forks.
    pub(crate) fn unshare(&self, offset: usize) {
        let start = self.start.wrapping_add(offset).cast();
        // It fails if the machine is out of memory, and then the pages stay shared.
        // SAFETY: touching our own pages for writing changes none of their bytes.
        let _ = unsafe { madvise(start, self.len - offset, Advice::LinuxPopulateWrite) };
    }

    /// Where the byte with this number came from.
    pub(crate) const fn home(&self, offset: usize) -> usize {
        self.home + offset
    }

    /// Returns the pages from `offset` on to where they came from. The machine tells nobody of faults there any more.
    ///
    /// # Errors
    ///
    /// There are too many mappings, and the pages are gone.
    ///
    /// # Safety
    ///
    /// No page has come there since.
    pub(crate) unsafe fn put_back(mut self, offset: usize) -> Result<(), Errno> {
        let (start, len) = (self.start.wrapping_add(offset), self.len - offset);
        // It is allowed here before it is there, so that a child forked in between has it, too.
        self.allow(offset, self.protection)?;
        let (old, new) = (start.cast(), self.home(offset) as *mut _);
        // SAFETY: by the type invariant the pages are ours, and by this function's contract there are none at `new`.
        unsafe { mremap_fixed(old, len, len, MremapFlags::MAYMOVE, new) }?;
        // INVARIANT: the pages from `offset` on are not ours any more.
        self.len = offset;
        Ok(())
    }

    fn allow(&self, offset: usize, protection: MprotectFlags) -> Result<(), Errno> {
        let start = self.start.wrapping_add(offset).cast();
        // SAFETY: by the type invariant nobody else uses these bytes.
        unsafe { mprotect(start, self.len - offset, protection) }
    }
}

impl Drop for Transit {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: by the type invariant the bytes are ours. It fails only if the process has too many mappings, and
            // then the addresses stay taken.
            let _ = unsafe { munmap(self.start.cast(), self.len) };
        }
    }
}

pub(crate) fn last_error() -> Errno {
    let error = std::io::Error::last_os_error();
    Errno::from_io_error(&error).unwrap_or(Errno::INVAL)
}
