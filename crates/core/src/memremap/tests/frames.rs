//! References and pins on frames that their user names, and what the last of them does.

use super::*;
use crate::addr::Page;
use crate::driver::{CoherentOps, DeviceError, P2pDmaOps};
use crate::holders::Who;
use crate::zone::Zone;
use pgmap_sync::WaitQueue;

/// A device that counts which of its pages are freed.
#[derive(Debug, Default)]
struct Freed(Mutex<Vec<Pfn>>);

impl CoherentOps for Freed {
    fn name(&self) -> &'static str {
        "coherent"
    }
    fn migrate_to_ram(&self, _: Pfn, _: &mut Page) -> Result<(), DeviceError> {
        Ok(())
    }
    fn migrate_to_device(&self, _: &Page, _: Pfn) -> Result<(), DeviceError> {
        Ok(())
    }
    fn page_free(&self, page: Pfn) {
        self.0.lock().push(page);
    }
}

impl P2pDmaOps for Freed {
    fn provider(&self) -> &'static str {
        "p2p"
    }
    fn bus_offset_bytes(&self) -> u64 {
        0
    }
    fn page_free(&self, page: Pfn) {
        self.0.lock().push(page);
    }
}

fn generic(map: &Arc<MemoryMap>, range: PfnRange, order: Order) -> DevPagemap {
    let ranges = [range];
    let request = Request {
        order,
        ..Request::at("dax0.0", &ranges, MemoryType::Generic)
    };
    map.memremap_request(request).unwrap()
}

/// REF-1, REF-2: the first reference of a given frame takes a live reference on the mapping, the last put gives it back, and nothing
/// between touches it.
#[test]
fn a_given_frame_in_use_holds_its_mapping() {
    let map = map(8192);
    let device = generic(&map, range(1024, 512), Order::Base);
    let page = Pfn::from_u32(1030);
    for _ in 0..100 {
        for _ in 0..3 {
            device.get_page(page).unwrap();
            assert_eq!(device.users_now(), 1);
        }
        for _ in 0..3 {
            assert_eq!(device.users_now(), 1);
            device.put_page(page);
        }
        assert_eq!(device.users_now(), 0);
    }
}

/// REF-2: a page whose references are gone is in use until its last unpin.
#[test]
fn the_last_unpin_gives_a_given_frame_back() {
    let map = map(8192);
    let device = generic(&map, range(1024, 512), Order::Base);
    let page = Pfn::from_u32(1030);
    assert_eq!(device.pin_page(page), Err(PageError::Busy(page)));
    device.get_page(page).unwrap();
    device.pin_page(page).unwrap();
    device.put_page(page);
    assert_eq!(device.users_now(), 1);
    assert_eq!(device.get_page(page), Err(PageError::Busy(page)));
    device.unpin_page(page);
    assert_eq!(device.users_now(), 0);
    assert_eq!(device.get_page(page), Ok(()));
}

/// REF-4, stale-mapping: a given frame that is used again carries nothing over.
#[test]
fn a_given_frame_remembers_nothing() {
    let map = map(8192);
    let device = generic(&map, range(1024, 512), Order::Base);
    let page = Pfn::from_u32(1030);
    device.get_page(page).unwrap();
    map.frame(page).set_mapping(9);
    device.set_data(page, DeviceData(9));
    device.put_page(page);
    device.get_page(page).unwrap();
    assert_eq!(
        (map.frame(page).mapping(), device.data(page)),
        (0, DeviceData(0))
    );
}

/// MAP-3: of a range that cannot be had whole nothing is held, also where it was in use before.
#[test]
fn a_range_is_held_whole_or_not_at_all() {
    let map = map(8192);
    let device = generic(&map, range(1024, 512), Order::Base);
    let (used, bad) = (Pfn::from_u32(1030), Pfn::from_u32(1040));
    device.get_page(used).unwrap();
    device.poison_page(bad);
    let run = range(1024, 100);
    assert_eq!(device.get_pages(run), Err(PageError::Poisoned(bad)));
    assert_eq!((device.users_now(), map.frame(used).refs()), (1, 1));
    device.heal_page(bad);
    assert_eq!(device.get_pages(run), Ok(()));
    assert_eq!((device.users_now(), map.frame(used).refs()), (100, 2));
    device.put_pages(run);
    assert_eq!(device.users_now(), 1);
    let unused = device.pin_pages(run);
    assert_eq!(unused, Err(PageError::Busy(run.start())));
    let outside = range(1500, 100);
    assert_eq!(
        device.get_pages(outside),
        Err(PageError::NotOurs(outside.start()))
    );
}

/// MAP-6, WB-6: a device that was removed loses no more pages, and heals none: the frames may be another's.
#[test]
fn a_removed_device_loses_and_heals_nothing() {
    let map = map(8192);
    let page = Pfn::from_u32(1030);
    let gone = generic(&map, range(1024, 512), Order::Base);
    gone.clone().kill().drain(None).unwrap().remove();
    let device = generic(&map, range(1024, 512), Order::Base);
    gone.poison_page(page);
    assert_eq!(device.get_page(page), Ok(()));
    device.put_page(page);
    device.poison_page(page);
    gone.heal_page(page);
    assert_eq!(device.get_page(page), Err(PageError::Poisoned(page)));
}

/// MAP-6: nobody gets a page of a dying device, and who has one keeps it.
#[test]
fn a_dying_device_gives_no_page() {
    let map = map(8192);
    let device = generic(&map, range(1024, 512), Order::Base);
    let page = Pfn::from_u32(1030);
    device.get_page(page).unwrap();
    let killed = device.clone().kill();
    assert_eq!(device.get_page(page), Err(PageError::Dying));
    assert_eq!(device.pin_page(page), Err(PageError::Dying));
    assert_eq!(device.users_now(), 1);
    device.put_page(page);
    killed.drain(None).unwrap().remove();
    let _next = generic(&map, range(1024, 512), Order::Base);
    assert_eq!(
        device.get_page(page),
        Err(PageError::Dying),
        "an old handle"
    );
}

/// GUP-1, stale-compound: a large page is one head, whichever of its frames is named, and the next mapping knows nothing of it.
#[test]
fn a_compound_page_is_its_head() {
    let map = map(8192);
    let device = generic(&map, range(1024, 2048), Order::Pmd);
    let (head, inner) = (Pfn::from_u32(1536), Pfn::from_u32(1999));
    device.get_page(inner).unwrap();
    device.pin_page(Pfn::from_u32(2047)).unwrap();
    assert_eq!((map.frame(head).refs(), map.frame(inner).refs()), (1, 0));
    assert!(map.frame(head).is_pinned());
    assert_eq!(map.get_dev_pagemap(inner).unwrap().head(inner), head);
    // Three pages are touched, two of them at one end only.
    let run = range(1535, 514);
    device.get_pages(run).unwrap();
    assert_eq!((device.users_now(), map.frame(head).refs()), (3, 2));
    device.put_pages(run);
    device.unpin_page(inner);
    device.put_page(head);
    assert_eq!(device.users_now(), 0);
    device.kill().drain(None).unwrap().remove();
    let device = generic(&map, range(1024, 2048), Order::Base);
    device.get_page(inner).unwrap();
    assert_eq!((map.frame(head).refs(), map.frame(inner).refs()), (0, 1));
}

/// MAP-1: each type of memory gives frames to all of its ranges: they are in the resource tree, found by number, of the device's
/// zone and of its type, until it is removed.
#[test]
fn each_type_gives_frames_to_all_of_its_ranges() {
    let kinds = [
        MemoryType::Private(Arc::new(Counting::default())),
        MemoryType::Coherent(Arc::new(Freed::default())),
        MemoryType::FsDax(Arc::new(WaitQueue::new())),
        MemoryType::Generic,
        MemoryType::P2pDma(Arc::new(Freed::default())),
    ];
    let lines = |map: &MemoryMap| map.iomem().to_string().lines().count();
    for kind in kinds {
        let (map, name) = (map(16384), kind.name());
        let ram = map.add_ram(512).unwrap();
        let ranges = [range(1024, 512), range(4096, 1024)];
        let device = map.memremap_pages(&ranges, kind).unwrap();
        assert_eq!(device.ranges(), ranges, "{name}");
        for inside in [1024, 1535, 4096, 5119] {
            let found = map.get_dev_pagemap(Pfn::from_u32(inside));
            assert!(
                found.is_some_and(|guard| ranges.iter().all(|range| guard.covers(range.start())))
            );
            let zone = ram.zone_of(Pfn::from_u32(inside));
            assert_eq!(zone, Some(Zone::Device), "{name}");
        }
        for outside in [1023, 1536, 4095, 5120] {
            assert!(map.get_dev_pagemap(Pfn::from_u32(outside)).is_none());
        }
        // Each range has a line of its own.
        assert_eq!(lines(&map), 3, "{name}");
        let Ok(drained) = device.kill().drain(None) else {
            panic!("{name}: nobody uses it");
        };
        drained.remove();
        assert!(map.get_dev_pagemap(Pfn::from_u32(1024)).is_none());
        assert_eq!(lines(&map), 1, "{name}");
        assert!(map.memremap_pages(&ranges, MemoryType::Generic).is_ok());
    }
}

/// REF-3: the last put of each kind of page does what its kind demands, once.
#[test]
fn each_kind_of_page_is_given_back_as_its_kind_demands() {
    let map = map(16384);
    let (coherent, p2p) = (Arc::new(Freed::default()), Arc::new(Freed::default()));
    let kind = MemoryType::Coherent(coherent.clone());
    let device = map.memremap_pages(&[range(1024, 512)], kind).unwrap();
    let page = device.alloc().unwrap();
    map.frame(page).set_mapping(5);
    device.get_page(page).unwrap();
    assert_eq!(
        device.get_page(Pfn::from_u32(1500)),
        Err(PageError::Busy(Pfn::from_u32(1500)))
    );
    device.put_page(page);
    assert!(coherent.0.lock().is_empty());
    device.put_page(page);
    assert_eq!(
        (&*coherent.0.lock(), map.frame(page).mapping()),
        (&[page].into(), 0)
    );
    assert_eq!(device.alloc(), Some(page), "the mapping's own list");

    let kind = MemoryType::P2pDma(p2p.clone());
    let device = map.memremap_pages(&[range(2048, 512)], kind).unwrap();
    assert_eq!(device.alloc(), None, "the provider says which");
    let page = Pfn::from_u32(2050);
    device.get_page(page).unwrap();
    device.put_page(page);
    assert_eq!(*p2p.0.lock(), [page]);
}

/// REF-3, WB-5: who waits for a range to be idle is woken by its last put or unpin, and not kept waiting by other pages.
#[test]
fn the_last_put_wakes_who_waits_for_idle() {
    let map = map(16384);
    let queue = MemoryType::FsDax(Arc::new(WaitQueue::new()));
    for (start, kind) in [(1024, queue), (2048, MemoryType::Generic)] {
        let device = map.memremap_pages(&[range(start, 512)], kind).unwrap();
        let (run, other) = (range(start, 10), Pfn::new(start + 10).unwrap());
        device.get_page(other).unwrap();
        device.get_pages(run).unwrap();
        device.pin_page(run.start()).unwrap();
        assert!(!device.wait_idle(run, Some(Duration::from_millis(1))));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| device.wait_idle(run, Some(Duration::from_mins(1))));
            device.put_pages(run);
            std::thread::sleep(Duration::from_millis(5));
            device.unpin_page(run.start());
            assert!(waiter.join().unwrap());
        });
    }
}

/// MAP-9: private and coherent pages are seen by who migrates for their owner, others by everybody.
#[test]
fn pages_are_seen_by_their_owner() {
    let map = map(16384);
    let (ours, theirs) = (Some(Owner(1)), Some(Owner(2)));
    let kind = MemoryType::Private(Arc::new(Counting::default()));
    let device = map.memremap_request(Request {
        owner: ours,
        ..Request::anywhere("gpu", 512, kind)
    });
    let device = device.unwrap();
    assert!(device.is_visible_to(ours) && !device.is_visible_to(theirs));
    assert!(!device.is_visible_to(None));
    let guard = map.get_dev_pagemap(device.ranges()[0].start()).unwrap();
    assert!(guard.is_visible_to(ours) && !guard.is_visible_to(theirs));
    let everybodys = generic(&map, range(8192, 512), Order::Base);
    assert!(everybodys.is_visible_to(theirs) && everybodys.is_visible_to(None));
}

/// MAP-6, REF-7: a drain that runs out of patience names who holds pages of this device, oldest first, and no others; what they hold
/// works on until they let go.
#[test]
fn a_drain_names_who_holds() {
    let map = map(16384);
    let device = generic(&map, range(1024, 512), Order::Base);
    let other = generic(&map, range(2048, 512), Order::Base);
    let site = Who::Site(core::panic::Location::caller());
    let first = device
        .hold(range(1030, 5), Hold::Pin, "vhost", Who::Process(77))
        .unwrap();
    let second = device
        .hold(range(1032, 1), Hold::Reference, "scrub", site)
        .unwrap();
    let _elsewhere = other
        .hold(range(2048, 1), Hold::Pin, "other", site)
        .unwrap();
    let killed = device.clone().kill();
    let still = killed.drain(Some(Duration::from_millis(1))).unwrap_err();
    let names = still
        .holders
        .iter()
        .map(|holder| (&*holder.label, holder.who, holder.frames));
    assert!(names.eq([
        ("vhost", Who::Process(77), first.range()),
        ("scrub", site, second.range()),
    ]));
    assert_eq!(still.users, 5);
    assert!(map.frame(Pfn::from_u32(1032)).is_pinned());
    drop(first);
    assert_eq!((device.users_now(), device.holders().len()), (1, 1));
    drop(second);
    still.killed.drain(None).unwrap().remove();
}

/// MAP-6: a hold that cannot be had leaves nothing, and nobody's name.
#[test]
fn a_refused_hold_leaves_nothing() {
    let map = map(8192);
    let device = generic(&map, range(1024, 512), Order::Base);
    device.poison_page(Pfn::from_u32(1031));
    let refused = device.hold(range(1030, 5), Hold::Pin, "vhost", Who::Process(77));
    assert!(refused.is_err());
    assert_eq!((device.users_now(), device.holders().len()), (0, 0));
}

/// MAP-6: 100,000 references are dropped one by one while the device drains, in no time.
#[test]
fn many_references_are_dropped_while_the_device_drains() {
    let map = map(1 << 17);
    let device = generic(&map, range(0, 100_000), Order::Base);
    device.get_pages(range(0, 100_000)).unwrap();
    assert_eq!(device.users_now(), 100_000);
    let killed = device.clone().kill();
    let start = std::time::Instant::now();
    std::thread::scope(|scope| {
        let drain = scope.spawn(|| killed.drain(None).unwrap().remove());
        for page in 0..50_000 {
            device.put_page(Pfn::from_u32(page));
        }
        device.put_pages(range(50_000, 50_000));
        drain.join().unwrap();
    });
    let took = start.elapsed();
    std::println!("100,000 references dropped: {took:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
}

proptest! {
    /// REF-1, REF-2: whatever ranges are got, put, pinned and unpinned, the mapping has one user for each page in use.
    #[test]
    fn users_are_the_pages_in_use(
        steps in prop::collection::vec((0u32..4, 0u64..40, 1u64..20), 1..100),
        large in any::<bool>(),
    ) {
        let map = map(1 << 16);
        let (order, scale) = if large { (Order::Pmd, 512) } else { (Order::Base, 1) };
        let device = generic(&map, range(1024, 64 * 512), order);
        let mut model = [(0u32, 0u32); 64];
        for (step, start, count) in steps {
            let run = range(1024 + start * scale, count * scale);
            let start = usize::try_from(start).unwrap();
            let pages = &mut model[start..start + usize::try_from(count).unwrap()];
            match step {
                0 => {
                    let can = pages.iter().all(|page| page.0 > 0 || page.1 == 0);
                    prop_assert_eq!(device.get_pages(run).is_ok(), can);
                    if can { for page in pages.iter_mut() { page.0 += 1; } }
                }
                1 => {
                    let can = pages.iter().all(|page| page.0 > 0);
                    prop_assert_eq!(device.pin_pages(run).is_ok(), can);
                    if can { for page in pages.iter_mut() { page.1 += 1; } }
                }
                2 if pages.iter().all(|page| page.0 > 0) => {
                    device.put_pages(run);
                    for page in pages.iter_mut() { page.0 -= 1; }
                }
                3 if pages.iter().all(|page| page.1 > 0) => {
                    device.unpin_pages(run);
                    for page in pages.iter_mut() { page.1 -= 1; }
                }
                _ => {}
            }
            let used = model.iter().filter(|page| **page != (0, 0)).count() as u64;
            prop_assert_eq!(device.users_now(), used);
        }
    }
}
