//! From a frame to its device under every interleaving of publishing, killing, removing and reusing an entry: who finds a device may use
//! it, and nobody finds another's. A model has one entry, so that every mapping reuses it, and sub-sections of eight frames.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p pgmap-core --release --test lookup
//! ```
#![allow(
    clippy::excessive_nesting,
    clippy::unwrap_used,
    reason = "a thread's code reads best where it is started; a test fails by panicking"
)]
#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use loom::thread;
use pgmap_core::addr::{Pfn, PfnRange};
use pgmap_core::memremap::{DevPagemap, MemoryMap, MemoryType, SUBSECTION_FRAMES};
use pgmap_core::platform::HeapPlatform;
use pgmap_sync::PercpuRef;

/// Complete exploration, which takes a few seconds.
fn explore(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 10_000;
    builder.check(model);
}

fn first() -> PfnRange {
    PfnRange::new(Pfn::from_u32(1), 2).unwrap()
}

fn second() -> PfnRange {
    PfnRange::new(Pfn::new(SUBSECTION_FRAMES).unwrap(), 3).unwrap()
}

/// A map, and the memory of its devices: loom panics if one is written while somebody uses it.
struct Machine {
    map: std::sync::Arc<MemoryMap>,
    memory: [UnsafeCell<u64>; 2],
}

impl Machine {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            map: MemoryMap::new(&HeapPlatform, 2 * SUBSECTION_FRAMES).unwrap(),
            memory: [UnsafeCell::new(0), UnsafeCell::new(0)],
        })
    }

    fn plug(&self, device: usize) -> DevPagemap {
        self.memory[device].with_mut(|_| ());
        let range = [first(), second()][device];
        self.map
            .memremap_pages(&[range], MemoryType::Generic)
            .unwrap()
    }

    fn unplug(&self, device: usize, pgmap: DevPagemap) {
        pgmap.kill().drain(None).unwrap().remove();
        self.memory[device].with_mut(|_| ());
    }

    /// Uses the device that has the frame, if there is one.
    fn look(&self, device: usize) {
        let pfn = [first(), second()][device].start();
        if let Some(guard) = self.map.get_dev_pagemap(pfn) {
            assert!(guard.covers(pfn), "another's device");
            self.memory[device].with(|_| ());
        }
    }
}

fn looker(machine: &Arc<Machine>, device: usize) -> thread::JoinHandle<()> {
    let machine = Arc::clone(machine);
    thread::spawn(move || machine.look(device))
}

/// MAP-5: who finds a device that is being mapped finds it whole.
#[test]
fn a_lookup_finds_a_new_device_whole() {
    explore(|| {
        let machine = Machine::new();
        let looker = looker(&machine, 0);
        let _pgmap = machine.plug(0);
        looker.join().unwrap();
        assert!(machine.map.get_dev_pagemap(first().start()).is_some());
    });
}

/// MAP-5, MAP-6: a device that is found is not removed before it is let go.
#[test]
fn a_lookup_keeps_a_dying_device() {
    explore(|| {
        let machine = Machine::new();
        let pgmap = machine.plug(0);
        let looker = looker(&machine, 0);
        machine.unplug(0, pgmap);
        looker.join().unwrap();
        assert!(machine.map.get_dev_pagemap(first().start()).is_none());
    });
}

/// MAP-5, section-keyed-lookup: the entry is another device's by the time it is held, and the lookup knows.
#[test]
fn a_lookup_does_not_find_who_has_the_entry_now() {
    explore(|| {
        let machine = Machine::new();
        let pgmap = machine.plug(0);
        let looker = looker(&machine, 0);
        machine.unplug(0, pgmap);
        let next = machine.plug(1);
        looker.join().unwrap();
        assert!(machine.map.get_dev_pagemap(second().start()).is_some());
        machine.unplug(1, next);
    });
}

/// REF-2: the first reference of a page and the kill of its device: one of them wins, and the other knows.
#[test]
fn a_first_get_and_a_kill_exclude_each_other() {
    explore(|| {
        let machine = Machine::new();
        let pgmap = machine.plug(0);
        let getter = {
            let (machine, pgmap) = (Arc::clone(&machine), pgmap.clone());
            thread::spawn(move || {
                let page = first().start();
                if pgmap.get_page(page).is_ok() {
                    machine.memory[0].with(|_| ());
                    pgmap.put_page(page);
                }
            })
        };
        machine.unplug(0, pgmap);
        getter.join().unwrap();
    });
}

/// The lookup, cut down to one entry, with its last question or without it.
struct Copied {
    section: AtomicU8,
    users: PercpuRef,
    start: AtomicU64,
}

fn look_while_reused(is_it: fn(u64) -> bool) {
    loom::model(move || {
        let copied = Arc::new(Copied {
            section: AtomicU8::new(1),
            users: PercpuRef::new(),
            start: AtomicU64::new(1),
        });
        let looker = {
            let copied = Arc::clone(&copied);
            thread::spawn(move || {
                let found = copied.section.load(Ordering::Acquire) != 0
                    && copied.users.try_get_live()
                    && is_it(copied.start.load(Ordering::Relaxed));
                assert!(
                    !found || copied.start.load(Ordering::Relaxed) == 1,
                    "another's device"
                );
            })
        };
        copied.users.kill();
        if copied.users.count() == 0 {
            copied.section.store(0, Ordering::Release);
            copied.start.store(2, Ordering::Relaxed);
            copied.users.resurrect();
        }
        looker.join().unwrap();
    });
}

/// The copy is sound if it asks the entry.
#[test]
fn a_lookup_that_asks_the_entry_is_sound() {
    look_while_reused(|start| start == 1);
}

/// The seeded bug: a lookup that believes its table is found to answer with another's device.
#[test]
#[should_panic = "another's device"]
fn a_lookup_that_believes_its_table_is_found() {
    look_while_reused(|_| true);
}
