//! Which blocks have dirty pages: one bit each, so that writeback looks at no others.

use core::ops::Range;

use pgmap_core::platform::{OutOfAddressSpace, Platform};
use pgmap_core::vmemmap::ZeroedSlice;
use pgmap_sync::atomic::{AtomicU64, Ordering};

use crate::page_table::{BLOCK_PAGES, BlockIndex};

/// The blocks of a file that may have dirty pages. Bits are changed under the cursor of the block.
#[derive(Debug)]
pub(super) struct DirtyBlocks {
    bits: ZeroedSlice<AtomicU64>,
    blocks: u32,
}

impl DirtyBlocks {
    pub(super) fn new(
        platform: &'static dyn Platform,
        pages: u32,
    ) -> Result<Self, OutOfAddressSpace> {
        let blocks = pages.div_ceil(BLOCK_PAGES);
        let bits = ZeroedSlice::new(platform, blocks.div_ceil(u64::BITS) as usize)?;
        Ok(Self { bits, blocks })
    }

    fn word(&self, block: BlockIndex) -> (&AtomicU64, u64) {
        let word = &self.bits[(block.0 / u64::BITS) as usize];
        (word, 1 << (block.0 % u64::BITS))
    }

    pub(super) fn set(&self, block: BlockIndex) {
        let (word, bit) = self.word(block);
        // Relaxed, both: bits change under their block's lock only; who finds this one takes that lock, and the entry, which is set
        // after it with a release, shows it to who pins the page.
        if word.load(Ordering::Relaxed) & bit == 0 {
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }

    pub(super) fn clear(&self, block: BlockIndex) {
        let (word, bit) = self.word(block);
        // Release: pairs with the acquire in `next`. Who finds no bit, and takes no lock, finds the pages under writeback.
        word.fetch_and(!bit, Ordering::Release);
    }

    /// Where the second and the last third of the dirty blocks of a range begin, if there are at least so many.
    pub(super) fn thirds(&self, range: &Range<u32>, least: usize) -> Option<[BlockIndex; 2]> {
        let first = self.next(BlockIndex(range.start));
        let dirty = || {
            core::iter::successors(first, |block| self.next(BlockIndex(block.0 + 1)))
                .take_while(|block| block.0 < range.end)
        };
        let count = dirty().count();
        if count < least {
            return None;
        }
        Some([dirty().nth(count / 3)?, dirty().nth(count * 2 / 3)?])
    }

    /// The first block at or after `from` that may have dirty pages.
    pub(super) fn next(&self, from: BlockIndex) -> Option<BlockIndex> {
        let mut block = from.0;
        while block < self.blocks {
            // Acquire: pairs with the release in `clear`.
            let word = self.word(BlockIndex(block)).0.load(Ordering::Acquire);
            let rest = word >> (block % u64::BITS);
            if rest != 0 {
                return Some(BlockIndex(block + rest.trailing_zeros()));
            }
            block = (block / u64::BITS + 1) * u64::BITS;
        }
        None
    }
}
