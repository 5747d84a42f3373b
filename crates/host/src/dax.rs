//! A shared mapping of a device's memory at an aligned address, so that the machine can map it in pages as large as the device's.
//!
//! What must never happen here: a reference to the bytes, which others write and which may be taken away.

use core::ops::Range;
use core::ptr::{self, NonNull};
use std::os::fd::AsFd;

use pgmap_core::addr::VirtAddr;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::area::ForkMark;
use crate::file_memory::Prot;

/// A mapping of a part of a device's memory, which children do not have.
///
/// # Invariants
///
/// `start` is the first of `len` bytes that are mapped shared, and ours until `drop`, except in children. No reference to them is
/// ever made.
#[derive(Debug)]
pub struct DaxMapping {
    start: NonNull<u8>,
    len: usize,
    made_here: ForkMark,
    prot: Prot,
}

// SAFETY: the mapping is a range of addresses; its bytes are only copied.
unsafe impl Send for DaxMapping {}
// SAFETY: as above.
unsafe impl Sync for DaxMapping {}

impl DaxMapping {
    /// Maps `len` bytes of a file from `offset` on, at a multiple of `align` bytes.
    ///
    /// # Errors
    ///
    /// What the machine answers; [`Errno::INVAL`] if there is no such range of addresses.
    pub fn new(
        file: impl AsFd,
        offset: u64,
        len: usize,
        align: usize,
        prot: Prot,
    ) -> Result<Self, Errno> {
        let made_here = ForkMark::new()?;
        let room = len.checked_add(align).ok_or(Errno::INVAL)?;
        let none = ProtFlags::empty();
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
        let first = unsafe { mmap_anonymous(ptr::null_mut(), room, none, flags)? };
        let skipped = first.addr().next_multiple_of(align) - first.addr();
        // SAFETY: what is skipped is less than `align`, and so inside of the room.
        let start = unsafe { first.byte_add(skipped) };
        // SAFETY: it takes the place of a part of the room, which is ours, and nobody uses it.
        let mapped = unsafe { map_over(start.cast(), len, prot, file, offset) };
        let end = skipped + len;
        // What is left of the room on both sides; if nothing was mapped, all of it.
        let (before, behind) = if mapped.is_ok() {
            (skipped, end..room)
        } else {
            (0, 0..room)
        };
        for part in [0..before, behind]
            .into_iter()
            .filter(|part| !part.is_empty())
        {
            // SAFETY: the part is inside of the room.
            let at = unsafe { first.byte_add(part.start) };
            // SAFETY: nobody uses this part of the room, and it is ours. A failure leaves it taken.
            let _ = unsafe { munmap(at, part.len()) };
        }
        mapped?;
        let start = NonNull::new(start.cast()).ok_or(Errno::INVAL)?;
        // INVARIANT: just mapped.
        let mapping = Self {
            start,
            len,
            made_here,
            prot,
        };
        mapping.withhold_from_children(0, len)?;
        Ok(mapping)
    }

    /// Takes bytes away: who touches them gets SIGBUS, and system calls an error. The range is one of whole units in which the
    /// file can be mapped.
    ///
    /// # Errors
    ///
    /// What the machine answers: that there is no memory, or that we have too many mappings. Nothing is taken away then.
    ///
    /// # Panics
    ///
    /// If the mapping is not so long.
    pub fn poison(&self, range: Range<usize>) -> Result<(), Errno> {
        // A file without a single byte: every access is one beyond its end.
        let nothing = memfd_create("pgmap-poison", MemfdFlags::CLOEXEC)?;
        self.replace(&range, nothing, 0)?;
        // A child that has the mapping all the same gets a SIGBUS instead of a SIGSEGV.
        let _ = self.withhold_from_children(range.start, range.len());
        Ok(())
    }

    /// Gives back what was [taken away](Self::poison): bytes of the file from `offset` on.
    ///
    /// # Errors
    ///
    /// What the machine answers: the bytes stay away then.
    ///
    /// # Panics
    ///
    /// If the mapping is not so long.
    pub fn heal(&self, range: Range<usize>, file: impl AsFd, offset: u64) -> Result<(), Errno> {
        self.replace(&range, file, offset)?;
        let withheld = self.withhold_from_children(range.start, range.len());
        withheld.or_else(|errno| self.poison(range).and(Err(errno)))
    }

    /// Puts bytes of a file in the place of what is mapped now. The kernel does that in one step, for all who touch them.
    fn replace(&self, range: &Range<usize>, file: impl AsFd, offset: u64) -> Result<(), Errno> {
        let (at, len) = (self.place(range.start, range.len()), range.len());
        // SAFETY: by the type invariant these bytes are ours until `drop`, and nobody has a reference to them.
        unsafe { map_over(at.as_ptr(), len, self.prot, file, offset) }
    }

    fn withhold_from_children(&self, offset: usize, len: usize) -> Result<(), Errno> {
        let at = self.place(offset, len).as_ptr().cast();
        // SAFETY: the advice changes no contents, and the mapping is ours.
        unsafe { madvise(at, len, Advice::LinuxDontFork) }
    }

    /// The first address.
    #[must_use]
    pub fn start(&self) -> VirtAddr {
        VirtAddr::new(self.start.as_ptr() as usize)
    }

    /// Mapped bytes.
    #[must_use]
    pub const fn len_bytes(&self) -> usize {
        self.len
    }

    /// Copies bytes out of the mapping; SIGBUS if they have been taken away.
    ///
    /// # Panics
    ///
    /// If the mapping is not so long.
    pub fn read(&self, offset: usize, to: &mut [u8]) {
        let from = self.place(offset, to.len());
        // SAFETY: by the type invariant the bytes are mapped; they are memory that others may write, like that of another
        // process, and only copied.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to.as_mut_ptr(), to.len()) };
    }

    /// Copies bytes into the mapping, which may be written; SIGBUS if they have been taken away.
    ///
    /// # Panics
    ///
    /// If the mapping is not so long.
    pub fn write(&self, offset: usize, from: &[u8]) {
        let to = self.place(offset, from.len());
        // SAFETY: as in `read`; a mapping that may not be written answers with a signal.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), from.len()) };
    }

    fn place(&self, offset: usize, len: usize) -> NonNull<u8> {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.len),
            "bytes {offset} and {len} more"
        );
        // SAFETY: just checked that it is inside of the mapping.
        unsafe { self.start.add(offset) }
    }
}

/// Maps bytes of a file in the place of whatever is mapped there.
///
/// # Safety
///
/// The `len` bytes at `at` are a mapping of the caller's, and nobody has a reference to them.
unsafe fn map_over(
    at: *mut u8,
    len: usize,
    prot: Prot,
    file: impl AsFd,
    offset: u64,
) -> Result<(), Errno> {
    let protection = match prot {
        Prot::Read => ProtFlags::READ,
        Prot::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
    };
    let flags = MapFlags::SHARED | MapFlags::FIXED;
    // SAFETY: by this function's contract nobody else's memory is replaced.
    unsafe { mmap(at.cast(), len, protection, flags, file, offset)? };
    Ok(())
}

impl Drop for DaxMapping {
    fn drop(&mut self) {
        if self.made_here.is_forked() {
            // The addresses are somebody else's by now.
            return;
        }
        // SAFETY: by the type invariant the mapping is ours, and nobody has a reference to its bytes. A failure leaves the
        // addresses taken.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}
