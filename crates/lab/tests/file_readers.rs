//! Reading ahead, four cursors at once, against everybody else who uses the pages of a file, with their threads interleaved in
//! random orders; and for each a bug that must be found.
//!
//! ```text
//! RUSTFLAGS="--cfg shuttle" cargo test -p pgmap-lab --release --test file_readers
//! ORDERS=100000 RUSTFLAGS="--cfg shuttle" cargo test -p pgmap-lab --release --test file_readers
//! ```
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(shuttle)]

mod explore;
mod files;

use core::ops::ControlFlow;
use std::sync::Arc;

use explore::explore;
use files::{GROUP, MOST_PAGES, NEXT_BLOCK, NINES, PAGE, full_machine, spawn};
use pgmap_lab::disk::Operation;
use pgmap_lab::file_machine::{FileMachine, word};
use pgmap_lab::machine::Signal;
use pgmap_mm::backing::BackingError;
use pgmap_mm::page_cache::Group;
use pgmap_mm::page_table::PageIndex;
use pgmap_mm::seeded_bug::{SeededBug, seed};
use pgmap_mm::space::Worker;
use shuttle::sync::atomic::{AtomicBool, Ordering};
use shuttle::thread;

/// Frames for all that the scenarios read.
const FRAMES: u64 = 2 * MOST_PAGES as u64;

/// A thread that reads groups ahead, by a page of each.
fn reader<const N: usize>(machine: &Arc<FileMachine>, pages: [u32; N]) -> thread::JoinHandle<()> {
    spawn(machine, move |machine| {
        let mut worker = Worker::new();
        for page in pages {
            machine
                .cache
                .read_group(&mut worker, Group::of(PageIndex(page)));
        }
    })
}

/// Two read a group ahead of which a part is punched, a part is cut off and comes back, and all of it is used and reclaimed.
fn readers_against_removal() {
    let pages = GROUP + 1;
    let (machine, vma) = full_machine(FRAMES, pages as usize * PAGE);
    let (punched, cut) = (NEXT_BLOCK + 1, 2 * NEXT_BLOCK);
    let readers = [0, 1].map(|_| reader(&machine, [0]));
    let removed = Arc::new(AtomicBool::new(false));
    let program = {
        let removed = Arc::clone(&removed);
        spawn(&machine, move |machine| {
            let mut cpu = machine.cpu();
            for page in [punched, cut, 1] {
                let was_removed = removed.load(Ordering::SeqCst) && page != 1;
                match cpu.load(word(&vma, page, 0)) {
                    Ok(0) => assert_ne!(page, 1, "what is read ahead is the file's"),
                    Ok(found) => assert!(found == NINES && !was_removed, "removed bytes stay away"),
                    Err(signal) => assert!(signal == Signal::Bus && !was_removed, "{signal:?}"),
                }
            }
        })
    };
    let reclaimer = spawn(&machine, |machine| {
        machine.cache.shrink(2);
        machine.cache.shrink(2);
    });
    let bytes = |page: u32| u64::from(page) * PAGE as u64;
    let give_up = |_| ControlFlow::Break(());
    let hole = bytes(punched)..bytes(punched + 1);
    assert_eq!(machine.cache.punch(hole, give_up), Ok(()));
    assert_eq!(machine.cache.set_len(bytes(cut), give_up), Ok(()));
    assert_eq!(machine.cache.set_len(bytes(pages), give_up), Ok(()));
    removed.store(true, Ordering::SeqCst);
    let mut cpu = machine.cpu();
    for page in [punched, cut, GROUP] {
        let found = cpu.load(word(&vma, page, 0));
        assert_eq!(found, Ok(0), "removed bytes stay away");
    }
    for reader in readers {
        reader.join().unwrap();
    }
    program.join().unwrap();
    reclaimer.join().unwrap();
    let found = cpu.load(word(&vma, cut - 1, 0));
    assert_eq!(found, Ok(NINES), "what is read ahead is the file's");
    drop(cpu);
    machine.assert_empty();
}

/// FLT-2: pages that are read ahead while they are punched, cut off, used and reclaimed.
#[test]
fn what_is_removed_is_not_read_ahead() {
    explore(readers_against_removal);
}

/// A group that nobody has used is read ahead while one of its pages is punched.
fn reader_against_punch() {
    let (machine, vma) = full_machine(FRAMES, 2 * PAGE);
    let reader = reader(&machine, [0]);
    let hole = PAGE as u64..2 * PAGE as u64;
    let punched = machine.cache.punch(hole, |_| ControlFlow::Break(()));
    assert_eq!(punched, Ok(()));
    reader.join().unwrap();
    let mut cpu = machine.cpu();
    let found = cpu.load(word(&vma, 1, 0));
    assert_eq!(found, Ok(0), "removed bytes stay away");
    drop(cpu);
    machine.assert_empty();
}

/// FLT-2: what is punched is not read ahead, though nobody has used its block.
#[test]
fn what_is_punched_is_not_read_ahead() {
    explore(reader_against_punch);
}

/// FLT-2: `remove-stale-source`.
#[test]
#[should_panic = "removed"]
fn a_reader_that_ignores_a_truncation_is_found() {
    seed(SeededBug::ReadIgnoresTheBarrier);
    explore(reader_against_punch);
}

/// Pages of a group are stored to, written back and reclaimed while the group is read ahead (FLT-4).
fn readers_against_stores() {
    let (machine, vma) = full_machine(FRAMES, GROUP as usize * PAGE);
    let reader = reader(&machine, [0, 0]);
    let reclaimer = spawn(&machine, |machine| {
        for _ in 0..3 {
            machine.cache.shrink(1);
        }
    });
    let mut cpu = machine.cpu();
    for round in 1..3 {
        for page in [NEXT_BLOCK, 1] {
            assert_eq!(cpu.store(word(&vma, page, 0), round), Ok(()));
            let found = cpu.load(word(&vma, page, 0));
            assert_eq!(found, Ok(round), "what is in RAM is not read over");
        }
    }
    reader.join().unwrap();
    reclaimer.join().unwrap();
    for page in [NEXT_BLOCK, 1] {
        let found = cpu.load(word(&vma, page, 0));
        assert_eq!(found, Ok(2), "what is in RAM is not read over");
        let found = cpu.load(word(&vma, page, 1));
        assert_eq!(found, Ok(NINES), "what is in RAM is not read over");
    }
    let cached = (0..GROUP).filter(|page| machine.cache.peek(*page).cached().is_some());
    let (cached, counted) = (cached.count() as u64, machine.cache.cached_pages());
    assert_eq!(cached, counted, "what is in RAM is not read over");
    drop(cpu);
    machine.assert_empty();
}

/// FLT-4: no page that is in RAM is read over.
#[test]
fn readers_lose_no_store() {
    explore(readers_against_stores);
}

/// FLT-4: what is missing is looked for without the cursors.
#[test]
#[should_panic = "what is in RAM is not read over"]
fn a_reader_that_looks_first_is_found() {
    seed(SeededBug::ReadAheadLooksFirst);
    explore(readers_against_stores);
}

/// Groups whose blocks share their locks are read ahead at once, the last of them no whole one, while both are used and cut.
fn readers_against_readers() {
    let (machine, vma) = full_machine(FRAMES, MOST_PAGES as usize * PAGE);
    let last = MOST_PAGES - 1;
    let readers = [reader(&machine, [0, last]), reader(&machine, [last])];
    let program = spawn(&machine, move |machine| {
        let mut cpu = machine.cpu();
        for page in [last, 0] {
            let found = cpu.load(word(&vma, page, 0));
            assert_eq!(found, Ok(NINES), "what is read ahead is the file's");
        }
    });
    let hole = PAGE as u64..2 * PAGE as u64;
    let punched = machine.cache.punch(hole, |_| ControlFlow::Break(()));
    assert_eq!(punched, Ok(()));
    for reader in readers {
        reader.join().unwrap();
    }
    program.join().unwrap();
    machine.assert_empty();
}

/// Who holds the cursors of a group waits for nobody who waits for him.
#[test]
fn readers_do_not_wait_for_each_other() {
    explore(readers_against_readers);
}

/// Four cursors at once, in an order of one's own.
#[test]
#[should_panic = "deadlock"]
fn a_reader_that_locks_backwards_is_found() {
    seed(SeededBug::ReadersLockBackwards);
    explore(readers_against_readers);
}

/// The file cannot give some pages, to who reads ahead or to who needs them.
fn readers_against_errors() {
    let (machine, vma) = full_machine(FRAMES, GROUP as usize * PAGE);
    machine.disk.fail(Operation::Read, BackingError::Io(5));
    let reader = reader(&machine, [0]);
    let mut cpu = machine.cpu();
    let mut lost = 0;
    for page in [2 * NEXT_BLOCK, 0] {
        match cpu.load(word(&vma, page, 0)) {
            Ok(found) => assert_eq!(found, NINES, "what is read ahead is the file's"),
            Err(signal) => {
                assert_eq!(signal, Signal::Bus);
                lost += 1;
            }
        }
    }
    reader.join().unwrap();
    // A page for which nobody waits is not lost, and one for whom somebody does is.
    for page in [1, NEXT_BLOCK, 2 * NEXT_BLOCK + 1] {
        let found = cpu.load(word(&vma, page, 0));
        assert_eq!(found, Ok(NINES), "what is read ahead is the file's");
    }
    assert!(lost <= 1, "one read has failed");
    drop(cpu);
    machine.assert_empty();
}

/// FLT-1: what cannot be read ahead costs nobody anything.
#[test]
fn what_cannot_be_read_ahead_is_read_by_who_wants_it() {
    explore(readers_against_errors);
}

/// FLT-1, FLT-3: zeros in the place of what the file could not give.
#[test]
#[should_panic = "what is read ahead is the file's"]
fn a_reader_that_trusts_the_file_is_found() {
    seed(SeededBug::ReadAheadTrustsTheFile);
    explore(readers_against_errors);
}
