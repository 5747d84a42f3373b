//! Lost blocks: noted, refused, mended, kept over a restart, and looked for.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
#![allow(
    clippy::single_range_in_vec_init,
    reason = "lists of one range are meant"
)]

mod common;

use core::time::Duration;
use std::sync::Arc;
use std::thread;

use common::power::PowerCut;
use common::{client, map, open, small_map, spec};
use pgmap_drivers::block::{Access, BlockDevice, BlockError, Contents, Zeros};
use pgmap_drivers::pmem::{
    AccessError, Afterwards, Generation, Patience, Pmem, Region, ScrubError, Sharing,
};
use rustix::io::Errno;

const PATIENCE: Option<Duration> = Some(Duration::from_secs(20));

fn bad(offset: u64) -> BlockError {
    BlockError::Bad { offset }
}

fn ranges(pmem: &Pmem) -> Vec<core::ops::Range<u64>> {
    pmem.bad_blocks().ranges().to_vec()
}

/// PMEM-3: a read of a bad block is an error that names its first lost byte; what is beside it is read.
#[test]
fn a_lost_block_is_not_read() {
    let (_region, pmem) = open("memory,size=8M");
    pmem.inject_error(1000..1100).unwrap();
    assert_eq!(ranges(&pmem), [1..3]);
    let mut bytes = [0; 512];
    assert_eq!(pmem.read(0, &mut bytes), Ok(()));
    assert_eq!(pmem.read(1536, &mut bytes), Ok(()));
    assert_eq!(pmem.read(1, &mut bytes), Err(bad(512)));
    assert_eq!(pmem.read(600, &mut bytes), Err(bad(600)));
    assert_eq!(pmem.read(0, &mut []), Ok(()));
    assert_eq!(pmem.direct(0..4096, Access::Read).unwrap_err(), bad(512));
    assert_eq!(pmem.direct(0..4096, Access::Write).unwrap_err(), bad(512));
    let pinned = pmem.pin(0..4096, client("test"));
    assert_eq!(pinned.unwrap_err(), AccessError::Bad { offset: 512 });
    assert!(pmem.holds().is_empty());
}

/// PMEM-3: a lost block is never in a hole: who skips holes would read zeros there, and no error.
#[test]
fn a_lost_block_is_in_no_hole() {
    let (_region, pmem) = open("memory,size=8M");
    assert_eq!(pmem.extents(0..8192), Ok(vec![(0..8192, Contents::Hole)]));
    pmem.inject_error(1024..3072).unwrap();
    let extents = [
        (700..1024, Contents::Hole),
        (1024..3072, Contents::Data),
        (3072..8192, Contents::Hole),
    ];
    assert_eq!(pmem.extents(700..8192).unwrap(), extents);
    let inside = pmem.extents(1100..1200).unwrap();
    assert_eq!(inside, [(1100..1200, Contents::Data)]);
    pmem.clear_error(1024..3072).unwrap();
    assert_eq!(pmem.extents(0..8192), Ok(vec![(0..8192, Contents::Hole)]));
}

/// PMEM-3: what is lost is not mapped, neither in memory nor in an image, and nothing is held then; what is beside it is, and
/// all of it once it is mended.
#[test]
fn a_lost_block_is_not_mapped() {
    let directory = tempfile::tempdir().unwrap();
    let image = format!("{}/a.img,size=10M", directory.path().display());
    for text in ["memory,size=8M", &image] {
        let (_region, pmem) = open(text);
        let pmem_map = |bytes| pmem.map(bytes, Sharing::Shared, client("test"));
        let unit = 2 << 20;
        pmem.inject_error(unit + 4096..unit + 4608).unwrap();
        for bytes in [unit..2 * unit, 0..3 * unit] {
            let refused = pmem_map(bytes).unwrap_err();
            assert_eq!(
                refused,
                AccessError::Bad {
                    offset: unit + 4096
                }
            );
            let said = refused.to_string();
            assert!(
                said.contains("block 4104 is bad (512 bytes at 0x201000)"),
                "{said}"
            );
        }
        assert!(pmem.holds().is_empty());
        drop(pmem_map(0..unit).unwrap());
        pmem.write(unit + 4096, &[1; 512]).unwrap();
        drop(pmem_map(0..3 * unit).unwrap());
    }
}

/// PMEM-3: a full write mends a block; one of a part is refused, and writes nothing.
#[test]
fn a_full_write_mends() {
    let (_region, pmem) = open("memory,size=8M");
    pmem.inject_error(1024..3072).unwrap();
    assert_eq!(pmem.write(1030, &[1; 5]), Err(bad(1030)));
    assert_eq!(pmem.write(1000, &[1; 600]), Err(bad(1536)));
    assert_eq!(
        pmem.write_zeroes(3000..4096, Zeros::MayPunch),
        Err(bad(3000))
    );
    let mut before = [9; 24];
    pmem.read(1000, &mut before).unwrap();
    assert_eq!(before, [0; 24]);
    // Beside the lost ones, parts may be written.
    pmem.write(900, &[2; 636]).unwrap();
    assert_eq!(ranges(&pmem), [3..6]);
    pmem.write_zeroes(2000..2048 + 512, Zeros::KeepRoom)
        .unwrap_err();
    pmem.write_zeroes(2048..2560, Zeros::KeepRoom).unwrap();
    assert_eq!(ranges(&pmem), [3..4, 5..6]);
    let mut bytes = [0; 512];
    pmem.read(1024, &mut bytes).unwrap();
    assert_eq!(bytes, [2; 512]);
    pmem.clear_error(0..4096).unwrap();
    assert!(ranges(&pmem).is_empty());
    pmem.read(1536, &mut bytes).unwrap();
}

/// PMEM-3: the list survives a restart, and that of one namespace is not another's.
#[test]
fn the_list_survives_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let text = format!("{},size=8M", directory.path().join("disk.img").display());
    let (region, pmem) = open(&text);
    pmem.inject_error(4096..8192).unwrap();
    pmem.write(4096, &[1; 512]).unwrap();
    drop((region, pmem));
    let (region, pmem) = open(&text);
    assert_eq!(ranges(&pmem), [9..16]);
    assert_eq!(pmem.read(8000, &mut [0; 512]), Err(bad(8000)));
    assert_eq!(region.bad_blocks().ranges(), [4096 + 9..4096 + 16]);
    pmem.unbind(&Patience::new(None), Afterwards::Keep, |_| ())
        .unwrap();
    let pmem = region.bind(&map(), 0).unwrap();
    assert_eq!(ranges(&pmem), [9..16]);
}

const MEDIUM_BYTES: usize = 8 << 20;
/// Where the namespace begins on the medium.
const START: u64 = 2 << 20;

fn on_power_cut() -> (Arc<PowerCut>, Arc<Region>, Arc<Pmem>) {
    let medium = Arc::new(PowerCut::new(vec![0; MEDIUM_BYTES]));
    let region =
        Region::on_medium(medium.clone(), MEDIUM_BYTES as u64, &spec("test.img"), 0).unwrap();
    let pmem = region.bind(&small_map(), 0).unwrap();
    (medium, region, pmem)
}

/// PMEM-3: a scrub on demand finds what is lost before anybody reads it, and can be waited for.
#[test]
fn a_scrub_finds_what_is_lost() {
    let (medium, _region, pmem) = on_power_cut();
    let first = pmem.scrub();
    assert_eq!(pmem.wait_for_scrub(first, PATIENCE), Ok(()));
    assert!(ranges(&pmem).is_empty());
    medium.lose(START + 700..START + 701);
    medium.lose(START + (3 << 20) + 512..START + (3 << 20) + 2048);
    let second = pmem.scrub();
    assert!(second > first);
    assert_eq!(pmem.wait_for_scrub(second, PATIENCE), Ok(()));
    assert_eq!(ranges(&pmem), [1..2, 6145..6148]);
    assert!(pmem.scrub_progress().whole >= second);
    assert_eq!(pmem.read(512, &mut [0; 512]), Err(bad(512)));
    pmem.write(512, &[3; 512]).unwrap();
    assert_eq!(pmem.read(512, &mut [0; 512]), Ok(()));
}

/// PMEM-3: a read that fails without warning starts a scrub.
#[test]
fn a_latent_error_starts_a_scrub() {
    let (medium, _region, pmem) = on_power_cut();
    medium.lose(START + 5120..START + 5121);
    assert_eq!(
        pmem.read(4096, &mut [0; 4096]),
        Err(BlockError::Io(Errno::IO))
    );
    assert_eq!(pmem.wait_for_scrub(Generation(1), PATIENCE), Ok(()));
    assert_eq!(ranges(&pmem), [10..11]);
    assert_eq!(pmem.read(4096, &mut [0; 4096]), Err(bad(5120)));
}

/// An image that somebody truncates is not taken for a lost one.
#[test]
fn a_truncated_image_is_no_bad_block() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    let (_region, pmem) = open(&format!("{},size=8M", image.display()));
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&image)
        .unwrap();
    file.set_len(4 << 20).unwrap();
    assert_eq!(
        pmem.read(4 << 20, &mut [0; 512]),
        Err(BlockError::Io(Errno::IO))
    );
    let scrub = pmem.scrub();
    assert_eq!(
        pmem.wait_for_scrub(scrub, PATIENCE),
        Err(ScrubError::Interrupted)
    );
    assert!(ranges(&pmem).is_empty());
}

/// PMEM-2: a scrub ends when the device is taken away, and who waits for it is told.
#[test]
fn unbind_interrupts_a_scrub() {
    let (_region, pmem) = open("memory,size=1G");
    pmem.write_zeroes(0..1 << 30, Zeros::KeepRoom).unwrap();
    let scrub = pmem.scrub();
    let waits = {
        let pmem = Arc::clone(&pmem);
        thread::spawn(move || pmem.wait_for_scrub(scrub, PATIENCE))
    };
    pmem.unbind(&Patience::new(PATIENCE), Afterwards::Forget, |_| ())
        .unwrap();
    assert_eq!(waits.join().unwrap(), Err(ScrubError::Interrupted));
}
