//! What a mapping that is refused or removed leaves behind: nothing, and everybody else's.

use alloc::format;
use alloc::string::String;
use core::ptr::NonNull;

use super::*;
use crate::driver::{AltmapOps, DeviceError};
use crate::platform::{BackError, DeviceFile, DevicePages};

/// Which step fails, counted down; those before and behind it succeed.
#[derive(Debug, Default)]
struct Fuse(Mutex<Option<u32>>);

impl Fuse {
    fn set(&self, steps: Option<u32>) {
        *self.0.lock() = steps;
    }

    fn burns(&self) -> bool {
        let mut left = self.0.lock();
        match *left {
            Some(0) => {
                *left = None;
                true
            }
            Some(steps) => {
                *left = Some(steps - 1);
                false
            }
            None => false,
        }
    }
}

/// The heap, whose steps can fail, which knows what lives on a device, and looks up where when it is taken out.
#[derive(Debug, Default)]
struct Flaky {
    fuse: Fuse,
    unback_fuse: Fuse,
    backed: Mutex<Vec<(usize, usize)>>,
    /// Frames whose metadata area is looked up at each `unback`, and what was found.
    looks: Mutex<Vec<(Arc<MemoryMap>, Pfn)>>,
    found: Mutex<Vec<Option<PfnRange>>>,
}

// SAFETY: the heap's.
unsafe impl Platform for Flaky {
    fn reserve_zeroed(&self, bytes: usize) -> Result<NonNull<u8>, OutOfAddressSpace> {
        HeapPlatform.reserve_zeroed(bytes)
    }
    unsafe fn release(&self, memory: NonNull<u8>, bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { HeapPlatform.release(memory, bytes) };
    }
    unsafe fn back(
        &self,
        memory: NonNull<u8>,
        bytes: usize,
        _: DevicePages,
    ) -> Result<(), BackError> {
        if self.fuse.burns() {
            return Err(BackError::Refused(12));
        }
        self.backed.lock().push((memory.as_ptr().addr(), bytes));
        Ok(())
    }
    unsafe fn unback(&self, memory: NonNull<u8>, bytes: usize) -> Result<(), BackError> {
        for (map, pfn) in &*self.looks.lock() {
            self.found.lock().push(map.altmap_area(*pfn));
        }
        if self.unback_fuse.burns() {
            return Err(BackError::Refused(12));
        }
        let place = (memory.as_ptr().addr(), bytes);
        let mut backed = self.backed.lock();
        let nth = backed.iter().position(|other| *other == place);
        backed.swap_remove(nth.expect("what is taken out was put in"));
        Ok(())
    }
    fn now_ns(&self) -> u64 {
        0
    }
}

/// A metadata area whose clearing can fail.
#[derive(Debug, Default)]
struct Area {
    fuse: Fuse,
    cleared: Mutex<Vec<u64>>,
}

impl AltmapOps for Area {
    fn pages(&self, first: Pfn) -> DevicePages {
        DevicePages {
            file: DeviceFile(0),
            offset_bytes: first.get() * 4096,
        }
    }
    fn clear(&self, _: Pfn, count: u64) -> Result<(), DeviceError> {
        if self.fuse.burns() {
            return Err(DeviceError::Io(5));
        }
        self.cleared.lock().push(count);
        Ok(())
    }
}

/// Everything that mapping and removing may change.
fn snapshot(map: &MemoryMap, platform: &Flaky) -> String {
    let users = (0..MAX_PGMAPS).map(|entry| {
        let users = map.lookup.users(entry);
        (users.count(), users.is_dying())
    });
    let frames = (0..map.max_frames).map(|pfn| format!("{:?}", map.frame(Pfn::new(pfn).unwrap())));
    format!(
        "{:?} {:?} {:?} {:?} {:?}",
        map.lookup.snapshot(),
        map.resources.lock(),
        users.collect::<Vec<_>>(),
        platform.backed.lock(),
        frames
            .filter(
                |frame| *frame != "Frame { state: 0, private: 0, mapping: 0, link: 0, _spare: 0 }"
            )
            .collect::<Vec<_>>(),
    )
}

fn flaky() -> &'static Flaky {
    Box::leak(Box::default())
}

fn with_altmap<'a>(area: &Arc<Area>, ranges: &'a [PfnRange], pages: u64) -> Request<'a> {
    let start = ranges[0].start().get();
    Request {
        altmap: Altmap::new(Arc::clone(area) as _, range(start, 2 + pages), 2),
        ..Request::at("pmem0", ranges, MemoryType::Generic)
    }
}

/// MAP-3, 77dd66a3c67c: whichever step fails, the map is as it was before, to the last byte, and the neighbour's mapping works.
#[test]
fn a_failure_at_any_step_leaves_the_map_as_it_was() {
    let platform = flaky();
    let map = MemoryMap::new(platform, 16384).unwrap();
    let _ram = map.add_ram(1000).unwrap();
    let neighbour = map.memremap_pages(&[range(4096, 512)], MemoryType::Generic);
    let neighbour = neighbour.unwrap();
    neighbour.get_page(Pfn::from_u32(4100)).unwrap();
    let before = snapshot(&map, platform);
    let ranges = [range(4608, 700), range(2048, 600), range(8192, 1024)];
    let area = Arc::new(Area::default());
    let pages = ranges.iter().map(|range| Altmap::pages_for(*range)).sum();
    let mut failures = 0;
    for steps in 0.. {
        platform.fuse.set(Some(steps));
        area.fuse.set(steps.checked_sub(3));
        match map.memremap_request(with_altmap(&area, &ranges, pages)) {
            Ok(device) => {
                platform.fuse.set(None);
                assert_eq!(platform.backed.lock().len(), 3);
                device.kill().drain(None).unwrap().remove();
                break;
            }
            Err(MapError::AltmapNotCleared(_) | MapError::AltmapNotUsed(_)) => failures += 1,
            Err(error) => panic!("{error}"),
        }
        assert_eq!(snapshot(&map, platform), before);
        assert_eq!(neighbour.users_now(), 1);
    }
    assert_eq!(snapshot(&map, platform), before);
    assert!(failures >= 3, "each range's step failed once");
}

/// MAP-2, MAP-3: whichever of several ranges is in the way, and wherever, nothing of the others stays.
#[test]
fn a_collision_anywhere_leaves_the_map_as_it_was() {
    let platform = flaky();
    let map = MemoryMap::new(platform, 16384).unwrap();
    let _ram = map.add_ram(1000).unwrap();
    let _other = map.memremap_pages(&[range(8192, 512)], MemoryType::Generic);
    let before = snapshot(&map, platform);
    let conflict = Err(MapError::Conflict(range(8192, 512)));
    // Before it, around it, in its middle, behind it, and nothing but its sub-section.
    let ways = [
        (7000, 1300),
        (7000, 4000),
        (8300, 10),
        (8600, 900),
        (8703, 1),
    ];
    for (start, count) in ways {
        let ranges = [range(2048, 512), range(start, count)];
        let refused = map.memremap_pages(&ranges, MemoryType::Generic).map(drop);
        assert_eq!(refused, conflict, "{start} {count}");
        assert_eq!(snapshot(&map, platform), before);
    }
    let with_itself = [range(2048, 600), range(2660, 100)];
    let refused = map.memremap_pages(&with_itself, MemoryType::Generic);
    assert_eq!(refused.map(drop), Err(MapError::Conflict(range(2048, 600))));
    assert_eq!(snapshot(&map, platform), before);
}

/// MAP-2, 5f29a77cd957: two ranges that share no frame, but a sub-section, are in each other's way.
#[test]
fn the_test_for_overlap_is_made_on_whole_subsections() {
    let map = map(8192);
    let _ram = map.add_ram(1000).unwrap();
    let _a = map.memremap_pages(&[range(4096, 100)], MemoryType::Generic);
    let b = map.memremap_pages(&[range(4300, 100)], MemoryType::Generic);
    assert_eq!(b.map(drop), Err(MapError::Conflict(range(4096, 100))));
    let c = map.memremap_pages(&[range(1010, 10)], MemoryType::Generic);
    assert_eq!(c.map(drop), Err(MapError::IntersectsRam(range(1010, 10))));
}

/// MAP-2, 06489cfbd915: a range of RAM, whole or in part, is never said to be mapped, and takes nothing.
#[test]
fn ram_is_refused_and_nothing_set_up() {
    let platform = flaky();
    let map = MemoryMap::new(platform, 8192).unwrap();
    let _ram = map.add_ram(1024).unwrap();
    let before = snapshot(&map, platform);
    for (start, count) in [(0, 1024), (512, 100), (512, 1024), (0, 8192)] {
        let ram = range(start, count);
        let refused = map.memremap_pages(&[ram], MemoryType::Generic).map(drop);
        assert_eq!(refused, Err(MapError::IntersectsRam(ram)));
    }
    assert_eq!(snapshot(&map, platform), before);
}

/// MAP-4, 10a0cd6e4932: what is removed is what was mapped, however crooked its ends.
#[test]
fn a_crooked_range_leaves_no_subsection_behind() {
    let platform = flaky();
    let map = MemoryMap::new(platform, 1 << 20).unwrap();
    let before = map.lookup.snapshot();
    for (start, count) in [
        (1, 1),
        (511, 2),
        (513, 1022),
        (262_143, 262_146),
        (700, 600_000),
    ] {
        let ranges = [range(start, count)];
        let device = map.memremap_pages(&ranges, MemoryType::Generic).unwrap();
        assert!(
            map.get_dev_pagemap(Pfn::new(start + count - 1).unwrap())
                .is_some()
        );
        device.kill().drain(None).unwrap().remove();
        assert_eq!(map.lookup.snapshot(), before, "{start} {count}");
    }
}

/// MAP-4, 15d36fecd0bd: of two namespaces in one 128 MiB section one is removed, and the other's frames stay as they are.
#[test]
fn a_neighbour_in_the_same_section_keeps_its_frames() {
    let map = map(32768);
    let a = map
        .memremap_pages(&[range(512, 512)], MemoryType::Generic)
        .unwrap();
    let b = map
        .memremap_pages(&[range(1024, 512)], MemoryType::Generic)
        .unwrap();
    let page = Pfn::from_u32(1024);
    b.get_page(page).unwrap();
    b.set_data(page, DeviceData(7));
    a.kill().drain(None).unwrap().remove();
    assert!(map.get_dev_pagemap(page).is_some());
    assert!(map.get_dev_pagemap(Pfn::from_u32(1023)).is_none());
    assert_eq!((b.data(page), map.frame(page).refs()), (DeviceData(7), 1));
    b.put_page(page);
}

/// MAP-5, section-keyed-lookup: frames next to a device's, in its section, its sub-section and its GiB, are not the device's.
#[test]
fn neighbours_are_not_found_by_their_section() {
    let map = map(1 << 20);
    let device = map.memremap_pages(&[range(262_100, 262_300)], MemoryType::Generic);
    let _device = device.unwrap();
    let found = |pfn| map.get_dev_pagemap(Pfn::new(pfn).unwrap()).is_some();
    for pfn in [
        262_100, 262_143, 262_144, 400_000, 524_287, 524_288, 524_399,
    ] {
        assert!(found(pfn), "{pfn}");
    }
    for pfn in [
        0,
        261_632,
        262_099,
        524_400,
        524_799,
        524_800,
        (1 << 20) - 1,
    ] {
        assert!(!found(pfn), "{pfn}");
    }
    assert!(map.get_dev_pagemap(Pfn::from_u32(1 << 20)).is_none());
}

/// MAP-5: a guard serves neighbouring frames, and keeps the device from going away until it is dropped.
#[test]
fn a_guard_serves_a_run_of_frames() {
    let map = map(8192);
    let ranges = [range(1024, 600), range(4096, 512)];
    let device = map.memremap_pages(&ranges, MemoryType::Generic).unwrap();
    let guard = map.get_dev_pagemap(Pfn::from_u32(1024)).unwrap();
    assert!(
        (1024..1624)
            .chain(4096..4608)
            .all(|pfn| guard.covers(Pfn::from_u32(pfn)))
    );
    assert!(
        [1023, 1624, 4095, 4608]
            .iter()
            .all(|pfn| !guard.covers(Pfn::from_u32(*pfn)))
    );
    assert_eq!(device.users_now(), 1);
    drop(guard);
    assert_eq!(device.users_now(), 0);
}

/// MAP-8, eb7d78c9e7f6: while the metadata is taken off the device, the device is found by every frame of the section, and by none
/// afterwards.
#[test]
fn the_metadata_area_is_found_until_removal_is_complete() {
    let platform = flaky();
    let map = MemoryMap::new(platform, 16384).unwrap();
    let ranges = [range(4106, 1000)];
    let area = Arc::new(Area::default());
    let request = with_altmap(&area, &ranges, 12);
    let wanted = request.altmap.as_ref().map(Altmap::area);
    let device = map.memremap_request(request).unwrap();
    // The section begins and ends outside the range.
    let frames = [4096, 4106, 4500, 5105, 5119].map(Pfn::from_u32);
    *platform.looks.lock() = frames.iter().map(|pfn| (map.clone(), *pfn)).collect();
    let stale = device.clone();
    device.kill().drain(None).unwrap().remove();
    assert_eq!(*platform.found.lock(), [wanted; 5]);
    assert!(frames.iter().all(|pfn| map.altmap_area(*pfn).is_none()));
    assert_eq!(stale.altmap().unwrap().allocated(), 0);
}

/// MAP-8: frames whose metadata the machine does not take off the device stay reserved: nobody gets them with it.
#[test]
fn frames_that_stay_on_the_device_stay_reserved() {
    let platform = flaky();
    let map = MemoryMap::new(platform, 16384).unwrap();
    let ranges = [range(4096, 1024)];
    let area = Arc::new(Area::default());
    let device = map
        .memremap_request(with_altmap(&area, &ranges, 8))
        .unwrap();
    platform.unback_fuse.set(Some(0));
    device.kill().drain(None).unwrap().remove();
    assert!(map.get_dev_pagemap(Pfn::from_u32(4096)).is_none());
    let next = map.memremap_pages(&ranges, MemoryType::Generic);
    assert_eq!(next.map(drop), Err(MapError::Conflict(ranges[0])));
}

/// MAP-3, MAP-8: the same, where a mapping fails half way.
#[test]
fn frames_that_stay_on_the_device_after_a_failure_stay_reserved() {
    let platform = flaky();
    let map = MemoryMap::new(platform, 16384).unwrap();
    let ranges = [range(4096, 1024), range(8192, 512)];
    let area = Arc::new(Area::default());
    platform.fuse.set(Some(1));
    platform.unback_fuse.set(Some(0));
    let failed = map.memremap_request(with_altmap(&area, &ranges, 12));
    let refused = MapError::AltmapNotUsed(BackError::Refused(12));
    assert_eq!(failed.map(drop), Err(refused));
    let next = map.memremap_pages(&ranges, MemoryType::Generic);
    assert_eq!(next.map(drop), Err(MapError::Conflict(ranges[0])));
}

/// MAP-8: an area that is too small, or not the device's, is refused before anything is touched.
#[test]
fn an_unfit_metadata_area_is_refused_at_once() {
    let platform = flaky();
    let map = MemoryMap::new(platform, 16384).unwrap();
    let before = snapshot(&map, platform);
    let ranges = [range(4096, 1024)];
    let area = Arc::new(Area::default());
    let refused = map
        .memremap_request(with_altmap(&area, &ranges, 7))
        .map(drop);
    let (needed, free) = (8, 7);
    assert_eq!(refused, Err(MapError::AltmapTooSmall { needed, free }));
    let outside = Request {
        altmap: Altmap::new(area.clone(), range(5100, 30), 2),
        ..Request::at("pmem0", &ranges, MemoryType::Generic)
    };
    let refused = map.memremap_request(outside).map(drop);
    assert_eq!(refused, Err(MapError::AltmapOutside(range(5100, 30))));
    assert_eq!(snapshot(&map, platform), before);
    assert!(area.cleared.lock().is_empty());
    assert!(Altmap::new(area, range(0, 3), 4).is_none());
}

/// MAP-7, soft-lockup: however large the device, the work says how far it is within bounded steps.
#[test]
fn clearing_yields_at_bounded_intervals() {
    let map = MemoryMap::new(flaky(), 1 << 20).unwrap();
    let ranges = [range(0, (1 << 20) - 512)];
    let area = Arc::new(Area::default());
    let steps = Mutex::new(Vec::new());
    let note = |progress: Progress| steps.lock().push(progress);
    let device = map.memremap_request(Request {
        progress: &note,
        ..with_altmap(&area, &ranges, 8192)
    });
    let _device = device.unwrap();
    let mut last = 0;
    for step in &*steps.lock() {
        assert!(step.done_frames - last <= PROGRESS_FRAMES);
        last = step.done_frames;
        assert_eq!(step.total_frames, (1 << 20) - 512);
    }
    assert_eq!(last, (1 << 20) - 512);
    let longest = area.cleared.lock().iter().copied().max();
    assert!(longest <= Some(PROGRESS_FRAMES / Altmap::FRAMES_PER_PAGE));
}

fn compound(ranges: &[PfnRange], order: Order) -> Request<'_> {
    Request {
        order,
        ..Request::at("dax0.0", ranges, MemoryType::Generic)
    }
}

/// Ranges that are not whole pages of the order, and allocated memory with large pages, are refused by name.
#[test]
fn crooked_compound_ranges_are_refused() {
    let map = map(1 << 20);
    for crooked in [range(511, 512), range(512, 513), range(100, 50)] {
        let refused = map
            .memremap_request(compound(&[crooked], Order::Pmd))
            .map(drop);
        assert_eq!(refused, Err(MapError::Unaligned(crooked, Order::Pmd)));
    }
    let small = range(512, 512);
    let refused = map
        .memremap_request(compound(&[small], Order::Pud))
        .map(drop);
    assert_eq!(refused, Err(MapError::Unaligned(small, Order::Pud)));
    let kind = MemoryType::Private(Arc::new(Counting::default()));
    let private = Request {
        order: Order::Pmd,
        ..Request::anywhere("gpu", 512, kind)
    };
    let refused = map.memremap_request(private).map(drop);
    assert_eq!(refused, Err(MapError::Allocated));
}

/// An area whose clearing fails, once somebody has begun to read.
#[derive(Debug)]
struct Waits(std::sync::Barrier);

impl AltmapOps for Waits {
    fn pages(&self, _: Pfn) -> DevicePages {
        unreachable!("nothing is backed before it is cleared")
    }
    fn clear(&self, _: Pfn, _: u64) -> Result<(), DeviceError> {
        self.0.wait();
        self.0.wait();
        Err(DeviceError::Io(5))
    }
}

/// HOT-3: what a failed mapping had reserved is not given back under a reader's eyes.
#[test]
fn a_reader_holds_the_rollback_off() {
    let map = MemoryMap::new(flaky(), 16384).unwrap();
    let area = Arc::new(Waits(std::sync::Barrier::new(2)));
    let reserved = || !map.resources.lock().tree.roots().is_empty();
    let ranges = [range(4096, 512)];
    std::thread::scope(|scope| {
        let request = Request {
            altmap: Altmap::new(Arc::clone(&area) as _, range(4096, 4), 0),
            ..Request::at("pmem0", &ranges, MemoryType::Generic)
        };
        let failing = scope.spawn(|| map.memremap_request(request).map(drop));
        area.0.wait();
        let reading = map.get_online_mems();
        area.0.wait();
        std::thread::sleep(Duration::from_millis(30));
        assert!(reserved(), "it waits for the reader");
        drop(reading);
        let failed = failing.join().unwrap();
        assert_eq!(failed, Err(MapError::AltmapNotCleared(DeviceError::Io(5))));
    });
    assert!(!reserved());
}
