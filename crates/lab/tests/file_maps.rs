//! Mappings of a file that come and go, and such as may only be read, while their pages are used, pinned and taken away, with
//! their threads interleaved in random orders; and for each a bug that must be found.
//!
//! ```text
//! RUSTFLAGS="--cfg shuttle" cargo test -p pgmap-lab --release --test file_maps
//! ```
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(shuttle)]

mod explore;
mod files;

use core::ops::ControlFlow;

use explore::explore;
use files::{NINES, PAGE, SOUND, full_machine, machine, pin, spawn, word_of};
use pgmap_lab::file_machine::word;
use pgmap_lab::machine::Signal;
use pgmap_mm::gup::{Pin, PinError, pin_user_pages_fast};
use pgmap_mm::page_cache::{OnPinned, VmaAccess};
use pgmap_mm::pinning::Pinning;
use pgmap_mm::seeded_bug::{SeededBug, seed};
use shuttle::thread;

/// A mapping goes, and another takes its addresses, while somebody faults there and pages are reclaimed.
fn faults_against_unmap() {
    let (machine, vma) = machine(3, 3 * PAGE, SOUND);
    let mut cpu = machine.cpu();
    for page in 0..3 {
        let stored = cpu.store(word(&vma, page, 0), u64::from(page) + 1);
        assert_eq!(stored, Ok(()));
    }
    let old = machine.map(1, &(0..1));
    let program = spawn(&machine, move |machine| {
        let mut cpu = machine.cpu();
        for _ in 0..3 {
            let found = cpu.load(word(&old, 0, 0));
            let known = matches!(found, Ok(1 | 3) | Err(Signal::Segv));
            assert!(known, "an address shows its own file's page: {found:?}");
        }
    });
    let reclaimer = spawn(&machine, |machine| {
        machine.cache.write_back(0..3, OnPinned::Skip);
        machine.cache.shrink(1);
    });
    machine.unmap(&old);
    let new = machine.map(1, &(2..3));
    let found = cpu.load(word(&new, 0, 0));
    assert_eq!(found, Ok(3), "an address shows its own file's page");
    program.join().unwrap();
    reclaimer.join().unwrap();
    machine.unmap(&new);
    drop(cpu);
    machine.assert_empty();
}

/// FLT-2: faults on a mapping of a file that is being unmapped.
#[test]
fn nothing_is_mapped_where_a_mapping_has_gone() {
    explore(faults_against_unmap);
}

/// FLT-2: what was found for one mapping is done to the next.
#[test]
#[should_panic = "in no mapping of the file"]
fn a_fault_that_trusts_its_address_is_found() {
    seed(SeededBug::FaultTrustsTheAddress);
    explore(faults_against_unmap);
}

/// FLT-2: a page is mapped where another file, or nobody, may be by now.
#[test]
#[should_panic = "in no mapping of the file"]
fn a_fault_that_outlives_its_mapping_is_found() {
    seed(SeededBug::FaultOutlivesTheMapping);
    explore(faults_against_unmap);
}

/// A mapping whose pages are pinned stays until they are not.
fn pins_against_unmap() {
    let (machine, vma) = machine(3, 2 * PAGE, SOUND);
    let other = machine.map(1, &(0..2));
    let at = word(&other, 1, 0);
    let device = spawn(&machine, move |machine| {
        let mut cpu = machine.cpu();
        for round in 1..3 {
            let Ok(pinned) = cpu.pin(at, 1, &Pin::WRITE) else {
                continue;
            };
            machine.memory.dma(1).store(at, round);
            let found = cpu.load(at);
            assert_eq!(found, Ok(round), "the addresses of a pinned page stay");
            drop(pinned);
        }
    });
    let reclaimer = spawn(&machine, |machine| {
        machine.cache.shrink(1);
        machine.cache.shrink(1);
    });
    while machine.unmap_unpinned(&other).is_err() {
        thread::yield_now();
    }
    device.join().unwrap();
    reclaimer.join().unwrap();
    let mut cpu = machine.cpu();
    let gone = cpu.pin(at, 1, &Pin::READ).map(drop);
    assert!(matches!(gone, Err(PinError::BadAddress { .. })), "{gone:?}");
    assert!(cpu.load(word(&vma, 1, 0)).is_ok());
    drop(cpu);
    machine.assert_empty();
}

/// GUP-3: a mapping is let go while its pages are being pinned.
#[test]
fn the_addresses_of_pinned_pages_stay() {
    explore(pins_against_unmap);
}

/// GUP-3: a pin comes after the look.
#[test]
#[should_panic = "the addresses of a pinned page stay"]
fn an_unmap_that_looks_first_is_found() {
    seed(SeededBug::UnmapLooksForPinsFirst);
    explore(pins_against_unmap);
}

/// The last mapping of a file goes, and its last handle, while a device still writes to a page that is pinned.
fn pins_against_close() {
    let (machine, vma) = machine(3, PAGE, SOUND);
    let mut cpu = machine.cpu();
    let at = word(&vma, 0, 0);
    let pinned = pin(&mut cpu, at, &Pin::WRITE);
    let closer = spawn(&machine, move |machine| {
        machine.unmap(&vma);
        machine.machine.space.files().close(&machine.cache);
    });
    machine.memory.dma(0).store(at, 7);
    drop(pinned);
    closer.join().unwrap();
    let written = word_of(&machine.disk.written(), 0, 0);
    assert_eq!(written, 7, "what the device wrote");
    drop(cpu);
    machine.assert_empty();
}

/// GUP-4, WB-4: what is written through pins reaches a file that nobody else has any more.
#[test]
fn what_is_pinned_reaches_a_closed_file() {
    explore(pins_against_close);
}

/// GUP-4: the last pin ends between the last writeback and its announcement.
#[test]
#[should_panic = "what the device wrote"]
fn a_close_that_writes_first_is_found() {
    seed(SeededBug::ReleaseWritesFirst);
    explore(pins_against_close);
}

/// One mapping reads what is stored through another, while pages are reclaimed and cut off; nobody writes or pins to write through
/// it (GUP-1).
fn readers_against_writers() {
    let (machine, vma) = full_machine(2, 3 * PAGE);
    let shown = machine.map_for(1, &(0..3), VmaAccess::Read);
    let reader = spawn(&machine, move |machine| {
        let mut cpu = machine.cpu();
        let mut last = 0;
        for _ in 0..3 {
            let found = cpu.load(word(&shown, 0, 0)).unwrap();
            let found = if found == NINES { 0 } else { found };
            assert!(found >= last, "a reader sees what was stored, in its order");
            last = found;
            let stored = cpu.store(word(&shown, 1, 0), 1);
            assert_eq!(stored, Err(Signal::Segv), "a reader writes nothing");
            let at = word(&shown, 0, 0);
            let space = &machine.machine.space;
            let fast = pin_user_pages_fast(&Pinning::new(space), at, 1, &Pin::WRITE);
            assert!(fast.is_none(), "a reader pins nothing to be written");
            let slow = cpu.pin(at, 1, &Pin::WRITE).map(drop);
            assert!(
                matches!(slow, Err(PinError::NotWritable { .. })),
                "a reader pins nothing to be written: {slow:?}"
            );
        }
    });
    let reclaimer = spawn(&machine, |machine| {
        machine.cache.write_back(0..3, OnPinned::Bounce);
        for _ in 0..3 {
            machine.cache.shrink(1);
        }
    });
    let mut cpu = machine.cpu();
    for round in 1..3 {
        assert_eq!(cpu.store(word(&vma, 0, 0), round), Ok(()));
        assert_eq!(cpu.load(word(&vma, 1, 0)), Ok(NINES));
        let found = cpu.load(word(&shown, 0, 0));
        assert_eq!(
            found,
            Ok(round),
            "a reader sees what was stored, in its order"
        );
    }
    let cut = machine
        .cache
        .set_len(PAGE as u64, |_| ControlFlow::Break(()));
    assert_eq!(cut, Ok(()));
    assert_eq!(cpu.load(word(&shown, 1, 0)), Err(Signal::Bus));
    reader.join().unwrap();
    reclaimer.join().unwrap();
    machine.unmap(&shown);
    drop(cpu);
    machine.assert_empty();
}

/// FLT-2, RMAP-1, GUP-1: a mapping that may only be read shows the file as the others do.
#[test]
fn readers_see_what_writers_store() {
    explore(readers_against_writers);
}

/// RMAP-1: pages are taken from those who may write only.
#[test]
#[should_panic = "was given back while it was mapped"]
fn a_walk_that_skips_readers_is_found() {
    seed(SeededBug::WalkSkipsReaders);
    explore(readers_against_writers);
}
