//! A namespace as a block device and as direct-access memory.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use core::time::Duration;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use common::{client, map, open, spec};
use pgmap_drivers::block::{Access, BlockDevice, BlockError, Contents, Zeros};
use pgmap_drivers::pmem::{AccessError, Afterwards, Align, Patience, Region, Sharing, Wanted};

const MIB: u64 = 1 << 20;

/// What is written is read, and what is not on the device is refused.
#[test]
fn what_is_written_is_read() {
    let (_region, pmem) = open("memory,size=8M");
    pmem.write(5000, b"some bytes").unwrap();
    pmem.flush().unwrap();
    let mut bytes = [0; 10];
    pmem.read(5000, &mut bytes).unwrap();
    assert_eq!(&bytes, b"some bytes");
    assert_eq!(
        pmem.read(8 * MIB - 9, &mut bytes),
        Err(BlockError::OutOfRange)
    );
    assert_eq!(pmem.write(u64::MAX, &bytes), Err(BlockError::OutOfRange));
    assert_eq!(pmem.discard(0..8 * MIB + 1), Err(BlockError::OutOfRange));
}

/// Zeros and discarded bytes read as zeros, and take room only if that is wanted.
#[test]
fn zeros_are_holes_where_they_may_be() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    for text in [
        "memory,size=8M".to_owned(),
        format!("{},size=8M", image.display()),
    ] {
        let (_region, pmem) = open(&text);
        pmem.write(0, &vec![7; 5 * 4096]).unwrap();
        pmem.write_zeroes(4096..8192, Zeros::MayPunch).unwrap();
        pmem.write_zeroes(8192..3 * 4096, Zeros::KeepRoom).unwrap();
        pmem.discard(3 * 4096..4 * 4096).unwrap();
        let mut bytes = vec![1; 5 * 4096];
        pmem.read(0, &mut bytes).unwrap();
        assert!(
            bytes[4096..4 * 4096].iter().all(|byte| *byte == 0),
            "{text}"
        );
        assert!(
            bytes[..4096]
                .iter()
                .chain(&bytes[4 * 4096..])
                .all(|byte| *byte == 7)
        );
        let extents = pmem.extents(0..5 * 4096).unwrap();
        assert_eq!(extents[0], (0..4096, Contents::Data));
        assert_eq!(extents[1].1, Contents::Hole, "{text}: {extents:?}");
        assert_eq!(extents.last().unwrap().0.end, 5 * 4096);
    }
}

/// Large requests pass between the frames and a socket.
#[test]
fn bytes_pass_directly_to_a_socket() {
    let (_region, pmem) = open("memory,size=8M");
    pmem.write(4096, b"to the socket").unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut direct = pmem.direct(4096..4109, Access::Read).unwrap();
    assert_eq!(direct.send(ours.as_fd()), Ok(13));
    drop(direct);
    let mut direct = pmem.direct(0..13, Access::Write).unwrap();
    assert_eq!(direct.receive(theirs.as_fd()), Ok(13));
    let mut bytes = [0; 13];
    pmem.read(0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"to the socket");
    // A request under way keeps the device.
    let held = pmem.unbind(
        &Patience::new(Some(Duration::ZERO)),
        Afterwards::Keep,
        |_| (),
    );
    assert!(
        held.unwrap_err()
            .to_string()
            .contains("1 requests under way")
    );
    drop(direct);
    pmem.unbind(&Patience::new(None), Afterwards::Keep, |_| ())
        .unwrap();
    let refused = pmem.direct(0..13, Access::Read).unwrap_err();
    assert!(matches!(refused, BlockError::Frozen(_)));
}

/// PMEM-1: as many frames as were asked for, as long as they follow one another: never more, and never beyond the end
/// or across a lost block.
#[test]
fn direct_access_never_gives_too_much() {
    let (_region, pmem) = open("memory,size=8M");
    let frames = pmem.pagemap().unwrap().ranges()[0];
    let access = |first, pages| {
        let access = pmem.direct_access(first, pages)?;
        Ok((access.first.get() - frames.start().get(), access.pages))
    };
    assert_eq!(access(0, 1), Ok((0, 1)));
    assert_eq!(access(0, 5000), Ok((0, 2048)));
    assert_eq!(access(2047, 2), Ok((2047, 1)));
    assert_eq!(access(3, u64::MAX), Ok((3, 2045)));
    assert_eq!(access(2048, 1), Err(AccessError::OutOfRange));
    assert_eq!(access(0, 0), Err(AccessError::OutOfRange));
    assert_eq!(access(u64::MAX, 1), Err(AccessError::OutOfRange));
    pmem.inject_error(10 * 4096 + 600..10 * 4096 + 601).unwrap();
    assert_eq!(access(8, 5), Ok((8, 2)));
    assert_eq!(
        access(10, 5),
        Err(AccessError::Bad {
            offset: 10 * 4096 + 512
        })
    );
    assert_eq!(access(11, 5), Ok((11, 5)));
}

/// DAX-1: a mapping is shared, and begins and ends at a multiple of the alignment.
#[test]
fn only_shared_and_aligned_mappings_are_given() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    for text in [
        "memory,size=8M".to_owned(),
        format!("{},size=10M", image.display()),
    ] {
        let (_region, pmem) = open(&text);
        let mapped = |range, sharing| {
            pmem.map(range, sharing, client("test"))
                .map(|map| map.len())
        };
        assert_eq!(
            mapped(0..4 * MIB, Sharing::Private),
            Err(AccessError::NotShared)
        );
        for odd in [4096..2 * MIB, 0..4096, 0..3 * MIB, MIB..3 * MIB] {
            assert_eq!(
                mapped(odd, Sharing::Shared),
                Err(AccessError::NotAligned(Align::Pmd))
            );
        }
        for outside in [0..0, 6 * MIB..10 * MIB, 16 * MIB..18 * MIB] {
            assert_eq!(
                mapped(outside, Sharing::Shared),
                Err(AccessError::OutOfRange)
            );
        }
        assert_eq!(mapped(2 * MIB..8 * MIB, Sharing::Shared), Ok(6 * MIB));
        assert!(pmem.holds().is_empty());
    }
    let (_region, pmem) = open("memory,size=8M,align=4K,map=mem");
    let mapped = pmem
        .map(4096..8192, Sharing::Shared, client("test"))
        .unwrap();
    assert_eq!((mapped.offset(), mapped.len()), (4096, 4096));
}

/// DAX-1: 1 GiB units begin at multiples of 1 GiB, of the frames too.
#[test]
fn a_namespace_of_1g_units_is_aligned_to_them() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    let (_region, pmem) = open(&format!("{},size=2G,align=1G", image.display()));
    assert_eq!(pmem.size_bytes(), 1 << 30);
    let frames = pmem.pagemap().unwrap().ranges()[0];
    assert!(frames.start().get().is_multiple_of(1 << 18));
}

/// A raw namespace has no frames to give.
#[test]
fn a_raw_namespace_has_nothing_to_map() {
    let (_region, pmem) = open("memory,size=8M,mode=raw");
    pmem.write(0, &[1; 4096]).unwrap();
    assert_eq!(pmem.direct_access(0, 1).unwrap_err(), AccessError::NoFrames);
    let mapped = pmem.map(0..2 * MIB, Sharing::Shared, client("test"));
    assert_eq!(mapped.unwrap_err(), AccessError::NoFrames);
    assert_eq!(
        pmem.pin(0..4096, client("test")).unwrap_err(),
        AccessError::NoFrames
    );
    pmem.unbind(&Patience::new(None), Afterwards::Keep, |_| ())
        .unwrap();
}

/// Each region has frames of its own, above RAM, and its namespaces are in one range.
#[test]
fn regions_have_frames_of_their_own() {
    let map = map();
    let ram = map.add_ram(1 << 19).unwrap();
    let mut starts = Vec::new();
    let mut all = Vec::new();
    for number in 0..2 {
        let region = Region::open(&spec("memory,size=16M"), number).unwrap();
        region.destroy_namespace(0).unwrap();
        for _ in 0..2 {
            let wanted = Wanted {
                size_bytes: Some(4 << 20),
                ..Wanted::default()
            };
            let made = region.create_namespace(&wanted).unwrap();
            let pmem = region.bind(&map, made.index).unwrap();
            starts.push(pmem.pagemap().unwrap().ranges()[0].start().get());
            all.push(pmem);
        }
    }
    assert!(starts[0] >= ram.capacity());
    assert_eq!(starts[1] - starts[0], 1024);
    assert_eq!(starts[3] - starts[2], 1024);
    assert_ne!(starts[0] >> 18, starts[2] >> 18);
}
