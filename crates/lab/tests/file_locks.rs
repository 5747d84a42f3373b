//! What pins wait for, with those who look at all mappings or all pages of a range, and who wait for pins themselves, interleaved
//! in random orders; and for each a bug that must be found.
//!
//! ```text
//! RUSTFLAGS="--cfg shuttle" cargo test -p pgmap-lab --release --test file_locks
//! ```
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(shuttle)]

mod explore;
mod files;

use core::ops::ControlFlow;

use explore::explore;
use files::{PAGE, SOUND, machine, pin, spawn, word_of};
use pgmap_lab::file_machine::word;
use pgmap_mm::gup::Pin;
use pgmap_mm::page_cache::OnPinned;
use pgmap_mm::seeded_bug::{SeededBug, seed};

/// Pages are pinned while all their mappings are protected, removed and cut off.
fn pins_against_walks() {
    let (machine, vma) = machine(4, 3 * PAGE, SOUND);
    let other = machine.map(1, &(0..3));
    let mut cpu = machine.cpu();
    for page in 0..2 {
        assert_eq!(cpu.store(word(&vma, page, 0), 1), Ok(()));
        assert_eq!(cpu.load(word(&other, page, 0)), Ok(1));
    }
    let flusher = spawn(&machine, |machine| {
        machine.cache.write_back(0..3, OnPinned::Skip);
        machine.cache.shrink(1);
    });
    let device = spawn(&machine, move |machine| {
        let mut cpu = machine.cpu();
        for at in [word(&other, 0, 0), word(&vma, 1, 0)] {
            drop(pin(&mut cpu, at, &Pin::WRITE));
        }
    });
    let cut = machine
        .cache
        .set_len(2 * PAGE as u64, |_| ControlFlow::Break(()));
    assert_eq!(cut, Ok(()));
    flusher.join().unwrap();
    device.join().unwrap();
    machine.unmap(&other);
    drop(cpu);
    machine.assert_empty();
}

/// WB-7: `mkclean-abba`: who pins holds nothing for which a walk over mappings or pages waits.
#[test]
fn pins_and_walks_do_not_wait_for_each_other() {
    explore(pins_against_walks);
}

/// WB-7: `mkclean-abba`.
#[test]
#[should_panic = "deadlock"]
fn a_pin_that_locks_the_mappings_is_found() {
    seed(SeededBug::PinLocksTheMappings);
    explore(pins_against_walks);
}

/// A truncation and a sync are told to wait for a pin, and their callers wait for a device that needs another page first.
fn pins_against_callbacks() {
    let (machine, vma) = machine(4, 3 * PAGE, SOUND);
    let device = |machine: &_| {
        spawn(machine, move |machine| {
            let mut cpu = machine.cpu();
            let Ok(first) = cpu.pin(word(&vma, 1, 0), 1, &Pin::WRITE) else {
                // Too late: there is no such page any more.
                return;
            };
            // In the same block, in the range that is to go, and not in RAM.
            let second = cpu.pin(word(&vma, 2, 0), 1, &Pin::WRITE);
            machine.memory.dma(1).store(word(&vma, 1, 0), 7);
            drop((first, second));
        })
    };
    let mut first = Some(device(&machine));
    let mut join = |_| {
        let device = first.take();
        device.map_or(ControlFlow::Break(()), |device| {
            device.join().unwrap();
            ControlFlow::Continue(())
        })
    };
    machine.cache.write_back(0..3, OnPinned::Wait(&mut join));
    if let Some(device) = first {
        device.join().unwrap();
    }
    machine.sync(&mut Default::default()).unwrap();
    let written = word_of(&machine.disk.durable(), 1, 0);
    assert_eq!(written, 7, "what the device wrote");
    let mut second = Some(device(&machine));
    let cut = machine.cache.set_len(PAGE as u64, |_| {
        if let Some(device) = second.take() {
            device.join().unwrap();
        }
        ControlFlow::Continue(())
    });
    assert_eq!(cut, Ok(()));
    if let Some(device) = second {
        device.join().unwrap();
    }
    machine.assert_empty();
}

/// WB-7, WB-2, WB-5: who is called back may wait for those who pin.
#[test]
fn callbacks_may_wait_for_pins() {
    explore(pins_against_callbacks);
}

/// WB-7: a callback with the range closed.
#[test]
#[should_panic = "deadlock"]
fn a_truncation_that_waits_closed_is_found() {
    seed(SeededBug::TruncateWaitsClosed);
    explore(pins_against_callbacks);
}
