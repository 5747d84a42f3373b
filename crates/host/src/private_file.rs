//! What a program has mapped privately of a file: its pages are read from a mapping of our own.
//!
//! From a mapping, and not with a descriptor: closing one would end the locks that the program has on the file (fcntl(2)). The
//! kernel copies, so that pages that the file does not have are an answer and no SIGBUS. What must never happen here: a
//! mapping that may be written.

use core::ptr::{self, NonNull};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use pgmap_core::addr::{PAGE_SIZE, Page};
use pgmap_mm::private_file::{FilePages, NotNow};
use rustix::fs::{FileType, fstat, fstatfs};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use crate::area::ForkMark;
use crate::mmu::HostMmu;
use crate::shared::mapped;

/// `HUGETLBFS_MAGIC` of `linux/magic.h`: its pages are larger, and in RAM for ever.
const HUGETLBFS: i64 = 0x9584_58f6;

/// A part of a file.
///
/// # Invariants
///
/// `start..start + len` is a mapping of the file that can only be read, and nobody else's; except in children of the process that
/// `made_here` marks.
#[derive(Debug)]
pub struct PrivateFile {
    start: NonNull<u8>,
    len: usize,
    made_here: Arc<ForkMark>,
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
    pub fn map(
        mmu: &HostMmu,
        file: BorrowedFd<'_>,
        offset: u64,
        len: usize,
    ) -> Result<Self, Errno> {
        // Programs map thousands of files: a mark for each would be too dear.
        Self::map_marked(Arc::clone(&mmu.made_here), file, offset, len)
    }

    fn map_marked(
        made_here: Arc<ForkMark>,
        file: BorrowedFd<'_>,
        offset: u64,
        len: usize,
    ) -> Result<Self, Errno> {
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
        // A child has the pages themselves. If it were to keep this too, that would be a waste only.
        // SAFETY: the advice changes no contents.
        let _ = unsafe { madvise(start.as_ptr().cast(), len, Advice::LinuxDontFork) };
        // INVARIANT: it was just made.
        Ok(Self {
            start,
            len,
            made_here,
        })
    }
}

impl FilePages for PrivateFile {
    fn read(&self, first: u32, pages: &mut [Page]) -> Result<usize, NotNow> {
        if self.made_here.is_forked() {
            // Whatever is there is not the file.
            return Err(NotNow);
        }
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
                Ok(0) | Err(Errno::FAULT) => break,
                Ok(more) => read += more,
                // The machine is short of memory, or does not let this thread copy.
                Err(_) if read == 0 => return Err(NotNow),
                Err(_) => break,
            }
        }
        Ok(read)
    }
}

impl Drop for PrivateFile {
    fn drop(&mut self) {
        if self.made_here.is_forked() {
            // The addresses are somebody else's by now.
            return;
        }
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
    use rustix::mm::mmap_anonymous;

    fn map(file: impl AsFd, offset: u64, pages: usize) -> Result<PrivateFile, Errno> {
        let made_here = Arc::new(ForkMark::new().unwrap());
        PrivateFile::map_marked(made_here, file.as_fd(), offset, pages * PAGE_SIZE)
    }

    /// Pages are those of the file as it is now; where it has none, that is said.
    #[test]
    fn a_file_is_read_as_far_as_it_goes() {
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (1..=5).flat_map(|nth| [nth; PAGE_SIZE]).collect();
        file.write_all_at(&bytes[..4 * PAGE_SIZE + 7], 0).unwrap();
        let offset = PAGE_SIZE as u64;
        let mapped = map(&file, offset, 7).unwrap();
        let mut pages = vec![Page::ZERO; 8];
        assert_eq!(mapped.read(0, &mut pages), Ok(4));
        let firsts: Vec<_> = pages.iter().map(|page| page.0[0]).collect();
        assert_eq!(firsts, [2, 3, 4, 5, 0, 0, 0, 0]);
        assert_eq!(pages[3].0[6..8], [5, 0]);
        assert_eq!(mapped.read(4, &mut pages[..1]), Ok(0));
        file.write_all_at(&[9], 8 * offset).unwrap();
        assert_eq!(mapped.read(6, &mut pages), Ok(1));
        assert_eq!(mapped.read(7, &mut pages), Ok(0));
        file.set_len(0).unwrap();
        assert_eq!(mapped.read(0, &mut pages), Ok(0));
    }

    /// A program may forbid writing to a file that we have mapped.
    #[test]
    fn a_mapped_file_can_be_sealed() {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("private", flags).unwrap();
        rustix::io::write(&file, &[3; PAGE_SIZE]).unwrap();
        let mapped = map(&file, 0, 1).unwrap();
        rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
        let mut pages = [Page::ZERO];
        assert_eq!(mapped.read(0, &mut pages), Ok(1));
        assert_eq!(pages[0].0[0], 3);
    }

    /// A fork's child does not have the mapping: it can map something else at its addresses, which it neither reads as the file's
    /// nor loses when it drops what it has inherited.
    #[test]
    fn a_child_that_drops_a_file_unmaps_nothing() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGE_SIZE as u64).unwrap();
        let mapped = map(&file, 0, 1).unwrap();
        let start = mapped.start.as_ptr().cast::<core::ffi::c_void>();
        // SAFETY: the child makes system calls and touches its own memory, and then exits.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
            let read_write = ProtFlags::READ | ProtFlags::WRITE;
            // SAFETY: nothing is there that could be replaced.
            let own = unsafe { mmap_anonymous(start, PAGE_SIZE, read_write, flags) };
            let mut pages = [Page::ZERO];
            let read = mapped.read(0, &mut pages);
            drop(mapped);
            let good = own.is_ok_and(|own| {
                // SAFETY: the child has just mapped it. If it is gone, the child dies.
                unsafe { own.cast::<u64>().write_volatile(9) };
                read == Err(NotNow)
            });
            // SAFETY: it runs nothing of this process any more.
            unsafe { libc::_exit(i32::from(!good)) };
        }
        assert_eq!(status_of(child), 0);
    }

    /// A program's first thread may end before the others: its files have not ended then.
    #[test]
    fn a_file_is_read_after_the_first_thread_has_ended() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGE_SIZE as u64).unwrap();
        // SAFETY: the child runs what is here, and then exits.
        let child = unsafe { libc::fork() };
        if child == 0 {
            std::thread::spawn(move || {
                let mapped = map(&file, 0, 1);
                let gone = wait_for_the_first_thread();
                let read = mapped.map(|mapped| mapped.read(0, &mut [Page::ZERO]));
                let good = gone.is_ok() && read == Ok(Ok(1));
                // SAFETY: it runs nothing of this process any more.
                unsafe { libc::_exit(i32::from(!good)) };
            });
            // SAFETY: it ends this thread alone, which has nothing that the other one uses.
            unsafe { libc::syscall(libc::SYS_exit, 0) };
        }
        assert_eq!(status_of(child), 0);
    }

    /// Waits until the thread that the process is named after has ended.
    fn wait_for_the_first_thread() -> std::io::Result<()> {
        while !std::fs::read_to_string("/proc/self/stat")?.contains(") Z ") {
            std::thread::yield_now();
        }
        Ok(())
    }

    /// What a thread may not ask is not the end of the file: another thread may.
    #[test]
    fn a_refused_read_is_not_the_end_of_the_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGE_SIZE as u64).unwrap();
        let mapped = map(&file, 0, 1).unwrap();
        let read = || mapped.read(0, &mut [Page::ZERO]);
        std::thread::scope(|scope| {
            let confined = scope.spawn(|| {
                forbid(libc::SYS_process_vm_writev);
                read()
            });
            assert_eq!(confined.join().unwrap(), Err(NotNow));
        });
        assert_eq!(read(), Ok(1));
    }

    /// From now on a system call of this thread fails with EPERM.
    fn forbid(call: libc::c_long) {
        let step = |code: u32, jt, jf, k| libc::sock_filter {
            code: u16::try_from(code).unwrap(),
            jt,
            jf,
            k,
        };
        let mut steps = [
            // The call's number is what its description begins with.
            step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
            step(
                libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
                0,
                1,
                u32::try_from(call).unwrap(),
            ),
            step(
                libc::BPF_RET | libc::BPF_K,
                0,
                0,
                libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned(),
            ),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let filter = libc::sock_fprog {
            len: u16::try_from(steps.len()).unwrap(),
            filter: steps.as_mut_ptr(),
        };
        rustix::thread::set_no_new_privs(true).unwrap();
        // SAFETY: the filter and its steps live during the call, and it allows all that this thread still does.
        let done = unsafe {
            libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const filter,
            )
        };
        assert_eq!(done, 0);
    }

    /// How a child has ended.
    fn status_of(child: libc::pid_t) -> i32 {
        let mut status = -1;
        // SAFETY: the status lives during the call.
        let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!(waited, child);
        status
    }

    /// What is not a file of usual pages is left to the kernel.
    #[test]
    fn only_files_are_mapped() {
        let zeros = std::fs::File::open("/dev/zero").unwrap();
        let refused = map(&zeros, 0, 1);
        assert_eq!(refused.unwrap_err(), Errno::NODEV);
    }
}
