//! Pages to and from files.
#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it should be"
)]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pgmap_core::addr::{PAGE_SIZE, Page};
use pgmap_host::uring::{Read, Ring, Write};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;

/// One test at a time: one of them looks for its own descriptor.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn file(direct: OFlags) -> Option<OwnedFd> {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC | direct;
    match openat(CWD, directory, flags, Mode::RUSR | Mode::WUSR) {
        Ok(fd) => Some(fd),
        Err(error) => {
            eprintln!("SKIPPED, because this machine lacks what the test needs: {error}");
            None
        }
    }
}

fn page(number: usize) -> Page {
    let mut page = Page::ZERO;
    for (index, byte) in page.0.iter_mut().enumerate() {
        *byte = (index / 16 + number * 7).to_le_bytes()[0];
    }
    page
}

fn write(ring: &mut Ring, fd: impl AsFd, pages: &[Page]) -> Vec<Result<(), Errno>> {
    let mut batch: Vec<Write<'_>> = pages
        .iter()
        .enumerate()
        .map(|(index, page)| Write {
            offset_bytes: (index * PAGE_SIZE) as u64,
            page,
            outcome: Ok(()),
        })
        .collect();
    ring.write_batch(fd, &mut batch);
    batch.into_iter().map(|write| write.outcome).collect()
}

/// Reads pages back to front.
fn read(ring: &mut Ring, fd: impl AsFd, count: usize) -> Vec<(Page, Result<(), Errno>)> {
    let mut pages = vec![Page::ZERO; count];
    let mut batch: Vec<Read<'_>> = pages
        .iter_mut()
        .enumerate()
        .map(|(index, page)| Read {
            offset_bytes: ((count - 1 - index) * PAGE_SIZE) as u64,
            page,
            outcome: Ok(()),
        })
        .collect();
    ring.read_batch(fd, &mut batch);
    let outcomes: Vec<_> = batch.into_iter().map(|read| read.outcome).collect();
    pages.into_iter().zip(outcomes).rev().collect()
}

fn round_trip(ring: &mut Ring, fd: &OwnedFd, count: usize) -> bool {
    let pages: Vec<Page> = (0..count).map(page).collect();
    let written = write(ring, fd, &pages);
    let back = read(ring, fd, count);
    written.iter().all(Result::is_ok)
        && back
            .iter()
            .zip(&pages)
            .all(|((page, outcome), wanted)| outcome.is_ok() && page.0 == wanted.0)
}

#[test]
fn more_pages_than_the_ring_is_deep_come_back() {
    let _alone = alone();
    let Some(fd) = file(OFlags::DIRECT) else {
        return;
    };
    let mut ring = Ring::new(8);
    if !ring.is_queued() {
        eprintln!("SKIPPED in part, because this machine lacks what the test needs: io_uring");
    }
    assert!(round_trip(&mut ring, &fd, 100));
    assert!(round_trip(&mut ring, &fd, 1));
    assert!(round_trip(&mut ring, &fd, 0));
}

#[test]
fn without_a_queue_pages_come_back_one_by_one() {
    let _alone = alone();
    let Some(fd) = file(OFlags::DIRECT) else {
        return;
    };
    let mut ring = Ring::new(0);
    assert!(!ring.is_queued());
    assert!(round_trip(&mut ring, &fd, 10));
}

#[test]
fn the_end_of_the_file_is_an_error_of_that_page_alone() {
    let _alone = alone();
    let Some(fd) = file(OFlags::empty()) else {
        return;
    };
    let mut ring = Ring::new(8);
    assert!(
        write(&mut ring, &fd, &[page(0), page(1)])
            .iter()
            .all(Result::is_ok)
    );
    rustix::fs::ftruncate(&fd, PAGE_SIZE as u64 + 100).unwrap();
    let back = read(&mut ring, &fd, 3);
    assert_eq!(back[0].1, Ok(()));
    assert_eq!(back[0].0.0, page(0).0);
    assert_eq!(back[1].1, Err(Errno::NODATA));
    assert_eq!(back[2].1, Err(Errno::NODATA));
}

#[test]
fn a_descriptor_that_cannot_be_written_is_an_error_of_every_page() {
    let _alone = alone();
    let null = File::open("/dev/null").unwrap();
    let mut ring = Ring::new(2);
    let outcomes = write(&mut ring, &null, &[page(0), page(1), page(2)]);
    assert_eq!(outcomes, [Err(Errno::BADF); 3]);
}

/// Programs that close every descriptor close ours, too.
#[test]
fn a_queue_whose_descriptor_was_taken_is_given_up() {
    let _alone = alone();
    let Some(fd) = file(OFlags::DIRECT) else {
        return;
    };
    let before = rings();
    let mut ring = Ring::new(8);
    let Some(ours) = rings().into_iter().find(|ring| !before.contains(ring)) else {
        eprintln!("SKIPPED, because this machine lacks what the test needs: io_uring");
        return;
    };
    let null = File::open("/dev/null").unwrap();
    // SAFETY: the number stays a descriptor, which the ring closes in the end.
    assert_eq!(unsafe { libc::dup2(null.as_raw_fd(), ours) }, ours);
    assert!(round_trip(&mut ring, &fd, 20));
    assert!(!ring.is_queued());
}

/// The descriptors of this process that are queues.
fn rings() -> Vec<RawFd> {
    let mut rings = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        let is_ring = std::fs::read_link(entry.path())
            .is_ok_and(|target| target.to_string_lossy().contains("io_uring"));
        if is_ring {
            rings.push(entry.file_name().to_string_lossy().parse().unwrap());
        }
    }
    rings
}

/// The parent's queue is not the child's, but both go on.
#[test]
fn a_forks_child_reads_and_writes_on_its_own() {
    let _alone = alone();
    let Some(fd) = file(OFlags::empty()) else {
        return;
    };
    let mut ring = Ring::new(8);
    assert!(round_trip(&mut ring, &fd, 20));
    // SAFETY: the child reads and writes a file, and then exits.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let good = round_trip(&mut ring, &fd, 20) && !ring.is_queued();
        // SAFETY: it runs nothing of this process any more.
        unsafe { libc::_exit(i32::from(!good)) }
    }
    let mut status = -1;
    // SAFETY: the status lives during the call.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!(status, 0);
    assert!(round_trip(&mut ring, &fd, 20));
}
