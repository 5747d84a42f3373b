//! Runs of pages to and from a file.
//!
//! The file device calls this. A run is pages whose places in the file follow one another; it is one
//! system call wherever the pages lie in memory. Pages in no order are read at once, through a ring.
//! Nothing here allocates.

use core::array;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;

use pgmap_core::addr::PAGE_SIZE;
use pgmap_core::driver::{DeviceError, Load, Store};
use pgmap_host::uring::{Read, Ring};
use rustix::io::{Errno, preadv, pwritev};

/// Most pages in one run.
pub(crate) const RUN_PAGES: usize = 64;

/// Reads the pages of a run from `offset` on, and fills in the outcome of each.
pub(crate) fn read_run(fd: BorrowedFd<'_>, offset: u64, run: &mut [Load<'_>]) {
    let mut transfer = Transfer::new(offset, run.len());
    while let Some((first, count, offset)) = transfer.next() {
        let part = &mut run[first..first + count];
        let mut pages = part.iter_mut();
        let mut vectors: [_; RUN_PAGES] = array::from_fn(|_| {
            IoSliceMut::new(pages.next().map_or(&mut [][..], |load| &mut load.page.0))
        });
        let moved = preadv(fd, &mut vectors[..count], offset);
        let (done, outcome) = transfer.advance(moved);
        part[..done]
            .iter_mut()
            .for_each(|load| load.outcome = outcome);
    }
}

/// Writes the pages of a run from `offset` on. A page that cannot be written gets the error for its
/// outcome; the outcomes of the others are left as they are.
pub(crate) fn write_run(fd: BorrowedFd<'_>, offset: u64, run: &mut [Store<'_>]) {
    let mut transfer = Transfer::new(offset, run.len());
    while let Some((first, count, offset)) = transfer.next() {
        let part = &mut run[first..first + count];
        let mut pages = part.iter();
        let vectors: [_; RUN_PAGES] =
            array::from_fn(|_| IoSlice::new(pages.next().map_or(&[][..], |store| &store.page.0)));
        let moved = pwritev(fd, &vectors[..count], offset);
        let (done, outcome) = transfer.advance(moved);
        if let Err(error) = outcome {
            part[..done]
                .iter_mut()
                .for_each(|store| store.outcome = Err(error));
        }
    }
}

/// Reads pages from all over the file, as many at once as the ring has room for, and fills in the outcome
/// of each; `offset` says where a page is.
pub(crate) fn read_scattered(
    ring: &mut Ring,
    fd: BorrowedFd<'_>,
    batch: &mut [Load<'_>],
    offset: impl Fn(&Load<'_>) -> u64,
) {
    // Chunks of sizes known when this is compiled need no memory for the requests.
    let (chunks, rest) = batch.as_chunks_mut();
    for chunk in chunks {
        read_chunk::<32>(ring, fd, chunk, &offset);
    }
    let (chunks, rest) = rest.as_chunks_mut();
    for chunk in chunks {
        read_chunk::<4>(ring, fd, chunk, &offset);
    }
    for load in rest {
        read_chunk::<1>(ring, fd, array::from_mut(load), &offset);
    }
}

fn read_chunk<const N: usize>(
    ring: &mut Ring,
    fd: BorrowedFd<'_>,
    chunk: &mut [Load<'_>; N],
    offset: impl Fn(&Load<'_>) -> u64,
) {
    let mut reads = chunk.each_mut().map(|load| Read {
        offset_bytes: offset(load),
        page: load.page,
        outcome: Err(Errno::INPROGRESS),
    });
    ring.read_batch(fd, &mut reads);
    let outcomes = reads.map(|read| read.outcome);
    for (load, outcome) in chunk.iter_mut().zip(outcomes) {
        load.outcome = outcome.map_err(|errno| DeviceError::Io(errno.raw_os_error()));
    }
}

/// How far a run has come.
struct Transfer {
    offset: u64,
    done: usize,
    len: usize,
    /// Pages in the next call: many, until one failed and it is not clear for which page.
    width: usize,
}

impl Transfer {
    fn new(offset: u64, len: usize) -> Self {
        Self {
            offset,
            done: 0,
            len,
            width: RUN_PAGES,
        }
    }

    /// The next pages: the first one, how many, and their offset in the file.
    fn next(&self) -> Option<(usize, usize, u64)> {
        let offset = self.offset + (self.done * PAGE_SIZE) as u64;
        (self.done < self.len).then(|| (self.done, self.width.min(self.len - self.done), offset))
    }

    /// Takes what a call returned, and says what became of how many of its pages.
    fn advance(&mut self, moved: Result<usize, Errno>) -> (usize, Result<(), DeviceError>) {
        let (done, outcome) = match moved {
            Ok(bytes) if bytes >= PAGE_SIZE => (bytes / PAGE_SIZE, Ok(())),
            Err(Errno::INTR) => (0, Ok(())),
            Err(_) | Ok(_) if self.width > 1 => {
                self.width = 1;
                (0, Ok(()))
            }
            // The file ends inside this page, or before it.
            Ok(_) => (1, Err(DeviceError::Io(Errno::IO.raw_os_error()))),
            Err(Errno::NOSPC | Errno::DQUOT) => (1, Err(DeviceError::Full)),
            Err(errno) => (1, Err(DeviceError::Io(errno.raw_os_error()))),
        };
        self.done += done;
        (done, outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_the_file_ends_in_is_an_error_of_its_own() {
        let mut transfer = Transfer::new(0, 3);
        assert_eq!(transfer.advance(Ok(PAGE_SIZE + 512)), (1, Ok(())));
        assert_eq!(transfer.next(), Some((1, 2, 4096)));
        // It is tried again alone, to tell which page it is.
        assert_eq!(transfer.advance(Ok(512)), (0, Ok(())));
        assert_eq!(transfer.next(), Some((1, 1, 4096)));
        assert_eq!(transfer.advance(Ok(512)), (1, Err(DeviceError::Io(5))));
        assert_eq!(
            transfer.advance(Err(Errno::NOSPC)),
            (1, Err(DeviceError::Full))
        );
        assert_eq!(transfer.next(), None);
    }
}
