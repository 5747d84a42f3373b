//! The protocols of `mm`, with their threads interleaved in random orders; and for each a bug that must be found.
//!
//! ```text
//! RUSTFLAGS="--cfg shuttle" cargo test -p pgmap-lab --release --test interleavings
//! ORDERS=100000 RUSTFLAGS="--cfg shuttle" cargo test -p pgmap-lab --release --test interleavings
//! ```
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(
    clippy::excessive_nesting,
    reason = "a thread's code reads best where it is started"
)]
#![cfg(shuttle)]

mod explore;
mod small;

use std::sync::Arc;

use explore::explore;
use pgmap_lab::device::{self, Failure};
use pgmap_lab::machine::{Machine, Signal};
use pgmap_lab::model;
use pgmap_mm::reclaim::Caller;
use pgmap_mm::seeded_bug::{SeededBug, seed};
use shuttle::sync::atomic::{AtomicBool, Ordering};
use shuttle::thread;
use small::{Flaws, SOUND, machine, reclaimer};

/// A program finds what it stored last, however its pages come and go (FLT-2, FLT-4).
fn faults_against_reclaim(flaws: Flaws) {
    let machine = machine(1, flaws);
    let reclaimer = reclaimer(&machine);
    let programs = [0u32, 1].map(|page| {
        let machine = Arc::clone(&machine);
        thread::spawn(move || {
            let mut cpu = machine.cpu();
            let at = machine.word(page, 0);
            for round in 1..4 {
                assert_eq!(cpu.store(at, round), Ok(()));
                // The other page of two shares the frames with the first.
                let shared = machine.word(2, page as usize);
                assert_eq!(cpu.store(shared, round), Ok(()));
                assert_eq!(cpu.load(at), Ok(round), "the last word stored");
                assert_eq!(cpu.load(shared), Ok(round), "the last word stored");
            }
        })
    });
    for program in programs {
        program.join().unwrap();
    }
    reclaimer.join().unwrap();
    machine.assert_empty();
}

#[test]
fn faults_and_reclaim_lose_no_store() {
    explore(|| faults_against_reclaim(SOUND));
}

/// A page that is touched while it is being stored, and taken out again before the store ends, keeps its newest bytes:
/// the slot tells the two stays in staging apart (FLT-2).
fn touches_against_stores() {
    let device = device::Flaw::Slow;
    let machine = machine(1, Flaws { device, ..SOUND });
    let done = Arc::new(AtomicBool::new(false));
    let until_done = |step: fn(&Machine)| {
        let (machine, done) = (Arc::clone(&machine), Arc::clone(&done));
        thread::spawn(move || {
            while !done.load(Ordering::SeqCst) {
                step(&machine);
                thread::yield_now();
            }
        })
    };
    let taker = until_done(|machine| machine.space.deactivate(Caller::Reclaimer, 1));
    let storer = until_done(|machine| {
        machine.space.store(1);
    });
    let mut cpu = machine.cpu();
    // A word of its own for every round, so that no store hides what became of an earlier one.
    for round in 0..6 {
        assert_eq!(cpu.store(machine.word(0, round), 1), Ok(()));
    }
    done.store(true, Ordering::SeqCst);
    taker.join().unwrap();
    storer.join().unwrap();
    for round in 0..6 {
        let word = cpu.load(machine.word(0, round));
        assert_eq!(word, Ok(1), "the last word stored");
    }
    drop(cpu);
    machine.assert_empty();
}

#[test]
fn a_touched_page_keeps_its_newest_bytes() {
    explore(touches_against_stores);
}

#[test]
#[should_panic = "the last word stored"]
fn a_commit_that_ignores_the_slot_is_found() {
    seed(SeededBug::CommitIgnoresTheSlot);
    explore(touches_against_stores);
}

#[test]
#[should_panic = "the last word stored"]
fn a_device_that_completes_early_is_found() {
    let device = device::Flaw::CompletesEarly;
    explore(move || faults_against_reclaim(Flaws { device, ..SOUND }));
}

/// A page that was discarded reads as zeros, whatever was on its way to or from a device (FLT-2).
fn faults_against_discard(flaws: Flaws) {
    let machine = machine(1, flaws);
    let reclaimer = reclaimer(&machine);
    let neighbour = {
        let machine = Arc::clone(&machine);
        thread::spawn(move || {
            let mut cpu = machine.cpu();
            for round in 1..4 {
                assert_eq!(cpu.store(machine.word(1, 0), round), Ok(()));
                // Reads of the page that is being discarded: its bytes, or zeros.
                let word = cpu.load(machine.word(0, 0)).unwrap();
                assert!(word < 4);
                assert_eq!(
                    cpu.load(machine.word(1, 0)),
                    Ok(round),
                    "the last word stored"
                );
            }
        })
    };
    let mut cpu = machine.cpu();
    let at = machine.word(0, 0);
    for round in 1..4 {
        assert_eq!(cpu.store(at, round), Ok(()));
        assert_eq!(cpu.load(at), Ok(round), "the last word stored");
        assert_eq!(machine.space.discard(at, 1), Ok(()));
        assert_eq!(cpu.load(at), Ok(0), "discarded pages are zeros");
    }
    drop(cpu);
    neighbour.join().unwrap();
    reclaimer.join().unwrap();
    machine.assert_empty();
}

#[test]
fn faults_and_discard_never_show_old_bytes() {
    explore(|| faults_against_discard(SOUND));
}

#[test]
#[should_panic = "discarded pages are zeros"]
fn a_machine_that_drops_late_is_found() {
    let mmu = model::Flaw::DropsLate;
    explore(move || faults_against_discard(Flaws { mmu, ..SOUND }));
}

/// Whoever gets addresses that another gave back finds zeros there, and a late access of the other leaves nothing behind.
fn faults_against_unmap() {
    let machine = machine(1, SOUND);
    let reclaimer = reclaimer(&machine);
    let late = {
        let machine = Arc::clone(&machine);
        thread::spawn(move || {
            let mut cpu = machine.cpu();
            for _ in 0..2 {
                match cpu.store(machine.word(2, 7), 7) {
                    Ok(()) | Err(Signal::Segv) => {}
                    Err(signal) => panic!("{signal:?}"),
                }
            }
        })
    };
    let mut cpu = machine.cpu();
    assert_eq!(cpu.store(machine.word(0, 0), 1), Ok(()));
    assert_eq!(machine.space.unmap(machine.word(0, 0), 3), Ok(()));
    let frames_left = machine.mmu.load(machine.word(0, 0));
    assert!(frames_left.is_err(), "nothing is left behind");
    late.join().unwrap();
    reclaimer.join().unwrap();
    let late_page = machine.mmu.load(machine.word(2, 7));
    assert!(late_page.is_err(), "nothing is left behind");
    assert_eq!(machine.space.map(3, 1), Some(machine.word(0, 0)));
    for page in 0..3 {
        assert_eq!(
            cpu.load(machine.word(page, 7)),
            Ok(0),
            "nothing is left behind"
        );
    }
    drop(cpu);
    machine.assert_empty();
}

#[test]
fn faults_and_unmap_leave_nothing_behind() {
    explore(faults_against_unmap);
}

#[test]
#[should_panic = "nothing is left behind"]
fn a_fault_that_ignores_the_area_is_found() {
    seed(SeededBug::FaultIgnoresTheArea);
    explore(faults_against_unmap);
}

/// A device is taken away under a running program: its pages come back, and none goes there afterwards (MAP-6).
fn faults_against_unplug() {
    let machine = machine(2, SOUND);
    let reclaimer = reclaimer(&machine);
    let program = {
        let machine = Arc::clone(&machine);
        thread::spawn(move || {
            let mut cpu = machine.cpu();
            for round in 1..3 {
                for page in 0..3 {
                    assert_eq!(cpu.store(machine.word(page, 0), round), Ok(()));
                }
                for page in 0..3 {
                    let word = cpu.load(machine.word(page, 0));
                    assert_eq!(word, Ok(round), "the last word stored");
                }
            }
        })
    };
    let mut cpu = machine.cpu();
    while machine.unplug(&mut cpu.worker, 0).is_err() {
        thread::yield_now();
    }
    assert_eq!(
        machine.devices[0].pages(),
        0,
        "nothing goes to a removed device"
    );
    program.join().unwrap();
    reclaimer.join().unwrap();
    assert_eq!(
        machine.devices[0].pages(),
        0,
        "nothing goes to a removed device"
    );
    for page in 0..3 {
        assert_eq!(
            cpu.load(machine.word(page, 0)),
            Ok(2),
            "the last word stored"
        );
    }
    drop(cpu);
    machine.assert_empty();
}

#[test]
fn faults_and_unplug_lose_nothing_and_leave_nothing() {
    explore(faults_against_unplug);
}

/// A device is taken away and comes back, with the frame numbers that it had, while pages go there, come back and are dropped:
/// who looks up the device of a page finds the one that has it (MAP-5, MAP-6).
fn faults_against_replug() {
    let machine = machine(2, SOUND);
    let reclaimer = reclaimer(&machine);
    let program = {
        let machine = Arc::clone(&machine);
        thread::spawn(move || {
            let mut cpu = machine.cpu();
            for round in 1..3 {
                for page in 0..3 {
                    assert_eq!(cpu.store(machine.word(page, 0), round), Ok(()));
                }
                assert_eq!(machine.space.discard(machine.word(2, 0), 1), Ok(()));
                for (page, expected) in [(0, round), (1, round), (2, 0)] {
                    let word = cpu.load(machine.word(page, 0));
                    assert_eq!(word, Ok(expected), "the last word stored");
                }
            }
        })
    };
    let mut cpu = machine.cpu();
    for _ in 0..2 {
        while machine.unplug(&mut cpu.worker, 0).is_err() {
            thread::yield_now();
        }
        assert_eq!(machine.devices[0].pages(), 0, "a removed device is empty");
        machine.plug(0).unwrap();
        // The list has it last now: the other one goes next.
        while machine.unplug(&mut cpu.worker, 0).is_err() {
            thread::yield_now();
        }
        machine.plug(1).unwrap();
    }
    program.join().unwrap();
    reclaimer.join().unwrap();
    drop(cpu);
    machine.assert_empty();
}

#[test]
fn faults_and_devices_that_come_back_lose_nothing() {
    explore(faults_against_replug);
}

/// A store that began before the device was killed does not end there after it was evacuated: nobody would bring the page
/// back, and the drain would wait for ever (MAP-6).
fn stores_against_unplug() {
    let machine = machine(2, SOUND);
    let mut cpu = machine.cpu();
    for page in 0..2 {
        assert_eq!(cpu.store(machine.word(page, 0), 1), Ok(()));
    }
    let reclaimer = reclaimer(&machine);
    while machine.unplug(&mut cpu.worker, 0).is_err() {
        thread::yield_now();
    }
    assert_eq!(
        machine.devices[0].pages(),
        0,
        "nothing goes to a removed device"
    );
    reclaimer.join().unwrap();
    for page in 0..2 {
        assert_eq!(
            cpu.load(machine.word(page, 0)),
            Ok(1),
            "the last word stored"
        );
    }
    drop(cpu);
    machine.assert_empty();
}

#[test]
fn stores_and_unplug_leave_nothing() {
    explore(stores_against_unplug);
}

#[test]
#[should_panic = "deadlock"]
fn a_commit_that_ignores_the_kill_is_found() {
    seed(SeededBug::CommitIgnoresTheKill);
    explore(stores_against_unplug);
}

/// A device that cannot read costs the pages that it lost, for ever until they are discarded, and no others (FLT-1).
fn faults_against_device_failure(flaws: Flaws) {
    let machine = machine(1, flaws);
    let reclaimer = reclaimer(&machine);
    let breaker = {
        let device = Arc::clone(&machine.devices[0]);
        thread::spawn(move || {
            device.fail(Failure::Write);
            device.fail(Failure::Read);
            device.fail(Failure::Corrupt);
        })
    };
    let mut cpu = machine.cpu();
    let mut lost = [false; 3];
    for round in 1..4 {
        for page in 0..3u32 {
            let stored = cpu.store(machine.word(page, 0), round);
            assert!(matches!(stored, Ok(()) | Err(Signal::Bus)), "{stored:?}");
        }
        for page in 0..3u32 {
            match cpu.load(machine.word(page, 0)) {
                Ok(word) => {
                    let sound = (round, false);
                    assert_eq!((word, lost[page as usize]), sound, "the last word stored");
                }
                Err(Signal::Bus) => lost[page as usize] = true,
                Err(signal) => panic!("{signal:?}"),
            }
        }
    }
    breaker.join().unwrap();
    reclaimer.join().unwrap();
    assert!(
        lost.iter().filter(|lost| **lost).count() <= 2,
        "a failure costs one page"
    );
    assert_eq!(machine.space.discard(machine.word(0, 0), 3), Ok(()));
    machine.devices[0].fail_nothing();
    for page in 0..3 {
        assert_eq!(
            cpu.load(machine.word(page, 0)),
            Ok(0),
            "a lost page can be used again"
        );
    }
    drop(cpu);
    machine.assert_empty();
}

#[test]
fn a_device_failure_costs_only_what_it_lost() {
    explore(|| faults_against_device_failure(SOUND));
}

#[test]
#[should_panic = "the last word stored"]
fn a_failing_device_that_completes_early_is_found() {
    let device = device::Flaw::CompletesEarly;
    explore(move || faults_against_device_failure(Flaws { device, ..SOUND }));
}

/// From its announcement until it is done, a fork finds every page where the child inherits it, while others reclaim.
fn announced_forks_against_take_out() {
    let machine = machine(1, SOUND);
    machine.space.ram().set_limit(1);
    let reclaimer = reclaimer(&machine);
    let mut cpu = machine.cpu();
    for round in 1..3 {
        for page in 0..2u32 {
            assert_eq!(cpu.store(machine.word(page, 0), round), Ok(()));
        }
        assert!(machine.space.before_fork(&mut cpu.worker));
        for page in [0, 1, 0] {
            thread::yield_now();
            let inherited = machine.mmu.load(machine.word(page, 0));
            assert_eq!(inherited, Ok(round), "a child inherits every page");
        }
        machine.space.after_fork();
    }
    drop(cpu);
    reclaimer.join().unwrap();
    machine.assert_empty();
}

#[test]
fn announced_forks_have_every_page() {
    explore(announced_forks_against_take_out);
}

#[test]
#[should_panic = "a child inherits every page"]
fn a_take_out_that_ignores_forks_is_found() {
    seed(SeededBug::TakeOutIgnoresForks);
    explore(announced_forks_against_take_out);
}
