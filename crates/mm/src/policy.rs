//! Which block gives up its pages next.
//!
//! Two first-in first-out queues of blocks, in the manner of a clock: a block goes to the tail when pages
//! come into it, and at the head it gives up the pages that were not touched while they last waited in
//! staging. Blocks that a long sequential stream brought back go through a queue of their own that is
//! emptied first, so that a scan does not push out what is used again (drop-behind). A page that comes
//! back soon after it left ([`Age::is_short`]) shows that its block deserves the main queue.

use pgmap_core::platform::{OutOfAddressSpace, Platform};
use pgmap_core::vmemmap::ZeroedSlice;
use pgmap_sync::Mutex;
use pgmap_sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::page_table::{BLOCK_PAGES, BlockIndex};
use crate::pte::Stamp;

/// Blocks that a stream may be behind its reader before they are given up: the reader still uses them.
const STREAM_BLOCKS: u32 = 4;
/// Evictions per tick of a [`Stamp`], as a power of two.
const TICK_SHIFT: u32 = 4;

/// What the pages of a block are expected to be used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// They may be used again.
    Main,
    /// They are passed once.
    Stream,
}

// The link of a block: 0 is "in no queue"; otherwise one more than the number of the next block, or END.
const END: u32 = u32::MAX;

#[derive(Debug, Default)]
struct Fifo {
    /// One more than the first block; 0 if there is none.
    head: u32,
    /// One more than the last block.
    tail: u32,
    len: u32,
}

impl Fifo {
    fn push(&mut self, links: &ZeroedSlice<AtomicU32>, block: u32) {
        // Relaxed, here and below: the queues' lock orders every access to a link.
        links[block as usize].store(END, Ordering::Relaxed);
        match self.tail {
            0 => self.head = block + 1,
            tail => links[tail as usize - 1].store(block + 1, Ordering::Relaxed),
        }
        self.tail = block + 1;
        self.len += 1;
    }

    fn pop(&mut self, links: &ZeroedSlice<AtomicU32>) -> Option<u32> {
        let block = self.head.checked_sub(1)?;
        match links[block as usize].swap(0, Ordering::Relaxed) {
            END => (self.head, self.tail) = (0, 0),
            next => self.head = next,
        }
        self.len -= 1;
        Some(block)
    }
}

#[derive(Debug, Default)]
struct Fifos {
    main: Fifo,
    stream: Fifo,
}

/// The order in which blocks give up their pages.
#[derive(Debug)]
pub struct Queues {
    fifos: Mutex<Fifos>,
    links: ZeroedSlice<AtomicU32>, // Q: the lock of `fifos`
    evictions: AtomicU64,
}

impl Queues {
    /// Empty queues for the blocks of `pages` pages.
    ///
    /// # Errors
    ///
    /// [`OutOfAddressSpace`] if the machine has no room for 4 bytes a block.
    pub fn new(platform: &'static dyn Platform, pages: u32) -> Result<Self, OutOfAddressSpace> {
        let blocks = pages.div_ceil(BLOCK_PAGES) as usize;
        let links = ZeroedSlice::new(platform, blocks)?;
        Ok(Self {
            fifos: Mutex::new(Fifos::default()),
            links,
            evictions: AtomicU64::new(0),
        })
    }

    /// Puts a block at the tail of its queue, unless it is in one.
    pub fn push(&self, block: BlockIndex, class: Class) {
        let link = &self.links[block.0 as usize];
        // Relaxed: only a hint that saves the lock; whoever holds the block's cursor pushes it, and a block
        // that is popped at this moment is pushed again by who popped it.
        if link.load(Ordering::Relaxed) != 0 {
            return;
        }
        let mut fifos = self.fifos.lock();
        if link.load(Ordering::Relaxed) == 0 {
            match class {
                Class::Main => fifos.main.push(&self.links, block.0),
                Class::Stream => fifos.stream.push(&self.links, block.0),
            }
        }
    }

    /// Takes the block that is to give up its pages next, after `fruitless` blocks that gave up none: when the whole
    /// main queue has nothing to give, a stream's reader is not spared any longer.
    pub fn pop(&self, fruitless: u32) -> Option<(BlockIndex, Class)> {
        let fifos = &mut *self.fifos.lock();
        if (fifos.stream.len > STREAM_BLOCKS || fifos.main.len <= fruitless)
            && let Some(block) = fifos.stream.pop(&self.links)
        {
            return Some((BlockIndex(block), Class::Stream));
        }
        fifos
            .main
            .pop(&self.links)
            .map(|block| (BlockIndex(block), Class::Main))
    }

    /// How many blocks are queued.
    pub fn len(&self) -> u32 {
        let fifos = self.fifos.lock();
        fifos.main.len + fifos.stream.len
    }

    /// Whether no block is queued.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Counts an eviction and says when it was.
    pub fn stamp(&self) -> Stamp {
        // Relaxed: a clock that nothing else is ordered by.
        Self::tick(self.evictions.fetch_add(1, Ordering::Relaxed))
    }

    /// How long a page was away that left at `stamp`.
    pub fn age(&self, stamp: Stamp) -> Age {
        // Relaxed: as in `stamp`.
        Age {
            ticks: Self::tick(self.evictions.load(Ordering::Relaxed)).since(stamp),
        }
    }

    fn tick(evictions: u64) -> Stamp {
        #[allow(
            clippy::cast_possible_truncation,
            reason = "a stamp keeps 24 bits anyway"
        )]
        Stamp::new((evictions >> TICK_SHIFT) as u32)
    }
}

/// How long a page was away, in evictions.
#[derive(Clone, Copy, Debug)]
pub struct Age {
    ticks: u32,
}

impl Age {
    /// Whether the page would still be in RAM if the main queue had kept it: it was away for fewer
    /// evictions than most of the budget.
    #[must_use]
    pub const fn is_short(self, budget_frames: u64) -> bool {
        ((self.ticks as u64) << TICK_SHIFT) < budget_frames - budget_frames / 8
    }
}

#[cfg(test)]
#[cfg(not(any(loom, shuttle)))]
mod tests {
    use super::*;
    use pgmap_core::platform::HeapPlatform;

    fn queues() -> Queues {
        Queues::new(&HeapPlatform, 64 * 1024).unwrap()
    }

    fn drain(queues: &Queues) -> Vec<u32> {
        core::iter::from_fn(|| queues.pop(0))
            .map(|(block, _)| block.0)
            .collect()
    }

    /// Blocks leave in the order in which they came, each once.
    #[test]
    fn blocks_leave_in_order_and_once() {
        let queues = queues();
        for block in [3, 1, 2, 1, 3] {
            queues.push(BlockIndex(block), Class::Main);
        }
        assert_eq!(drain(&queues), [3, 1, 2]);
        queues.push(BlockIndex(1), Class::Main);
        assert_eq!(drain(&queues), [1]);
        assert!(queues.is_empty());
    }

    /// What a scan brought leaves before what may be used again, but not from under the scan's reader.
    #[test]
    fn a_scan_leaves_first_but_not_under_its_reader() {
        let queues = queues();
        for block in 0..3 {
            queues.push(BlockIndex(block), Class::Main);
        }
        for block in 10..16 {
            queues.push(BlockIndex(block), Class::Stream);
        }
        assert_eq!(drain(&queues), [10, 11, 0, 1, 2, 12, 13, 14, 15]);
    }

    /// When no block of the main queue gives up a page, those of a stream have to.
    #[test]
    fn a_fruitless_main_queue_does_not_spare_a_stream() {
        let queues = queues();
        queues.push(BlockIndex(1), Class::Main);
        queues.push(BlockIndex(2), Class::Stream);
        for fruitless in [0, 1] {
            let (block, class) = queues.pop(fruitless).unwrap();
            assert_eq!(block.0, fruitless + 1);
            queues.push(block, class);
        }
    }

    /// A page that was away for less than the budget came back early.
    #[test]
    fn age_is_measured_in_evictions() {
        let queues = queues();
        let stamp = queues.stamp();
        for _ in 0..800 {
            queues.stamp();
        }
        assert!(queues.age(stamp).is_short(1024));
        for _ in 0..200 {
            queues.stamp();
        }
        assert!(!queues.age(stamp).is_short(1024));
    }
}
