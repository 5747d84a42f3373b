//! Our descriptors among the program's: out of its way, and known by their numbers, so that it cannot close them.
//!
//! A descriptor that comes with the message of a fork has a low number for an instant, before it is moved: a program that closes
//! numbers which it has not opened, on another thread, can hit it then.
//!
//! What must never happen here: a number that stays marked after its descriptor is closed, as the program gets it next.

use core::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use pgmap_sync::atomic::{AtomicU64, Ordering};

/// Ours get numbers from here on, as programs may count on low ones.
const LOWEST: RawFd = 700;
/// Numbers that are watched over. Nobody gets one as high without having as many open.
const WATCHED: usize = 1 << 16;

/// A bit for each number that is ours.
static OURS: [AtomicU64; WATCHED / 64] = [const { AtomicU64::new(0) }; WATCHED / 64];

/// Whether a number is a descriptor of ours.
#[must_use]
pub fn is_ours(fd: RawFd) -> bool {
    // Relaxed: who may not close a number has not opened it, so there is nothing to be ordered with.
    word_and_bit(fd).is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
}

/// The lowest number in a range that is a descriptor of ours.
#[must_use]
pub fn lowest_of_ours(range: Range<RawFd>) -> Option<RawFd> {
    let mut fd = usize::try_from(range.start).unwrap_or(0);
    while let Some(word) = OURS.get(fd / 64) {
        // Relaxed: see `is_ours`.
        let rest = word.load(Ordering::Relaxed) >> (fd % 64);
        if rest != 0 {
            let found = fd + rest.trailing_zeros() as usize;
            return RawFd::try_from(found).ok().filter(|fd| *fd < range.end);
        }
        fd = (fd / 64 + 1) * 64;
    }
    None
}

/// In a fork's child: closes the descriptors of ours that it has inherited. Their numbers are anybody's then.
pub fn close_inherited() {
    while let Some(fd) = lowest_of_ours(0..RawFd::MAX) {
        drop(Mark(fd));
        // SAFETY: the descriptor was ours; a child uses none of them, and drops nothing that owns one. A file system that is
        // full may say so here, and closes it all the same.
        unsafe { libc::syscall(libc::SYS_close, fd) };
    }
}

fn word_and_bit(fd: RawFd) -> Option<(&'static AtomicU64, u64)> {
    let fd = usize::try_from(fd).ok()?;
    Some((OURS.get(fd / 64)?, 1 << (fd % 64)))
}

/// Says that a number is ours, for as long as it lives.
///
/// To be dropped before the descriptor is closed.
#[derive(Debug)]
pub(crate) struct Mark(RawFd);

impl Mark {
    pub(crate) fn new(fd: impl AsFd) -> Self {
        let fd = fd.as_fd().as_raw_fd();
        if let Some((word, bit)) = word_and_bit(fd) {
            // Relaxed: see `is_ours`.
            word.fetch_or(bit, Ordering::Relaxed);
        }
        Self(fd)
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if let Some((word, bit)) = word_and_bit(self.0) {
            // Relaxed: see `is_ours`.
            word.fetch_and(!bit, Ordering::Relaxed);
        }
    }
}

/// A descriptor that is not the program's to close.
#[derive(Debug)]
pub struct OurFd {
    // Dropped first: fields are dropped in this order.
    _mark: Mark,
    fd: OwnedFd,
}

impl OurFd {
    /// Takes a descriptor out of the program's way. It is closed on exec.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        let fd = out_of_the_way(fd);
        Self {
            _mark: Mark::new(&fd),
            fd,
        }
    }
}

impl AsFd for OurFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Gives a descriptor a high number. Where the limit is lower it stays as it is.
pub(crate) fn out_of_the_way(fd: OwnedFd) -> OwnedFd {
    rustix::io::fcntl_dupfd_cloexec(&fd, LOWEST).unwrap_or(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A number is ours exactly as long as the descriptor is open.
    #[test]
    fn a_number_is_marked_while_it_is_open() {
        let fd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let low = fd.as_raw_fd();
        let ours = OurFd::new(fd);
        let number = ours.as_fd().as_raw_fd();
        assert!(number >= LOWEST && is_ours(number) && !is_ours(low));
        assert_eq!(lowest_of_ours(number..RawFd::MAX), Some(number));
        assert_eq!(lowest_of_ours(number + 1..number + 1), None);
        assert!(!is_ours(-1) && !is_ours(RawFd::MAX));
        // A number that stays open, so that no other test gets it.
        let open = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let mark = Mark::new(&open);
        assert!(is_ours(open.as_raw_fd()));
        drop(mark);
        assert!(!is_ours(open.as_raw_fd()));
    }
}
