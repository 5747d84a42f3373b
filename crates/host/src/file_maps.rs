//! The file mappings that the program made itself: which there are, what of them is in RAM, and how the kernel is asked to drop
//! some of it.
//!
//! Everything here is harmless whatever the program does meanwhile with the addresses: asking looks, and dropping
//! (`MADV_PAGEOUT`) loses no byte of any kind of memory. What must never happen here: advice that does (`MADV_DONTNEED`), for an
//! address may be another mapping by the time that it is given.

use core::ops::Range;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::mm::{Advice, madvise};

use crate::fds::OurFd;

/// Runs of pages that one call may find.
const RUNS: usize = 256;

/// `struct pm_scan_arg` of `linux/fs.h`.
#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const _: () = assert!(size_of::<ScanArg>() == 96 && size_of::<PageRegion>() == 24);

const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const SCAN: Opcode = opcode::read_write::<ScanArg>(b'f', 16);

/// The kernel's account of this process's pages.
#[derive(Debug)]
pub struct Pagemap {
    fd: OurFd,
    regions: Box<[PageRegion; RUNS]>,
}

impl Pagemap {
    /// # Errors
    ///
    /// What the machine answers if it shows none.
    pub fn open() -> io::Result<Self> {
        let fd = OurFd::new(File::open("/proc/self/pagemap")?.into());
        let regions = Box::new([PageRegion::default(); RUNS]);
        Ok(Self { fd, regions })
    }

    /// Calls `found` with the runs of addresses at which pages of a file are mapped, in order. Pages that a private mapping has
    /// changed are not a file's any more.
    ///
    /// # Errors
    ///
    /// What the machine answers, `ENOTTY` from kernels before 6.7.
    pub fn each_resident(
        &mut self,
        range: &Range<usize>,
        mut found: impl FnMut(Range<usize>),
    ) -> Result<(), Errno> {
        let (mut at, end) = (range.start as u64, range.end as u64);
        while at < end {
            let wanted = PAGE_IS_FILE | PAGE_IS_PRESENT;
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                flags: 0,
                start: at,
                end,
                walk_end: 0,
                vec: self.regions.as_mut_ptr() as u64,
                vec_len: RUNS as u64,
                max_pages: 0,
                category_inverted: 0,
                category_mask: wanted,
                category_anyof_mask: 0,
                return_mask: wanted,
            };
            let runs = self.scan(&mut arg)?.min(RUNS);
            for run in &self.regions[..runs] {
                let address = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
                found(address(run.start)..address(run.end));
            }
            if arg.walk_end <= at {
                break;
            }
            at = arg.walk_end;
        }
        Ok(())
    }

    fn scan(&self, arg: &mut ScanArg) -> Result<usize, Errno> {
        // SAFETY: the opcode goes with this argument, whose vector is `regions`, and as long as it says.
        let call = unsafe { Scan::new(arg) };
        // SAFETY: the call writes to the argument and the vector only, which live that long.
        unsafe { ioctl(self.fd.as_fd(), call) }
    }
}

/// The call answers a number, which [`Updater`] does not give.
struct Scan<'a>(Updater<'a, SCAN, ScanArg>);

impl<'a> Scan<'a> {
    /// # Safety
    ///
    /// As for [`Updater::new`].
    unsafe fn new(arg: &'a mut ScanArg) -> Self {
        // SAFETY: by this function's contract.
        Self(unsafe { Updater::new(arg) })
    }
}

// SAFETY: as `Updater`, whose pointer and opcode these are.
unsafe impl rustix::ioctl::Ioctl for Scan<'_> {
    type Output = usize;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.0.opcode()
    }

    fn as_ptr(&mut self) -> *mut rustix::ffi::c_void {
        self.0.as_ptr()
    }

    unsafe fn output_from_ptr(
        out: rustix::ioctl::IoctlOutput,
        _: *mut rustix::ffi::c_void,
    ) -> rustix::io::Result<usize> {
        usize::try_from(out).map_err(|_| Errno::IO)
    }
}

/// This process's mappings of regular files with at least `least` bytes, in order of their addresses.
///
/// # Errors
///
/// What the machine answers if it does not show them, `EMFILE` while the program has all descriptors that it may have.
pub fn file_maps(least: usize) -> io::Result<Vec<Range<usize>>> {
    let maps = fs::read("/proc/self/maps")?;
    // Only how a path begins is looked at, so it does not matter what becomes of names that are no text.
    let maps = String::from_utf8_lossy(&maps);
    let maps = maps.lines().filter_map(parse);
    Ok(maps.filter(|range| range.len() >= least).collect())
}

/// A line of `/proc/self/maps`, if it is a mapping of a file that somebody could have opened.
fn parse(line: &str) -> Option<Range<usize>> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let number = |word| usize::from_str_radix(word, 16).ok();
    let range = number(start)?..number(end)?;
    // Protection, offset, device, inode, and what is left is the path.
    let path = words.nth(4)?;
    let is_memory =
        path.starts_with("/memfd:") || path.starts_with("/dev/") || path.starts_with("/SYSV");
    (path.starts_with('/') && !is_memory).then_some(range)
}

/// Asks the kernel to drop the pages at these addresses from RAM. Those that somebody has pinned stay, and so do those of files
/// that this user may not write.
pub fn page_out(range: &Range<usize>) {
    if range.is_empty() {
        return;
    }
    // SAFETY: this advice loses no byte, whatever is there. It fails where nothing is.
    let _ = unsafe { madvise(range.start as *mut _, range.len(), Advice::LinuxPageOut) };
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::os::unix::ffi::OsStrExt;

    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

    /// The names of files are bytes, and one that is no text hides neither its own mapping nor the others.
    #[test]
    fn a_file_with_a_name_that_is_no_text_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory
            .path()
            .join(std::ffi::OsStr::from_bytes(b"caf\xe9 \xff"));
        let file = File::create_new(path).unwrap();
        let len: usize = 1 << 36;
        file.set_len(len as u64).unwrap();
        let (protection, flags) = (ProtFlags::empty(), MapFlags::SHARED);
        // SAFETY: the kernel chooses an address that nobody has.
        let at = unsafe { mmap(core::ptr::null_mut(), len, protection, flags, &file, 0) };
        let at = at.unwrap();
        let found = file_maps(len);
        // SAFETY: nobody else knows of the mapping.
        unsafe { munmap(at, len) }.unwrap();
        let start = at.addr();
        assert!(found.unwrap().contains(&(start..start + len)));
    }

    /// Mappings of files are told from all others.
    #[test]
    fn only_files_are_found() {
        let line = "7f00-9f00 r--s 00000000 fd:00 1234                     /var/lib/a file";
        assert_eq!(parse(line), Some(0x7f00..0x9f00));
        for line in [
            "7f00-9f00 rw-p 00000000 00:00 0 ",
            "7f00-9f00 rw-p 00000000 00:00 0                          [heap]",
            "7f00-9f00 rw-s 00000000 00:01 1027                       /memfd:pgmap-file (deleted)",
            "7f00-9f00 rw-s 00000000 00:01 1027                       /dev/zero (deleted)",
            "",
        ] {
            assert_eq!(parse(line), None, "{line}");
        }
    }
}
