#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::BTreeMap;

use proptest::prelude::*;

mod frames;
mod rollback;

use core::time::Duration;

use super::*;
use crate::driver::{DeviceData, Latency, Load, Store, Usage};
use crate::platform::HeapPlatform;

/// A device that counts how often its pages are freed.
#[derive(Debug, Default)]
struct Counting {
    freed: Mutex<Vec<u64>>,
}

impl PrivateOps for Counting {
    fn name(&self) -> &'static str {
        "counting"
    }
    fn latency(&self) -> Latency {
        Latency::Memory
    }
    fn migrate_to_device(&self, _: &mut [Store<'_>]) {}
    fn migrate_to_ram(&self, _: &mut [Load<'_>]) {}
    fn page_free(&self, data: DeviceData) {
        self.freed.lock().push(data.0);
    }
    fn usage(&self) -> Usage {
        Usage::default()
    }
}

fn map(frames: u64) -> Arc<MemoryMap> {
    MemoryMap::new(&HeapPlatform, frames).unwrap()
}

fn range(start: u64, count: u64) -> PfnRange {
    PfnRange::new(Pfn::new(start).unwrap(), count).unwrap()
}

/// MAP-5: lookup is exact at both ends, and MAP-6: it fails once the mapping is dying.
#[test]
fn lookup_is_exact_and_ends_with_kill() {
    let map = map(8192);
    let device = map
        .memremap_pages(&[range(1024, 600)], MemoryType::Generic)
        .unwrap();
    let found = |pfn| map.get_dev_pagemap(Pfn::new(pfn).unwrap()).is_some();
    assert!(!found(1023) && found(1024) && found(1623) && !found(1624));
    let killed = device.kill();
    assert!(!found(1024));
    killed.drain(None).unwrap().remove();
    assert!(!found(1024));
}

/// MAP-6, REF-2: a page in use finds its device while that is dying, and its last put is what the drain waits for.
#[test]
fn a_page_in_use_finds_its_dying_device() {
    let map = map(8192);
    let ops = Arc::new(Counting::default());
    let device = map.memremap_private(Arc::clone(&ops) as _, 100).unwrap();
    let page = device.alloc().unwrap();
    device.set_data(page, DeviceData(5));
    let killed = device.kill();
    assert!(map.get_dev_pagemap(page).is_none());
    {
        // SAFETY: the page is ours until it is put below.
        let found = unsafe { map.page_pgmap(page) }.unwrap();
        assert!(found.contains(page) && found.ops().unwrap().name() == "counting");
        let next = page.checked_add(100).unwrap();
        assert!(!found.contains(next), "exact at the end");
    }
    let held = killed.drain(Some(Duration::ZERO)).unwrap_err();
    assert_eq!(held.users, 1);
    map.put_dev_page(page);
    assert_eq!(*ops.freed.lock(), [5]);
    held.killed.drain(None).unwrap().remove();
    // SAFETY: no device has the page, so nothing is answered that could be used.
    assert!(unsafe { map.page_pgmap(page) }.is_none());
}

/// REF-2, MAP-6: pages in use keep a mapping from being removed, and nothing of them is lost meanwhile.
#[test]
fn a_mapping_with_pages_in_use_is_not_removed() {
    let map = map(8192);
    let ops = Arc::new(Counting::default());
    let device = map.memremap_private(ops.clone(), 100).unwrap();
    let page = device.alloc().unwrap();
    device.set_data(page, DeviceData(77));
    let still = device
        .clone()
        .kill()
        .drain(Some(Duration::from_millis(5)))
        .unwrap_err();
    assert_eq!((still.users, device.data(page)), (1, DeviceData(77)));
    assert_eq!(device.alloc(), None);
    device.put_page(page);
    assert_eq!(*ops.freed.lock(), [77]);
    still.killed.drain(None).unwrap().remove();
}

/// 71389703839e: any number of cycles leaves the count of users as it was.
#[test]
fn cycles_of_use_leave_no_trace_on_the_count() {
    let map = map(8192);
    let device = map
        .memremap_private(Arc::new(Counting::default()), 4)
        .unwrap();
    let page = device.alloc().unwrap();
    for _ in 0..1000 {
        map.frame(page).try_get().unwrap();
        drop(map.get_dev_pagemap(page));
        device.put_page(page);
    }
    assert_eq!(device.users_now(), 1);
    device.put_page(page);
    assert_eq!(device.users_now(), 0);
}

/// MAP-2, MAP-3, 77dd66a3c67c: a refused mapping leaves the others as they are.
#[test]
fn a_refused_mapping_leaves_the_others_alone() {
    let map = map(16384);
    let _ram = map.add_ram(1000).unwrap();
    let first = map
        .memremap_pages(&[range(4096, 512)], MemoryType::Generic)
        .unwrap();
    let refused = map.memremap_pages(&[range(8192, 512), range(4500, 512)], MemoryType::Generic);
    assert_eq!(refused.unwrap_err(), MapError::Conflict(range(4096, 512)));
    let refused = map.memremap_pages(&[range(1023, 512)], MemoryType::Generic);
    assert_eq!(
        refused.unwrap_err(),
        MapError::IntersectsRam(range(1023, 512))
    );
    assert!(map.get_dev_pagemap(Pfn::from_u32(4096)).is_some());
    assert!(map.get_dev_pagemap(Pfn::from_u32(8192)).is_none());
    first.kill().drain(None).unwrap().remove();
    let both = map.memremap_pages(&[range(8192, 512), range(4500, 512)], MemoryType::Generic);
    assert!(both.is_ok());
}

/// MAP-10: private memory needs no hole among the physical addresses.
#[test]
fn private_memory_has_numbers_of_its_own() {
    let map = map(1 << 20);
    let ram = map.add_ram(700).unwrap();
    let a = map
        .memremap_private(Arc::new(Counting::default()), 1000)
        .unwrap();
    let b = map
        .memremap_private(Arc::new(Counting::default()), 1000)
        .unwrap();
    let (a, b) = (a.ranges()[0], b.ranges()[0]);
    assert!(!a.intersects(b) && a.start().get() >= ram.capacity());
}

/// MAP-6: a handle that outlives its mapping gets nothing from the mapping that has its place and its numbers now.
#[test]
fn a_removed_device_gives_nothing() {
    let map = map(8192);
    let device = map
        .memremap_private(Arc::new(Counting::default()), 100)
        .unwrap();
    let stale = device.clone();
    let first = device.ranges()[0].start();
    device.kill().drain(None).unwrap().remove();
    let next = map
        .memremap_private(Arc::new(Counting::default()), 100)
        .unwrap();
    let page = next.alloc().unwrap();
    assert_eq!(page, first);
    assert!(next.contains(page) && !stale.contains(page));
    assert!(stale.is_dying() && stale.alloc().is_none() && stale.try_get().is_none());
    assert_eq!((stale.users_now(), next.users_now()), (0, 1));
}

/// MAP-6: a mapping that is gone cannot be killed through an old handle: another may have its place.
#[test]
#[should_panic = "by one handle, once"]
fn a_removed_device_is_not_killed_again() {
    let map = map(8192);
    let device = map
        .memremap_pages(&[range(1024, 512)], MemoryType::Generic)
        .unwrap();
    let stale = device.clone();
    device.kill().drain(None).unwrap().remove();
    let _killed = stale.kill();
}

/// MAP-6: nobody can give a mapping its life back while somebody else removes it.
#[test]
#[should_panic = "by one handle, once"]
fn two_handles_do_not_both_take_a_device_away() {
    let map = map(8192);
    let device = map
        .memremap_pages(&[range(1024, 512)], MemoryType::Generic)
        .unwrap();
    let other = device.clone();
    let _drained = device.kill().drain(None).unwrap();
    let _alive = other.kill().resurrect();
}

/// MAP-6: a mapping that got its life back can be used and taken away again.
#[test]
fn a_resurrected_device_can_be_taken_away_again() {
    let map = map(8192);
    let device = map
        .memremap_pages(&[range(1024, 512)], MemoryType::Generic)
        .unwrap();
    let device = device.kill().resurrect();
    assert!(!device.is_dying() && device.try_get().is_some());
    device.kill().drain(None).unwrap().remove();
}

/// MAP-10: the numbers of removed devices are given out again, however devices come and go.
#[test]
fn numbers_of_removed_devices_come_back() {
    let map = map(8192);
    let _ram = map.add_ram(700).unwrap();
    let mut device = map
        .memremap_private(Arc::new(Counting::default()), 1000)
        .unwrap();
    for _ in 0..100 {
        let next = map.memremap_private(Arc::new(Counting::default()), 1000);
        device.kill().drain(None).unwrap().remove();
        device = next.unwrap();
    }
}

proptest! {
    /// REF-2, REF-3: the device's allocator agrees with a set; each page's data comes back once, with its last put.
    #[test]
    fn device_pages_agree_with_a_set(steps in prop::collection::vec((any::<bool>(), 0usize..64), 1..200)) {
        let map = map(8192);
        let ops = Arc::new(Counting::default());
        let device = map.memremap_private(ops.clone(), 48).unwrap();
        let mut used: BTreeMap<Pfn, u64> = BTreeMap::new();
        let mut freed = Vec::new();
        for (nth, (take, which)) in steps.into_iter().enumerate() {
            let data = nth as u64;
            if take {
                let page = device.alloc();
                prop_assert_eq!(page.is_some(), used.len() < 48);
                if let Some(page) = page {
                    prop_assert_eq!(device.data(page), DeviceData(0), "REF-4");
                    device.set_data(page, DeviceData(data));
                    prop_assert_eq!(used.insert(page, data), None);
                }
            } else if let Some(page) = used.keys().nth(which).copied() {
                device.put_page(page);
                freed.extend(used.remove(&page));
            }
            prop_assert_eq!(device.users_now(), used.len() as u64);
            prop_assert_eq!(&*ops.freed.lock(), &freed);
        }
    }

    /// MAP-2 to MAP-5: mapping, unmapping and lookup agree with a list of ranges.
    #[test]
    fn lookup_agrees_with_a_list(steps in prop::collection::vec((0u64..14, 1u64..1500, any::<bool>()), 1..40)) {
        let map = map(16384);
        let mut model: BTreeMap<u64, (PfnRange, DevPagemap)> = BTreeMap::new();
        for (start, count, remove) in steps {
            let new = range(start * 700, count);
            if remove {
                if let Some((_, (_, device))) = model.pop_first() {
                    device.kill().drain(None).unwrap().remove();
                }
                continue;
            }
            let (low, high) = aligned(new);
            let free = high <= 16384 && model.values().all(|(other, _)| {
                let (start, end) = aligned(*other);
                high <= start || end <= low
            });
            let mapped = map.memremap_pages(&[new], MemoryType::Generic);
            prop_assert_eq!(mapped.is_ok(), free && model.len() < usize::from(MAX_PGMAPS));
            if let Ok(device) = mapped {
                model.insert(new.start().get(), (new, device));
            }
            for (other, _) in model.values() {
                for pfn in [other.start().get().wrapping_sub(1), other.start().get(), other.end() - 1, other.end()] {
                    let Some(pfn) = Pfn::new(pfn).filter(|pfn| pfn.get() < 16384) else { continue };
                    let expected = model.values().any(|(range, _)| range.contains(pfn));
                    prop_assert_eq!(map.get_dev_pagemap(pfn).is_some(), expected);
                }
            }
        }
    }
}
