//! Taking a namespace away from whoever uses it.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use core::time::Duration;
use std::fs::File;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use common::mapping::Mapping;
use common::{client, map, open, spec};
use pgmap_core::addr::Pfn;
use pgmap_drivers::block::{Access, BlockDevice, BlockError, Zeros};
use pgmap_drivers::pmem::{
    AccessError, Afterwards, HoldKind, Patience, Pmem, Region, Sharing, UnbindError,
};
use pgmap_sync::atomic::{AtomicBool, Ordering};

const MIB: u64 = 1 << 20;
const SOON: Option<Duration> = Some(Duration::from_millis(20));

fn image(directory: &tempfile::TempDir) -> String {
    format!("{},size=16M", directory.path().join("disk.img").display())
}

fn still_works(pmem: &Arc<Pmem>) {
    pmem.write(0, &[1; 4096]).unwrap();
    pmem.flush().unwrap();
    pmem.direct_access(0, 1).unwrap();
    drop(pmem.pin(0..4096, client("again")).unwrap());
    drop(
        pmem.map(0..2 * MIB, Sharing::Shared, client("again"))
            .unwrap(),
    );
}

/// PMEM-2, MAP-6: at the deadline the error names who pins, where and for how long; and everything works as before.
#[test]
fn a_pin_is_waited_for_and_named() {
    let directory = tempfile::tempdir().unwrap();
    for text in ["memory,size=8M".to_owned(), image(&directory)] {
        let (_region, pmem) = open(&format!("{text},align=4K"));
        let pin = pmem.pin(4096..3 * 4096, client("a client")).unwrap();
        let held = pmem
            .unbind(&Patience::new(SOON), Afterwards::Keep, |_| ())
            .unwrap_err();
        let said = held.to_string();
        let UnbindError::Held(holders) = held else {
            panic!("{said}")
        };
        assert_eq!(
            (holders.in_flight, holders.references, holders.holds.len()),
            (0, 2, 1)
        );
        let pin_hold = &holders.holds[0];
        assert_eq!(
            (pin_hold.kind, pin_hold.pid),
            (HoldKind::Pinned, Some(std::process::id()))
        );
        assert_eq!(pin_hold.bytes, 4096..3 * 4096);
        assert!(pin_hold.age(holders.now_ns) >= Duration::from_millis(10));
        assert!(said.contains("a client (pid"), "{said}");
        still_works(&pmem);
        let started = Instant::now();
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(50));
                drop(pin);
            });

            pmem.unbind(&Patience::new(None), Afterwards::Keep, |_| ())
                .unwrap();
            assert!(started.elapsed() >= Duration::from_millis(40));
        });
    }
}

/// MAP-6: who loses interest need not wait for the deadline, and everything works as before.
#[test]
fn a_wait_can_be_given_up() {
    let (_region, pmem) = open("memory,size=8M");
    let pin = pmem.pin(0..4096, client("pins")).unwrap();
    let request = pmem.direct(0..4096, Access::Read).unwrap();
    let lost_interest = || true;
    let give_up = || {
        let patience = Patience::new(None).or_until(&lost_interest);
        pmem.unbind(&patience, Afterwards::Keep, |_| ())
            .unwrap_err()
    };
    assert!(give_up().to_string().contains("1 requests"));
    drop(request);
    assert!(give_up().to_string().contains("pins (pid"));
    drop(pin);
    still_works(&pmem);
}

/// PMEM-2: a mapping of a file is waited for, and named; its client is asked to let go.
#[test]
fn a_mapping_of_a_file_is_asked_back() {
    let directory = tempfile::tempdir().unwrap();
    let (_region, pmem) = open(&image(&directory));
    let mapped = pmem
        .map(0..4 * MIB, Sharing::Shared, client("mapper"))
        .unwrap();
    let held = pmem
        .unbind(&Patience::new(SOON), Afterwards::Keep, |_| ())
        .unwrap_err();
    assert!(held.to_string().contains("mapper (pid"), "{held}");
    still_works(&pmem);
    let asked = |holds: &[pgmap_drivers::pmem::Hold]| {
        assert_eq!(holds.len(), 1);
        assert_eq!(holds[0].kind, HoldKind::Mapped);
        drop(mapped);
    };
    pmem.unbind(&Patience::new(SOON), Afterwards::Keep, asked)
        .unwrap();
}

/// MAP-6: who tries to get at the frames while they go, and is refused, keeps nobody from taking them.
#[test]
fn who_is_refused_is_not_waited_for() {
    let region = Region::open(&spec("memory,size=8M"), 0).unwrap();
    let map = map();
    let current = Mutex::new(region.bind(&map, 0).unwrap());
    let ended = AtomicBool::new(false);
    let keep_trying = || {
        while !ended.load(Ordering::Relaxed) {
            let pmem = Arc::clone(&current.lock().unwrap());
            (0..10_000).for_each(|_| drop(pmem.direct_access(0, 1)));
        }
    };
    let unbind = || {
        let pmem = Arc::clone(&current.lock().unwrap());
        pmem.unbind(&Patience::new(None), Afterwards::Forget, |_| ())?;
        *current.lock().unwrap() = region.bind(&map, 0).unwrap();
        Ok::<_, UnbindError>(())
    };
    let unbound = thread::scope(|scope| {
        scope.spawn(keep_trying);
        scope.spawn(keep_trying);
        let unbound = (0..20_000).try_for_each(|_| unbind());
        ended.store(true, Ordering::Relaxed);
        unbound
    });
    unbound.unwrap();
}

/// PMEM-2: what is taken away refuses everything, and its frames are nobody's.
#[test]
fn after_unbind_everything_is_refused() {
    let (region, pmem) = open("memory,size=8M");
    let first = pmem.pagemap().unwrap().ranges()[0].start();
    pmem.unbind(&Patience::new(None), Afterwards::Keep, |_| ())
        .unwrap();
    assert!(matches!(
        pmem.read(0, &mut [0; 1]),
        Err(BlockError::Frozen(_))
    ));
    assert!(matches!(pmem.write(0, &[0; 1]), Err(BlockError::Frozen(_))));
    assert!(matches!(pmem.flush(), Err(BlockError::Frozen(_))));
    assert!(matches!(
        pmem.inject_error(0..1),
        Err(BlockError::Frozen(_))
    ));
    assert_eq!(pmem.direct_access(0, 1).unwrap_err(), AccessError::Leaving);
    assert_eq!(
        pmem.pin(0..4096, client("late")).unwrap_err(),
        AccessError::Leaving
    );
    let late = pmem.map(0..2 * MIB, Sharing::Shared, client("late"));
    assert_eq!(late.unwrap_err(), AccessError::Leaving);
    assert!(!pmem.pagemap().unwrap().contains(first));
    let again = pmem.unbind(&Patience::new(None), Afterwards::Keep, |_| ());
    assert!(matches!(again, Err(UnbindError::Already)));
    assert!(region.bound(0).is_none());
}

/// PMEM-2: who maps volatile memory that is to be kept is waited for, so that no store is lost; if it is not to be kept, nobody is.
#[test]
fn a_mapping_of_memory_is_waited_for_only_if_its_bytes_are_wanted() {
    let map = map();
    let region = Region::open(&spec("memory,size=8M"), 0).unwrap();
    let pmem = region.bind(&map, 0).unwrap();
    let mapped = pmem
        .map(0..2 * MIB, Sharing::Shared, client("mapper"))
        .unwrap();
    let kept = pmem.unbind(&Patience::new(SOON), Afterwards::Keep, |_| ());
    let said = kept.unwrap_err().to_string();
    assert!(said.contains("mapper (pid"), "{said}");
    still_works(&pmem);
    let forever = Patience::new(None);
    pmem.unbind(&forever, Afterwards::Forget, |_| ()).unwrap();
    // The next who has the frames is not told of a mapping that is gone.
    let next = region.bind(&map, 0).unwrap();
    assert!(next.holds().is_empty() && pmem.holds().is_empty());
    still_works(&next);
    drop(mapped);
    assert!(next.holds().is_empty());
}

/// Volatile memory keeps its bytes while it is disabled, unless they are not wanted.
#[test]
fn volatile_memory_keeps_its_bytes() {
    let map = map();
    let (region, pmem) = open("memory,size=8M");
    pmem.write(5 * MIB + 3, b"kept").unwrap();
    pmem.unbind(&Patience::new(None), Afterwards::Keep, |_| ())
        .unwrap();
    let pmem = region.bind(&map, 0).unwrap();
    let mapped = pmem
        .map(0..8 * MIB, Sharing::Shared, client("test"))
        .unwrap();
    pmem.write(8 * MIB - 1, &[9]).unwrap();
    drop(mapped);
    pmem.unbind(&Patience::new(None), Afterwards::Keep, |_| ())
        .unwrap();
    let pmem = region.bind(&map, 0).unwrap();
    let (mut bytes, mut last) = ([0; 4], [0; 1]);
    pmem.read(5 * MIB + 3, &mut bytes).unwrap();
    pmem.read(8 * MIB - 1, &mut last).unwrap();
    assert_eq!((&bytes, last), (b"kept", [9]));
    pmem.unbind(&Patience::new(None), Afterwards::Forget, |_| ())
        .unwrap();
    let pmem = region.bind(&map, 0).unwrap();
    pmem.read(5 * MIB + 3, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 4]);
}

/// REF-5, REF-1: pins are exact on each frame, and leave nothing behind.
#[test]
fn pins_are_exact() {
    let map = map();
    let (region, pmem) = open("memory,size=8M,align=4K");
    drop(pmem);
    let pmem = region.bind(&map, 0).unwrap();
    let first = pmem.pagemap().unwrap().ranges()[0].start();
    let frame = |nth: u64| map.frame(Pfn::new(first.get() + nth).unwrap());
    let one = pmem.pin(0..2 * 4096, client("one")).unwrap();
    let two = pmem.pin(4096..3 * 4096, client("two")).unwrap();
    let refs = || [0, 1, 2, 3].map(|nth| frame(nth).refs());
    assert_eq!(refs(), [1, 2, 1, 0]);
    assert_eq!(pmem.pagemap().unwrap().users_now(), 3);
    drop(one);
    assert_eq!(
        (refs(), frame(0).is_pinned(), frame(1).is_pinned()),
        ([0, 1, 1, 0], false, true)
    );
    drop(two);
    assert_eq!((refs(), frame(1).is_pinned()), ([0; 4], false));
    assert_eq!(pmem.pagemap().unwrap().users_now(), 0);
}

/// WB-5: no hole is punched under a pin or a mapping: who stores there afterwards stores to the device.
#[test]
fn no_hole_is_punched_under_a_hold() {
    let (_region, pmem) = open("memory,size=8M");
    pmem.write(0, &[7; 8192]).unwrap();
    let pin = pmem.pin(0..4096, client("test")).unwrap();
    pmem.discard(0..8192).unwrap();
    pmem.write_zeroes(0..4096, Zeros::MayPunch).unwrap();
    let extents = |pmem: &Pmem| pmem.extents(0..8192).unwrap()[0].clone();
    assert_eq!(extents(&pmem).1, pgmap_drivers::block::Contents::Data);
    drop(pin);
    pmem.discard(0..8192).unwrap();
    assert_eq!(
        extents(&pmem),
        (0..8192, pgmap_drivers::block::Contents::Hole)
    );
}

/// GUP-3: bytes that somebody holds become zeros where they are: a file system that zeroes a range by itself drops the pages that
/// are in memory, and who has one of them reads and writes what is nobody's any more.
#[test]
fn zeros_are_written_to_the_pages_that_are_held() {
    let directory = tempfile::tempdir().unwrap();
    let (_region, pmem) = open(&image(&directory));
    pmem.write(0, &[7; 4096]).unwrap();
    let guard = pmem
        .map(0..2 * MIB, Sharing::Shared, client("test"))
        .unwrap();
    let file = File::from(guard.fd().unwrap().try_clone_to_owned().unwrap());
    let mapping = Mapping::new(&file, guard.offset(), 4096);
    mapping.store(0, 8);
    assert!(mapping.is_in_page_table());
    for zeros in [Zeros::KeepRoom, Zeros::MayPunch] {
        pmem.write_zeroes(0..4096, zeros).unwrap();
        assert!(mapping.is_in_page_table(), "{zeros:?}");
        assert_eq!(mapping.load(0), 0);
    }
}

/// A device that nobody has any more gives its frames back by itself.
#[test]
fn a_dropped_device_gives_its_frames_back() {
    let map = map();
    let (region, pmem) = open("memory,size=8M");
    drop(pmem);
    for _ in 0..100 {
        let pmem = region.bind(&map, 0).unwrap();
        pmem.direct_access(0, 1).unwrap();
    }
}
