//! The RAM of a memory in blocks, which go on and off line while it is used (HOT-4, HOT-5).

use core::ops::ControlFlow;
use core::time::Duration;
use std::time::Instant;

use pgmap_core::hotplug::{BlockView, HotplugError};
use pgmap_core::sparse::BlockId;
use pgmap_core::zone::ZoneChoice;
use pgmap_mm::reclaim::Caller;

use crate::memory::Memory;

/// How long a round of emptying a block is from the next, if it did not get on.
const ROUND: Duration = Duration::from_millis(1);

impl Memory {
    /// The blocks of RAM, in order.
    #[must_use]
    pub fn ram_blocks(&self) -> Vec<BlockView> {
        self.space().inner().ram().blocks()
    }

    /// Takes a block of RAM off line: its pages go to other frames or to devices, and the budget shrinks by it (HOT-5).
    ///
    /// # Errors
    ///
    /// [`HotplugError`]; the block is on line then, as it was. A pinned page keeps it there, and the error names who pins
    /// (HOT-4); so does a lack of other places for `patience`.
    #[doc(alias = "memory_block_offline")]
    pub fn offline(&self, block: BlockId, patience: Duration) -> Result<(), HotplugError> {
        let begun = Instant::now();
        let space = self.space().inner();
        space.offline(Caller::Reclaimer, block, |round| {
            if begun.elapsed() >= patience {
                return ControlFlow::Break(());
            }
            if round.gone_frames == 0 {
                std::thread::sleep(ROUND);
            }
            ControlFlow::Continue(())
        })
    }

    /// Takes a block of RAM on line again: the budget grows by it (HOT-5).
    ///
    /// # Errors
    ///
    /// [`HotplugError`]; nothing has changed then.
    #[doc(alias = "memory_block_online")]
    pub fn online(&self, block: BlockId, zone: ZoneChoice) -> Result<(), HotplugError> {
        self.space().inner().ram().online(block, zone).map(drop)
    }
}
