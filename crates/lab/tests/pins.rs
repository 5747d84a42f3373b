//! Pins of anonymous memory, with their threads interleaved with those who take pages away; and bugs that must be found.
//!
//! ```text
//! RUSTFLAGS="--cfg shuttle" cargo test -p pgmap-lab --release --test pins
//! ```
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(
    clippy::excessive_nesting,
    reason = "a thread's code reads best where it is started"
)]
#![cfg(shuttle)]

mod explore;
mod small;

use std::borrow::Cow;
use std::sync::Arc;

use explore::explore;
use pgmap_lab::model;
use pgmap_mm::gup::{Pin, pin_user_pages};
use pgmap_mm::reclaim::Caller;
use pgmap_mm::seeded_bug::{SeededBug, seed};
use shuttle::thread;
use small::{Flaws, SOUND, machine, reclaimer};

/// What a device writes to a page that `mm` knows to be pinned is what the program reads (GUP-3, RMAP-1).
fn pins_against_take_out() {
    let machine = machine(1, SOUND);
    let reclaimer = reclaimer(&machine);
    let program = {
        let machine = Arc::clone(&machine);
        thread::spawn(move || {
            let mut cpu = machine.cpu();
            for round in 1..3 {
                assert_eq!(cpu.store(machine.word(1, 0), round), Ok(()));
                assert_eq!(cpu.store(machine.word(2, 0), round), Ok(()));
            }
        })
    };
    let mut cpu = machine.cpu();
    let at = machine.word(0, 0);
    assert_eq!(cpu.store(at, 1), Ok(()));
    let label = Cow::Borrowed("dma");
    let pin = loop {
        let worker = &mut cpu.worker;
        match pin_user_pages(
            &machine.space,
            worker,
            at,
            1,
            &Pin::WRITE.label(label.clone()),
        ) {
            Ok(pin) => break pin,
            Err(_) => thread::yield_now(),
        }
    };
    let dma = machine.mmu.dma(at).expect("a pinned page stays");
    dma.store(at, 2);
    thread::yield_now();
    assert_eq!(machine.mmu.load(at), Ok(2), "a pinned page stays");
    dma.store(at, 3);
    drop(pin);
    assert_eq!(cpu.load(at), Ok(3), "the last word stored");
    drop(cpu);
    program.join().unwrap();
    reclaimer.join().unwrap();
    machine.assert_empty();
}

/// GUP-3, RMAP-1: `unmap-check-then-act`, in anonymous memory.
#[test]
fn pinned_pages_stay() {
    explore(pins_against_take_out);
}

/// GUP-3: a page is taken out whose pins nobody looked at.
#[test]
#[should_panic = "a pinned page stays"]
fn a_take_out_that_ignores_pins_is_found() {
    seed(SeededBug::TakeOutIgnoresPins);
    explore(pins_against_take_out);
}

/// RMAP-1: `unmap-check-then-act`.
#[test]
#[should_panic = "a pinned page stays"]
fn a_take_out_that_claims_nothing_is_found() {
    seed(SeededBug::TakeOutClaimsNothing);
    explore(pins_against_take_out);
}

/// A page is discarded, or pinned: not both. The frame of what was discarded goes to another page at once, and who has it pinned
/// for a moment by its old name neither keeps that one from being discarded, nor keeps the frame (GUP-1, RMAP-1).
fn pins_against_discard() {
    let machine = machine(1, SOUND);
    let reclaimer = reclaimer(&machine);
    let pinner = {
        let machine = Arc::clone(&machine);
        thread::spawn(move || {
            let mut cpu = machine.cpu();
            let at = machine.word(0, 0);
            for round in 1..4 {
                let pin = Pin::WRITE.label("dma");
                let Ok(pin) = pin_user_pages(&machine.space, &mut cpu.worker, at, 1, &pin) else {
                    continue;
                };
                let dma = machine.mmu.dma(at).expect("what is pinned is there");
                dma.store(at, round);
                thread::yield_now();
                assert_eq!(machine.mmu.load(at), Ok(round), "what is pinned is there");
                drop(pin);
            }
        })
    };
    let mut cpu = machine.cpu();
    for round in 1..4 {
        // Refused while it is pinned.
        let _ = machine.space.discard(machine.word(0, 0), 1);
        assert_eq!(cpu.store(machine.word(1, 0), round), Ok(()));
        assert_eq!(cpu.store(machine.word(2, 0), round), Ok(()));
        assert_eq!(
            cpu.load(machine.word(1, 0)),
            Ok(round),
            "the last word stored"
        );
        let others = machine.space.discard(machine.word(1, 0), 2);
        assert_eq!(others, Ok(()), "nobody has pinned these");
    }
    pinner.join().unwrap();
    reclaimer.join().unwrap();
    drop(cpu);
    machine.assert_empty();
}

/// GUP-1, RMAP-1: a page is pinned, or discarded.
#[test]
fn pins_and_discard_exclude_each_other() {
    explore(pins_against_discard);
}

/// RMAP-1: a pin comes between the look and the discard.
#[test]
#[should_panic = "what is pinned is there"]
fn a_discard_that_claims_nothing_is_found() {
    seed(SeededBug::DiscardClaimsNothing);
    explore(pins_against_discard);
}

/// A page that waits in staging is not pinned there, however quickly it went (GUP-1, RMAP-1).
fn pins_against_staging() {
    let machine = machine(1, SOUND);
    let mut cpu = machine.cpu();
    let at = machine.word(0, 0);
    assert_eq!(cpu.store(at, 1), Ok(()));
    let taker = {
        let machine = Arc::clone(&machine);
        thread::spawn(move || {
            for _ in 0..2 {
                machine.space.deactivate(Caller::Reclaimer, 1);
            }
        })
    };
    for _ in 0..2 {
        let pin = pin_user_pages(&machine.space, &mut cpu.worker, at, 1, &Pin::WRITE);
        let pin = pin.unwrap();
        let dma = machine.mmu.dma(at).expect("what is pinned is there");
        dma.store(at, 2);
        drop(pin);
    }
    taker.join().unwrap();
    assert_eq!(cpu.load(at), Ok(2), "the last word stored");
    drop(cpu);
    machine.assert_empty();
}

/// GUP-1, RMAP-1: a pin finds a page, or brings it back.
#[test]
fn what_waits_in_staging_is_not_pinned() {
    explore(pins_against_staging);
}

/// RMAP-1: a pin comes after the page went.
#[test]
#[should_panic = "what is pinned is there"]
fn a_pin_that_looks_once_is_found() {
    seed(SeededBug::PinLooksOnce);
    explore(pins_against_staging);
}

/// What a device writes to a page that only the machine knows to be pinned is what the program reads (GUP-3).
fn unseen_pins_against_take_out(flaws: Flaws) {
    let machine = machine(1, flaws);
    let reclaimer = reclaimer(&machine);
    let mut cpu = machine.cpu();
    let at = machine.word(0, 0);
    let dma = loop {
        assert_eq!(cpu.store(at, 1), Ok(()));
        if let Ok(dma) = machine.mmu.pin_unseen(at) {
            break dma;
        }
    };
    for page in 1..3 {
        dma.store(at, 10 + u64::from(page));
        assert_eq!(cpu.store(machine.word(page, 0), 1), Ok(()));
    }
    drop(dma);
    assert_eq!(cpu.load(at), Ok(12), "what the device wrote");
    drop(cpu);
    reclaimer.join().unwrap();
    machine.assert_empty();
}

/// GUP-3: what only the machine knows to be pinned.
#[test]
fn pages_pinned_behind_our_back_stay() {
    explore(|| unseen_pins_against_take_out(SOUND));
}

/// GUP-3: the same checks find a machine that moves what is busy.
#[test]
#[should_panic = "what the device wrote"]
fn a_machine_that_moves_pinned_pages_is_found() {
    let mmu = model::Flaw::TakesPinned;
    explore(move || unseen_pins_against_take_out(Flaws { mmu, ..SOUND }));
}
