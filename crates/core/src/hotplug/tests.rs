#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::BTreeSet;
use std::string::ToString;
use std::sync::{Barrier, Mutex as StdMutex};

use pgmap_sync::atomic::{AtomicU32, Ordering};
use proptest::prelude::*;

use super::*;
use crate::memremap::MemoryType;
use crate::platform::HeapPlatform;
use crate::sparse::SUBSECTION_FRAMES;

const BLOCK: u64 = SUBSECTION_FRAMES;

/// A map with `blocks` blocks of RAM on line, each of a sub-section, and room for more.
fn machine(blocks: u64) -> (Arc<MemoryMap>, Ram) {
    let map = MemoryMap::new(&HeapPlatform, 64 * BLOCK).unwrap();
    let ram = map.add_ram(blocks * BLOCK).unwrap();
    (map, ram)
}

fn alloc(ram: &Ram, count: usize) -> Vec<Pfn> {
    let mut out = std::vec![Pfn::from_u32(0); count];
    let taken = ram.alloc(&mut out);
    out.truncate(taken);
    out
}

fn state(ram: &Ram, id: BlockId) -> Option<BlockState> {
    ram.blocks()
        .into_iter()
        .find(|block| block.id == id)
        .map(|block| block.state)
}

/// Whoever uses the frames: a list of them, in which each can be named anew.
struct Owner<'a>(&'a mut Vec<Pfn>);

impl Migrate for Owner<'_> {
    fn empty(&mut self, ram: &Ram, block: BlockId) -> Result<(), Obstacle> {
        let size = ram.block_size();
        for pfn in self
            .0
            .iter_mut()
            .filter(|pfn| size.block_of(**pfn) == block)
        {
            let mut new = *pfn;
            *pfn = match ram.replace(*pfn, Target::AnyZone, |named| new = named) {
                Ok(()) => new,
                Err(NotReplaced::Held) => {
                    return Err(Obstacle::Held {
                        pfn: *pfn,
                        holder: None,
                    });
                }
                Err(NotReplaced::Full) => {
                    return Err(Obstacle::NoRoom {
                        frames: ram.used_in(block),
                    });
                }
            };
        }
        Ok(())
    }
}

use crate::ram::{NotReplaced, Target};

/// HOT-5: what goes off line cannot be had any more, what goes on line can, and what was in use stays in use.
#[test]
fn blocks_change_the_budget_while_it_is_used() {
    let (_map, ram) = machine(4);
    let mut used = alloc(&ram, 600);
    for (nth, pfn) in used.iter().enumerate() {
        ram.map.frame(*pfn).set_mapping(nth as u64 + 1);
    }
    ram.offline(BlockId(0), &mut Owner(&mut used)).unwrap();
    assert_eq!((ram.capacity(), ram.limit()), (3 * BLOCK, 3 * BLOCK));
    assert_eq!((ram.in_use(), ram.used_in(BlockId(0))), (600, 0));
    for (nth, pfn) in used.iter().enumerate() {
        assert_eq!(
            ram.map.frame(*pfn).mapping(),
            nth as u64 + 1,
            "its owner's words"
        );
    }
    used.extend(alloc(&ram, 4096));
    assert_eq!(used.len() as u64, 3 * BLOCK);
    assert!(used.iter().all(|pfn| pfn.get() >= BLOCK));
    assert_eq!(
        ram.online(BlockId(0), ZoneChoice::Auto).unwrap(),
        RamZone::Normal
    );
    used.extend(alloc(&ram, 4096));
    assert_eq!((used.len() as u64, ram.limit()), (4 * BLOCK, 4 * BLOCK));
    ram.free(&used);
    assert_eq!(ram.in_use(), 0);
}

/// HOT-2: added memory is in no zone, off line, and no part of the budget until it is brought on line; then it can be removed
/// again, and its numbers are given out again.
#[test]
fn added_memory_is_used_once_it_is_on_line() {
    let (map, ram) = machine(2);
    let device = map
        .memremap_pages(&[range(2 * BLOCK, 100)], MemoryType::Generic)
        .unwrap();
    let first = ram.add(2).unwrap();
    assert_eq!(
        (first, state(&ram, first)),
        (BlockId(3), Some(BlockState::Offline))
    );
    assert_eq!(
        (ram.capacity(), ram.zone_of(pfn(3 * BLOCK))),
        (2 * BLOCK, None)
    );
    ram.online(first, ZoneChoice::Movable).unwrap();
    assert_eq!(ram.capacity(), 3 * BLOCK);
    assert_eq!(alloc(&ram, 1), [pfn(3 * BLOCK)], "MOVABLE is used first");
    assert_eq!(
        ram.zone_of(pfn(3 * BLOCK)),
        Some(Zone::Ram(RamZone::Movable))
    );
    assert_eq!(ram.zone_of(pfn(2 * BLOCK)), Some(Zone::Device));
    let busy = ram.remove(first).unwrap_err().to_string();
    assert_eq!(busy, "memory3 is online");
    ram.remove(BlockId(4)).unwrap();
    assert!(matches!(
        ram.online(BlockId(4), ZoneChoice::Auto),
        Err(HotplugError::Absent(_))
    ));
    device.kill().drain(None).unwrap().remove();
    assert_eq!(
        (ram.add(1).unwrap(), ram.add(1).unwrap()),
        (BlockId(2), BlockId(4))
    );
}

fn pfn(number: u64) -> Pfn {
    Pfn::new(number).unwrap()
}

fn range(start: u64, count: u64) -> PfnRange {
    PfnRange::new(pfn(start), count).unwrap()
}

/// HOT-2: a device's memory is in `ZONE_DEVICE`; it goes neither on nor off line, and who tries is told whose it is.
#[test]
fn device_memory_is_not_onlined_or_offlined() {
    let (map, ram) = machine(2);
    let _device = map
        .memremap_pages(&[range(2 * BLOCK, BLOCK)], MemoryType::Generic)
        .unwrap();
    for error in [
        ram.online(BlockId(2), ZoneChoice::Auto).map(drop),
        ram.offline(BlockId(2), &mut Owner(&mut Vec::new())),
        ram.remove(BlockId(2)),
    ] {
        let text = error.unwrap_err().to_string();
        assert!(text.contains("ZONE_DEVICE, the memory of devdax"), "{text}");
    }
}

/// HOT-4: a pinned page makes offlining fail, and everything is as it was: state, budget, and who has which frame.
#[test]
fn a_pinned_page_keeps_its_block_on_line() {
    let (map, ram) = machine(3);
    let mut used = alloc(&ram, 20);
    map.frame(used[7]).try_pin().unwrap();
    let before = (
        ram.capacity(),
        ram.limit(),
        ram.in_use(),
        state(&ram, BlockId(0)),
    );
    let view = ram.blocks().remove(0);
    assert_eq!(view.obstacle().unwrap(), "1 frames are pinned");
    let error = ram.offline(BlockId(0), &mut Owner(&mut used)).unwrap_err();
    assert!(matches!(error, HotplugError::Busy(_, Obstacle::Held { pfn, .. }) if pfn == used[7]));
    let after = (
        ram.capacity(),
        ram.limit(),
        ram.in_use(),
        state(&ram, BlockId(0)),
    );
    assert_eq!(before, after);
    used.extend(alloc(&ram, 4096));
    assert_eq!(used.len() as u64, 3 * BLOCK, "every frame can be had again");
    ram.unpin(used[7]);
}

/// HOT-4: a limit that is set while a block tries to go off line is kept when it fails.
#[test]
fn a_limit_set_meanwhile_is_kept() {
    struct SetsLimit;
    impl Migrate for SetsLimit {
        fn empty(&mut self, ram: &Ram, _: BlockId) -> Result<(), Obstacle> {
            ram.set_limit(100);
            Err(Obstacle::InTransit { frames: 1 })
        }
    }
    let (_map, ram) = machine(3);
    ram.offline(BlockId(1), &mut SetsLimit).unwrap_err();
    assert_eq!((ram.capacity(), ram.limit()), (3 * BLOCK, 100));
}

/// HOT-5: the last RAM that may be used stays.
#[test]
fn the_last_ram_stays_on_line() {
    let (_map, ram) = machine(2);
    ram.offline(BlockId(0), &mut Owner(&mut Vec::new()))
        .unwrap();
    let error = ram
        .offline(BlockId(1), &mut Owner(&mut Vec::new()))
        .unwrap_err();
    assert!(matches!(error, HotplugError::Last(BlockId(1))));
    assert_eq!(ram.limit(), BLOCK);
}

/// WB-6: a frame that was lost does not keep its block on line, and does not come back with it.
#[test]
fn a_poisoned_frame_stays_lost() {
    let (map, ram) = machine(2);
    let used = alloc(&ram, 1);
    map.frame(used[0]).poison();
    map.frame(pfn(5)).poison();
    ram.free(&used);
    ram.offline(BlockId(0), &mut Owner(&mut Vec::new()))
        .unwrap();
    ram.remove(BlockId(0)).unwrap();
    assert_eq!(ram.add(1).unwrap(), BlockId(0));
    ram.online(BlockId(0), ZoneChoice::Kernel).unwrap();
    let all = alloc(&ram, 4096);
    assert_eq!(all.len() as u64, 2 * BLOCK - 2);
    assert!(!all.contains(&used[0]) && !all.contains(&pfn(5)));
}

/// Notes what it is told, and refuses one kind of change.
#[derive(Debug)]
struct Noting {
    name: &'static str,
    refuses: Option<Going>,
    log: Arc<StdMutex<Vec<String>>>,
}

impl MemoryNotifier for Noting {
    fn going(&self, what: Going, _: PfnRange) -> Result<(), Veto> {
        self.log
            .lock()
            .unwrap()
            .push(std::format!("{} Going{what:?}", self.name));
        if self.refuses == Some(what) {
            return Err(Veto("not now".into()));
        }
        Ok(())
    }

    fn happened(&self, event: Event, _: PfnRange) {
        self.log
            .lock()
            .unwrap()
            .push(std::format!("{} {event:?}", self.name));
    }
}

/// HOT-4: a veto leaves everything as it was; those who had agreed are told, in their order, and nobody else.
#[test]
fn a_veto_leaves_the_state_unchanged() {
    let (_map, ram) = machine(3);
    let log = Arc::new(StdMutex::new(Vec::new()));
    let register = |name, refuses| {
        let log = Arc::clone(&log);
        ram.register_memory_notifier(Arc::new(Noting { name, refuses, log }));
    };
    register("a", None);
    let off = |id| ram.offline(BlockId(id), &mut Owner(&mut Vec::new()));
    off(0).unwrap();
    ram.online(BlockId(0), ZoneChoice::Auto).unwrap();
    off(2).unwrap();
    register("b", Some(Going::Offline));
    register("c", Some(Going::Online));
    log.lock().unwrap().clear();
    let before = (ram.capacity(), ram.limit(), ram.blocks());
    let error = off(1).unwrap_err();
    assert_eq!(error.to_string(), "memory1 stays as it is: not now");
    ram.online(BlockId(2), ZoneChoice::Auto).unwrap_err();
    assert_eq!((ram.capacity(), ram.limit(), ram.blocks()), before);
    let expected = [
        "a GoingOffline",
        "b GoingOffline",
        "a CancelOffline",
        "a GoingOnline",
        "b GoingOnline",
        "c GoingOnline",
        "a CancelOnline",
        "b CancelOnline",
    ];
    assert_eq!(*log.lock().unwrap(), expected);
}

/// HOT-3: who is asked, and who moves pages, is waited for outside of the lock.
#[test]
fn nobody_is_waited_for_inside_begin_and_done() {
    #[derive(Debug)]
    struct Adds(Arc<MemoryMap>);
    impl MemoryNotifier for Adds {
        fn going(&self, _: Going, _: PfnRange) -> Result<(), Veto> {
            // Would wait for ever inside.
            drop(self.0.iomem());
            let device = self
                .0
                .memremap_pages(&[range(20 * BLOCK, BLOCK)], MemoryType::Generic);
            device.unwrap().kill().drain(None).unwrap().remove();
            Ok(())
        }
        fn happened(&self, _: Event, _: PfnRange) {
            drop(self.0.iomem());
        }
    }
    let (map, ram) = machine(2);
    ram.register_memory_notifier(Arc::new(Adds(map)));
    ram.offline(BlockId(0), &mut Owner(&mut Vec::new()))
        .unwrap();
    ram.online(BlockId(0), ZoneChoice::Auto).unwrap();
}

/// HOT-3: a reader holds off who adds, removes, or changes what is on line.
#[test]
fn readers_hold_changes_off() {
    let (map, ram) = machine(2);
    let off = ram.add(1).unwrap();
    let changed = AtomicU32::new(0);
    // SeqCst: a test needs no less.
    let change = &|what: &dyn Fn()| {
        what();
        changed.fetch_add(1, Ordering::SeqCst);
    };
    let add = || assert!(ram.add(1).is_ok());
    let online = || assert!(ram.online(off, ZoneChoice::Auto).is_ok());
    let remove = || assert!(map.remove_resource(range(40 * BLOCK, 1)).is_err());
    std::thread::scope(|scope| {
        let reading = map.get_online_mems();
        for what in [&add as &(dyn Fn() + Sync), &online, &remove] {
            scope.spawn(move || change(&what));
        }
        std::thread::sleep(core::time::Duration::from_millis(30));
        assert_eq!(
            changed.load(Ordering::SeqCst),
            0,
            "nothing changes meanwhile"
        );
        drop(reading);
    });
    assert_eq!(changed.load(Ordering::SeqCst), 3);
}

/// HOT-3, f931ab479dd2: many add at once, and none of them is lost.
#[test]
fn adding_is_exclusive() {
    let (map, ram) = machine(1);
    let start = Barrier::new(4);
    let add = &|nth: u64| {
        start.wait();
        for round in 0..5 {
            ram.add(1).unwrap();
            let at = (40 + nth * 5 + round) * BLOCK;
            let device = map.memremap_pages(&[range(at, BLOCK)], MemoryType::Generic);
            if round == 0 {
                device.unwrap().kill().drain(None).unwrap().remove();
            }
        }
    };
    std::thread::scope(|scope| {
        for nth in 0..4 {
            scope.spawn(move || add(nth));
        }
    });
    assert_eq!(ram.blocks().len(), 21);
    let iomem = map.iomem();
    let devices = iomem.roots().iter().filter(|root| root.name() == "devdax");
    assert_eq!(devices.count(), 16);
    for nth in 0..4 {
        let at = (40 + nth * 5) * BLOCK;
        assert!(map.get_dev_pagemap(pfn(at)).is_none());
        assert!(map.get_dev_pagemap(pfn(at + BLOCK)).is_some());
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Add(u32),
    Online(u32, ZoneChoice),
    Offline(u32),
    Remove(u32),
    Alloc(usize),
    Free(usize),
}

fn any_step() -> impl Strategy<Value = Step> {
    let id = || 0u32..12;
    let choice = prop_oneof![
        Just(ZoneChoice::Auto),
        Just(ZoneChoice::Kernel),
        Just(ZoneChoice::Movable)
    ];
    prop_oneof![
        1 => (1u32..3).prop_map(Step::Add),
        4 => (id(), choice).prop_map(|(id, choice)| Step::Online(id, choice)),
        4 => id().prop_map(Step::Offline),
        2 => id().prop_map(Step::Remove),
        3 => (1usize..900).prop_map(Step::Alloc),
        2 => (1usize..900).prop_map(Step::Free),
    ]
}

/// A block, as the model has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Block {
    Absent,
    Off,
    In(RamZone),
}

/// RAM, and the list that it has to agree with.
struct Model {
    ram: Ram,
    blocks: Vec<Block>,
    used: Vec<Pfn>,
}

impl Model {
    fn new() -> Self {
        let map = MemoryMap::new(&HeapPlatform, 12 * BLOCK).unwrap();
        let mut blocks = std::vec![Block::Absent; 12];
        blocks[..4].fill(Block::In(RamZone::Normal));
        Self {
            ram: map.add_ram(4 * BLOCK).unwrap(),
            blocks,
            used: Vec::new(),
        }
    }

    fn online_frames(&self) -> usize {
        let online = self.blocks.iter();
        let online = online.filter(|block| matches!(block, Block::In(_)));
        online.count() * usize::try_from(BLOCK).unwrap()
    }

    /// The zone that a block that is off line joins, as rule HOT-2 says it.
    fn joins(&self, id: usize, choice: ZoneChoice) -> Option<RamZone> {
        let normal = !self.blocks[..id].contains(&Block::In(RamZone::Movable));
        let movable = !self.blocks[id + 1..].contains(&Block::In(RamZone::Normal));
        let normal = normal.then_some(RamZone::Normal);
        let movable = movable.then_some(RamZone::Movable);
        match choice {
            ZoneChoice::Auto => normal.or(movable),
            ZoneChoice::Kernel => normal,
            ZoneChoice::Movable => movable,
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Add(count) => self.add(count),
            Step::Online(id, choice) => {
                let block = &self.blocks[id as usize];
                let joins = self.joins(id as usize, choice);
                let expected = joins.filter(|_| *block == Block::Off);
                assert_eq!(self.ram.online(BlockId(id), choice).ok(), expected);
                if let Some(zone) = expected {
                    self.blocks[id as usize] = Block::In(zone);
                }
            }
            Step::Offline(id) => self.offline(id),
            Step::Remove(id) => {
                let off = self.blocks[id as usize] == Block::Off;
                assert_eq!(self.ram.remove(BlockId(id)).is_ok(), off);
                if off {
                    self.blocks[id as usize] = Block::Absent;
                }
            }
            Step::Alloc(count) => {
                let taken = alloc(&self.ram, count);
                let room = self.online_frames() - self.used.len();
                assert_eq!(taken.len(), count.min(room));
                self.used.extend(taken);
            }
            Step::Free(count) => {
                let rest = self.used.split_off(count.min(self.used.len()));
                self.ram.free(&self.used);
                self.used = rest;
            }
        }
    }

    fn add(&mut self, count: u32) {
        let len = count as usize;
        let is_free = |at: &usize| {
            self.blocks[*at..at + len]
                .iter()
                .all(|block| *block == Block::Absent)
        };
        let room = (0..=12 - len).find(is_free);
        let first = self.ram.add(count).ok();
        assert_eq!(first.map(|first| first.0 as usize), room);
        if let Some(at) = room {
            self.blocks[at..at + len].fill(Block::Off);
        }
    }

    fn offline(&mut self, id: u32) {
        let frames = self.online_frames();
        let left = frames.saturating_sub(usize::try_from(BLOCK).unwrap());
        let is_online = matches!(self.blocks[id as usize], Block::In(_));
        let done = self.ram.offline(BlockId(id), &mut Owner(&mut self.used));
        let expected = is_online && left > 0 && self.used.len() <= left;
        assert_eq!(done.is_ok(), expected);
        if expected {
            self.blocks[id as usize] = Block::Off;
        }
    }

    /// What holds after every step.
    fn check(&self) {
        let frames = self.online_frames() as u64;
        assert_eq!((self.ram.capacity(), self.ram.limit()), (frames, frames));
        assert_eq!(self.ram.in_use(), self.used.len() as u64);
        let distinct: BTreeSet<_> = self.used.iter().collect();
        assert_eq!(distinct.len(), self.used.len(), "no frame is had twice");
        for pfn in &self.used {
            let block = self.blocks[usize::try_from(pfn.get() / BLOCK).unwrap()];
            assert!(
                matches!(block, Block::In(zone) if self.ram.zone_of(*pfn) == Some(Zone::Ram(zone)))
            );
        }
        let in_zones = self.blocks.iter();
        let zones: Vec<_> = in_zones
            .filter_map(|block| match block {
                Block::In(zone) => Some(*zone),
                Block::Absent | Block::Off => None,
            })
            .collect();
        assert!(zones.is_sorted(), "NORMAL lies below MOVABLE: {zones:?}");
        let there = self.blocks.iter().filter(|block| **block != Block::Absent);
        assert_eq!(self.ram.blocks().len(), there.count());
    }
}

proptest! {
    /// HOT-2, HOT-5: blocks agree with a list of zones, of which NORMAL lies below MOVABLE; and the budget is what is on line.
    #[test]
    fn zones_and_blocks_agree_with_a_list(steps in prop::collection::vec(any_step(), 1..60)) {
        let mut model = Model::new();
        for step in steps {
            model.step(step);
            model.check();
        }
    }
}

/// HOT-2, zone-shift: blocks that are added, and not on line yet, change nothing that an earlier one may become.
#[test]
fn adding_a_block_does_not_shift_zones() {
    let choices = [ZoneChoice::Kernel, ZoneChoice::Movable];
    for (choice, added_later) in choices
        .into_iter()
        .flat_map(|choice| [(choice, 0), (choice, 3)])
    {
        let (_map, ram) = machine(2);
        let first = ram.add(1).unwrap();
        if added_later > 0 {
            ram.add(added_later).unwrap();
        }
        // Both zones are legal for it, whatever was added behind it meanwhile.
        ram.online(first, choice).unwrap();
    }
    let (_map, ram) = machine(2);
    let first = ram.add(3).unwrap();
    let second = BlockId(first.0 + 1);
    ram.online(second, ZoneChoice::Movable).unwrap();
    let wrong = ram.online(BlockId(first.0 + 2), ZoneChoice::Kernel);
    let text = wrong.unwrap_err().to_string();
    assert!(
        text.starts_with("Normal cannot be there: the block below it"),
        "{text}"
    );
    assert_eq!(
        ram.online(first, ZoneChoice::Auto).unwrap(),
        RamZone::Normal
    );
}
