//! The floor of a pager: userfaultfd alone, with no page table, no device and no policy; and a bare mapping of a file.
//!
//! One thread touches, one answers with `UFFDIO_COPY`; or batches are copied and moved with nobody waiting.
//! Layouts and numbers are those of the kernel's user interface (`linux/userfaultfd.h`).

use core::ffi::c_void;
use core::ops::Range;
use core::ptr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::thread;

use anyhow::ensure;
use pgmap_core::addr::{PAGE_SIZE, Page};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::mm::{
    Advice, MapFlags, ProtFlags, UserfaultfdFlags, madvise, mmap, mmap_anonymous, munmap,
    userfaultfd,
};

const GROUP: u8 = 0xAA;
/// `api`, `features`, `ioctls`.
type Api = [u64; 3];
/// `start`, `len`, `mode`, `ioctls`.
type Register = [u64; 4];
/// `dst`, `src`, `len`, `mode`, and what was done.
type Transfer = [u64; 5];
/// The event, and three words; the address is the last but one.
type Message = [u64; 4];

const API: Opcode = opcode::read_write::<Api>(GROUP, 0x3F);
const REGISTER: Opcode = opcode::read_write::<Register>(GROUP, 0x00);
const COPY: Opcode = opcode::read_write::<Transfer>(GROUP, 0x03);
const MOVE: Opcode = opcode::read_write::<Transfer>(GROUP, 0x05);
const FEATURE_MOVE: u64 = 1 << 16;
const REGISTER_MISSING: u64 = 1;

/// Memory whose missing pages are answered by nobody but us.
///
/// # Invariants
///
/// `start` is the beginning of `pages` mapped pages, which are nobody else's.
#[derive(Debug)]
pub(crate) struct Bare {
    fd: OwnedFd,
    start: *mut c_void,
    pages: usize,
}

// SAFETY: it is a descriptor and a range of addresses, which no thread owns more than another.
unsafe impl Sync for Bare {}

impl Bare {
    /// Missing memory of `pages` pages.
    pub(crate) fn new(pages: usize) -> anyhow::Result<Self> {
        // SAFETY: the descriptor alone does nothing.
        let fd = unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) }?;
        let len = pages * PAGE_SIZE;
        let (protection, flags) = (
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        );
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), len, protection, flags) }?;
        // INVARIANT: just mapped.
        let bare = Self { fd, start, pages };
        // SAFETY: this advice changes no contents.
        unsafe { madvise(start, len, Advice::LinuxNoHugepage) }?;
        bare.call::<API, _>(&mut [0xAA, FEATURE_MOVE, 0])?;
        bare.call::<REGISTER, _>(&mut [start as u64, len as u64, REGISTER_MISSING, 0])?;
        Ok(bare)
    }

    fn call<const OPCODE: Opcode, T>(&self, argument: &mut T) -> Result<(), Errno> {
        // SAFETY: every caller pairs the opcode with the words that the kernel's header gives it.
        let call = unsafe { Updater::<OPCODE, T>::new(argument) };
        // SAFETY: the argument lives during the call, and the addresses in it are of our memory.
        unsafe { ioctl(&self.fd, call) }
    }

    /// The address of a page, in bytes.
    pub(crate) fn page(&self, number: usize) -> usize {
        assert!(number < self.pages, "page {number} of {}", self.pages);
        self.start as usize + number * PAGE_SIZE
    }

    /// Copies pages to missing ones from `to` on.
    pub(crate) fn copy(&self, to: usize, pages: &[Page]) -> Result<(), Errno> {
        let source = pages.as_ptr() as u64;
        let mut words = [to as u64, source, size_of_val(pages) as u64, 0, 0];
        self.call::<COPY, _>(&mut words)
    }

    /// Moves `count` pages from `from` on to missing ones of this memory.
    pub(crate) fn take(&self, to: usize, from: usize, count: usize) -> Result<(), Errno> {
        let mut words = [to as u64, from as u64, (count * PAGE_SIZE) as u64, 0, 0];
        self.call::<MOVE, _>(&mut words)
    }

    /// Makes all pages missing again.
    pub(crate) fn clear(&self) -> Result<(), Errno> {
        // SAFETY: by the type invariant the memory is ours, and we want none of it.
        unsafe { madvise(self.start, self.pages * PAGE_SIZE, Advice::LinuxDontNeed) }
    }

    /// Answers every fault with a copy of the page of `source` that has the same number, while `touch` runs.
    pub(crate) fn serve<T>(&self, source: &[Page], touch: impl FnOnce() -> T) -> anyhow::Result<T> {
        let (stop, stopped) = rustix::pipe::pipe()?;
        thread::scope(|scope| {
            let server = scope.spawn(move || self.answer(source, &stop));
            let result = touch();
            drop(stopped);
            ensure!(
                matches!(server.join(), Ok(Ok(()))),
                "a fault could not be answered"
            );
            Ok(result)
        })
    }

    fn answer(&self, source: &[Page], stop: &OwnedFd) -> Result<(), Errno> {
        while self.wait(stop)? {
            let mut message = [0; size_of::<Message>()];
            match rustix::io::read(&self.fd, &mut message) {
                Ok(_) => {
                    let at = u64::from_ne_bytes(message[16..24].try_into().unwrap_or_default());
                    let at = usize::try_from(at).unwrap_or(0) & !(PAGE_SIZE - 1);
                    let number = (at - self.start as usize) / PAGE_SIZE;
                    self.copy(at, &source[number..=number])?;
                }
                Err(Errno::AGAIN) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Waits for a fault. False if there will be no more.
    fn wait(&self, stop: &OwnedFd) -> Result<bool, Errno> {
        let mut fds = [
            PollFd::new(&self.fd, PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
        ];
        poll(&mut fds, None::<&Timespec>)?;
        Ok(fds[1].revents().is_empty())
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        // SAFETY: by the type invariant the memory is ours, and its owner is going away.
        let _ = unsafe { munmap(self.start, self.pages * PAGE_SIZE) };
    }
}

/// Reads a byte of a page, which may fault.
///
/// # Safety
///
/// The address is mapped, and somebody answers for it if it is missing.
pub(crate) unsafe fn touch(at: usize) {
    // SAFETY: by this function's contract.
    core::hint::black_box(unsafe { (at as *const u8).read_volatile() });
}

/// Reads every word of a range.
///
/// # Safety
///
/// The addresses are mapped, and their bytes are nobody's `&mut`; they are whole words.
pub(crate) unsafe fn sum(range: Range<usize>) -> u64 {
    let words = range.start as *const u64;
    let word = |nth| {
        // SAFETY: by this function's contract it is inside of the mapping.
        let word = unsafe { words.add(nth) };
        // SAFETY: mapped, readable and aligned, by this function's contract.
        unsafe { word.read() }
    };
    (0..range.len() / 8).map(word).fold(0, u64::wrapping_add)
}

/// A part of a file, mapped.
///
/// # Invariants
///
/// `start` is a mapping of `len` bytes, which is ours until `drop`, and whole words.
pub(crate) struct Mapped {
    start: *mut c_void,
    len: usize,
}

impl Mapped {
    pub(crate) fn new(file: BorrowedFd<'_>, offset: u64, bytes: u64) -> anyhow::Result<Self> {
        Self::with(file, offset, bytes, ProtFlags::READ)
    }

    /// A mapping that may be written, too.
    pub(crate) fn to_write(file: BorrowedFd<'_>, bytes: u64) -> anyhow::Result<Self> {
        Self::with(file, 0, bytes, ProtFlags::READ | ProtFlags::WRITE)
    }

    fn with(
        file: BorrowedFd<'_>,
        offset: u64,
        bytes: u64,
        protection: ProtFlags,
    ) -> anyhow::Result<Self> {
        let len = usize::try_from(bytes)?;
        anyhow::ensure!(len.is_multiple_of(8), "{len} bytes are no whole words");
        let flags = MapFlags::SHARED;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe { mmap(ptr::null_mut(), len, protection, flags, file, offset) }?;
        // INVARIANT: just mapped.
        Ok(Self { start, len })
    }

    /// The first address.
    pub(crate) fn address(&self) -> usize {
        self.start as usize
    }

    /// Writes some of its bytes to a file.
    pub(crate) fn write_to(
        &self,
        file: BorrowedFd<'_>,
        bytes: Range<usize>,
        offset: u64,
    ) -> anyhow::Result<()> {
        anyhow::ensure!(bytes.end <= self.len, "{bytes:?} of {} bytes", self.len);
        let from = self.start.cast::<u8>().wrapping_add(bytes.start);
        let (fd, offset) = (file.as_raw_fd(), libc::off_t::try_from(offset)?);
        // SAFETY: by the type invariant and the check above the bytes are ours, and the kernel only reads them.
        let written = unsafe { libc::pwrite(fd, from.cast(), bytes.len(), offset) };
        let whole = usize::try_from(written).is_ok_and(|written| written == bytes.len());
        anyhow::ensure!(whole, "a write ended with {written}");
        Ok(())
    }

    /// Reads every word.
    pub(crate) fn sum(&self) -> u64 {
        let start = self.address();
        // SAFETY: by the type invariant it is our mapping, of whole words; nobody has a reference to it.
        unsafe { sum(start..start + self.len) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: ours by the type invariant, and nobody refers to it.
        let _ = unsafe { munmap(self.start, self.len) };
    }
}
