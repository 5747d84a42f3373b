//! Managed memory under real threads: each finds its own words, and nothing leaks.
//!
//! ```text
//! cargo test -p pgmap-lab --release --test threads
//! ```
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(not(any(loom, shuttle)))]

use std::borrow::Cow;
use std::sync::Arc;
use std::thread;

use pgmap_lab::device::{self, ModelDevice};
use pgmap_lab::machine::{Cpu, Machine, Setup, Signal};
use pgmap_lab::model::{self, ModelMmu};
use pgmap_mm::gup::{Pin, PinError, pin_user_pages};

const PAGES: u32 = 256;
const PROGRAMS: u32 = 4;
const ROUNDS: u32 = 20_000;

/// Random numbers that are the same in every run (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        u32::try_from(self.0 % u64::from(end)).unwrap()
    }
}

/// One program: every page is shared by all programs, and every program has a word of its own in each.
struct Program {
    machine: Arc<Machine>,
    cpu: Cpu,
    number: u32,
    words: Vec<u64>,
}

impl Program {
    fn run(mut self) {
        let mut random = Random(u64::from(self.number) + 1);
        for round in 1..=u64::from(ROUNDS) {
            let page = random.below(PAGES);
            match random.below(40) {
                0 => self.pin(page, round),
                1..20 => self.load(page),
                _ => self.store(page, round),
            }
        }
        (0..PAGES).for_each(|page| self.load(page));
    }

    fn load(&mut self, page: u32) {
        let word = self.machine.word(page, self.number as usize);
        assert_eq!(self.cpu.load(word), Ok(self.words[page as usize]));
    }

    fn store(&mut self, page: u32, value: u64) {
        let word = self.machine.word(page, self.number as usize);
        assert_eq!(self.cpu.store(word, value), Ok(()));
        self.words[page as usize] = value;
    }

    /// Pins a page, and has a device write this program's word.
    fn pin(&mut self, page: u32, value: u64) {
        let word = self.machine.word(page, self.number as usize);
        let pin = loop {
            let (worker, label) = (&mut self.cpu.worker, Cow::Borrowed("program"));
            match pin_user_pages(
                &self.machine.space,
                worker,
                word,
                1,
                &Pin::WRITE.label(label),
            ) {
                Ok(pin) => break pin,
                // Whatever could be freed is on its way to a device.
                Err(PinError::NoMemory { .. }) => thread::yield_now(),
                Err(error) => panic!("{error}"),
            }
        };
        let dma = self.machine.mmu.dma(word).expect("a pinned page stays");
        dma.store(word, value);
        drop(pin);
        self.words[page as usize] = value;
    }
}

/// Programs share pages and pin them while one thread reclaims and another takes a device away and gives it back.
#[test]
fn every_program_finds_its_own_words() {
    let slots = 64;
    let machine = Machine::new(Setup {
        pages: PAGES,
        frames: 96,
        slots,
        mmu: ModelMmu::new(slots, model::Flaw::None),
        devices: vec![
            ModelDevice::new(50, device::Flaw::None),
            ModelDevice::new(PAGES as usize, device::Flaw::Slow),
        ],
    });
    let machine = machine.unwrap();
    machine.space.map(PAGES, 1).unwrap();
    let programs: Vec<_> = (0..PROGRAMS)
        .map(|number| {
            let program = Program {
                cpu: machine.cpu(),
                words: vec![0; PAGES as usize],
                machine: Arc::clone(&machine),
                number,
            };
            thread::spawn(move || program.run())
        })
        .collect();
    let mut pager = machine.cpu();
    while programs.iter().any(|program| !program.is_finished()) {
        pager.reclaim(8);
        let killed = machine.space.devices().all()[0].clone().kill();
        let evacuated = machine.space.evacuate(&mut pager.worker, killed.device());
        if evacuated.is_ok() {
            let drained = killed.drain(Some(core::time::Duration::from_secs(10)));
            assert!(drained.is_ok(), "an evacuated device has no users");
            break;
        }
        drop(killed.resurrect());
    }
    while programs.iter().any(|program| !program.is_finished()) {
        pager.reclaim(8);
    }
    for program in programs {
        program.join().unwrap();
    }
    assert!(machine.space.ram().peak() <= machine.space.ram().limit());
    drop(pager);
    machine.assert_empty();
}

fn map_anew(machine: &Machine, cpu: &mut Cpu, page: u32) {
    let at = machine.word(page, 0);
    assert_eq!(machine.space.unmap(at, 1), Ok(()));
    assert_eq!(cpu.load(at), Err(Signal::Segv));
    assert!(machine.space.extend(at, 0, 1), "the addresses are free");
}

/// While programs use neighbouring pages, pages that are discarded or mapped anew read as zeros.
#[test]
fn dropped_pages_are_zeros_among_busy_neighbours() {
    let slots = 16;
    let machine = Machine::new(Setup {
        pages: 64,
        frames: 24,
        slots,
        mmu: ModelMmu::new(slots, model::Flaw::None),
        devices: vec![ModelDevice::new(128, device::Flaw::Slow)],
    });
    let machine = machine.unwrap();
    machine.space.map(64, 1).unwrap();
    let programs = [0u32, 1, 2].map(|number| {
        let machine = Arc::clone(&machine);
        thread::spawn(move || {
            let mut cpu = machine.cpu();
            let mut random = Random(u64::from(number) + 1);
            for round in 1..=u64::from(ROUNDS) {
                // Every third page is this program's.
                let page = random.below(20) * 3 + number;
                let word = machine.word(page, 9);
                assert_eq!(cpu.store(word, round), Ok(()));
                assert_eq!(cpu.load(word), Ok(round));
                match random.below(4) {
                    0 => assert_eq!(machine.space.discard(machine.word(page, 0), 1), Ok(())),
                    1 => map_anew(&machine, &mut cpu, page),
                    _ => continue,
                }
                assert_eq!(cpu.load(word), Ok(0), "dropped pages are zeros");
            }
        })
    });
    let pager = machine.cpu();
    while programs.iter().any(|program| !program.is_finished()) {
        pager.reclaim(2);
    }
    for program in programs {
        program.join().unwrap();
    }
    drop(pager);
    machine.assert_empty();
}
