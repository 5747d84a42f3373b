#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::string::ToString;
use std::sync::{Barrier, Mutex as StdMutex};

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
            *pfn = match ram.replace(*pfn) {
                Ok(new) => new,
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

use crate::ram::NotReplaced;

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

/// HOT-2: a device's memory is in ZONE_DEVICE; it goes neither on nor off line, and who tries is told whose it is.
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

/// HOT-3, f931ab479dd2: many add at once, and none of them is lost.
#[test]
fn adding_is_exclusive() {
    let (map, ram) = machine(1);
    let start = Barrier::new(4);
    std::thread::scope(|scope| {
        for nth in 0..4 {
            let (map, ram, start) = (&map, &ram, &start);
            scope.spawn(move || {
                start.wait();
                for round in 0..5 {
                    ram.add(1).unwrap();
                    let at = (40 + nth * 5 + round) * BLOCK;
                    let device = map.memremap_pages(&[range(at, BLOCK)], MemoryType::Generic);
                    if round == 0 {
                        device.unwrap().kill().drain(None).unwrap().remove();
                    }
                }
            });
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

/// The zones that a block may join, as rule HOT-2 says it: `None` for what is absent, else the zone for what is on line.
fn allowed(model: &[Option<Option<RamZone>>], id: usize) -> [bool; 2] {
    let is = |zone| move |block: &Option<Option<RamZone>>| *block == Some(Some(zone));
    [
        !model[..id].iter().any(is(RamZone::Movable)),
        !model[id + 1..].iter().any(is(RamZone::Normal)),
    ]
}

proptest! {
    /// HOT-2, HOT-5, zone-shift: blocks agree with a list of zones; NORMAL lies below MOVABLE; adding and removing a block
    /// changes nothing that another may become; and the budget is what is on line.
    #[test]
    fn zones_and_blocks_agree_with_a_list(steps in prop::collection::vec(any_step(), 1..60)) {
        let map = MemoryMap::new(&HeapPlatform, 12 * BLOCK).unwrap();
        let ram = map.add_ram(4 * BLOCK).unwrap();
        let mut model: Vec<Option<Option<RamZone>>> = std::vec![None; 12];
        model[..4].fill(Some(Some(RamZone::Normal)));
        let mut used: Vec<Pfn> = Vec::new();
        for step in steps {
            let online = |model: &[Option<Option<RamZone>>]| {
                model.iter().filter(|block| matches!(block, Some(Some(_)))).count() as u64
            };
            match step {
                Step::Add(count) => {
                    let before: Vec<_> = (0..12).map(|id| allowed(&model, id)).collect();
                    let len = count as usize;
                    let room = (0..=12 - len).find(|at| model[*at..at + len].iter().all(Option::is_none));
                    let first = ram.add(count).ok().map(|first| first.0 as usize);
                    prop_assert_eq!(first, room);
                    if let Some(at) = room {
                        model[at..at + len].fill(Some(None));
                    }
                    let after: Vec<_> = (0..12).map(|id| allowed(&model, id)).collect();
                    prop_assert_eq!(before, after, "zone-shift");
                }
                Step::Online(id, choice) => {
                    let [normal, movable] = allowed(&model, id as usize);
                    let expected = match choice {
                        ZoneChoice::Auto | ZoneChoice::Kernel if normal => Some(RamZone::Normal),
                        ZoneChoice::Auto | ZoneChoice::Movable if movable => Some(RamZone::Movable),
                        ZoneChoice::Auto | ZoneChoice::Kernel | ZoneChoice::Movable => None,
                    };
                    let expected = expected.filter(|_| model[id as usize] == Some(None));
                    prop_assert_eq!(ram.online(BlockId(id), choice).ok(), expected);
                    if expected.is_some() {
                        model[id as usize] = Some(expected);
                    }
                }
                Step::Offline(id) => {
                    let is_online = matches!(model[id as usize], Some(Some(_)));
                    let room = used.len() as u64 <= online(&model).saturating_sub(1) * BLOCK;
                    let done = ram.offline(BlockId(id), &mut Owner(&mut used)).is_ok();
                    prop_assert_eq!(done, is_online && online(&model) > 1 && room);
                    if done {
                        model[id as usize] = Some(None);
                    }
                }
                Step::Remove(id) => {
                    let off = model[id as usize] == Some(None);
                    prop_assert_eq!(ram.remove(BlockId(id)).is_ok(), off);
                    if off {
                        model[id as usize] = None;
                    }
                }
                Step::Alloc(count) => {
                    let room = usize::try_from(online(&model) * BLOCK).unwrap() - used.len();
                    let taken = alloc(&ram, count);
                    prop_assert_eq!(taken.len(), count.min(room));
                    used.extend(taken);
                }
                Step::Free(count) => {
                    let rest = used.split_off(count.min(used.len()));
                    ram.free(&used);
                    used = rest;
                }
            }
            prop_assert_eq!((ram.capacity(), ram.limit()), (online(&model) * BLOCK, online(&model) * BLOCK));
            prop_assert_eq!(ram.in_use(), used.len() as u64);
            let mut names = used.clone();
            names.sort_unstable();
            names.dedup();
            prop_assert_eq!(names.len(), used.len(), "no frame is had twice");
            for pfn in &used {
                let zone = model[usize::try_from(pfn.get() / BLOCK).unwrap()].flatten();
                prop_assert!(zone.is_some() && ram.zone_of(*pfn) == zone.map(Zone::Ram));
            }
            let zones: Vec<_> = model.iter().filter_map(|block| block.flatten()).collect();
            prop_assert!(zones.is_sorted(), "NORMAL lies below MOVABLE: {zones:?}");
            let views = ram.blocks();
            prop_assert_eq!(views.len(), model.iter().flatten().count());
        }
    }
}
