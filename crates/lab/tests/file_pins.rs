//! Pins, faults, reclaim and truncation of a mapped file, with their threads interleaved in random orders; and for each a bug
//! that must be found.
//!
//! ```text
//! RUSTFLAGS="--cfg shuttle" cargo test -p pgmap-lab --release --test file_pins
//! ORDERS=100000 RUSTFLAGS="--cfg shuttle" cargo test -p pgmap-lab --release --test file_pins
//! ```
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(shuttle)]

mod explore;
mod files;

use core::ops::ControlFlow;
use std::sync::Arc;

use explore::explore;
use files::{NEXT_BLOCK, NINES, PAGE, SOUND, full_machine, machine, pin, spawn, word_of};
use pgmap_lab::file_machine::word;
use pgmap_lab::machine::Signal;
use pgmap_mm::gup::Pin;
use pgmap_mm::page_cache::OnPinned;
use pgmap_mm::seeded_bug::{SeededBug, seed};
use shuttle::sync::atomic::{AtomicBool, Ordering};
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
            "a pinned page keeps everything, what the device wrote too"
        );
    }
    drop(pinned);
    assert_eq!(cpu.load(at), Ok(2), "what the device wrote");
    reclaimer.join().unwrap();
    program.join().unwrap();
    machine.sync(&mut Default::default()).unwrap();
    let written = word_of(&machine.disk.durable(), 0, 0);
    assert_eq!(written, 2, "what the device wrote");
    drop(cpu);
    machine.assert_empty();
}

/// GUP-3, RMAP-1, WB-4: `unmap-check-then-act`, `evict-under-dma`, `ext4-1899`.
#[test]
fn pinned_pages_of_files_stay() {
    explore(pins_against_evict);
}

/// GUP-3: `evict-under-dma`.
#[test]
#[should_panic = "a pinned page"]
fn an_eviction_under_dma_is_found() {
    seed(SeededBug::ClaimIgnoresPins);
    explore(pins_against_evict);
}

/// A clean page that nobody maps stays while somebody has it pinned to read (RMAP-1).
fn read_pins_against_evict() {
    let (machine, vma) = full_machine(2, 2 * PAGE);
    let mut cpu = machine.cpu();
    let at = word(&vma, 0, 0);
    drop(pin(&mut cpu, at, &Pin::READ));
    let reclaimer = spawn(&machine, |machine| {
        machine.cache.shrink(1);
        machine.cache.shrink(1);
    });
    for _ in 0..2 {
        let pinned = pin(&mut cpu, at, &Pin::READ);
        let dma = machine.memory.dma(0);
        thread::yield_now();
        assert_eq!(dma.load(at), NINES, "a pinned page stays");
        drop(pinned);
    }
    reclaimer.join().unwrap();
    drop(cpu);
    machine.assert_empty();
}

/// RMAP-1: pins that need no lock.
#[test]
fn clean_pinned_pages_stay() {
    explore(read_pins_against_evict);
}

/// RMAP-1: `unmap-check-then-act`.
#[test]
#[should_panic = "a pinned page stays"]
fn an_eviction_that_looks_first_is_found() {
    seed(SeededBug::ClaimLooksFirst);
    explore(read_pins_against_evict);
}

/// WB-4: `ext4-1899`.
#[test]
#[should_panic = "what the device wrote"]
fn a_reclaim_that_strips_pinned_pages_is_found() {
    seed(SeededBug::ReclaimStripsPinned);
    explore(pins_against_evict);
}

/// Reclaim that has found pages pinned finds them again when they are not.
fn reclaim_against_pins() {
    let (machine, vma) = machine(4, 2 * PAGE, SOUND);
    let mut cpu = machine.cpu();
    assert_eq!(cpu.store(word(&vma, 0, 0), 1), Ok(()));
    let device = spawn(&machine, move |machine| {
        let mut cpu = machine.cpu();
        let pinned = pin(&mut cpu, word(&vma, 1, 0), &Pin::WRITE);
        thread::yield_now();
        drop(pinned);
    });
    for _ in 0..3 {
        machine.cache.shrink(2);
    }
    device.join().unwrap();
    machine.cache.shrink(2);
    let left = machine.cache.cached_pages();
    assert_eq!(left, 0, "what was pinned can leave afterwards");
    drop(cpu);
    machine.assert_empty();
}

/// WB-4: a page's place in the lists survives a pin.
#[test]
fn what_was_pinned_can_leave_afterwards() {
    explore(reclaim_against_pins);
}

/// WB-4: pinned pages are dropped from the lists.
#[test]
#[should_panic = "what was pinned can leave afterwards"]
fn a_reclaim_that_forgets_pinned_pages_is_found() {
    seed(SeededBug::ReclaimForgetsPinned);
    explore(reclaim_against_pins);
}

/// What a device wrote reaches the file, whatever was cleaned meanwhile (GUP-4).
fn pins_against_clean() {
    let (machine, vma) = machine(4, PAGE, SOUND);
    let mut cpu = machine.cpu();
    let at = word(&vma, 0, 0);
    // Dirty already: the pin needs no lock.
    assert_eq!(cpu.store(at, 1), Ok(()));
    let flusher = spawn(&machine, |machine| {
        machine.cache.write_back(0..1, OnPinned::Skip);
    });
    let pinned = pin(&mut cpu, at, &Pin::WRITE);
    let dma = machine.memory.dma(0);
    flusher.join().unwrap();
    dma.store(at, 2);
    drop(pinned);
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

/// GUP-4: `wp-bypass`.
#[test]
#[should_panic = "what the device wrote"]
fn a_cleaning_of_pinned_pages_is_found() {
    seed(SeededBug::ClaimIgnoresPins);
    explore(pins_against_clean);
}

/// GUP-4, RMAP-1: `wp-bypass`, by a pin that comes after the look.
#[test]
#[should_panic = "what the device wrote"]
fn a_cleaning_that_looks_first_is_found() {
    seed(SeededBug::ClaimLooksFirst);
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

/// WB-5: `truncate-end-zero`.
#[test]
#[should_panic = "a pinned page stays"]
fn an_end_that_is_nothing_is_found() {
    seed(SeededBug::TruncateEndIsNothing);
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

/// FLT-2: punched and cut pages, read and reclaimed meanwhile.
#[test]
fn removed_bytes_stay_away() {
    explore(faults_against_removal);
}

/// A hole is punched to the end of a file that somebody makes shorter.
fn punch_against_truncate() {
    let (machine, _) = machine(4, 3 * PAGE, SOUND);
    let give_up = |_| ControlFlow::Break(());
    let puncher = spawn(&machine, move |machine| {
        let page = PAGE as u64;
        assert_eq!(machine.cache.punch(page..3 * page, give_up), Ok(()));
    });
    assert_eq!(machine.cache.set_len(2 * PAGE as u64, give_up), Ok(()));
    puncher.join().unwrap();
    let written = machine.disk.written();
    assert_eq!(written.len(), 2 * PAGE);
    assert_eq!(word_of(&written, 1, 0), 0);
    machine.assert_empty();
}

/// WB-5: what is punched to the end of a file leaves the file as short as somebody has made it meanwhile.
#[test]
fn a_punch_lengthens_no_file() {
    explore(punch_against_truncate);
}

/// A page of a block that nobody has touched is read in while it is cut off, and does not come back with the file (FLT-2).
fn first_faults_against_truncate() {
    let start = NEXT_BLOCK as usize * PAGE;
    let end = (start + PAGE) as u64;
    let (machine, vma) = full_machine(2, start + PAGE);
    let reader = spawn(&machine, move |machine| {
        let _ = machine.cpu().load(word(&vma, NEXT_BLOCK, 0));
    });
    let give_up = |_| ControlFlow::Break(());
    assert_eq!(machine.cache.set_len(start as u64, give_up), Ok(()));
    assert_eq!(machine.cache.set_len(end, give_up), Ok(()));
    reader.join().unwrap();
    let mut cpu = machine.cpu();
    let found = cpu.load(word(&vma, NEXT_BLOCK, 0));
    assert_eq!(found, Ok(0), "removed bytes stay away");
    drop(cpu);
    machine.assert_empty();
}

/// FLT-2: `remove-stale-source`.
#[test]
fn what_is_read_while_it_is_cut_stays_away() {
    explore(first_faults_against_truncate);
}

/// FLT-2: `remove-stale-source`.
#[test]
#[should_panic = "removed"]
fn a_read_that_ignores_a_truncation_is_found() {
    seed(SeededBug::ReadIgnoresTheBarrier);
    explore(first_faults_against_truncate);
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

/// A pin that comes too late, and goes at once, is no obstacle to a truncation that is under way; one that came before it keeps
/// its page (WB-5, REF-5).
fn late_pins_against_truncate() {
    let (machine, vma) = full_machine(4, 2 * PAGE);
    let at = word(&vma, 1, 0);
    let mut cpu = machine.cpu();
    assert_eq!(cpu.load(at), Ok(NINES));
    let late = spawn(&machine, move |machine| {
        let mut cpu = machine.cpu();
        for _ in 0..2 {
            let Ok(pinned) = cpu.pin(at, 1, &Pin::READ) else {
                continue;
            };
            let dma = machine.memory.dma(1);
            thread::yield_now();
            assert_eq!(dma.load(at), NINES, "a pinned page stays");
            drop(pinned);
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

/// WB-5: a pin comes after the look.
#[test]
#[should_panic = "a pinned page stays"]
fn a_pin_that_ignores_a_truncation_is_found() {
    seed(SeededBug::PinIgnoresTheBarrier);
    explore(late_pins_against_truncate);
}
