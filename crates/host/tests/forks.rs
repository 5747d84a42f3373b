//! A fork's child sees every byte as it was when the fork happened.
#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it should be"
)]

mod common;

use core::time::Duration;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use common::{arena, at, bytes, install, page, poke, syscall_writes};
use pgmap_host::event::{ChildSpace, Event};
use pgmap_host::mmu::{Children, HostMmu};
use pgmap_mm::mmu::{Mmu, Progress, Protect, Slot, Stop};
use rustix::mm::MprotectFlags;

/// A fork is told to every arena of the process, and waits until each has listened: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An arena whose children are served, or a loud skip.
fn served(pages: usize) -> Option<Arc<HostMmu>> {
    let mmu = arena(pages)?;
    if mmu.children() == Children::Announced {
        eprintln!("SKIPPED, because this process may not be told of its forks (CAP_SYS_PTRACE)");
        return None;
    }
    Some(Arc::new(mmu))
}

/// Forks on another thread, where the child runs `child` and exits with what that says. Answers the child's status.
fn fork(
    mmu: &Arc<HostMmu>,
    child: impl FnOnce(&HostMmu) -> bool + Send + 'static,
) -> JoinHandle<i32> {
    let mmu = Arc::clone(mmu);
    thread::spawn(move || {
        // SAFETY: the child makes system calls and reads memory, and then exits.
        match unsafe { libc::fork() } {
            0 => exit(i32::from(!child(&mmu))),
            pid => wait(pid),
        }
    })
}

fn exit(status: i32) -> ! {
    // SAFETY: it runs nothing of this process any more.
    unsafe { libc::_exit(status) }
}

fn wait(pid: i32) -> i32 {
    let mut status = -1;
    // SAFETY: the status lives during the call.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    status
}

fn next_child(mmu: &HostMmu) -> ChildSpace {
    let mut events = [Event::Kick];
    for _ in 0..10 {
        assert_eq!(mmu.next_events(&mut events, Some(5000)), 1, "no event came");
        if let [Event::Fork(child)] = events {
            return child;
        }
    }
    panic!("no fork came");
}

#[test]
fn a_child_waits_for_the_pages_that_it_is_given() {
    let _alone = alone();
    let Some(mmu) = served(16) else { return };
    install(&mmu, 0, 0..2, Protect::ReadWrite);
    assert_eq!(mmu.take_out(at(&mmu, 0), 1, Slot(0)), Progress::complete(1));
    let status = fork(&mmu, |mmu| {
        bytes(mmu, 0).0 == page(0).0 && bytes(mmu, 1).0 == page(1).0 && bytes(mmu, 2).0[0] == 0
    });
    let child = next_child(&mmu);
    thread::sleep(Duration::from_millis(20));
    child.install(at(&mmu, 0), &page(0)).unwrap();
    // It has that page already.
    child.install(at(&mmu, 1), &page(9)).unwrap();
    drop(child);
    assert_eq!(status.join().unwrap(), 0);
}

/// A child that was forked later has a copy of the descriptor by which the first is served; the first goes on all the same.
#[test]
fn a_child_goes_on_though_another_has_its_descriptor() {
    let _alone = alone();
    let Some(mmu) = served(16) else { return };
    let first = fork(&mmu, |mmu| bytes(mmu, 0).0[0] == 0);
    let child = next_child(&mmu);
    // Time to touch the page that is missing.
    thread::sleep(Duration::from_millis(20));
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let second = fork(&mmu, move |_| rustix::io::read(&reader, &mut [0]).is_ok());
    drop(next_child(&mmu));
    drop(child);
    for _ in 0..500 {
        if first.is_finished() {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    let went_on = first.is_finished();
    rustix::io::write(&writer, &[1]).unwrap();
    assert_eq!(second.join().unwrap(), 0);
    assert!(went_on, "the first child waits for ever");
    assert_eq!(first.join().unwrap(), 0);
}

/// The child's snapshot is not changed by a page that the parent brings back, and writes, before the child is served.
#[test]
fn a_page_that_comes_back_first_is_given_to_the_child() {
    let _alone = alone();
    let Some(mmu) = served(16) else { return };
    install(&mmu, 0, 0..2, Protect::ReadWrite);
    assert_eq!(mmu.take_out(at(&mmu, 0), 2, Slot(0)), Progress::complete(2));
    let status = fork(&mmu, |mmu| {
        bytes(mmu, 0).0 == page(0).0 && bytes(mmu, 1).0 == page(1).0 && bytes(mmu, 4).0 == page(4).0
    });
    thread::sleep(Duration::from_millis(50));
    // Nobody has read the message of the fork: these are refused, and must read it themselves.
    assert_eq!(
        mmu.give_back(Slot(0), 1, at(&mmu, 0)),
        Progress::complete(1)
    );
    poke(&mmu, 0, 77);
    install(&mmu, 4, 4..5, Protect::ReadWrite);
    poke(&mmu, 4, 77);
    assert_eq!(
        mmu.give_back(Slot(1), 1, at(&mmu, 1)),
        Progress::complete(1)
    );
    poke(&mmu, 1, 77);
    drop(next_child(&mmu));
    assert_eq!(status.join().unwrap(), 0);
}

#[test]
fn a_child_that_has_ended_is_gone() {
    let _alone = alone();
    let Some(mmu) = served(16) else { return };
    let status = fork(&mmu, |_| true);
    let child = next_child(&mmu);
    assert_eq!(status.join().unwrap(), 0);
    let refused = child.install(at(&mmu, 0), &page(0));
    assert_eq!(refused, Err(Stop::Gone));
}

#[test]
fn a_child_of_a_child_is_served_too() {
    let _alone = alone();
    let Some(mmu) = served(16) else { return };
    install(&mmu, 0, 0..2, Protect::ReadWrite);
    assert_eq!(mmu.take_out(at(&mmu, 0), 2, Slot(0)), Progress::complete(2));
    let status = fork(&mmu, |mmu| {
        // SAFETY: as in `fork`.
        match unsafe { libc::fork() } {
            0 => exit(i32::from(
                bytes(mmu, 0).0 != page(0).0 || bytes(mmu, 1).0 != page(1).0,
            )),
            pid => wait(pid) == 0 && bytes(mmu, 1).0 == page(1).0,
        }
    });
    let child = next_child(&mmu);
    thread::sleep(Duration::from_millis(50));
    child.install(at(&mmu, 0), &page(0)).unwrap();
    child.install(at(&mmu, 1), &page(1)).unwrap();
    drop(child);
    let grandchild = next_child(&mmu);
    grandchild.install(at(&mmu, 0), &page(0)).unwrap();
    grandchild.install(at(&mmu, 1), &page(1)).unwrap();
    drop(grandchild);
    assert_eq!(status.join().unwrap(), 0);
}

#[test]
fn shared_pages_stay_until_they_are_unshared_and_staged_ones_are_never_shared() {
    let _alone = alone();
    let Some(mmu) = served(16) else { return };
    install(&mmu, 0, 0..2, Protect::ReadWrite);
    assert_eq!(mmu.take_out(at(&mmu, 1), 1, Slot(1)), Progress::complete(1));
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let status = fork(&mmu, move |_| {
        let _ = rustix::io::read(&reader, &mut [0]);
        true
    });
    drop(next_child(&mmu));
    let progress = mmu.take_out(at(&mmu, 0), 1, Slot(0));
    assert_eq!(progress.stop, Some(Stop::Busy));
    assert!(mmu.unshare(at(&mmu, 0)));
    assert_eq!(mmu.take_out(at(&mmu, 0), 1, Slot(0)), Progress::complete(1));
    assert_eq!(
        mmu.give_back(Slot(1), 1, at(&mmu, 1)),
        Progress::complete(1)
    );
    rustix::io::write(&writer, &[1]).unwrap();
    assert_eq!(status.join().unwrap(), 0);
}

/// `unshare` cannot write where the program may not: pages in transit are unshared there.
#[test]
fn shared_pages_that_may_not_be_written_leave() {
    let _alone = alone();
    let Some(mmu) = served(16) else { return };
    install(&mmu, 0, 0..4, Protect::ReadWrite);
    // SAFETY: the arena is the test's.
    unsafe { mmu.protect(at(&mmu, 0), 8, MprotectFlags::READ) }.unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let status = fork(&mmu, move |mmu| {
        let _ = rustix::io::read(&reader, &mut [0]);
        (0..4).all(|number| bytes(mmu, usize::from(number)).0 == page(number).0)
    });
    drop(next_child(&mmu));
    assert_eq!(mmu.take_out(at(&mmu, 0), 4, Slot(0)), Progress::complete(4));
    rustix::io::write(&writer, &[1]).unwrap();
    assert_eq!(status.join().unwrap(), 0);
}

/// Children forked while pages are in transit, from which they come back, lack nothing, and may do what the parent may.
#[test]
fn forks_and_transits_at_once_lose_nothing() {
    const PAGES: u8 = 8;
    let _alone = alone();
    let Some(mmu) = served(16) else { return };
    install(&mmu, 0, 0..PAGES, Protect::ReadWrite);
    // SAFETY: the arena is the test's.
    unsafe { mmu.protect(at(&mmu, 0), 16, MprotectFlags::READ) }.unwrap();
    // No page leaves, as this slot is taken.
    install(&mmu, 10, 10..11, Protect::ReadWrite);
    while mmu.take_out(at(&mmu, 10), 1, Slot(0)).done == 0 {}
    // Held while pages are taken out: the lock of their block, as it were.
    let cursor = Arc::new(Mutex::new(()));
    let mover = {
        let (mmu, cursor) = (Arc::clone(&mmu), Arc::clone(&cursor));
        // Until the test lets go of it.
        thread::spawn(move || {
            while Arc::strong_count(&cursor) > 1 {
                thread::yield_now();
                let _held = cursor.lock().unwrap();
                let progress = mmu.take_out(at(&mmu, 0), PAGES.into(), Slot(0));
                assert_eq!((progress.done, progress.stop), (0, Some(Stop::Exists)));
            }
        })
    };
    for _ in 0..200 {
        let status = fork(&mmu, |mmu| {
            (0..PAGES).all(|number| {
                let there = bytes(mmu, number.into()).0 == page(number).0;
                there && syscall_writes(mmu, number.into()).is_err()
            })
        });
        let child = next_child(&mmu);
        // The fault thread looks at every block before it lets a child go.
        drop(cursor.lock().unwrap());
        drop(child);
        assert_eq!(status.join().unwrap(), 0);
    }
    drop(cursor);
    mover.join().unwrap();
}

/// The descriptors that a child inherits mean its parent's memory, which is none of its business.
#[test]
fn a_child_cannot_touch_its_parents_pages() {
    let _alone = alone();
    let Some(mmu) = served(16) else { return };
    install(&mmu, 0, 0..1, Protect::ReadWrite);
    assert_eq!(mmu.take_out(at(&mmu, 0), 1, Slot(0)), Progress::complete(1));
    let status = fork(&mmu, |mmu| {
        mmu.settle_forks();
        let refused = [
            mmu.install(at(mmu, 5), &[page(5)], Protect::ReadWrite),
            mmu.give_back(Slot(0), 1, at(mmu, 0)),
            mmu.poison(at(mmu, 6), 1),
        ];
        refused
            .iter()
            .all(|refusal| refusal.stop == Some(Stop::Gone))
    });
    let child = next_child(&mmu);
    assert_eq!(status.join().unwrap(), 0);
    drop(child);
    assert_eq!(
        mmu.give_back(Slot(0), 1, at(&mmu, 0)),
        Progress::complete(1)
    );
    let progress = mmu.take_out(at(&mmu, 5), 2, Slot(1));
    assert_eq!(progress.stop, Some(Stop::Hole));
}

/// Where the kernel does not tell us of forks, a child that touches the arena dies, rather than read zeros.
#[test]
fn a_child_that_cannot_be_served_has_no_arena() {
    let _alone = alone();
    let Some(mmu) = arena(16).map(Arc::new) else {
        return;
    };
    if mmu.children() == Children::Served {
        eprintln!("SKIPPED, because this process may be told of its forks (CAP_SYS_PTRACE)");
        return;
    }
    install(&mmu, 0, 0..1, Protect::ReadWrite);
    let status = fork(&mmu, |mmu| bytes(mmu, 0).0 == page(0).0);
    assert_eq!(status.join().unwrap() & 0x7f, libc::SIGSEGV);
    assert_eq!(bytes(&mmu, 0).0, page(0).0);
}

#[test]
fn settling_waits_for_the_last_child() {
    let _alone = alone();
    let Some(mmu) = served(16) else { return };
    mmu.settle_forks();
    let status = fork(&mmu, |_| true);
    let child = next_child(&mmu);
    let waiting = Arc::clone(&mmu);
    let settled = thread::spawn(move || waiting.settle_forks());
    thread::sleep(Duration::from_millis(20));
    assert!(!settled.is_finished());
    drop(child);
    settled.join().unwrap();
    assert_eq!(status.join().unwrap(), 0);
}

/// Many forks while threads bring pages in and out: every child checks every page.
#[test]
fn forks_and_moves_at_once_lose_nothing() {
    const PAGES: u8 = 8;
    let _alone = alone();
    let Some(mmu) = served(16) else { return };
    install(&mmu, 0, 0..PAGES, Protect::ReadWrite);
    // Where each page is: the lock of its block, as it were.
    let staged = Arc::new(Mutex::new([false; PAGES as usize]));
    let mover = {
        let (mmu, staged) = (Arc::clone(&mmu), Arc::clone(&staged));
        // Until the test lets go of the list.
        thread::spawn(move || {
            while Arc::strong_count(&staged) > 1 {
                (0..PAGES).for_each(|number| toggle(&mmu, &staged, number));
            }
        })
    };
    for _ in 0..200 {
        let status = fork(&mmu, |mmu| {
            (0..PAGES).all(|number| bytes(mmu, number.into()).0 == page(number).0)
        });
        let child = next_child(&mmu);
        for number in 0..PAGES {
            let staged = staged.lock().unwrap();
            if staged[usize::from(number)] {
                // The child may have seen enough, and ended.
                let _ = child.install(at(&mmu, number.into()), &page(number));
            }
        }
        drop(child);
        assert_eq!(status.join().unwrap(), 0);
    }
    drop(staged);
    mover.join().unwrap();
}

/// Takes a page out, or gives it back.
fn toggle(mmu: &HostMmu, staged: &Mutex<[bool; 8]>, number: u8) {
    let (place, slot) = (at(mmu, number.into()), Slot(number.into()));
    let mut staged = staged.lock().unwrap();
    let is_staged = &mut staged[usize::from(number)];
    let progress = if *is_staged {
        let progress = mmu.give_back(slot, 1, place);
        assert_eq!(progress.stop, None);
        progress
    } else {
        let progress = mmu.take_out(place, 1, slot);
        if progress.stop == Some(Stop::Busy) {
            mmu.unshare(place);
        }
        progress
    };
    *is_staged ^= progress.done == 1;
}
