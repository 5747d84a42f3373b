//! What a program has mapped privately of a file: its pages are read from a mapping of our own.
//!
//! From a mapping, and not with a descriptor: closing one would end the locks that the program has on the file (fcntl(2)). The
//! kernel copies, so that pages that the file does not have are an answer and no SIGBUS. What must never happen here: a
//! mapping that may be written.

use core::ptr::{self, NonNull};
use std::os::fd::BorrowedFd;

use pgmap_core::addr::{PAGE_SIZE, Page};
use pgmap_mm::private_file::FilePages;
use rustix::fs::{FileType, fstat, fstatfs};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use crate::shared::mapped;

/// `HUGETLBFS_MAGIC` of `linux/magic.h`: its pages are larger, and in RAM for ever.
const HUGETLBFS: i64 = 0x9584_58f6;

/// A part of a file.
///
/// # Invariants
///
/// `start..start + len` is a mapping of the file that can only be read, and nobody else's.
#[derive(Debug)]
pub struct PrivateFile {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is as good on every thread.
unsafe impl Send for PrivateFile {}
// SAFETY: it is only read, by system calls.
unsafe impl Sync for PrivateFile {}

impl PrivateFile {
    /// `len` bytes from `offset` on of a file that is open for reading. The descriptor is not needed any more after this.
    ///
    /// # Errors
    ///
    /// What the machine answers; [`Errno::NODEV`] for what is not a file of usual pages.
    pub fn map(file: BorrowedFd<'_>, offset: u64, len: usize) -> Result<Self, Errno> {
        if FileType::from_raw_mode(fstat(file)?.st_mode) != FileType::RegularFile
            || fstatfs(file)?.f_type == HUGETLBFS
        {
            return Err(Errno::NODEV);
        }
        mapped::check()?;
        // A shared mapping of a file that is open for writing counts as one that may be written: the program could not seal it.
        let (any, flags) = (ptr::null_mut(), MapFlags::PRIVATE);
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe { mmap(any, len, ProtFlags::READ, flags, file, offset) }?;
        let start = NonNull::new(start.cast::<u8>()).ok_or(Errno::NOMEM)?;
        // A child has the pages themselves. If it were to have this too, that would be a waste only.
        // SAFETY: the advice changes no contents.
        let _ = unsafe { madvise(start.as_ptr().cast(), len, Advice::LinuxDontFork) };
        // INVARIANT: it was just made.
        Ok(Self { start, len })
    }
}

impl FilePages for PrivateFile {
    fn read(&self, first: u32, pages: &mut [Page]) -> usize {
        let offset = first as usize * PAGE_SIZE;
        let there = self.len.saturating_sub(offset).div_ceil(PAGE_SIZE);
        let count = pages.len().min(there);
        let mut read = 0;
        while read < count {
            let wanted = &mut pages[read..count];
            let Some(from) =
                NonNull::new(self.start.as_ptr().wrapping_add(offset + read * PAGE_SIZE))
            else {
                break;
            };
            // SAFETY: by the type invariant these addresses are the mapping's, of which nobody has a reference.
            match unsafe { mapped::load_pages(from, wanted) } {
                Ok(0) | Err(_) => break,
                Ok(more) => read += more,
            }
        }
        read
    }
}

impl Drop for PrivateFile {
    fn drop(&mut self) {
        // SAFETY: by the type invariant the mapping is ours, and nobody reads it any more.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use rustix::fs::{MemfdFlags, SealFlags};

    /// Pages are those of the file as it is now; where it has none, that is said.
    #[test]
    fn a_file_is_read_as_far_as_it_goes() {
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (1..=5).flat_map(|nth| [nth; PAGE_SIZE]).collect();
        file.write_all_at(&bytes[..4 * PAGE_SIZE + 7], 0).unwrap();
        let offset = PAGE_SIZE as u64;
        let mapped = PrivateFile::map(file.as_fd(), offset, 7 * PAGE_SIZE).unwrap();
        let mut pages = vec![Page::ZERO; 8];
        assert_eq!(mapped.read(0, &mut pages), 4);
        let firsts: Vec<_> = pages.iter().map(|page| page.0[0]).collect();
        assert_eq!(firsts, [2, 3, 4, 5, 0, 0, 0, 0]);
        assert_eq!(pages[3].0[6..8], [5, 0]);
        assert_eq!(mapped.read(4, &mut pages[..1]), 0);
        file.write_all_at(&[9], 8 * offset).unwrap();
        assert_eq!(mapped.read(6, &mut pages), 1);
        assert_eq!(mapped.read(7, &mut pages), 0);
        file.set_len(0).unwrap();
        assert_eq!(mapped.read(0, &mut pages), 0);
    }

    /// A program may forbid writing to a file that we have mapped.
    #[test]
    fn a_mapped_file_can_be_sealed() {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("private", flags).unwrap();
        rustix::io::write(&file, &[3; PAGE_SIZE]).unwrap();
        let mapped = PrivateFile::map(file.as_fd(), 0, PAGE_SIZE).unwrap();
        rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
        let mut pages = [Page::ZERO];
        assert_eq!(mapped.read(0, &mut pages), 1);
        assert_eq!(pages[0].0[0], 3);
    }

    /// What is not a file of usual pages is left to the kernel.
    #[test]
    fn only_files_are_mapped() {
        let zeros = std::fs::File::open("/dev/zero").unwrap();
        let refused = PrivateFile::map(zeros.as_fd(), 0, PAGE_SIZE);
        assert_eq!(refused.unwrap_err(), Errno::NODEV);
    }
}
