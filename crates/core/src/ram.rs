//! Frames of RAM, and the budget: how many may be used at once.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

use pgmap_sync::Mutex;
use pgmap_sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::addr::{Pfn, PfnRange};
use crate::hotplug::MemoryNotifier;
use crate::memory_block::Blocks;
use crate::memremap::MemoryMap;
use crate::page::Put;
use crate::zone::{RamZone, Zone};

/// Frames `0..count` of a pool that are free: those never used, and a list of those given back.
#[derive(Debug, Default)]
pub(crate) struct FreeList {
    /// Frames below this, counted from the pool's first, have been used.
    fresh: u64,
    /// One more than the first free frame given back, counted from the pool's first; 0 if there is none.
    head: u32,
}

impl FreeList {
    /// How many frames have ever been used, counted from the pool's first.
    pub(crate) const fn fresh(&self) -> u64 {
        self.fresh
    }

    /// Takes a free frame of the pool `first..first+count`. One that was poisoned while it was free is lost.
    pub(crate) fn take(&mut self, map: &MemoryMap, first: Pfn, count: u64) -> Option<Pfn> {
        loop {
            let pfn = if let Some(index) = self.head.checked_sub(1) {
                let pfn = first.checked_add(u64::from(index))?;
                self.head = map.frame(pfn).link();
                pfn
            } else if self.fresh < count {
                self.fresh += 1;
                first.checked_add(self.fresh - 1)?
            } else {
                return None;
            };
            if map.frame(pfn).allocate() {
                return Some(pfn);
            }
            assert!(
                map.frame(pfn).is_poisoned(),
                "{pfn:?} was on the free list and in use"
            );
        }
    }

    /// Gives back a frame whose last hold was dropped. A poisoned one is lost: nobody gets it again.
    pub(crate) fn give(&mut self, map: &MemoryMap, first: Pfn, pfn: Pfn) {
        if map.frame(pfn).is_poisoned() {
            return;
        }
        map.frame(pfn).set_link(self.head);
        self.head = pfn.as_u32() - first.as_u32() + 1;
    }
}

/// Frames that somebody who waits may take while those above the limit are being freed.
const SLACK: u64 = 64;

/// The RAM that pgmap may use.
///
/// Its blocks go on and off line while it is used: see [`hotplug`](crate::hotplug).
#[derive(Debug)]
pub struct Ram {
    pub(crate) map: Arc<MemoryMap>,
    pub(crate) blocks: Mutex<Blocks>,
    /// Frames of the blocks that are on line.
    capacity: AtomicU64, // changed under `blocks`' lock, read by anybody
    /// The limit that was asked for, whatever is on line.
    wanted: AtomicU64, // as `capacity`
    /// Frames that may be in use for a while, though they are above the limit: 0 if none may, [`u64::MAX`] while the limit
    /// is suspended.
    ceiling: AtomicU64, // read and changed under `blocks`' lock
    in_use: AtomicU64, // as `capacity`
    peak: AtomicU64,   // as `capacity`
    /// Whether any block has ever been in `ZONE_MOVABLE`.
    any_movable: AtomicBool, // set under `blocks`' lock
    pub(crate) notifiers: Mutex<Vec<Arc<dyn MemoryNotifier>>>,
}

/// Why a frame could not be replaced by another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NotReplaced {
    /// Others hold it, or its bytes are lost: it stays (GUP-3, REF-6).
    Held,
    /// Every block that is on line, and would do, is full.
    Full,
}

/// Where the frame may be that replaces another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    /// In any block.
    AnyZone,
    /// In a block that is not in `ZONE_MOVABLE`.
    Unmovable,
}

impl Ram {
    /// The frames of `range`, all on line, and spare ones.
    pub(crate) fn new(map: Arc<MemoryMap>, range: PfnRange, spare: Option<PfnRange>) -> Self {
        Self {
            map,
            blocks: Mutex::new(Blocks::online(range, spare)),
            capacity: AtomicU64::new(range.count()),
            wanted: AtomicU64::new(u64::MAX),
            ceiling: AtomicU64::new(0),
            in_use: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            any_movable: AtomicBool::new(false),
            notifiers: Mutex::default(),
        }
    }

    /// Frames of the blocks that are on line: the limit is never higher.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        // Relaxed: as in `limit`.
        self.capacity.load(Ordering::Relaxed)
    }

    /// The first run of frames at or after number `from` that have ever been in use.
    #[must_use]
    pub fn touched(&self, from: u64) -> Option<Range<u64>> {
        self.blocks.lock().touched(from)
    }

    /// Frames that may be in use: those that were asked for, or all that are on line if these are less.
    #[must_use]
    pub fn limit(&self) -> u64 {
        // Relaxed: a number that others may change at any time.
        self.wanted.load(Ordering::Relaxed).min(self.capacity())
    }

    /// Changes how many frames may be in use, at most; [`u64::MAX`], as in the beginning, for all that are on line. Frames
    /// above a lower limit stay in use until somebody frees them: see [`deficit`](Self::deficit).
    pub fn set_limit(&self, frames: u64) {
        let _lock = self.blocks.lock();
        self.lower_ceiling(0);
        // Relaxed: as in `limit`.
        self.wanted.store(frames, Ordering::Relaxed);
    }

    /// Frames came on line, or stay there.
    pub(crate) fn grow(&self, _locked: &Blocks, frames: u64, zone: RamZone) {
        self.lower_ceiling(0);
        match zone {
            // Relaxed: as in `is_movable`.
            RamZone::Movable => self.any_movable.store(true, Ordering::Relaxed),
            RamZone::Normal => {}
        }
        // Relaxed, here and below: changed under the lock only.
        self.capacity.fetch_add(frames, Ordering::Relaxed);
    }

    /// Frames are going off line. False, and nothing has changed, if there are no others.
    pub(crate) fn shrink(&self, _locked: &Blocks, frames: u64) -> bool {
        if self.capacity() <= frames {
            return false;
        }
        self.lower_ceiling(0);
        self.capacity.fetch_sub(frames, Ordering::Relaxed);
        true
    }

    /// Frames in use.
    #[must_use]
    pub fn in_use(&self) -> u64 {
        // Relaxed: as in `limit`.
        self.in_use.load(Ordering::Relaxed)
    }

    /// The most frames that were in use at once.
    #[must_use]
    pub fn peak(&self) -> u64 {
        // Relaxed: as in `limit`.
        self.peak.load(Ordering::Relaxed)
    }

    /// Frames that can still be had.
    #[must_use]
    pub fn free_count(&self) -> u64 {
        self.limit().saturating_sub(self.in_use())
    }

    /// Frames in use above the limit.
    #[must_use]
    pub fn deficit(&self) -> u64 {
        self.in_use().saturating_sub(self.limit())
    }

    /// Lets all frames be used, spare ones, too, whatever the limit, until [`restore_limit`](Self::restore_limit).
    pub fn suspend_limit(&self) {
        let _lock = self.blocks.lock();
        // Relaxed, here and below: changed under the lock only.
        self.ceiling.store(u64::MAX, Ordering::Relaxed);
    }

    /// The limit holds again. Frames that are in use above it now may be used until they are freed; of those that are freed,
    /// half can be had again until the limit is kept.
    pub fn restore_limit(&self) {
        let _lock = self.blocks.lock();
        self.ceiling.store(self.in_use() + SLACK, Ordering::Relaxed);
        self.lower_ceiling(0);
    }

    /// Frames that may be in use now. Under the lock.
    fn allowed(&self) -> u64 {
        self.limit().max(self.ceiling.load(Ordering::Relaxed))
    }

    /// After `freed` frames were freed: half of them are not had again, so that the limit is kept in the end, however many
    /// are wanted. Under the lock, before any is taken.
    fn lower_ceiling(&self, freed: u64) {
        let (limit, in_use) = (self.limit(), self.in_use());
        let ceiling = self.ceiling.load(Ordering::Relaxed);
        if ceiling == 0 || ceiling == u64::MAX {
            return;
        }
        let less = ceiling
            .saturating_sub(freed.div_ceil(2))
            .min(in_use + SLACK);
        let kept = in_use <= limit || less <= limit;
        self.ceiling
            .store(if kept { 0 } else { less }, Ordering::Relaxed);
    }

    /// Takes frames, one reference each, as many as there are up to the length of `out`. Says how many.
    pub fn alloc(&self, out: &mut [Pfn]) -> usize {
        let mut blocks = self.blocks.lock();
        self.lower_ceiling(0);
        let most = usize::try_from(self.allowed().saturating_sub(self.in_use()))
            .unwrap_or(usize::MAX)
            .min(out.len());
        let mut taken = 0;
        for place in &mut out[..most] {
            let pfn = blocks.take(&self.map);
            // What is short of the limit is on line, so that these are had above it only.
            let Some(pfn) = pfn.or_else(|| blocks.take_spare(&self.map)) else {
                break;
            };
            *place = pfn;
            taken += 1;
        }
        // Relaxed: changed under the lock only.
        let before = self.in_use.fetch_add(taken as u64, Ordering::Relaxed);
        self.peak
            .fetch_max(before + taken as u64, Ordering::Relaxed);
        taken
    }

    /// Drops one reference of each frame; those that nobody else holds are free.
    pub fn free(&self, pfns: &[Pfn]) {
        if pfns.is_empty() {
            return;
        }
        let mut blocks = self.blocks.lock();
        let mut freed = 0;
        for pfn in pfns {
            if self.map.frame(*pfn).put() == Put::Last {
                blocks.give(&self.map, *pfn);
                freed += 1;
            }
        }
        // Relaxed: changed under the lock only.
        self.in_use.fetch_sub(freed, Ordering::Relaxed);
        self.lower_ceiling(freed);
    }

    /// Drops one pin of a frame; if its owner has let go meanwhile, the frame is free now.
    pub fn unpin(&self, pfn: Pfn) {
        if self.map.frame(pfn).unpin() == Put::Last {
            let mut blocks = self.blocks.lock();
            blocks.give(&self.map, pfn);
            // Relaxed: changed under the lock only.
            self.in_use.fetch_sub(1, Ordering::Relaxed);
            self.lower_ceiling(1);
        }
    }

    /// Whether a frame is in `ZONE_MOVABLE`, whose blocks are to be such as can go off line: who pins it for long would keep its
    /// block on line for as long (GUP-2). Where no block has ever joined that zone, this is one load.
    #[must_use]
    #[doc(alias = "is_longterm_pinnable_page")]
    pub fn is_movable(&self, pfn: Pfn) -> bool {
        // Relaxed: set under the blocks' lock, before the first frame of such a block can be had.
        self.any_movable.load(Ordering::Relaxed)
            && self.zone_of(pfn) == Some(Zone::Ram(RamZone::Movable))
    }

    /// Replaces a frame with one reference, whose block is going off line or is no place for it, by one of a block that is on
    /// line and where `to` says, which has the owner's words from then on. The caller has the owner's lock; `rename` names the new frame in the owner's entry. Until
    /// that is done the old one is claimed, so that whoever reads the entry without the lock cannot pin it (RMAP-1).
    ///
    /// # Errors
    ///
    /// [`NotReplaced`]; nothing has changed then.
    pub fn replace(
        &self,
        old: Pfn,
        to: Target,
        rename: impl FnOnce(Pfn),
    ) -> Result<(), NotReplaced> {
        let from = self.map.frame(old);
        let mut blocks = self.blocks.lock();
        if !from.freeze(1) {
            return Err(NotReplaced::Held);
        }
        let taken = match to {
            Target::AnyZone => blocks.take(&self.map),
            Target::Unmovable => blocks.take_in(RamZone::Normal, &self.map),
        };
        let Some(new) = taken else {
            from.unfreeze(1);
            return Err(NotReplaced::Full);
        };
        let to = self.map.frame(new);
        to.set_private(from.private());
        to.set_mapping(from.mapping());
        to.set_link(from.link());
        from.set_mapping(0);
        rename(new);
        from.unfreeze(0);
        // As many frames are in use as before.
        blocks.give(&self.map, old);
        Ok(())
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::platform::HeapPlatform;
    use crate::zone::ZoneChoice;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        /// The allocator agrees with a set: no frame is handed out twice, none is lost, and the limit holds.
        #[test]
        fn the_allocator_agrees_with_a_set(steps in prop::collection::vec((0u8..3, 1usize..40), 1..80)) {
            let map = MemoryMap::new(&HeapPlatform, 256).unwrap();
            let ram = map.add_ram(256).unwrap();
            let mut used = BTreeSet::new();
            for (step, count) in steps {
                match step {
                    0 => {
                        let mut out = vec![Pfn::from_u32(0); count];
                        let taken = ram.alloc(&mut out);
                        let room = usize::try_from(ram.limit()).unwrap().saturating_sub(used.len());
                        prop_assert_eq!(taken, count.min(room));
                        prop_assert!(out[..taken].iter().all(|pfn| used.insert(*pfn)));
                    }
                    1 => {
                        let some: Vec<Pfn> = used.iter().copied().take(count).collect();
                        ram.free(&some);
                        used.retain(|pfn| !some.contains(pfn));
                    }
                    _ => ram.set_limit(count as u64 * 8),
                }
                prop_assert_eq!(ram.in_use(), used.len() as u64);
            }
        }
    }

    /// While the limit is suspended all frames can be had; afterwards each that is freed counts, until the limit is kept.
    #[test]
    fn a_suspended_limit_is_kept_again_as_frames_are_freed() {
        let map = MemoryMap::new(&HeapPlatform, 1024).unwrap();
        let ram = map.add_ram(1024).unwrap();
        let mut out = [Pfn::from_u32(0); 1024];
        ram.set_limit(100);
        assert_eq!(ram.alloc(&mut out), 100);
        ram.suspend_limit();
        assert_eq!(ram.alloc(&mut out[100..500]), 400);
        ram.free(&out[490..500]);
        assert_eq!(ram.alloc(&mut out[490..500]), 10);
        ram.restore_limit();
        assert_eq!((ram.limit(), ram.deficit()), (100, 400));
        assert_eq!(ram.alloc(&mut out[500..]), 64);
        ram.free(&out[264..564]);
        assert_eq!(ram.deficit(), 164);
        assert_eq!(ram.alloc(&mut out[264..]), 64);
        ram.free(&out[..328]);
        assert_eq!(ram.in_use(), 0);
        assert_eq!(ram.alloc(&mut out), 100);
    }

    /// HOT-5: spare frames are in no block, and had only while the limit is suspended; they do not replace what goes off line.
    #[test]
    fn spare_frames_are_had_above_the_limit_only() {
        let map = MemoryMap::new(&HeapPlatform, 4096).unwrap();
        let ram = map.add_ram_with_spare(1024, 500).unwrap();
        let frames: u64 = ram.blocks().iter().map(|block| block.range.count()).sum();
        assert_eq!((frames, ram.capacity(), ram.limit()), (1024, 1024, 1024));
        let mut out = [Pfn::from_u32(0); 2000];
        assert_eq!(ram.alloc(&mut out), 1024);
        let replaced = ram.replace(out[0], Target::AnyZone, |_| panic!("there is no other"));
        assert_eq!(replaced, Err(NotReplaced::Full));
        ram.suspend_limit();
        assert_eq!(ram.alloc(&mut out[1024..]), 500);
        assert_eq!(ram.touched(1024), Some(1024..1524));
        ram.restore_limit();
        ram.free(&out[..1524]);
        assert_eq!(ram.in_use(), 0);
        assert_eq!(ram.alloc(&mut out), 1024);
        assert!(out[..1024].iter().all(|pfn| pfn.get() < 1024));
    }

    /// Frames that were ever in use are found in the order of their numbers, spare ones before a block that was added.
    #[test]
    fn spare_frames_are_not_skipped() {
        let map = MemoryMap::new(&HeapPlatform, 4096).unwrap();
        let ram = map.add_ram_with_spare(1024, 500).unwrap();
        let mut out = [Pfn::from_u32(0); 1525];
        ram.suspend_limit();
        assert_eq!(ram.alloc(&mut out[..1524]), 1524);
        let added = ram.add(1).unwrap();
        ram.online(added, ZoneChoice::Auto).unwrap();
        assert_eq!(ram.alloc(&mut out[1524..]), 1);
        let last = out[1524].get();
        assert_eq!(ram.touched(1024), Some(1024..1524));
        assert_eq!(ram.touched(1524), Some(last..last + 1));
    }

    /// A program that wants as many frames as are freed does not keep the limit from being kept.
    #[test]
    fn a_suspended_limit_is_kept_again_however_many_frames_are_wanted() {
        let map = MemoryMap::new(&HeapPlatform, 1024).unwrap();
        let ram = map.add_ram(1024).unwrap();
        let mut used = vec![Pfn::from_u32(0); 500];
        assert_eq!(ram.alloc(&mut used), 500);
        ram.suspend_limit();
        ram.set_limit(100);
        ram.restore_limit();
        for _ in 0..40 {
            ram.free(&used.split_off(used.len() - 32));
            let mut out = [Pfn::from_u32(0); 32];
            let taken = ram.alloc(&mut out);
            used.extend(&out[..taken]);
        }
        assert_eq!(ram.in_use(), 100);
    }

    /// WB-6: a frame whose bytes are lost is not handed out again; the others are.
    #[test]
    fn a_poisoned_frame_is_not_reused() {
        let map = MemoryMap::new(&HeapPlatform, 2).unwrap();
        let ram = map.add_ram(2).unwrap();
        let mut out = [Pfn::from_u32(0); 2];
        assert_eq!(ram.alloc(&mut out), 2);
        map.frame(out[0]).poison();
        ram.free(&out);
        assert_eq!(ram.in_use(), 0);
        let mut again = [Pfn::from_u32(0); 2];
        assert_eq!(ram.alloc(&mut again), 1);
        assert_eq!(again[0], out[1]);
    }

    /// GUP-3: a pinned frame is not handed out again before its last pin is dropped.
    #[test]
    fn a_pinned_frame_is_not_reused() {
        let map = MemoryMap::new(&HeapPlatform, 1).unwrap();
        let ram = map.add_ram(1).unwrap();
        let mut out = [Pfn::from_u32(0)];
        assert_eq!(ram.alloc(&mut out), 1);
        map.frame(out[0]).try_pin().unwrap();
        ram.free(&out);
        assert_eq!(ram.alloc(&mut [Pfn::from_u32(0)]), 0);
        ram.unpin(out[0]);
        assert_eq!(ram.alloc(&mut out), 1);
    }
}
