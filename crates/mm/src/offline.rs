//! Taking RAM off line: whoever uses a frame of the block is made to use another.
//!
//! A frame accounts for a page, and the machine chooses where the bytes are; so a page moves by being named anew in its entry,
//! under its cursor, and its bytes stay. What must never happen here: a pinned page's frame replaced (GUP-3), or a staged
//! page separated from its slot.

use alloc::boxed::Box;
use core::ops::ControlFlow;

use pgmap_core::addr::{PAGE_SIZE, Pfn, VirtAddr};
use pgmap_core::hotplug::{HotplugError, Migrate, Obstacle};
use pgmap_core::ram::{NotReplaced, Ram, Target};
use pgmap_core::sparse::BlockId;

use crate::page_cache::FilePage;
use crate::page_table::PageIndex;
use crate::pte::Pte;
use crate::reclaim::Caller;
#[cfg(shuttle)]
use crate::seeded_bug::{self, SeededBug};
use crate::space::{AddressSpace, BATCH};

/// Frames that are reclaimed in one round, at least, where there is no room for more.
const MAKE_ROOM: usize = 8 * BATCH;

/// What one look at a block that is going off line has come to.
#[derive(Debug)]
pub struct Round<'a> {
    /// Frames that are not in use any more since the last look.
    pub gone_frames: u64,
    /// Frames still in use.
    pub left_frames: u64,
    /// What keeps them in use.
    pub obstacle: &'a Obstacle,
}

impl AddressSpace {
    /// Takes a block of RAM off line while it is used (HOT-4). If RAM is short, pages go to the devices. Blocks go on line
    /// by [`Ram::online`].
    ///
    /// `go_on` is asked after every round that leaves frames in use: it waits a little, looks at the clock, and gives up when
    /// it will. The caller is [`Caller::Reclaimer`], unless it serves faults.
    ///
    /// # Errors
    ///
    /// [`HotplugError`]; the block is on line then, as it was.
    pub fn offline(
        &self,
        caller: Caller,
        block: BlockId,
        go_on: impl FnMut(Round<'_>) -> ControlFlow<()>,
    ) -> Result<(), HotplugError> {
        let mut emptying = Emptying {
            space: self,
            caller,
            go_on,
        };
        self.ram.offline(block, &mut emptying)
    }

    /// Replaces the frames of a block that are in use, as far as that is possible. Answers what is in the way.
    fn replace_frames(&self, block: BlockId) -> Option<Obstacle> {
        let mut obstacle = None;
        for pfn in self.ram.touched_in(block).filter_map(Pfn::new) {
            match self.replace_frame(pfn, Target::AnyZone) {
                Ok(()) => {}
                Err(NotReplaced::Held) => {
                    obstacle.get_or_insert_with(|| self.held(pfn));
                }
                Err(NotReplaced::Full) => {
                    let frames = self.ram.used_in(block);
                    return Some(Obstacle::NoRoom { frames });
                }
            }
        }
        obstacle
    }

    /// Replaces a frame if a page's entry names it.
    pub(crate) fn replace_frame(&self, pfn: Pfn, to: Target) -> Result<(), NotReplaced> {
        let frame = self.map.frame(pfn);
        if frame.refs() == 0 {
            // Free, unless its owner has let go and a pin has not.
            return if frame.is_pinned() {
                Err(NotReplaced::Held)
            } else {
                Ok(())
            };
        }
        if let Some(FilePage { file, page }) = FilePage::from_word(frame.mapping()) {
            let cache = self.files.of_any(file);
            return cache.map_or(Ok(()), |cache| cache.replace_frame(page, pfn, to));
        }
        let mapping = frame.mapping().checked_sub(1);
        let Some(page) = mapping.and_then(|page| u32::try_from(page).ok()) else {
            // On its way somewhere.
            return Ok(());
        };
        let page = PageIndex(page);
        // The frame may be another page's by now, or nobody's: the entry tells.
        let mut cursor = self.table.lock(page.block());
        match cursor.get(page) {
            Pte::Present { frame, heat, copy } if frame == pfn => self.replace(pfn, to, |frame| {
                cursor.set(page, Pte::Present { frame, heat, copy });
            }),
            Pte::Staged { frame, copy } if frame == pfn => self.replace(pfn, to, |frame| {
                cursor.set(page, Pte::Staged { frame, copy });
            }),
            Pte::None
            | Pte::Present { .. }
            | Pte::Staged { .. }
            | Pte::Device { .. }
            | Pte::Poisoned => Ok(()),
        }
    }

    fn replace(&self, old: Pfn, to: Target, rename: impl FnOnce(Pfn)) -> Result<(), NotReplaced> {
        #[cfg(shuttle)]
        if seeded_bug::has(SeededBug::ReplaceIgnoresPins) && self.map.frame(old).is_pinned() {
            let mut new = [old];
            self.ram.alloc(&mut new);
            self.map
                .frame(new[0])
                .set_mapping(self.map.frame(old).mapping());
            rename(new[0]);
            self.ram.free(&[old]);
            return Ok(());
        }
        self.ram.replace(old, to, |new| {
            #[cfg(shuttle)]
            if seeded_bug::has(SeededBug::ReplaceForgetsTheSlot) {
                self.map.frame(new).set_link(0);
            }
            rename(new);
        })
    }

    /// An address of the page in a frame.
    fn address_of(&self, pfn: Pfn) -> Option<VirtAddr> {
        let word = self.map.frame(pfn).mapping();
        if let Some(FilePage { file, page }) = FilePage::from_word(word) {
            return self.files.of_any(file)?.address_of(page);
        }
        let page = u32::try_from(word.checked_sub(1)?).ok()?;
        (page < self.table.pages()).then(|| self.table.address(PageIndex(page)))
    }

    /// Who holds a frame, as far as they have said so (REF-7).
    fn held(&self, pfn: Pfn) -> Obstacle {
        let holder = self.address_of(pfn).and_then(|at| {
            let at = at.get();
            let mut holders = self.holders(&(at..at + PAGE_SIZE)).into_iter();
            holders.next().map(Box::new)
        });
        Obstacle::Held { pfn, holder }
    }
}

/// A block that is being emptied.
struct Emptying<'a, F> {
    space: &'a AddressSpace,
    caller: Caller,
    go_on: F,
}

impl<F: FnMut(Round<'_>) -> ControlFlow<()>> Migrate for Emptying<'_, F> {
    fn empty(&mut self, ram: &Ram, block: BlockId) -> Result<(), Obstacle> {
        let mut used = ram.used_in(block);
        loop {
            let mut obstacle = self.space.replace_frames(block);
            if matches!(obstacle, Some(Obstacle::NoRoom { .. }))
                && self.space.reclaim(self.caller, MAKE_ROOM) > 0
            {
                obstacle = self.space.replace_frames(block);
            }
            let left = ram.used_in(block);
            if left == 0 {
                return Ok(());
            }
            let obstacle = obstacle.unwrap_or(Obstacle::InTransit { frames: left });
            let round = Round {
                gone_frames: used - left,
                left_frames: left,
                obstacle: &obstacle,
            };
            if (self.go_on)(round).is_break() {
                return Err(obstacle);
            }
            used = left;
        }
    }
}
