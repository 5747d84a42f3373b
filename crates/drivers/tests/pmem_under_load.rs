//! Unbind under load, many times at random moments.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use core::time::Duration;
use std::sync::{Arc, RwLock};
use std::thread;
use std::time::Instant;

use common::power::Dice;
use common::{client, map, spec};
use pgmap_drivers::block::{BlockDevice, BlockError};
use pgmap_drivers::pmem::{AccessError, Afterwards, Patience, Pmem, Region, Sharing, UnbindError};
use pgmap_sync::atomic::{AtomicBool, AtomicU64, Ordering};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;
const WRITERS: u64 = 2;
/// Blocks of 4 KiB of each writer.
const BLOCKS: u64 = 64;
const TIME: Duration = Duration::from_secs(3);

/// What all threads share.
struct Load {
    now: RwLock<Arc<Pmem>>,
    over: AtomicBool,
    answered: AtomicU64,
    refused: AtomicU64,
}

/// Ends the load when it is dropped, also by a panic.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        // Release: pairs with the acquire in `goes_on`.
        self.0.store(true, Ordering::Release);
    }
}

impl Load {
    fn pmem(&self) -> Arc<Pmem> {
        Arc::clone(&self.now.read().unwrap())
    }

    fn goes_on(&self) -> bool {
        // Acquire, here and below: nothing depends on the order but the end of the test.
        !self.over.load(Ordering::Acquire)
    }

    /// Writes and reads blocks of its own. Whatever was answered is there, whatever was refused is not.
    fn write(&self, writer: u64) {
        let mut dice = Dice(writer + 1);
        let mut there = vec![0_u64; usize::try_from(BLOCKS).unwrap()];
        let mut version = 0_u64;
        while self.goes_on() {
            let pmem = self.pmem();
            let block = dice.throw(there.len());
            let offset = (writer * BLOCKS + block as u64) * 4096;
            version += 1;
            let bytes: Vec<u8> = version.to_le_bytes().repeat(512);
            if done(pmem.write(offset, &bytes)) {
                there[block] = version;
            }
            let mut read = vec![0; 4096];
            if done(pmem.read(offset, &mut read)) {
                assert_eq!(read, there[block].to_le_bytes().repeat(512));
                self.answered.fetch_add(1, Ordering::AcqRel);
            } else {
                self.refused.fetch_add(1, Ordering::AcqRel);
            }
            if dice.throw(50) == 0 {
                done(pmem.flush());
            }
        }
    }

    /// Pins and maps, for a moment each.
    fn hold(&self, seed: u64) {
        let mut dice = Dice(seed);
        while self.goes_on() {
            let pmem = self.pmem();
            let start = dice.throw(1000) as u64 * 4096;
            let pin = pmem.pin(start..start + 8 * 4096, client("pins"));
            let mapped = pmem.map(0..2 * MIB, Sharing::Shared, client("maps"));
            for error in [pin.as_ref().err(), mapped.as_ref().err()]
                .into_iter()
                .flatten()
            {
                assert_eq!(*error, AccessError::Leaving);
            }
            if let Ok(access) = pmem.direct_access(dice.throw(2048) as u64, 1) {
                assert!(pmem.pagemap().unwrap().contains(access.first));
            }
            thread::sleep(Duration::from_micros(dice.throw(300) as u64));
        }
    }

    fn scrub(&self) {
        while self.goes_on() {
            let pmem = self.pmem();
            let pass = pmem.scrub();
            let _interrupted = pmem.wait_for_scrub(pass, Some(Duration::from_secs(20)));
        }
    }
}

/// Whether a request was answered; if not, it must have been refused.
fn done(answer: Result<(), BlockError>) -> bool {
    assert!(
        matches!(answer, Ok(()) | Err(BlockError::Frozen(_))),
        "{answer:?}"
    );
    answer.is_ok()
}

/// Takes the device away and back, at random moments. Says how often it went, and how often somebody held it.
fn take_away(
    load: &Load,
    region: &Arc<Region>,
    map: &Arc<pgmap_core::memremap::MemoryMap>,
) -> (u64, u64) {
    let _over = Over(&load.over);
    let (mut gone, mut held) = (0, 0);
    let mut dice = Dice(99);
    let end = Instant::now() + TIME;
    while Instant::now() < end {
        thread::sleep(Duration::from_micros(dice.throw(3000) as u64));
        let pmem = load.pmem();
        let patience = Duration::from_micros(dice.throw(3000) as u64);
        match pmem.unbind(&Patience::new(Some(patience)), Afterwards::Keep, |_| ()) {
            Ok(()) => {
                gone += 1;

                *load.now.write().unwrap() = region.bind(map, 0).unwrap();
            }
            Err(UnbindError::Held(_)) => held += 1,
            Err(error) => panic!("{error}"),
        }
    }
    (gone, held)
}

fn under_load(text: &str) {
    let map = map();
    let region = Region::open(&spec(text), 0).unwrap();
    let pmem = region.bind(&map, 0).unwrap();
    assert!(pmem.size_bytes() >= SIZE);
    let load = Load {
        now: RwLock::new(pmem),
        over: AtomicBool::new(false),
        answered: AtomicU64::new(0),
        refused: AtomicU64::new(0),
    };
    let (gone, held) = thread::scope(|scope| {
        for writer in 0..WRITERS {
            let load = &load;
            scope.spawn(move || load.write(writer));
        }
        for seed in 1..3 {
            let load = &load;
            scope.spawn(move || load.hold(seed));
        }
        scope.spawn(|| load.scrub());
        take_away(&load, &region, &map)
    });
    let answered = load.answered.load(Ordering::Acquire);
    let refused = load.refused.load(Ordering::Acquire);
    eprintln!("{text}: gone {gone}, held {held}, answered {answered}, refused {refused}");
    assert!(gone > 0 && answered > 100 && refused > 0);
    let pmem = load.pmem();
    assert!(pmem.holds().is_empty());
    pmem.unbind(&Patience::new(None), Afterwards::Keep, |_| ())
        .unwrap();
}

/// PMEM-2: an image that is taken away under load, many times: each request is answered once, what was written is there
/// when it is back, and no pin is left behind.
#[test]
fn an_image_goes_and_comes_under_load() {
    let directory = tempfile::tempdir().unwrap();
    under_load(&format!(
        "{},size=10M",
        directory.path().join("disk.img").display()
    ));
}

/// PMEM-2: the same with volatile memory, whose mappings are revoked.
#[test]
fn memory_goes_and_comes_under_load() {
    under_load("memory,size=8M");
}
