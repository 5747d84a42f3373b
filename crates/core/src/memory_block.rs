//! Blocks of RAM: the frames of each, which of them are free, and whether they may be handed out.
//!
//! [`Ram`](crate::ram::Ram) keeps them under its lock. Taking and giving a frame costs the same however many blocks there are:
//! the blocks that are on line and have free frames are linked. Isolating a block is no more than unlinking it: its free frames
//! stay where they are, and nobody gets them.

use alloc::vec::Vec;
use core::ops::Range;

use crate::addr::{Pfn, PfnRange};
use crate::memremap::MemoryMap;
use crate::ram::FreeList;
use crate::sparse::{BlockId, BlockSize};
use crate::zone::RamZone;

/// Whether a block's frames may be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BlockState {
    /// There is no such memory; it was removed.
    Absent,
    /// It is there, and nobody uses it.
    Offline,
    /// Those who asked to be told are asked whether it may go on line.
    GoingOnline(RamZone),
    /// Its frames are used.
    Online(RamZone),
    /// Its frames are not handed out any more, and those in use are replaced.
    GoingOffline(RamZone),
}

impl BlockState {
    /// The zone that the block is in, joins or leaves.
    #[must_use]
    pub const fn zone(self) -> Option<RamZone> {
        match self {
            Self::Absent | Self::Offline => None,
            Self::GoingOnline(zone) | Self::Online(zone) | Self::GoingOffline(zone) => Some(zone),
        }
    }
}

/// One block of RAM.
#[derive(Debug)]
pub(crate) struct MemoryBlock {
    pub(crate) id: BlockId,
    /// As long as a block; the last of the RAM that was there first may be shorter.
    pub(crate) range: PfnRange,
    state: BlockState,
    free: FreeList,
    used: u64,
    /// Whether it is in its zone's list, and the next there.
    listed: bool,
    next: Option<usize>,
}

impl MemoryBlock {
    fn new(id: BlockId, range: PfnRange, state: BlockState) -> Self {
        Self {
            id,
            range,
            state,
            free: FreeList::default(),
            used: 0,
            listed: false,
            next: None,
        }
    }

    /// Whether the block's frames may be used.
    pub(crate) const fn state(&self) -> BlockState {
        self.state
    }

    /// Frames in use.
    pub(crate) const fn used(&self) -> u64 {
        self.used
    }

    /// Frames that have ever been in use.
    pub(crate) const fn touched(&self) -> Range<u64> {
        let start = self.range.start().get();
        start..start + self.free.fresh()
    }
}

/// The zones, in the order in which they are tried: what can go off line is used first, so that the rest is there for pages
/// that cannot be moved.
const ORDER: [RamZone; 2] = [RamZone::Movable, RamZone::Normal];

/// All blocks of RAM.
///
/// # Invariants
///
/// Sorted by their frames. Every block that is on line and has a free frame is in the list of its zone.
#[derive(Debug)]
pub(crate) struct Blocks {
    size: BlockSize,
    all: Vec<MemoryBlock>,
    /// For each zone the first block that may have free frames.
    heads: [Option<usize>; 2],
    /// Frames that go neither on nor off line, and have no number: above those of the first blocks.
    spare: Option<MemoryBlock>,
}

impl Blocks {
    /// The blocks of the RAM that is there from the start: all on line, in NORMAL.
    pub(crate) fn online(range: PfnRange, spare: Option<PfnRange>) -> Self {
        let size = BlockSize::of_budget(range.count());
        let numbers = size.block_of(range.start()).0..;
        let parts = numbers.map_while(|number| {
            let whole = size.range_of(BlockId(number))?;
            let count = range.end().checked_sub(whole.start().get())?;
            let part = PfnRange::new(whole.start(), count.min(whole.count()))?;
            let state = BlockState::Online(RamZone::Normal);
            Some(MemoryBlock::new(BlockId(number), part, state))
        });
        let mut blocks = Self {
            size,
            all: parts.collect(),
            heads: [None; 2],
            spare: spare.map(|range| {
                let state = BlockState::Online(RamZone::Normal);
                MemoryBlock::new(size.block_of(range.start()), range, state)
            }),
        };
        blocks.relist();
        blocks
    }

    pub(crate) const fn size(&self) -> BlockSize {
        self.size
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &MemoryBlock> + Clone {
        self.all.iter()
    }

    pub(crate) fn get(&self, id: BlockId) -> Option<&MemoryBlock> {
        self.all.iter().find(|block| block.id == id)
    }

    /// The block that has a frame.
    pub(crate) fn of(&self, pfn: Pfn) -> Option<&MemoryBlock> {
        let spare = self.spare.as_ref();
        let spare = spare.filter(|spare| spare.range.contains(pfn));
        spare.or_else(|| Some(&self.all[self.index_of(pfn)?]))
    }

    /// Adds a block that is off line, or whose memory was removed.
    pub(crate) fn add(&mut self, id: BlockId, range: PfnRange) {
        let place = self.all.partition_point(|block| block.id < id);
        let block = MemoryBlock::new(id, range, BlockState::Offline);
        if self.all.get(place).is_some_and(|there| there.id == id) {
            self.all[place] = block;
        } else {
            self.all.insert(place, block);
        }
        self.relist();
    }

    /// Changes whether a block's frames may be used.
    pub(crate) fn set_state(&mut self, id: BlockId, state: BlockState) {
        if let Some(block) = self.all.iter_mut().find(|block| block.id == id) {
            block.state = state;
        }
        self.relist();
    }

    /// The first run of frames at or after number `from` that have ever been in use.
    pub(crate) fn touched(&self, from: u64) -> Option<Range<u64>> {
        let blocks = self.all.iter().chain(&self.spare);
        let touched = blocks.map(MemoryBlock::touched);
        let behind = touched.filter(|run| run.end > from && !run.is_empty());
        // Blocks that were added stand behind the spare frames.
        let run = behind.min_by_key(|run| run.start)?;
        Some(run.start.max(from)..run.end)
    }

    /// Takes a free frame of a block that is on line.
    pub(crate) fn take(&mut self, map: &MemoryMap) -> Option<Pfn> {
        ORDER.into_iter().find_map(|zone| self.take_in(zone, map))
    }

    /// Takes a free frame of a block that is on line in a zone.
    pub(crate) fn take_in(&mut self, zone: RamZone, map: &MemoryMap) -> Option<Pfn> {
        while let Some(first) = self.heads[zone as usize] {
            let block = &mut self.all[first];
            let range = block.range;
            if let Some(pfn) = block.free.take(map, range.start(), range.count()) {
                block.used += 1;
                return Some(pfn);
            }
            // INVARIANT: it has no free frame.
            block.listed = false;
            self.heads[zone as usize] = block.next;
        }
        None
    }

    /// Takes a free frame that is spare.
    pub(crate) fn take_spare(&mut self, map: &MemoryMap) -> Option<Pfn> {
        let spare = self.spare.as_mut()?;
        let range = spare.range;
        let pfn = spare.free.take(map, range.start(), range.count())?;
        spare.used += 1;
        Some(pfn)
    }

    /// Gives back a frame whose last hold was dropped.
    ///
    /// # Panics
    ///
    /// If it is no frame of RAM.
    pub(crate) fn give(&mut self, map: &MemoryMap, pfn: Pfn) {
        let spare = self.spare.as_mut();
        if let Some(spare) = spare.filter(|spare| spare.range.contains(pfn)) {
            spare.free.give(map, spare.range.start(), pfn);
            spare.used -= 1;
            return;
        }
        let Some(index) = self.index_of(pfn) else {
            panic!("{pfn:?} is given back, and is not RAM");
        };
        let block = &mut self.all[index];
        block.free.give(map, block.range.start(), pfn);
        block.used -= 1;
        self.list(index);
    }

    fn index_of(&self, pfn: Pfn) -> Option<usize> {
        // Most blocks stand at their number: only what was added behind other memory does not.
        let guess = self.size.block_of(pfn).0 as usize;
        let has = |index: &usize| {
            let block = self.all.get(*index);
            block.is_some_and(|block| block.range.contains(pfn))
        };
        Some(guess).filter(has).or_else(|| {
            let behind = self.all.partition_point(|block| block.range.start() <= pfn);
            behind.checked_sub(1).filter(has)
        })
    }

    /// Puts a block that may have free frames into its zone's list, if they may be handed out.
    fn list(&mut self, index: usize) {
        let block = &mut self.all[index];
        if let BlockState::Online(zone) = block.state
            && !block.listed
        {
            block.listed = true;
            block.next = self.heads[zone as usize].replace(index);
        }
    }

    /// Makes the lists anew, the lowest blocks first.
    fn relist(&mut self) {
        self.heads = [None; 2];
        for index in (0..self.all.len()).rev() {
            self.all[index].listed = false;
            self.list(index);
        }
    }
}
