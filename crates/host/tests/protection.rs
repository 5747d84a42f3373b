//! Pages that the program may not write leave the arena and come back, and it may not write them in between either.
#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it should be"
)]

mod common;

use core::time::Duration;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use common::{arena, at, bytes, install, page, poke, syscall_reads, syscall_writes};
use pgmap_core::addr::PAGE_SIZE;
use pgmap_host::event::Event;
use pgmap_host::mmu::HostMmu;
use pgmap_mm::fault::Access;
use pgmap_mm::mmu::{Mmu, Progress, Protect, Slot, Stop};
use rustix::mm::MprotectFlags;

const NONE: MprotectFlags = MprotectFlags::empty();
const READ: MprotectFlags = MprotectFlags::READ;
const READ_EXEC: MprotectFlags = MprotectFlags::READ.union(MprotectFlags::EXEC);
const READ_WRITE: MprotectFlags = MprotectFlags::READ.union(MprotectFlags::WRITE);
const ALL: MprotectFlags = READ_WRITE.union(MprotectFlags::EXEC);

fn protect(mmu: &HostMmu, start: usize, count: u32, protection: MprotectFlags) {
    // SAFETY: the arena is the test's.
    unsafe { mmu.protect(at(mmu, start), count, protection) }.unwrap();
}

/// Brings staged pages back as `mm` does where the machine moves none.
fn bring_back(mmu: &HostMmu, start: usize, count: u32, from: Slot) {
    for nth in 0..count {
        let (slot, place) = (Slot(from.0 + nth), at(mmu, start + nth as usize));
        // SAFETY: the test has had a page taken out to that slot, and empties it below.
        let page = unsafe { mmu.staged(slot) };
        let progress = mmu.install(place, core::slice::from_ref(page), Protect::ReadWrite);
        assert_eq!(progress, Progress::complete(1));
    }
    mmu.empty(from, count as usize);
}

/// What the machine itself says is allowed at a page.
fn allowed(mmu: &HostMmu, number: usize) -> MprotectFlags {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let address = at(mmu, number).get();
    for line in maps.lines() {
        let (range, rest) = line.split_once(' ').unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let number = |hex| usize::from_str_radix(hex, 16).unwrap();
        if (number(start)..number(end)).contains(&address) {
            let letters = ["r", "w", "x"].into_iter().zip([1, 2, 4]);
            let bits = letters.filter(|(letter, _)| rest[..3].contains(letter));
            return MprotectFlags::from_bits_retain(bits.map(|(_, bit)| bit).sum());
        }
    }
    panic!("{address:#x} is not mapped");
}

#[test]
fn pages_that_may_not_be_written_leave_and_come_back() {
    for protection in [READ, READ_EXEC, NONE] {
        let Some(mmu) = arena(64) else { return };
        install(&mmu, 3, 0..40, Protect::ReadWrite);
        protect(&mmu, 0, 64, protection);
        let progress = mmu.take_out(at(&mmu, 3), 40, Slot(5));
        assert_eq!(progress, Progress::complete(40), "{protection:?}");
        assert_eq!(allowed(&mmu, 3), protection);
        assert!(syscall_writes(&mmu, 3).is_err(), "{protection:?}");
        bring_back(&mmu, 3, 40, Slot(5));
        assert_eq!(allowed(&mmu, 3), protection);
        assert!(syscall_writes(&mmu, 3).is_err(), "{protection:?}");
        protect(&mmu, 0, 64, READ_WRITE);
        for number in 0..40u8 {
            assert_eq!(bytes(&mmu, 3 + usize::from(number)).0, page(number).0);
            poke(&mmu, 3 + usize::from(number), 1);
        }
    }
}

#[test]
fn a_run_of_many_protections_leaves_at_once() {
    let Some(mmu) = arena(64) else { return };
    install(&mmu, 0, 0..64, Protect::ReadWrite);
    let protections = [READ, READ_WRITE, NONE, READ_EXEC, READ];
    for (nth, protection) in protections.into_iter().enumerate() {
        protect(&mmu, 5 + 7 * nth, 7, protection);
    }
    assert_eq!(
        mmu.take_out(at(&mmu, 0), 64, Slot(0)),
        Progress::complete(64)
    );
    bring_back(&mmu, 0, 64, Slot(0));
    for (nth, protection) in protections.into_iter().enumerate() {
        assert_eq!(allowed(&mmu, 5 + 7 * nth), protection);
        assert_eq!(allowed(&mmu, 11 + 7 * nth), protection);
    }
    protect(&mmu, 0, 64, READ_WRITE);
    for number in 0..64u8 {
        assert_eq!(bytes(&mmu, number.into()).0, page(number).0);
    }
}

/// GUP-3: it is the very page that comes back from transit, not a copy.
#[test]
fn a_page_that_io_uring_has_pinned_stays_the_same_page() {
    let Some(mmu) = arena(16) else { return };
    let Ok(mut ring) = io_uring::IoUring::new(1) else {
        eprintln!("SKIPPED, because this machine lacks what the test needs: io_uring");
        return;
    };
    install(&mmu, 0, 0..5, Protect::ReadWrite);
    let buffer = libc::iovec {
        iov_base: at(&mmu, 2).get() as *mut _,
        iov_len: PAGE_SIZE,
    };
    // SAFETY: the buffer stays mapped as long as the ring lives.
    unsafe { ring.submitter().register_buffers(&[buffer]) }.unwrap();
    protect(&mmu, 0, 16, READ);
    let progress = mmu.take_out(at(&mmu, 0), 5, Slot(0));
    assert_eq!((progress.done, progress.stop), (2, Some(Stop::Busy)));
    assert_eq!(bytes(&mmu, 2).0, page(2).0);
    assert_eq!(bytes(&mmu, 4).0, page(4).0);

    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&page(77).0, 0).unwrap();
    let file = io_uring::types::Fd(std::os::fd::AsRawFd::as_raw_fd(&file));
    let start = at(&mmu, 2).get() as *mut u8;
    let read = io_uring::opcode::ReadFixed::new(file, start, 4096, 0).build();
    // SAFETY: the file and the buffer live until the answer is there.
    unsafe { ring.submission().push(&read) }.unwrap();
    ring.submit_and_wait(1).unwrap();
    assert_eq!(ring.completion().next().unwrap().result(), 4096);
    assert_eq!(bytes(&mmu, 2).0, page(77).0);
}

/// What comes back from transit is protected from the first write if it was, and its neighbours' faults are told.
#[test]
fn what_did_not_leave_is_as_it_was() {
    let Some(mmu) = arena(16).map(Arc::new) else {
        return;
    };
    install(&mmu, 0, 0..2, Protect::ReadWrite);
    install(&mmu, 3, 3..5, Protect::ReadOnly);
    protect(&mmu, 0, 8, READ);
    let progress = mmu.take_out(at(&mmu, 0), 5, Slot(0));
    assert_eq!((progress.done, progress.stop), (2, Some(Stop::Hole)));
    assert_eq!(bytes(&mmu, 4).0, page(4).0);
    protect(&mmu, 0, 8, READ_WRITE);
    let writer = {
        let mmu = Arc::clone(&mmu);
        thread::spawn(move || poke(&mmu, 3, 42))
    };
    assert_eq!(next_fault(&mmu), (3, Access::WriteProtected));
    assert_eq!(bytes(&mmu, 3).0, page(3).0);
    mmu.unprotect(at(&mmu, 3), 1);
    writer.join().unwrap();
    assert_eq!(bytes(&mmu, 3).0[0], 42);
    mmu.zap(at(&mmu, 4), 1);
    let reader = {
        let mmu = Arc::clone(&mmu);
        thread::spawn(move || bytes(&mmu, 4))
    };
    assert_eq!(next_fault(&mmu), (4, Access::Read));
    install(&mmu, 4, 9..10, Protect::ReadWrite);
    assert_eq!(reader.join().unwrap().0, page(9).0);
}

fn next_fault(mmu: &HostMmu) -> (usize, Access) {
    let mut events = [Event::Kick];
    assert_eq!(mmu.next_events(&mut events, Some(5000)), 1, "no event came");
    let [
        Event::Fault {
            at: place, access, ..
        },
    ] = events
    else {
        panic!("not a fault: {events:?}");
    };
    ((place.get() - mmu.range().start) / PAGE_SIZE, access)
}

#[test]
fn locked_pages_stay_locked() {
    let Some(mmu) = arena(16) else { return };
    install(&mmu, 0, 0..4, Protect::ReadWrite);
    // SAFETY: locking changes no bytes.
    unsafe { rustix::mm::mlock(at(&mmu, 0).get() as *mut _, 4 * PAGE_SIZE) }.unwrap();
    protect(&mmu, 0, 4, READ);
    let unevictable = Progress {
        done: 0,
        stop: Some(Stop::Unevictable),
    };
    assert_eq!(mmu.take_out(at(&mmu, 0), 2, Slot(0)), unevictable);
    protect(&mmu, 0, 4, READ_WRITE);
    assert_eq!(mmu.take_out(at(&mmu, 3), 1, Slot(0)), unevictable);
}

#[test]
fn pages_that_may_be_written_and_executed_leave_unless_they_are_pinned() {
    for protection in [ALL, MprotectFlags::WRITE] {
        let Some(mmu) = arena(64) else { return };
        let Ok(ring) = io_uring::IoUring::new(1) else {
            eprintln!("SKIPPED, because this machine lacks what the test needs: io_uring");
            return;
        };
        install(&mmu, 0, 0..40, Protect::ReadWrite);
        let buffer = libc::iovec {
            iov_base: at(&mmu, 38).get() as *mut _,
            iov_len: PAGE_SIZE,
        };
        // SAFETY: the buffer stays mapped as long as the ring lives.
        unsafe { ring.submitter().register_buffers(&[buffer]) }.unwrap();
        protect(&mmu, 0, 50, protection);
        let progress = mmu.take_out(at(&mmu, 0), 40, Slot(5));
        assert_eq!((progress.done, progress.stop), (38, Some(Stop::Busy)));
        bring_back(&mmu, 0, 38, Slot(5));
        // A second time, to where the first has left nothing behind.
        let progress = mmu.take_out(at(&mmu, 0), 38, Slot(5));
        assert_eq!(progress, Progress::complete(38));
        bring_back(&mmu, 0, 38, Slot(5));
        assert_eq!(allowed(&mmu, 0), protection);
        for number in 0..40u8 {
            assert_eq!(bytes(&mmu, number.into()).0, page(number).0);
            poke(&mmu, number.into(), 1);
        }
    }
}

/// Staging has no room for a page, and it returns with its neighbours.
#[test]
fn pages_that_cannot_be_staged_return() {
    for protection in [READ, ALL] {
        let Some(mmu) = arena(16) else { return };
        install(&mmu, 0, 0..6, Protect::ReadWrite);
        assert_eq!(mmu.take_out(at(&mmu, 5), 1, Slot(2)), Progress::complete(1));
        protect(&mmu, 0, 5, protection);
        let progress = mmu.take_out(at(&mmu, 0), 5, Slot(0));
        assert_eq!((progress.done, progress.stop), (2, Some(Stop::Exists)));
        for number in 2..5u8 {
            assert_eq!(bytes(&mmu, number.into()).0, page(number).0);
        }
        assert_eq!(mmu.take_out(at(&mmu, 2), 3, Slot(7)), Progress::complete(3));
    }
}

/// A clean page that returns is still clean.
#[test]
fn what_could_not_be_staged_is_still_protected() {
    let Some(mmu) = arena(16).map(Arc::new) else {
        return;
    };
    install(&mmu, 0, 0..1, Protect::ReadOnly);
    install(&mmu, 1, 1..2, Protect::ReadWrite);
    assert_eq!(mmu.take_out(at(&mmu, 1), 1, Slot(0)), Progress::complete(1));
    protect(&mmu, 0, 1, ALL);
    let progress = mmu.take_out(at(&mmu, 0), 1, Slot(0));
    assert_eq!((progress.done, progress.stop), (0, Some(Stop::Exists)));
    let writer = {
        let mmu = Arc::clone(&mmu);
        thread::spawn(move || poke(&mmu, 0, 42))
    };
    assert_eq!(next_fault(&mmu), (0, Access::WriteProtected));
    mmu.unprotect(at(&mmu, 0), 1);
    writer.join().unwrap();
}

/// One thread stores, one loads what it may not, one what it may, while the pages go and come: the first two are refused every
/// time, and the third never sees other bytes.
#[test]
fn no_moment_allows_what_the_program_forbade() {
    const PAGES: u8 = 8;
    let Some(mmu) = arena(64).map(Arc::new) else {
        return;
    };
    install(&mmu, 0, 0..2 * PAGES, Protect::ReadWrite);
    protect(&mmu, 0, PAGES.into(), READ);
    protect(&mmu, PAGES.into(), PAGES.into(), NONE);
    let end = Instant::now() + Duration::from_millis(500);
    let repeat = |check: fn(&HostMmu, usize)| {
        let mmu = Arc::clone(&mmu);
        thread::spawn(move || {
            let mut rounds = 0u64;
            while Instant::now() < end {
                (0..usize::from(PAGES)).for_each(|number| check(&mmu, number));
                rounds += 1;
            }
            rounds
        })
    };
    let threads = [
        repeat(|mmu, number| assert!(syscall_writes(mmu, number).is_err())),
        repeat(|mmu, number| assert!(syscall_reads(mmu, usize::from(PAGES) + number).is_err())),
        repeat(|mmu, number| {
            assert_eq!(bytes(mmu, number).0, page(u8::try_from(number).unwrap()).0);
        }),
    ];
    let mut rounds = 0u64;
    while Instant::now() < end {
        let progress = mmu.take_out(at(&mmu, 0), 2 * usize::from(PAGES), Slot(0));
        assert_eq!(progress, Progress::complete(2 * usize::from(PAGES)));
        bring_back(&mmu, 0, 2 * u32::from(PAGES), Slot(0));
        rounds += 1;
    }
    assert!(rounds > 100, "only {rounds} rounds");
    for thread in threads {
        assert!(thread.join().unwrap() > 100, "a thread hardly ran");
    }
}

/// A page that could not leave by the detour comes back protected; when it is unprotected it can be made private without the
/// thread that serves faults.
#[test]
fn a_page_that_came_back_is_made_private_without_a_fault() {
    let Some(mmu) = arena(16).map(Arc::new) else {
        return;
    };
    install(&mmu, 0, 0..2, Protect::ReadWrite);
    assert_eq!(mmu.take_out(at(&mmu, 1), 1, Slot(0)), Progress::complete(1));
    protect(&mmu, 0, 1, READ);
    // The slot is taken.
    assert!(mmu.take_out(at(&mmu, 0), 1, Slot(0)).stop.is_some());
    protect(&mmu, 0, 1, READ_WRITE);
    mmu.unprotect(at(&mmu, 0), 1);
    assert!(mmu.unshare(at(&mmu, 0)));
    assert_eq!(bytes(&mmu, 0).0, page(0).0);
}
