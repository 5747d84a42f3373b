//! The protocols of the page cache, with their threads interleaved in random orders.
//!
//! ```text
//! RUSTFLAGS="--cfg shuttle" cargo test -p pgmap-lab --release --test file_interleavings
//! ORDERS=100000 RUSTFLAGS="--cfg shuttle" cargo test -p pgmap-lab --release --test file_interleavings
//! ```
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(shuttle)]

mod explore;
mod files;

use core::ops::ControlFlow;
use std::sync::Arc;

use explore::explore;
use files::{PAGE, SOUND, machine, pin, spawn, word_of};
use pgmap_lab::disk;
use pgmap_lab::file_machine::word;
use pgmap_lab::machine::Signal;
use pgmap_lab::shared_memory;
use pgmap_mm::backing::BackingError;
use pgmap_mm::gup::Pin;
use pgmap_mm::mmu::Stop;
use pgmap_mm::page_cache::OnPinned;
use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use shuttle::thread;

/// What a device writes to a pinned page is what the program and the file have (GUP-3, RMAP-1, WB-4).
fn pins_against_evict() {
    let (machine, vma) = machine(2, 3 * PAGE, SOUND);
    let reclaimer = spawn(&machine, |machine| {
        for _ in 0..3 {
            machine.cache.shrink(1);
        }
    });
    let program = spawn(&machine, move |machine| {
        let mut cpu = machine.cpu();
        for page in [1, 2, 1] {
            assert_eq!(cpu.store(word(&vma, page, 1), 1), Ok(()));
        }
    });
    let mut cpu = machine.cpu();
    let at = word(&vma, 0, 0);
    let pinned = pin(&mut cpu, at, &Pin::WRITE);
    let dma = machine.memory.dma(0);
    for round in 1..3 {
        dma.store(at, round);
        thread::yield_now();
        assert_eq!(dma.load(at), round, "a pinned page stays");
        let entry = machine.cache.peek(0).cached();
        assert!(
            entry.is_some_and(|page| page.is_dirty()),
            "a pinned page keeps everything"
        );
    }
    drop(pinned);
    assert_eq!(cpu.load(at), Ok(2), "what the device wrote");
    reclaimer.join().unwrap();
    program.join().unwrap();
    machine.sync(&mut Default::default()).unwrap();
    assert_eq!(word_of(&machine.disk.durable(), 0, 0), 2);
    drop(cpu);
    machine.assert_empty();
}

/// GUP-3, RMAP-1, WB-4: `unmap-check-then-act`, `evict-under-dma`, `ext4-1899`.
#[test]
fn pinned_pages_of_files_stay() {
    explore(pins_against_evict);
}

/// What a device wrote reaches the file, whatever was cleaned meanwhile (GUP-4).
fn pins_against_clean() {
    let (machine, vma) = machine(4, 2 * PAGE, SOUND);
    let flusher = spawn(&machine, |machine| {
        machine.cache.write_back(0..2, OnPinned::Skip);
        machine.cache.write_some(1);
    });
    let mut cpu = machine.cpu();
    let at = word(&vma, 0, 0);
    for round in 1..3 {
        let pinned = pin(&mut cpu, at, &Pin::WRITE);
        let dma = machine.memory.dma(0);
        thread::yield_now();
        dma.store(at, round);
        drop(pinned);
    }
    flusher.join().unwrap();
    machine.sync(&mut Default::default()).unwrap();
    let written = word_of(&machine.disk.durable(), 0, 0);
    assert_eq!(written, 2, "what the device wrote");
    drop(cpu);
    machine.assert_empty();
}

/// GUP-4: `wp-bypass`.
#[test]
fn pinned_pages_are_never_taken_for_clean() {
    explore(pins_against_clean);
}

/// Somebody pins a page, as long as there is one, while it is cut off and punched (WB-5, GUP-3).
fn pins_against_truncate() {
    let (machine, vma) = machine(4, 3 * PAGE, SOUND);
    let device = spawn(&machine, move |machine| {
        let mut cpu = machine.cpu();
        let at = word(&vma, 2, 0);
        for round in 1..4 {
            let Ok(pinned) = cpu.pin(at, 1, &Pin::WRITE) else {
                continue;
            };
            let dma = machine.memory.dma(2);
            dma.store(at, round);
            thread::yield_now();
            assert_eq!(dma.load(at), round, "a pinned page stays");
            drop(pinned);
        }
    });
    let reader = spawn(&machine, move |machine| {
        // Pins that come and go at once.
        let mut cpu = machine.cpu();
        for page in [2, 1, 2] {
            drop(cpu.pin(word(&vma, page, 0), 1, &Pin::READ));
        }
    });
    let keep_waiting = |_| {
        thread::yield_now();
        ControlFlow::Continue(())
    };
    let bytes = 2 * PAGE as u64..3 * PAGE as u64;
    assert_eq!(machine.cache.punch(bytes, keep_waiting), Ok(()));
    assert_eq!(machine.cache.set_len(PAGE as u64, keep_waiting), Ok(()));
    assert_eq!(machine.disk.written().len(), PAGE);
    assert_eq!(machine.cache.set_len(0, keep_waiting), Ok(()));
    device.join().unwrap();
    reader.join().unwrap();
    assert_eq!(machine.cache.cached_pages(), 0, "nothing is left");
    machine.assert_empty();
}

/// WB-5: `truncate-end-zero`, and pins that come while a range is looked at.
#[test]
fn truncation_waits_for_pins() {
    explore(pins_against_truncate);
}

/// Who reads a page that was punched, or cut off and added again, never reads old bytes (FLT-2).
fn faults_against_removal() {
    let (machine, vma) = machine(2, 3 * PAGE, SOUND);
    let mut cpu = machine.cpu();
    for page in [1, 2] {
        assert_eq!(cpu.store(word(&vma, page, 0), 9), Ok(()));
    }
    machine.sync(&mut Default::default()).unwrap();
    let removed = Arc::new(AtomicBool::new(false));
    let readers = [1, 2].map(|page| {
        let removed = Arc::clone(&removed);
        spawn(&machine, move |machine| {
            let mut cpu = machine.cpu();
            for _ in 0..3 {
                let was_removed = removed.load(Ordering::SeqCst);
                match cpu.load(word(&vma, page, 0)) {
                    Ok(0) => {}
                    Ok(_) => assert!(!was_removed, "removed bytes stay away"),
                    Err(signal) => assert!(signal == Signal::Bus && !was_removed, "{signal:?}"),
                }
            }
        })
    });
    let reclaimer = spawn(&machine, |machine| {
        machine.cache.shrink(1);
        machine.cache.shrink(1);
    });
    let give_up = |_| ControlFlow::Break(());
    let (page, end) = (PAGE as u64, 3 * PAGE as u64);
    assert_eq!(machine.cache.punch(page..2 * page, give_up), Ok(()));
    assert_eq!(machine.cache.set_len(2 * page, give_up), Ok(()));
    assert_eq!(machine.cache.set_len(end, give_up), Ok(()));
    removed.store(true, Ordering::SeqCst);
    for page in [2, 1] {
        let found = cpu.load(word(&vma, page, 0));
        assert_eq!(found, Ok(0), "removed bytes stay away");
    }
    for reader in readers {
        reader.join().unwrap();
    }
    reclaimer.join().unwrap();
    drop(cpu);
    machine.assert_empty();
}

/// FLT-2: `remove-stale-source`.
#[test]
fn removed_bytes_stay_away() {
    explore(faults_against_removal);
}

/// Two write the same pages back, while a program stores: the newest bytes are in the file last.
fn writeback_against_writeback() {
    let (machine, vma) = machine(4, 2 * PAGE, SOUND);
    let flushers = [
        spawn(&machine, |machine| {
            machine.cache.write_back(0..2, OnPinned::Skip)
        }),
        spawn(&machine, |machine| {
            machine.cache.write_back(0..2, OnPinned::Bounce)
        }),
    ];
    let mut cpu = machine.cpu();
    for round in 1..4 {
        assert_eq!(cpu.store(word(&vma, 0, 0), round), Ok(()));
        machine.cache.write_back(0..1, OnPinned::Bounce);
        let written = word_of(&machine.disk.written(), 0, 0);
        assert_eq!(written, round, "the newest bytes");
    }
    for flusher in flushers {
        flusher.join().unwrap();
    }
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

/// A program finds what it stored last, with fewer frames than pages, while all is reclaimed and written back (FLT-4).
fn faults_against_shrink() {
    let (machine, vma) = machine(2, 3 * PAGE, SOUND);
    let reclaimer = spawn(&machine, |machine| {
        for _ in 0..2 {
            machine.cache.shrink(1);
        }
        machine.cache.write_back(0..3, OnPinned::Bounce);
    });
    let programs = [0, 1].map(|page| {
        spawn(&machine, move |machine| {
            let mut cpu = machine.cpu();
            for round in 1..3 {
                let own = word(&vma, page, 0);
                let shared = word(&vma, 2, page as usize + 1);
                assert_eq!(cpu.store(own, round), Ok(()));
                assert_eq!(cpu.store(shared, round), Ok(()));
                assert_eq!(cpu.load(own), Ok(round), "the last word stored");
                assert_eq!(cpu.load(shared), Ok(round), "the last word stored");
            }
        })
    });
    for program in programs {
        program.join().unwrap();
    }
    reclaimer.join().unwrap();
    machine.sync(&mut Default::default()).unwrap();
    let durable = machine.disk.durable();
    assert_eq!(word_of(&durable, 2, 1), 2, "the last word stored");
    assert_eq!(word_of(&durable, 1, 0), 2, "the last word stored");
    machine.assert_empty();
}

/// FLT-4: no dirty page is dropped.
#[test]
fn faults_and_reclaim_of_files_lose_no_store() {
    explore(faults_against_shrink);
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
    let program = spawn(&machine, move |machine| {
        let mut cpu = machine.cpu();
        let _ = cpu.load(word(&vma, 1, 0));
    });
    let longer = machine
        .cache
        .set_len(2 * PAGE as u64, |_| ControlFlow::Break(()));
    assert_eq!(longer, Ok(()));
    program.join().unwrap();
    let mut cpu = machine.cpu();
    let added = cpu.load(word(&vma, 1, 0));
    assert_eq!(added, Ok(0), "a longer file can be used");
    drop(cpu);
    machine.assert_empty();
}

/// WB-5: what a file has gained can be used, whoever touched it before.
#[test]
fn a_longer_file_can_be_used() {
    explore(extension_against_faults);
}

/// A pin that comes too late, and goes at once, is no obstacle to a truncation that is under way (WB-5, REF-5).
fn late_pins_against_truncate() {
    let (machine, vma) = machine(4, 2 * PAGE, SOUND);
    let mut cpu = machine.cpu();
    assert_eq!(cpu.load(word(&vma, 1, 0)), Ok(0));
    let late = spawn(&machine, move |machine| {
        let mut cpu = machine.cpu();
        for _ in 0..2 {
            drop(cpu.pin(word(&vma, 1, 0), 1, &Pin::READ));
        }
    });
    let cut = machine.cache.set_len(PAGE as u64, |_| {
        thread::yield_now();
        ControlFlow::Continue(())
    });
    assert_eq!(cut, Ok(()));
    late.join().unwrap();
    drop(cpu);
    machine.assert_empty();
}

/// WB-5, REF-5: pins that come while a closed range is dropped.
#[test]
fn late_pins_do_not_disturb_truncation() {
    explore(late_pins_against_truncate);
}

/// WB-5: extending a file re-protects the page at the old end.
#[test]
fn what_a_longer_file_gains_is_zeros() {
    explore(extension_against_stores);
}

/// Whenever the power is cut, what sync returned for is there (WB-2), and after a crash of the program alone, too.
fn power_cut_against_writeback(flaw: disk::Flaw) {
    let (machine, vma) = machine(2, 3 * PAGE, flaw);
    let promised = Arc::new(AtomicU64::new(0));
    let flusher = spawn(&machine, |machine| {
        machine.cache.write_back(0..3, OnPinned::Skip);
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
        promised.store(round, Ordering::SeqCst);
        assert_eq!(cpu.store(word(&vma, 0, 2), round), Ok(()));
    }
    let durable = machine.disk.durable();
    for page in 0..2 {
        let word = word_of(&durable, page, 1);
        assert!(word >= 3, "what sync returned for is there");
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
    assert_eq!(told, 1, "each is told once");
    drop(cpu);
    machine.assert_empty();
}

/// WB-2: an error of background writeback is reported by the sync that waited for it.
#[test]
fn sync_tells_of_errors_in_the_background() {
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
