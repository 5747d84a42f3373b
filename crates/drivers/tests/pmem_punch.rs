//! Holes in a namespace that others map and pin (WB-5).
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
#![allow(
    clippy::single_range_in_vec_init,
    reason = "lists of one range are meant"
)]

mod common;

use core::ops::Bound;
use core::time::Duration;
use std::thread;
use std::time::Instant;

use common::{client, open};
use pgmap_drivers::block::{BlockDevice, BlockError, Contents};
use pgmap_drivers::pmem::{Patience, Pmem, PunchError, Sharing};

const MIB: u64 = 1 << 20;

fn at_once() -> Patience<'static> {
    Patience::new(Some(Duration::ZERO))
}

fn names(error: PunchError) -> Vec<String> {
    match error {
        PunchError::Held(holds) => holds.iter().map(|hold| hold.label.to_string()).collect(),
        PunchError::Device(error) => panic!("{error}"),
    }
}

/// Where the device has data.
fn data(pmem: &Pmem) -> Vec<core::ops::Range<u64>> {
    let extents = pmem.extents(0..pmem.size_bytes()).unwrap().into_iter();
    let data = extents.filter(|(_, contents)| *contents == Contents::Data);
    data.map(|(bytes, _)| bytes).collect()
}

/// WB-5: pins of the affected range are reported, by name; those of other ranges are not, even of the same huge page, and nobody waits
/// for them.
#[test]
fn only_pins_of_the_range_are_in_the_way() {
    for align in ["4K", "2M"] {
        let (_region, pmem) = open(&format!("memory,size=8M,align={align}"));
        pmem.write(0, &vec![7; 32768]).unwrap();
        let before = pmem.pin(0..8192, client("before")).unwrap();
        let inside = pmem.pin(12288..16384, client("inside")).unwrap();
        let behind = pmem.pin(16384..20480, client("behind")).unwrap();
        let held = pmem.punch(8192..16384, &at_once()).unwrap_err();
        assert!(held.to_string().contains("inside (pid"), "{held}");
        assert_eq!(names(held), ["inside"]);
        assert_eq!(data(&pmem), [0..32768]);
        drop(inside);
        pmem.punch(8192..16384, &at_once()).unwrap();
        assert_eq!(data(&pmem), [0..8192, 16384..32768]);
        drop((before, behind));
    }
}

/// WB-5: to the end is not an end of 0: the first is a hole, and busy pages in it are found; the second is nothing.
#[test]
fn to_the_end_is_not_an_end_of_zero() {
    let (_region, pmem) = open("memory,size=8M,align=4K");
    pmem.write(0, &[7; 8192]).unwrap();
    pmem.write(8 * MIB - 4096, &[7; 4096]).unwrap();
    let first = pmem.pin(0..4096, client("first")).unwrap();
    let last = pmem.pin(8 * MIB - 4096..8 * MIB, client("last")).unwrap();
    for nothing in [0..0, 4096..4096] {
        pmem.punch(nothing, &at_once()).unwrap();
    }
    pmem.punch(..0, &at_once()).unwrap();
    assert_eq!(data(&pmem), [0..8192, 8 * MIB - 4096..8 * MIB]);
    assert_eq!(names(pmem.punch(4096.., &at_once()).unwrap_err()), ["last"]);
    let after = (Bound::Excluded(4095), Bound::Included(8 * MIB - 1));
    assert_eq!(names(pmem.punch(after, &at_once()).unwrap_err()), ["last"]);
    assert_eq!(
        names(pmem.punch(.., &at_once()).unwrap_err()),
        ["first", "last"]
    );
    drop(last);
    pmem.punch(4096.., &at_once()).unwrap();
    assert_eq!(data(&pmem), [0..4096]);
    drop(first);
    pmem.punch(.., &at_once()).unwrap();
    assert!(data(&pmem).is_empty());
    let beyond = pmem.punch(0..=8 * MIB, &at_once());
    assert!(matches!(
        beyond,
        Err(PunchError::Device(BlockError::OutOfRange))
    ));
}

/// WB-5: who punches waits for the pins of the range, and the device can be used meanwhile.
#[test]
fn a_hole_waits_for_pins() {
    let (_region, pmem) = open("memory,size=8M");
    pmem.write(0, &[7; 8192]).unwrap();
    let pin = pmem.pin(0..4096, client("dma")).unwrap();
    let began = Instant::now();
    thread::scope(|scope| {
        let punched = scope.spawn(|| pmem.punch(0..8192, &Patience::new(None)));
        thread::sleep(Duration::from_millis(30));
        pmem.write(4096, &[8; 4096]).unwrap();
        assert_eq!(data(&pmem), [0..8192]);
        drop(pin);
        punched.join().unwrap().unwrap();
    });
    assert!(began.elapsed() >= Duration::from_millis(30));
    assert!(data(&pmem).is_empty());
}

/// WB-5, GUP-3: whoever maps the bytes may have them pinned in ways that nobody sees: mappings are in the way like pins.
#[test]
fn mappings_are_in_the_way() {
    let (_region, pmem) = open("memory,size=8M");
    let mapped = pmem.map(0..2 * MIB, Sharing::Shared, client("mapper"));
    let held = pmem.punch(MIB.., &at_once()).unwrap_err();
    assert_eq!(names(held), ["mapper"]);
    pmem.punch(2 * MIB.., &at_once()).unwrap();
    drop(mapped);
    pmem.punch(.., &at_once()).unwrap();
}

/// WB-6: a hole mends the lost sectors that go as a whole, and the bytes are back in service.
#[test]
fn a_hole_mends_what_was_lost() {
    let (_region, pmem) = open("memory,size=8M");
    pmem.inject_error(4096..8192).unwrap();
    assert!(pmem.pin(4096..8192, client("test")).is_err());
    let part = pmem.punch(0..4100, &at_once());
    assert!(matches!(
        part,
        Err(PunchError::Device(BlockError::Bad { offset: 4096 }))
    ));
    pmem.punch(0..8192, &at_once()).unwrap();
    drop(pmem.pin(4096..8192, client("test")).unwrap());
    let mut bytes = [9; 4096];
    pmem.read(4096, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 4096]);
}
