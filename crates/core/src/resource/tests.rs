#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::string::ToString;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::memremap::{MemoryMap, MemoryType};
use crate::platform::HeapPlatform;
use pgmap_sync::WaitQueue;

fn range(start: u64, count: u64) -> PfnRange {
    PfnRange::new(Pfn::new(start).unwrap(), count).unwrap()
}

fn resource(start: u64, count: u64, flags: Flags, descriptor: Descriptor, name: &str) -> Resource {
    Resource::new(range(start, count), flags, descriptor, name)
}

/// HOT-1: what no frames can be is refused, whatever is asked for.
#[test]
fn a_resource_that_cannot_be_is_refused() {
    let map = MemoryMap::new(&HeapPlatform, 1 << 20).unwrap();
    for (frames, from, align) in [
        (1, 0, 0),
        (1, u64::MAX, 2),
        (1, 1, u64::MAX),
        (0, 0, 1),
        (u64::MAX, 0, 1),
    ] {
        let refused = map.allocate_resource(frames, from, align, |_| unreachable!());
        assert_eq!(refused, Err(MapError::NoRoom), "{frames} {from} {align}");
    }
}

/// HOT-1: one print shows RAM, what lies in it, and devices with their names, in bytes of 64 bits.
#[test]
fn the_tree_prints_like_iomem() {
    let map = MemoryMap::new(&HeapPlatform, 1 << 23).unwrap();
    let ram = map.add_ram(1 << 16).unwrap();
    let pmem = resource(
        1 << 22,
        1 << 18,
        Flags::MEMORY,
        Descriptor::PersistentMemory,
        "Persistent Memory",
    );
    map.insert_resource(pmem).unwrap();
    let fsdax = MemoryType::FsDax(Arc::new(WaitQueue::new()));
    let pmem0 = map
        .memremap_pages(&[range(1 << 22, 1 << 16)], fsdax)
        .unwrap();
    let dax = map.memremap_pages(&[range((1 << 22) + (1 << 17), 512)], MemoryType::Generic);
    ram.add(2).unwrap();
    let expected = "\
00000000-0fffffff : System RAM
10000000-13ffffff : System RAM
400000000-43fffffff : Persistent Memory
  400000000-40fffffff : fsdax
  420000000-4201fffff : devdax
";
    assert_eq!(map.iomem().to_string(), expected);
    let still_there = map.remove_resource(range(1 << 22, 1 << 18));
    assert_eq!(still_there, Err(NotThere(range(1 << 22, 1 << 18))));
    pmem0.kill().drain(None).unwrap().remove();
    dax.unwrap().kill().drain(None).unwrap().remove();
    assert_eq!(map.remove_resource(range(1 << 22, 1 << 18)), Ok(()));
    assert_eq!(map.iomem().roots().len(), 2);
}

/// HOT-1: who requests what another has is told who that is, and what is not busy can be requested in parts.
#[test]
fn a_request_names_who_is_in_the_way() {
    let mut tree = ResourceTree::default();
    let soft = resource(
        100,
        100,
        Flags::MEMORY,
        Descriptor::SoftReserved,
        "Soft Reserved",
    );
    tree.insert(soft).unwrap();
    let request = |tree: &mut ResourceTree, start, count, name| {
        let new = resource(start, count, Flags::MEMORY, Descriptor::None, name);
        tree.request(new).map_err(|in_the_way| in_the_way.name)
    };
    assert_eq!(request(&mut tree, 100, 50, "dax0.0"), Ok(()));
    assert_eq!(request(&mut tree, 149, 2, "dax0.1"), Err("dax0.0".into()));
    assert_eq!(request(&mut tree, 120, 2, "dax0.1"), Err("dax0.0".into()));
    assert_eq!(
        request(&mut tree, 199, 2, "dax0.1"),
        Err("Soft Reserved".into())
    );
    assert_eq!(request(&mut tree, 150, 50, "dax0.1"), Ok(()));
    assert_eq!(
        tree.release(range(100, 100)),
        Err(NotThere(range(100, 100)))
    );
    assert_eq!(tree.release(range(120, 10)), Ok(()));
    let parts: Vec<_> = tree.roots()[0]
        .children()
        .iter()
        .map(Resource::range)
        .collect();
    assert_eq!(parts, [range(100, 20), range(130, 20), range(150, 50)]);
}

/// HOT-1: a resource goes inside what contains it, takes in what it contains, and does not cross the ends of others.
#[test]
fn an_inserted_resource_finds_its_level() {
    let mut tree = ResourceTree::default();
    let insert = |tree: &mut ResourceTree, start, count, name| {
        let new = resource(start, count, Flags::MEMORY, Descriptor::None, name);
        tree.insert(new).map_err(|in_the_way| in_the_way.name)
    };
    assert_eq!(insert(&mut tree, 10, 10, "a"), Ok(()));
    assert_eq!(insert(&mut tree, 30, 10, "b"), Ok(()));
    assert_eq!(insert(&mut tree, 12, 2, "in a"), Ok(()));
    assert_eq!(insert(&mut tree, 0, 35, "crosses b"), Err("b".into()));
    assert_eq!(insert(&mut tree, 0, 40, "around both"), Ok(()));
    let root = &tree.roots()[0];
    let names = |level: &[Resource]| {
        level
            .iter()
            .map(|child| child.name.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(tree.roots()), ["around both"]);
    assert_eq!(names(root.children()), ["a", "b"]);
    assert_eq!(names(root.children()[0].children()), ["in a"]);
}

/// HOT-1, MAP-2: what matters are flags and descriptor; a name changes nothing.
#[test]
fn names_do_not_matter() {
    let mut tree = ResourceTree::default();
    let ram = resource(
        0,
        10,
        Flags::SYSTEM_RAM,
        Descriptor::None,
        "hibernation image",
    );
    tree.request(ram).unwrap();
    let other = resource(
        20,
        10,
        Flags::MEMORY,
        Descriptor::PersistentMemory,
        "System RAM",
    );
    tree.insert(other).unwrap();
    let ram = |start, count| {
        tree.region_intersects(range(start, count), Flags::SYSTEM_RAM, Descriptor::None)
    };
    assert_eq!(ram(0, 10), Intersection::Intersects);
    assert_eq!(ram(5, 10), Intersection::Intersects);
    assert_eq!(ram(10, 20), Intersection::Disjoint);
    assert_eq!(ram(5, 20), Intersection::Mixed);
    let pmem = tree.region_intersects(range(0, 40), Flags::MEMORY, Descriptor::PersistentMemory);
    assert_eq!(pmem, Intersection::Mixed);
}

#[derive(Clone, Debug)]
enum Step {
    Insert(u64, u64, Flags, Descriptor),
    Request(u64, u64, Flags, Descriptor),
    Release(usize),
    Part(u64, u64),
}

fn any_step() -> impl Strategy<Value = Step> {
    let place = || (0u64..60, 1u64..20);
    let kind = || {
        prop_oneof![
            Just((Flags::MEMORY, Descriptor::None)),
            Just((Flags::SYSTEM_RAM, Descriptor::None)),
            Just((
                Flags::MEMORY.and(Flags::EXCLUSIVE),
                Descriptor::PersistentMemory
            )),
        ]
    };
    prop_oneof![
        (place(), kind()).prop_map(|((at, n), (f, d))| Step::Insert(at, n, f, d)),
        (place(), kind()).prop_map(|((at, n), (f, d))| Step::Request(at, n, f, d)),
        any::<usize>().prop_map(Step::Release),
        place().prop_map(|(at, n)| Step::Part(at, n)),
    ]
}

type Entry = (PfnRange, Flags, Descriptor);

/// The model: a list of resources; one lies in another if that contains it.
fn flat(level: &[Resource], out: &mut Vec<Entry>) {
    let mut end = 0;
    for resource in level {
        assert!(
            resource.range.start().get() >= end,
            "sorted, without overlap"
        );
        end = resource.range.end();
        out.push((resource.range, resource.flags, resource.descriptor));
        let inside = resource
            .children
            .iter()
            .all(|child| contains(resource.range, child.range));
        assert!(inside, "children lie inside");
        flat(&resource.children, out);
    }
}

fn crosses(a: PfnRange, b: PfnRange) -> bool {
    a.intersects(b) && !contains(a, b) && !contains(b, a)
}

/// How a range lies, frame by frame.
fn model(entries: &[Entry], asked: PfnRange, flags: Flags, descriptor: Descriptor) -> Intersection {
    let (mut matched, mut other) = (false, false);
    for pfn in (asked.start().get()..asked.end()).filter_map(Pfn::new) {
        let here: Vec<_> = entries
            .iter()
            .filter(|entry| entry.0.contains(pfn))
            .collect();
        let any = here.iter().any(|entry| {
            entry.1.contains(flags) && (descriptor == Descriptor::None || entry.2 == descriptor)
        });
        matched |= any;
        other |= !any && !here.is_empty();
    }
    match (matched, other) {
        (false, _) => Intersection::Disjoint,
        (true, false) => Intersection::Intersects,
        (true, true) => Intersection::Mixed,
    }
}

proptest! {
    /// HOT-1: the tree agrees with a list of ranges, and every question about a range with a look at each of its frames.
    #[test]
    fn the_tree_agrees_with_a_list(steps in prop::collection::vec(any_step(), 1..40), asked in (0u64..70, 1u64..30)) {
        let mut tree = ResourceTree::default();
        let mut list: Vec<Entry> = Vec::new();
        for step in steps {
            match step {
                Step::Insert(start, count, flags, descriptor) => {
                    let new = range(start, count);
                    let done = tree.insert(Resource::new(new, flags, descriptor, ""));
                    prop_assert_eq!(done.is_ok(), !list.iter().any(|entry| crosses(entry.0, new)));
                    if done.is_ok() {
                        list.push((new, flags, descriptor));
                    }
                }
                Step::Request(start, count, flags, descriptor) => {
                    let new = range(start, count);
                    let done = tree.request(Resource::new(new, flags, descriptor, ""));
                    let free = list.iter().filter(|entry| entry.0.intersects(new)).all(|entry| {
                        contains(entry.0, new) && !entry.1.contains(Flags::BUSY)
                    });
                    prop_assert_eq!(done.is_ok(), free);
                    if done.is_ok() {
                        list.push((new, flags.and(Flags::BUSY), descriptor));
                    }
                }
                Step::Release(nth) => {
                    let Some((whole, ..)) = list.get(nth % list.len().max(1)).copied() else { continue };
                    let alone = list.iter().filter(|entry| contains(whole, entry.0)).count() == 1;
                    if alone {
                        prop_assert_eq!(tree.release(whole), Ok(()));
                        list.retain(|entry| entry.0 != whole);
                    }
                }
                Step::Part(start, count) => {
                    let part = range(start, count);
                    let whole = list.iter().position(|entry| {
                        contains(entry.0, part) && entry.1.contains(Flags::BUSY)
                            && !list.iter().any(|inner| inner.0 != entry.0 && contains(entry.0, inner.0))
                            && list.iter().filter(|same| same.0 == entry.0).count() == 1
                    });
                    if let Some(nth) = whole {
                        prop_assert_eq!(tree.release(part), Ok(()));
                        let (whole, flags, descriptor) = list.swap_remove(nth);
                        list.extend(outside(whole, part).map(|rest| (rest, flags, descriptor)));
                    }
                }
            }
            let mut found = Vec::new();
            flat(tree.roots(), &mut found);
            let order = |entry: &Entry| (entry.0.start(), entry.0.count(), entry.1.0, entry.2 as u8);
            found.sort_by_key(order);
            list.sort_by_key(order);
            prop_assert_eq!(&found, &list);
        }
        let asked = range(asked.0, asked.1);
        for (flags, descriptor) in [
            (Flags::SYSTEM_RAM, Descriptor::None),
            (Flags::MEMORY, Descriptor::PersistentMemory),
            (Flags::BUSY, Descriptor::None),
        ] {
            let expected = model(&list, asked, flags, descriptor);
            prop_assert_eq!(tree.region_intersects(asked, flags, descriptor), expected);
        }
    }
}
