//! Writeback, sync and extension of a mapped file, with their threads interleaved in random orders; and for each a bug that must
//! be found.
//!
//! ```text
//! RUSTFLAGS="--cfg shuttle" cargo test -p pgmap-lab --release --test file_writeback
//! ORDERS=100000 RUSTFLAGS="--cfg shuttle" cargo test -p pgmap-lab --release --test file_writeback
//! ```
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(shuttle)]

mod explore;
mod files;

use core::ops::ControlFlow;
use std::sync::Arc;

use explore::explore;
use files::{NEXT_BLOCK, PAGE, SOUND, machine, pin, spawn, word_of};
use pgmap_lab::disk;
use pgmap_lab::file_machine::word;
use pgmap_lab::shared_memory;
use pgmap_mm::backing::BackingError;
use pgmap_mm::gup::Pin;
use pgmap_mm::mmu::Stop;
use pgmap_mm::page_cache::OnPinned;
use pgmap_mm::seeded_bug::{SeededBug, seed};
use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use shuttle::thread;

/// Two write the same page back, while a program stores: the newest bytes are in the file last.
fn writeback_against_writeback() {
    let (machine, vma) = machine(4, PAGE, SOUND);
    let mut cpu = machine.cpu();
    assert_eq!(cpu.store(word(&vma, 0, 0), 1), Ok(()));
    let flusher = spawn(&machine, |machine| {
        machine.cache.write_back(0..1, OnPinned::Skip);
    });
    for round in 2..4 {
        assert_eq!(cpu.store(word(&vma, 0, 0), round), Ok(()));
        machine.cache.write_back(0..1, OnPinned::Bounce);
        let written = word_of(&machine.disk.written(), 0, 0);
        assert_eq!(written, round, "the newest bytes");
    }
    flusher.join().unwrap();
    let written = word_of(&machine.disk.written(), 0, 0);
    assert_eq!(written, 3, "the newest bytes");
    drop(cpu);
    machine.assert_empty();
}

/// WB-2: older bytes never land last.
#[test]
fn older_bytes_never_land_last() {
    explore(writeback_against_writeback);
}

/// WB-2: two writes of one page at once.
#[test]
#[should_panic = "two transfers"]
fn a_writeback_of_pages_under_writeback_is_found() {
    seed(SeededBug::WritebackIgnoresWriteback);
    explore(writeback_against_writeback);
}

/// Stores through two mappings reach the file, whatever is cleaned meanwhile, and if one of them cannot be protected (WB-3).
fn two_mappings_against_clean(refuses: Option<Stop>) {
    let (machine, vma) = machine(4, 2 * PAGE, SOUND);
    let other = machine.map(1, &(0..2));
    let flusher = spawn(&machine, move |machine| {
        if let Some(stop) = refuses {
            machine
                .memory
                .refuse(shared_memory::Operation::Protect, stop);
        }
        machine.cache.write_back(0..2, OnPinned::Skip);
        machine.cache.write_back(0..2, OnPinned::Bounce);
    });
    let second = spawn(&machine, move |machine| {
        let mut cpu = machine.cpu();
        for round in 1..4 {
            assert_eq!(cpu.store(word(&other, 0, 1), round), Ok(()));
        }
    });
    let mut cpu = machine.cpu();
    for round in 1..4 {
        assert_eq!(cpu.store(word(&vma, 0, 0), round), Ok(()));
    }
    flusher.join().unwrap();
    second.join().unwrap();
    machine.memory.refuse_nothing();
    machine.sync(&mut Default::default()).unwrap();
    let durable = machine.disk.durable();
    for nth in 0..2 {
        assert_eq!(word_of(&durable, 0, nth), 3, "the last word stored");
    }
    machine.unmap(&other);
    drop(cpu);
    machine.assert_empty();
}

/// WB-3: `mkclean-two-vmas`.
#[test]
fn cleaning_is_all_or_nothing() {
    explore(|| two_mappings_against_clean(None));
}

/// WB-3: `mkclean-two-vmas`.
#[test]
#[should_panic = "the last word stored"]
fn a_cleaning_of_one_mapping_is_found() {
    seed(SeededBug::MkcleanStopsAtTheFirst);
    explore(|| two_mappings_against_clean(None));
}

/// WB-3: a mapping that cannot be protected keeps the page dirty.
#[test]
fn a_mapping_that_stays_writable_keeps_the_page_dirty() {
    explore(|| two_mappings_against_clean(Some(Stop::Other(12))));
}

/// Background writeback ends while somebody who waits for that has a page pinned (WB-1).
fn background_writeback_against_pins() {
    let (machine, vma) = machine(4, 2 * PAGE, SOUND);
    let mut cpu = machine.cpu();
    assert_eq!(cpu.store(word(&vma, 1, 0), 1), Ok(()));
    let pinned = pin(&mut cpu, word(&vma, 0, 0), &Pin::WRITE);
    let flusher = spawn(&machine, |machine| {
        machine.cache.write_back(0..2, OnPinned::Skip);
        machine.cache.write_some(1);
    });
    let syncer = spawn(&machine, |machine| {
        machine.sync(&mut Default::default()).unwrap();
    });
    flusher.join().unwrap();
    syncer.join().unwrap();
    drop(pinned);
    assert_eq!(word_of(&machine.disk.durable(), 1, 0), 1);
    drop(cpu);
    machine.assert_empty();
}

/// WB-1, WB-2: `mkclean-wait`.
#[test]
fn background_writeback_never_waits_for_a_pin() {
    explore(background_writeback_against_pins);
}

/// WB-1: `mkclean-wait`.
#[test]
#[should_panic = "max_steps"]
fn a_background_writeback_that_waits_is_found() {
    seed(SeededBug::BackgroundWaits);
    explore(background_writeback_against_pins);
}

/// What lies behind the end of a file is zeros when the file becomes longer, and what is stored afterwards stays (WB-5).
fn extension_against_stores() {
    let (machine, vma) = machine(4, PAGE + 64, SOUND);
    let mut cpu = machine.cpu();
    // Behind the end, in its page: nobody is ever to see it once that is in the file.
    assert_eq!(cpu.store(word(&vma, 1, 16), 7), Ok(()));
    let longer = Arc::new(AtomicBool::new(false));
    let flusher = spawn(&machine, |machine| {
        machine.cache.write_back(0..2, OnPinned::Bounce);
    });
    let program = {
        let longer = Arc::clone(&longer);
        spawn(&machine, move |machine| {
            let mut cpu = machine.cpu();
            let mut lasts = false;
            for _ in 0..2 {
                lasts |= longer.load(Ordering::SeqCst);
                assert_eq!(cpu.store(word(&vma, 1, 17), 8), Ok(()));
                let _ = cpu.load(word(&vma, 2, 0));
            }
            lasts
        })
    };
    let give_up = |_| ControlFlow::Break(());
    assert_eq!(machine.cache.set_len(3 * PAGE as u64, give_up), Ok(()));
    longer.store(true, Ordering::SeqCst);
    let added = cpu.load(word(&vma, 2, 0));
    assert_eq!(added, Ok(0), "a longer file can be used");
    let tail = cpu.load(word(&vma, 1, 16));
    assert_eq!(tail, Ok(0), "what is new is zeros");
    let lasts = program.join().unwrap();
    flusher.join().unwrap();
    let found = cpu.load(word(&vma, 1, 17)).unwrap();
    assert!(found == 8 || found == 0 && !lasts, "the last word stored");
    let added = cpu.load(word(&vma, 2, 0));
    assert_eq!(added, Ok(0), "a longer file can be used");
    machine.sync(&mut Default::default()).unwrap();
    let durable = machine.disk.durable();
    assert_eq!(word_of(&durable, 1, 16), 0, "what is new is zeros");
    assert_eq!(word_of(&durable, 1, 17), found, "the last word stored");
    drop(cpu);
    machine.assert_empty();
}

/// An access behind the end that is being answered while the file becomes longer leaves no SIGBUS behind (WB-5).
fn extension_against_faults() {
    let (machine, vma) = machine(2, PAGE, SOUND);
    // In another block than the old end.
    let page = NEXT_BLOCK;
    let program = spawn(&machine, move |machine| {
        let mut cpu = machine.cpu();
        let _ = cpu.load(word(&vma, page, 0));
    });
    let longer =
        machine.cache.set_len(
            u64::from(page + 1) * PAGE as u64,
            |_| ControlFlow::Break(()),
        );
    assert_eq!(longer, Ok(()));
    program.join().unwrap();
    let mut cpu = machine.cpu();
    let added = cpu.load(word(&vma, page, 0));
    assert_eq!(added, Ok(0), "a longer file can be used");
    drop(cpu);
    machine.assert_empty();
}

/// WB-5: what a file has gained can be used, whoever touched it before.
#[test]
fn a_longer_file_can_be_used() {
    explore(extension_against_faults);
}

/// WB-5: the SIGBUS of the old end stays.
#[test]
#[should_panic = "a longer file can be used"]
fn a_longer_file_that_ignores_faults_is_found() {
    seed(SeededBug::ExtendIgnoresFaults);
    explore(extension_against_faults);
}

/// WB-5: extending a file re-protects the page at the old end.
#[test]
fn what_a_longer_file_gains_is_zeros() {
    explore(extension_against_stores);
}

/// WB-5: bytes behind the old end show.
#[test]
#[should_panic = "what is new is zeros"]
fn a_longer_file_that_keeps_its_tail_is_found() {
    seed(SeededBug::ExtendKeepsTheTail);
    explore(extension_against_stores);
}

/// Whenever the power is cut, what sync returned for is there (WB-2), and after a crash of the program alone, too.
fn power_cut_against_writeback(flaw: disk::Flaw) {
    let (machine, vma) = machine(2, 3 * PAGE, flaw);
    let promised = Arc::new(AtomicU64::new(0));
    let flusher = spawn(&machine, |machine| {
        for _ in 0..2 {
            machine.cache.write_back(0..3, OnPinned::Skip);
        }
        machine.cache.shrink(2);
    });
    let power = {
        let promised = Arc::clone(&promised);
        spawn(&machine, move |machine| {
            for _ in 0..3 {
                let promised = promised.load(Ordering::SeqCst);
                for image in [machine.disk.durable(), machine.disk.written()] {
                    for page in 0..2 {
                        let word = word_of(&image, page, 1);
                        assert!(word >= promised, "what sync returned for is there");
                    }
                }
            }
        })
    };
    let mut cpu = machine.cpu();
    let mut seen = machine.cache.errors().sample();
    for round in 1..4 {
        for page in 0..2 {
            assert_eq!(cpu.store(word(&vma, page, 1), round), Ok(()));
        }
        machine.sync(&mut seen).unwrap();
        let durable = machine.disk.durable();
        for page in 0..2 {
            let word = word_of(&durable, page, 1);
            assert_eq!(word, round, "what sync returned for is there");
        }
        promised.store(round, Ordering::SeqCst);
        assert_eq!(cpu.store(word(&vma, 0, 2), round), Ok(()));
    }
    flusher.join().unwrap();
    power.join().unwrap();
    drop(cpu);
    machine.assert_empty();
}

/// WB-2: crash at any step of writeback and sync.
#[test]
fn what_sync_returned_for_is_there() {
    explore(|| power_cut_against_writeback(SOUND));
}

/// A sync returns when what somebody else was writing is in the file (WB-2).
fn sync_against_writeback() {
    let (machine, vma) = machine(4, PAGE, SOUND);
    let mut cpu = machine.cpu();
    assert_eq!(cpu.store(word(&vma, 0, 0), 1), Ok(()));
    let flusher = spawn(&machine, |machine| {
        machine.cache.write_back(0..1, OnPinned::Skip);
    });
    machine.sync(&mut Default::default()).unwrap();
    let durable = word_of(&machine.disk.durable(), 0, 0);
    assert_eq!(durable, 1, "what sync returned for is there");
    flusher.join().unwrap();
    drop(cpu);
    machine.assert_empty();
}

/// WB-2: sync against writeback in the background.
#[test]
fn sync_waits_for_what_others_write() {
    explore(sync_against_writeback);
}

/// WB-2: a sync returns for what somebody else still writes.
#[test]
#[should_panic = "what sync returned for is there"]
fn a_sync_that_waits_for_nobody_is_found() {
    seed(SeededBug::SyncIgnoresWriteback);
    explore(sync_against_writeback);
}

/// WB-2: the same checks find a disk that promises too early.
#[test]
#[should_panic = "what sync returned for is there"]
fn a_disk_that_never_syncs_is_found() {
    explore(|| power_cut_against_writeback(disk::Flaw::NeverSyncs));
}

/// A write that fails in the background is told to who syncs: no sync returns for bytes that are not there.
fn errors_against_sync() {
    let (machine, vma) = machine(4, 2 * PAGE, SOUND);
    let mut seen = machine.cache.errors().sample();
    let mut cpu = machine.cpu();
    assert_eq!(cpu.store(word(&vma, 0, 0), 1), Ok(()));
    let error = BackingError::NoSpace(28);
    machine.disk.fail(disk::Operation::Write, error);
    let flusher = spawn(&machine, |machine| {
        machine.cache.write_back(0..2, OnPinned::Skip);
    });
    let mut told = 0;
    while let Err(found) = machine.sync(&mut seen) {
        assert_eq!(found, error);
        told += 1;
    }
    let durable = word_of(&machine.disk.durable(), 0, 0);
    assert_eq!(durable, 1, "what sync returned for is there");
    flusher.join().unwrap();
    assert_eq!(told, 1, "what sync tells of, once");
    drop(cpu);
    machine.assert_empty();
}

/// WB-2: an error of background writeback is reported by the sync that waited for it.
#[test]
fn sync_tells_of_errors_in_the_background() {
    explore(errors_against_sync);
}

/// WB-2: an error is noted when nobody asks any more.
#[test]
#[should_panic = "what sync"]
fn errors_that_come_late_are_found() {
    seed(SeededBug::ErrorsComeLate);
    explore(errors_against_sync);
}

/// RAM loses a page while it is written, punched and read (WB-6): others keep theirs, and what was lost does not come back.
fn memory_failure_against_writeback() {
    let (machine, vma) = machine(4, 2 * PAGE, SOUND);
    let mut cpu = machine.cpu();
    assert_eq!(cpu.store(word(&vma, 0, 0), 1), Ok(()));
    assert_eq!(cpu.store(word(&vma, 1, 0), 1), Ok(()));
    let flusher = spawn(&machine, |machine| {
        machine.cache.write_back(0..2, OnPinned::Bounce);
    });
    let failure = spawn(&machine, |machine| {
        machine.cache.memory_failure(0);
    });
    let whole = 0..PAGE as u64;
    let punched = machine.cache.punch(whole, |_| {
        thread::yield_now();
        ControlFlow::Continue(())
    });
    assert_eq!(punched, Ok(()));
    flusher.join().unwrap();
    failure.join().unwrap();
    match cpu.load(word(&vma, 0, 0)) {
        Ok(found) => assert_eq!(found, 0, "removed bytes stay away"),
        Err(signal) => panic!("a punched page is sound again: {signal:?}"),
    }
    assert_eq!(cpu.load(word(&vma, 1, 0)), Ok(1), "the last word stored");
    drop(cpu);
    machine.assert_empty();
}

/// WB-6: a page that is lost while it is written.
#[test]
fn a_lost_page_costs_no_other() {
    explore(memory_failure_against_writeback);
}

/// WB-6: the bytes of a lost page land in a hole.
#[test]
#[should_panic = "removed"]
fn a_failure_that_ignores_writeback_is_found() {
    seed(SeededBug::FailureIgnoresWriteback);
    explore(memory_failure_against_writeback);
}
