//! Cutting the power at every store and flush.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::sync::Arc;

use common::power::{Dice, PowerCut};
use common::{small_map, spec};
use pgmap_drivers::block::{BlockDevice, BlockError, Zeros};
use pgmap_drivers::pmem::badblocks::BadBlocks;
use pgmap_drivers::pmem::{
    Activation, Afterwards, Mode, Namespace, Patience, Region, RegionError, UnbindError, Wanted,
};
use proptest::prelude::*;
use rustix::io::Errno;

const MEDIUM_BYTES: usize = 8 << 20;
/// How often each cut is made: what it leaves is different each time.
const TIMES: u64 = 6;

fn open(medium: Arc<PowerCut>) -> Arc<Region> {
    let spec = spec("test.img,align=4K,map=mem");
    Region::on_medium(medium, MEDIUM_BYTES as u64, &spec, 0).unwrap()
}

/// What a region says about itself.
type Said = (Vec<Namespace>, BadBlocks);

fn said(region: &Region) -> Said {
    (region.namespaces(), region.bad_blocks())
}

#[derive(Clone, Debug)]
enum Change {
    Create(u64),
    Destroy(u32),
    Activate(u32, Activation),
    Lose(u64, u64),
    Clear(u64, u64),
}

fn change() -> impl Strategy<Value = Change> {
    let activations = prop::sample::select(vec![Activation::Enabled, Activation::Disabled]);
    prop_oneof![
        (1_u64..3).prop_map(Change::Create),
        (0_u32..4).prop_map(Change::Destroy),
        (0_u32..4, activations).prop_map(|(index, to)| Change::Activate(index, to)),
        (0_u64..64, 1_u64..40).prop_map(|(at, len)| Change::Lose(at, len)),
        (0_u64..64, 1_u64..40).prop_map(|(at, len)| Change::Clear(at, len)),
    ]
}

/// Makes a change, if it is possible.
fn make(region: &Arc<Region>, change: &Change) {
    let refused = match change {
        Change::Create(units) => {
            let wanted = Wanted {
                size_bytes: Some(units << 20),
                mode: Mode::Raw,
                align: pgmap_drivers::pmem::Align::Page,
                ..Wanted::default()
            };
            region.create_namespace(&wanted).err()
        }
        Change::Destroy(index) => region.destroy_namespace(*index).err(),
        Change::Activate(index, activation) => region.set_activation(*index, *activation).err(),
        Change::Lose(at, len) => {
            let Some(pmem) = region.bound(0) else { return };
            pmem.inject_error(at * 512..(at + len) * 512).unwrap();
            None
        }
        Change::Clear(at, len) => {
            let Some(pmem) = region.bound(0) else { return };
            pmem.clear_error(at * 512..(at + len) * 512).unwrap();
            None
        }
    };
    let expected =
        |error: &RegionError| !matches!(error, RegionError::Commit(_) | RegionError::Io(_));
    assert!(refused.as_ref().is_none_or(expected), "{refused:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// PMEM-4: wherever the power is cut, a label is the old one or the new one.
    #[test]
    fn a_label_is_old_or_new(changes in prop::collection::vec(change(), 1..7), seed in 1_u64..) {
        let medium = Arc::new(PowerCut::new(vec![0; MEDIUM_BYTES]));
        let region = open(medium.clone());
        region.destroy_namespace(0).unwrap();
        let small = Wanted {
            size_bytes: Some(2 << 20),
            ..Wanted::default()
        };
        region.create_namespace(&small).unwrap();
        let pmem = region.bind(&small_map(), 0).unwrap();
        // From here on a label is more than one sector, and can be torn.
        for nth in 0..24 {
            pmem.inject_error(200 * 512 + nth * 1024..200 * 512 + nth * 1024 + 1).unwrap();
        }
        // What was said, and from which event on that is certain.
        let mut history = vec![(medium.events(), said(&region))];
        for change in &changes {
            make(&region, change);
            history.push((medium.events(), said(&region)));
        }
        drop(pmem);
        let mut dice = Dice(seed);
        for cut in history[0].0..=medium.events() {
            let certain = history.iter().rposition(|(events, _)| *events <= cut).unwrap();
            for _ in 0..TIMES {
                let left = Arc::new(PowerCut::new(medium.cut(cut, &mut dice)));
                let now = said(&open(left));
                let allowed = &history[certain..history.len().min(certain + 2)];
                prop_assert!(allowed.iter().any(|(_, then)| *then == now), "cut {cut}: {now:?}");
            }
        }
    }

    /// PMEM-4: a cut while an image is made leaves a fresh image, or one that can be made again.
    #[test]
    fn a_cut_at_creation_leaves_an_image_that_opens(seed in 1_u64..) {
        let medium = Arc::new(PowerCut::new(vec![0; MEDIUM_BYTES]));
        let made = said(&open(medium.clone()));
        let mut dice = Dice(seed);
        for cut in 0..=medium.events() {
            let left = Arc::new(PowerCut::new(medium.cut(cut, &mut dice)));
            let (namespaces, bad) = said(&open(left));
            prop_assert_eq!(namespaces[0].size_bytes(), made.0[0].size_bytes());
            prop_assert_eq!(bad, BadBlocks::default());
        }
    }
}

/// Blocks of the data test, of one sector each.
const BLOCKS: u64 = 12;

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64),
    Zero(u64, u64),
    Lose(u64),
    Flush,
}

fn step() -> impl Strategy<Value = Step> {
    let blocks = || (0..BLOCKS, 1_u64..4);
    prop_oneof![
        4 => blocks().prop_map(|(at, len)| Step::Write(at, len.min(BLOCKS - at))),
        1 => blocks().prop_map(|(at, len)| Step::Zero(at, len.min(BLOCKS - at))),
        1 => (0..BLOCKS).prop_map(Step::Lose),
        2 => Just(Step::Flush),
    ]
}

/// What became of one block, in order: the event after which it may be so, and what is there.
#[derive(Clone, Debug, Default)]
struct History {
    versions: Vec<(usize, u8)>,
    /// How many versions there were when a flush returned, and the event after which that was certain.
    flushed: Vec<(usize, usize)>,
    /// When it was lost and mended: the events before and after which, and the number of versions then.
    lost: Vec<(usize, usize, Option<usize>)>,
}

impl History {
    /// Whether these are bytes that the block may have after a cut; `None` if it is lost.
    fn allows(&self, cut: usize, now: Option<u8>) -> bool {
        let certain = self.flushed.iter().rev().find(|(event, _)| *event <= cut);
        let mut first = certain.map_or(0, |(_, versions)| *versions - 1);
        let mut may_be_lost = false;
        let mut may_be_well = true;
        for (from, certain, mended) in &self.lost {
            match mended {
                None if *from <= cut => {
                    may_be_lost = true;
                    may_be_well &= *certain > cut;
                }
                Some(version) if *from <= cut => {
                    may_be_lost &= *certain > cut;
                    may_be_well = true;
                    // Whoever finds it well after it was lost finds what mended it.
                    let mends = now.is_some() && self.was_lost_at(cut);
                    first = first.max(usize::from(mends) * *version);
                }
                None | Some(_) => {}
            }
        }
        match now {
            None => may_be_lost,
            Some(byte) => {
                let mut versions = self.versions[first..].iter();
                may_be_well && versions.any(|(from, version)| *version == byte && *from <= cut)
            }
        }
    }

    fn is_lost(&self) -> bool {
        let last = self.lost.last();
        last.is_some_and(|(.., mended)| mended.is_none())
    }

    fn write(&mut self, version: u8, before: usize, after: usize) {
        self.versions.push((before, version));
        if self.is_lost() {
            let mends = self.versions.len() - 1;
            self.lost.push((before, after, Some(mends)));
            self.flushed.push((after, mends + 1));
        }
    }

    fn lose(&mut self, before: usize, after: usize) {
        if !self.is_lost() {
            self.lost.push((before, after, None));
        }
    }

    /// Whether the block was certainly lost before the latest mending that may have happened.
    fn was_lost_at(&self, cut: usize) -> bool {
        let mut certain = self.lost.iter().filter(|(_, certain, _)| *certain <= cut);
        certain
            .next_back()
            .is_some_and(|(.., mended)| mended.is_none())
    }
}

fn run(steps: &[Step], medium: &Arc<PowerCut>, blocks: &mut [History]) {
    let region = open(medium.clone());
    let pmem = region.bind(&small_map(), 0).unwrap();
    for block in &mut *blocks {
        block.versions.push((0, 0));
    }
    let mut version = 0_u8;
    for step in steps {
        let before = medium.events() + 1;
        match step {
            Step::Write(at, len) | Step::Zero(at, len) => {
                let range = at * 512..(at + len) * 512;
                let written = if matches!(step, Step::Zero(..)) {
                    pmem.write_zeroes(range, Zeros::KeepRoom).map(|()| 0)
                } else {
                    version += 1;
                    let bytes = vec![version; usize::try_from(len * 512).unwrap()];
                    pmem.write(range.start, &bytes).map(|()| version)
                };
                let written = written.unwrap();
                let first = usize::try_from(*at).unwrap();
                let written_to = blocks[first..]
                    .iter_mut()
                    .take(usize::try_from(*len).unwrap());
                written_to.for_each(|block| block.write(written, before, medium.events()));
            }
            Step::Lose(at) => {
                pmem.inject_error(at * 512..at * 512 + 1).unwrap();
                blocks[usize::try_from(*at).unwrap()].lose(before, medium.events());
            }
            Step::Flush => {
                pmem.flush().unwrap();
                for block in &mut *blocks {
                    block.flushed.push((medium.events(), block.versions.len()));
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// PMEM-4, PMEM-3: wherever the power is cut, what flush returned for is there; what was lost is lost until what
    /// mended it is there.
    #[test]
    fn what_was_flushed_is_there(steps in prop::collection::vec(step(), 1..16), seed in 1_u64..) {
        let medium = Arc::new(PowerCut::new(vec![0; MEDIUM_BYTES]));
        drop(open(medium.clone()));
        let medium = Arc::new(PowerCut::new(medium.cut(medium.events(), &mut Dice(1))));
        let mut blocks = vec![History::default(); usize::try_from(BLOCKS).unwrap()];
        run(&steps, &medium, &mut blocks);
        let mut dice = Dice(seed);
        for cut in 0..=medium.events() {
            for _ in 0..TIMES {
                let left = Arc::new(PowerCut::new(medium.cut(cut, &mut dice)));
                let pmem = open(left).bind(&small_map(), 0).unwrap();
                for (block, history) in (0_u64..).zip(&blocks) {
                    let mut bytes = [0; 512];
                    let now = match pmem.read(block * 512, &mut bytes) {
                        Ok(()) => {
                            prop_assert!(bytes.iter().all(|byte| *byte == bytes[0]));
                            Some(bytes[0])
                        }
                        Err(BlockError::Bad { .. }) => None,
                        Err(error) => panic!("{error}"),
                    };
                    prop_assert!(history.allows(cut, now), "cut {cut}, block {block}: {now:?} of {history:?}");
                }
            }
        }
    }
}

/// A label that cannot be written leaves the old one, in memory and on the medium, and the next one works.
#[test]
fn a_change_that_fails_changes_nothing() {
    let medium = Arc::new(PowerCut::new(vec![0; MEDIUM_BYTES]));
    let region = open(medium.clone());
    let before = said(&region);
    medium.refuse(Some(Errno::NOSPC));
    for _ in 0..3 {
        let refused = region.set_activation(0, Activation::Disabled);
        assert!(
            matches!(refused, Err(RegionError::Commit(_))),
            "{refused:?}"
        );
        assert_eq!(said(&region), before);
    }
    medium.refuse(None);
    let left = medium.cut(medium.events(), &mut Dice(3));
    assert_eq!(said(&open(Arc::new(PowerCut::new(left)))), before);
    region.set_activation(0, Activation::Disabled).unwrap();
    let left = medium.cut(medium.events(), &mut Dice(3));
    let after = said(&open(Arc::new(PowerCut::new(left))));
    assert_eq!(after.0[0].activation, Activation::Disabled);
}

/// PMEM-4: the kernel tells one caller that bytes could not be written, and then takes them for clean. No later flush says
/// that they are durable; who takes the device away hears of it once, and opening the image again ends it.
#[test]
fn a_flush_that_failed_is_not_forgotten() {
    let medium = Arc::new(PowerCut::new(vec![0; MEDIUM_BYTES]));
    let region = open(medium.clone());
    let pmem = region.bind(&small_map(), 0).unwrap();
    pmem.write(0, &[7; 4096]).unwrap();
    medium.refuse(Some(Errno::IO));
    assert_eq!(pmem.flush(), Err(BlockError::Io(Errno::IO)));
    medium.refuse(None);
    assert_eq!(pmem.flush(), Err(BlockError::Io(Errno::IO)));
    let unbind = || pmem.unbind(&Patience::new(None), Afterwards::Keep, |_| ());
    let refused = unbind().unwrap_err();
    assert!(
        matches!(refused, UnbindError::Flush(Errno::IO)),
        "{refused}"
    );
    pmem.read(0, &mut [0; 4096]).unwrap();
    unbind().unwrap();
    let again = open(medium).bind(&small_map(), 0).unwrap();
    again.flush().unwrap();
}
