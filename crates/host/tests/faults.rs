//! What the thread that serves faults is told, and what waiting accesses see.
#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it should be"
)]

mod common;

use core::time::Duration;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use common::{arena, at, bytes, install, page, poke, syscall_reads};
use pgmap_core::addr::PAGE_SIZE;
use pgmap_host::event::Event;
use pgmap_host::mmu::HostMmu;
use pgmap_mm::fault::Access;
use pgmap_mm::mmu::{Mmu, Progress, Protect};

fn next(mmu: &HostMmu) -> Event {
    let mut events = [Event::Kick];
    assert_eq!(mmu.next_events(&mut events, Some(5000)), 1, "no event came");
    let [event] = events;
    event
}

fn tid() -> u32 {
    let tid = rustix::thread::gettid();
    tid.as_raw_nonzero().get().cast_unsigned()
}

/// Does something on another thread, which may have to wait. Answers the thread, and its kernel's number.
fn meanwhile<T: Send + 'static>(
    mmu: &Arc<HostMmu>,
    run: impl FnOnce(&HostMmu) -> T + Send + 'static,
) -> (thread::JoinHandle<T>, u32) {
    let mmu = Arc::clone(mmu);
    let (sender, receiver) = std::sync::mpsc::channel();
    let thread = thread::spawn(move || {
        sender.send(tid()).unwrap();
        run(&mmu)
    });
    (thread, receiver.recv().unwrap())
}

#[test]
fn a_read_waits_for_its_page() {
    let Some(mmu) = arena(16).map(Arc::new) else {
        return;
    };
    let (reader, reader_tid) = meanwhile(&mmu, |mmu| bytes(mmu, 3));
    let Event::Fault {
        at: place,
        access,
        tid,
    } = next(&mmu)
    else {
        panic!("not a fault");
    };
    assert_eq!(
        (place, access, tid),
        (at(&mmu, 3), Access::Read, reader_tid)
    );
    install(&mmu, 3, 9..10, Protect::ReadWrite);
    assert_eq!(reader.join().unwrap().0, page(9).0);
}

#[test]
fn a_system_call_waits_for_its_page() {
    let Some(mmu) = arena(16).map(Arc::new) else {
        return;
    };
    let (reader, _) = meanwhile(&mmu, |mmu| syscall_reads(mmu, 3).unwrap());
    assert!(matches!(next(&mmu), Event::Fault { .. }));
    install(&mmu, 3, 9..10, Protect::ReadWrite);
    assert_eq!(reader.join().unwrap(), PAGE_SIZE);
}

#[test]
fn the_first_write_to_a_clean_page_is_an_event() {
    let Some(mmu) = arena(16).map(Arc::new) else {
        return;
    };
    install(&mmu, 0, 1..2, Protect::ReadOnly);
    assert_eq!(bytes(&mmu, 0).0, page(1).0);
    let (writer, _) = meanwhile(&mmu, |mmu| poke(mmu, 0, 42));
    let Event::Fault { access, .. } = next(&mmu) else {
        panic!("not a fault");
    };
    assert_eq!(access, Access::WriteProtected);
    assert_eq!(bytes(&mmu, 0).0, page(1).0);
    mmu.unprotect(at(&mmu, 0), 1);
    writer.join().unwrap();
    assert_eq!(bytes(&mmu, 0).0[0], 42);
}

#[test]
fn a_write_to_a_missing_page_says_so_and_giving_back_wakes_it() {
    let Some(mmu) = arena(16).map(Arc::new) else {
        return;
    };
    install(&mmu, 0, 1..2, Protect::ReadWrite);
    let slot = pgmap_mm::mmu::Slot(0);
    assert_eq!(mmu.take_out(at(&mmu, 0), 1, slot), Progress::complete(1));
    let (writer, _) = meanwhile(&mmu, |mmu| poke(mmu, 0, 42));
    let Event::Fault { access, .. } = next(&mmu) else {
        panic!("not a fault");
    };
    assert_eq!(access, Access::Write);
    assert_eq!(mmu.give_back(slot, 1, at(&mmu, 0)), Progress::complete(1));
    writer.join().unwrap();
    assert_eq!(bytes(&mmu, 0).0[1..], page(1).0[1..]);
}

#[test]
fn somebody_woken_in_vain_faults_again() {
    let Some(mmu) = arena(16).map(Arc::new) else {
        return;
    };
    let (reader, _) = meanwhile(&mmu, |mmu| bytes(mmu, 3));
    assert!(matches!(next(&mmu), Event::Fault { .. }));
    mmu.wake(at(&mmu, 3), 1);
    assert!(matches!(next(&mmu), Event::Fault { .. }));
    install(&mmu, 3, 9..10, Protect::ReadWrite);
    assert_eq!(reader.join().unwrap().0, page(9).0);
}

/// FLT-1: a lost page is an error, and it can be used again once it has been discarded.
#[test]
fn a_poisoned_page_is_an_error_until_it_is_zapped() {
    let Some(mmu) = arena(16) else { return };
    assert_eq!(mmu.poison(at(&mmu, 0), 2), Progress::complete(2));
    let error = syscall_reads(&mmu, 1).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    mmu.zap(at(&mmu, 1), 1);
    install(&mmu, 1, 5..6, Protect::ReadWrite);
    assert_eq!(bytes(&mmu, 1).0, page(5).0);
    assert!(syscall_reads(&mmu, 0).is_err());
}

#[test]
fn a_kick_and_the_end_of_patience_end_the_wait() {
    let Some(mmu) = arena(16).map(Arc::new) else {
        return;
    };
    let mut events = [Event::Kick, Event::Kick];
    let start = Instant::now();
    assert_eq!(mmu.next_events(&mut events, Some(20)), 0);
    assert!(start.elapsed() >= Duration::from_millis(20));
    let (kicker, _) = meanwhile(&mmu, HostMmu::kick);
    assert_eq!(mmu.next_events(&mut events, None), 1);
    assert!(matches!(events[0], Event::Kick));
    kicker.join().unwrap();
}
