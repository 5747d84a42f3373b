//! The sizes in which the memory map is handled: sections, sub-sections, and blocks of RAM.
//!
//! Devices are mapped by the sub-section (MAP-4), RAM goes on and off line by the block. A block is a section where there is
//! much RAM, and smaller where a section would be most of the budget.

use core::fmt;

use crate::addr::{Pfn, PfnRange};

/// Frames of a section: 128 MiB.
pub const SECTION_FRAMES: u64 = 1 << 15;
/// Frames of a sub-section, the granularity of device mappings: 2 MiB (MAP-4). Models have small ones.
pub const SUBSECTION_FRAMES: u64 = if cfg!(any(loom, shuttle)) { 8 } else { 512 };
/// A budget has at least so many blocks, if it has as many sub-sections.
const BLOCKS_OF_A_BUDGET: u64 = 8;

/// Frames of a block of RAM.
///
/// # Invariants
///
/// A power of two, at least a sub-section and at most a section.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockSize(u64);

impl BlockSize {
    /// The size of the blocks of a budget of `frames` frames.
    #[must_use]
    pub const fn of_budget(frames: u64) -> Self {
        let most = frames / BLOCKS_OF_A_BUDGET;
        let mut size = SECTION_FRAMES;
        while size > most && size > SUBSECTION_FRAMES {
            size /= 2;
        }
        // INVARIANT: halved from a section, which is a power of two, and not below a sub-section.
        Self(size)
    }

    /// How many frames.
    #[must_use]
    pub const fn frames(self) -> u64 {
        self.0
    }

    /// The block that has a frame.
    #[must_use]
    pub const fn block_of(self, pfn: Pfn) -> BlockId {
        BlockId(pfn.as_u32() >> self.0.trailing_zeros())
    }

    /// The frames of a block, if there can be such a block.
    #[must_use]
    pub const fn range_of(self, block: BlockId) -> Option<PfnRange> {
        match Pfn::new(block.0 as u64 * self.0) {
            Some(start) => PfnRange::new(start, self.0),
            None => None,
        }
    }
}

/// The number of a block of RAM: its first frame, divided by the size of a block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BlockId(pub u32);

impl fmt::Display for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "memory{}", self.0)
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    /// HOT-5: a budget can be changed by an eighth or less, in blocks of at most a section and at least a sub-section.
    #[test]
    fn blocks_are_small_where_the_budget_is() {
        let mib = |mib: u64| BlockSize::of_budget(mib << 8).frames() >> 8;
        assert_eq!(
            [1, 16, 31, 64, 1000, 1024, 1 << 20].map(mib),
            [2, 2, 2, 8, 64, 128, 128]
        );
    }

    /// A block's frames are its own.
    #[test]
    fn a_block_and_its_frames_agree() {
        let size = BlockSize::of_budget(1 << 30);
        let range = size.range_of(BlockId(7)).unwrap();
        assert_eq!(range.start().get(), 7 * SECTION_FRAMES);
        assert_eq!(size.block_of(range.start()), BlockId(7));
        assert_eq!(size.block_of(Pfn::new(range.end()).unwrap()), BlockId(8));
        assert_eq!(size.range_of(BlockId(u32::MAX)), None);
    }
}
