//! Mapping, unmapping, lookup and pins of device memory, with their threads interleaved in random orders; and for each rule a bug that must
//! be found.
//!
//! ```text
//! RUSTFLAGS="--cfg shuttle" cargo test -p pgmap-lab --release --test device_mappings
//! ```
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(
    clippy::excessive_nesting,
    reason = "a thread's code reads best where it is started"
)]
#![cfg(shuttle)]

mod explore;

use std::sync::Arc;

use explore::explore;
use pgmap_core::addr::{Pfn, PfnRange};
use pgmap_core::holders::Who;
use pgmap_core::memremap::{DevPagemap, Hold, MemoryMap, MemoryType, PageError, SUBSECTION_FRAMES};
use pgmap_core::platform::HeapPlatform;
use pgmap_core::seeded_bug::{SeededBug, seed};
use shuttle::sync::Mutex;
use shuttle::sync::atomic::{AtomicBool, Ordering};
use shuttle::thread;

/// A device's memory: there or not, and how to use it.
struct Device {
    range: PfnRange,
    there: AtomicBool,
    pgmap: Mutex<Option<DevPagemap>>,
}

/// Two devices, next to each other in numbers, which take turns in the same entry of the lookup.
struct Machine {
    map: Arc<MemoryMap>,
    devices: [Device; 2],
}

impl Machine {
    fn new() -> Arc<Self> {
        let device = |start| Device {
            range: PfnRange::new(Pfn::new(start).unwrap(), 4).unwrap(),
            there: AtomicBool::new(false),
            pgmap: Mutex::new(None),
        };
        Arc::new(Self {
            map: MemoryMap::new(&HeapPlatform, 2 * SUBSECTION_FRAMES).unwrap(),
            devices: [device(SUBSECTION_FRAMES - 4), device(SUBSECTION_FRAMES)],
        })
    }

    fn plug(&self, nth: usize) {
        let device = &self.devices[nth];
        device.there.store(true, Ordering::SeqCst);
        let pgmap = self
            .map
            .memremap_pages(&[device.range], MemoryType::Generic);
        *device.pgmap.lock().unwrap() = Some(pgmap.unwrap());
    }

    fn unplug(&self, nth: usize) {
        let device = &self.devices[nth];
        let pgmap = device.pgmap.lock().unwrap().clone().unwrap();
        let drained = pgmap.kill().drain(None).unwrap();
        for pfn in device.range.start().get()..device.range.end() {
            let frame = self.map.frame(Pfn::new(pfn).unwrap());
            assert!(frame.is_idle(), "a page of a removed device is in use");
        }
        drained.remove();
        device.there.store(false, Ordering::SeqCst);
    }

    fn assert_there(&self, nth: usize) {
        let there = self.devices[nth].there.load(Ordering::SeqCst);
        assert!(there, "the memory of a removed device is in use");
    }

    /// Looks a device up by its frame that is next to the other's.
    fn look(&self, nth: usize) {
        let range = self.devices[nth].range;
        let pfn = [Pfn::new(range.end() - 1).unwrap(), range.start()][nth];
        if let Some(_guard) = self.map.get_dev_pagemap(pfn) {
            self.assert_there(nth);
            thread::yield_now();
            self.assert_there(nth);
        }
    }

    /// Pins a device's pages through a handle that may be old.
    fn pin(&self, nth: usize) {
        let device = &self.devices[nth];
        let Some(pgmap) = device.pgmap.lock().unwrap().clone() else {
            return;
        };
        match pgmap.hold(device.range, Hold::Pin, "dma", Who::Process(1)) {
            Ok(pages) => {
                self.assert_there(nth);
                thread::yield_now();
                assert!(self.map.frame(device.range.start()).is_pinned());
                self.assert_there(nth);
                drop(pages);
            }
            Err(PageError::Dying | PageError::Busy(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// Devices come and go in one entry, while others use them: who has something of a device has it whole.
fn map_against_unmap_against(users: [fn(&Machine, usize); 3]) {
    let machine = Machine::new();
    machine.plug(0);
    let users = users.map(|user| {
        let machine = Arc::clone(&machine);
        thread::spawn(move || {
            for nth in [0, 1] {
                user(&machine, nth);
            }
        })
    });
    machine.unplug(0);
    machine.plug(1);
    machine.unplug(1);
    machine.plug(0);
    for user in users {
        user.join().unwrap();
    }
    machine.unplug(0);
}

fn lookups_and_pins() {
    map_against_unmap_against([Machine::look, Machine::pin, Machine::pin]);
}

fn lookups() {
    map_against_unmap_against([Machine::look; 3]);
}

/// MAP-5, MAP-6, REF-2: nothing is removed under who looked it up, or has its pages pinned.
#[test]
fn nothing_is_removed_under_its_users() {
    explore(lookups_and_pins);
}

/// rfc-v3-put-many: pages that hold no reference on their mapping.
#[test]
#[should_panic = "of a removed device is in use"]
fn a_get_that_keeps_no_reference_is_found() {
    seed(SeededBug::GetKeepsNoReference);
    explore(lookups_and_pins);
}

/// section-keyed-lookup: a lookup that finds whoever has the entry.
#[test]
#[should_panic = "the memory of a removed device is in use"]
fn a_lookup_that_ignores_ranges_is_found() {
    seed(SeededBug::LookupIgnoresRanges);
    explore(lookups);
}

/// 50f44ee7248a: frames that are taken away before their users are gone.
#[test]
#[should_panic = "the memory of a removed device is in use"]
fn a_removal_that_does_not_wait_is_found() {
    seed(SeededBug::DrainDoesNotWait);
    explore(lookups);
}
