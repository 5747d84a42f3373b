//! Taking a device away: every page that is on it comes back, or goes to another device.
//!
//! The order (MAP-6) is held by the types of `core::memremap`; here is the step between kill and drain.

use pgmap_core::memremap::DevPagemap;

use crate::fault::{Access, Outcome};
use crate::page_table::{BlockIndex, PageIndex};
use crate::pte::{Copy, Pte};
use crate::space::{AddressSpace, Worker};

/// RAM and the other devices have no room for what the device holds. It keeps the rest, and works on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{left_pages} pages have no other place; add a device, or raise the budget")]
pub struct NoRoom {
    /// Pages still on the device, at least.
    pub left_pages: u64,
}

/// Blocks that one step looks at.
const STEP_BLOCKS: u32 = 4;

/// How far the evacuation of a device has come: the blocks before this one have nothing there.
///
/// Nothing comes to a device that has been killed, so one pass is enough.
#[derive(Debug, Default)]
pub struct Evacuation {
    next: BlockIndex,
}

/// What a step of an evacuation leads to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Step {
    /// There is more to do.
    More,
    /// No entry names a page of the device any more.
    Done,
}

impl AddressSpace {
    /// Brings back every page that is on a device that has been killed, and forgets the copies that it keeps.
    ///
    /// # Errors
    ///
    /// [`NoRoom`] if there is no other place for them.
    pub fn evacuate(&self, worker: &mut Worker, device: &DevPagemap) -> Result<(), NoRoom> {
        let mut evacuation = Evacuation::default();
        while self.evacuate_some(worker, device, &mut evacuation)? == Step::More {}
        Ok(())
    }

    /// A step of [`evacuate`](Self::evacuate): a few hundred pages at most.
    ///
    /// # Errors
    ///
    /// [`NoRoom`] if there is no other place for the next page now. The step can be tried again.
    pub fn evacuate_some(
        &self,
        worker: &mut Worker,
        device: &DevPagemap,
        evacuation: &mut Evacuation,
    ) -> Result<Step, NoRoom> {
        for _ in 0..STEP_BLOCKS {
            let Some(block) = self.table.next_used(evacuation.next) else {
                return Ok(Step::Done);
            };
            // First: should the step fail, it begins with the same block.
            evacuation.next = block;
            self.evacuate_block(worker, device, block)?;
            evacuation.next = BlockIndex(block.0 + 1);
        }
        Ok(Step::More)
    }

    fn evacuate_block(
        &self,
        worker: &mut Worker,
        device: &DevPagemap,
        block: BlockIndex,
    ) -> Result<(), NoRoom> {
        let mut before = None;
        while let Some(page) = self.forget_copies(block, device) {
            // The machine may refuse a page, and wake who waits for it: then it stays where it is for now.
            let refused = before == Some(page);
            before = Some(page);
            if refused
                || self.fault(worker, self.table.address(page), Access::Write) != Outcome::Resolved
            {
                return Err(NoRoom {
                    left_pages: device.users_now(),
                });
            }
        }
        Ok(())
    }

    /// Forgets a device's copies of a block's pages. Answers a page that is only there.
    fn forget_copies(&self, block: BlockIndex, device: &DevPagemap) -> Option<PageIndex> {
        let mut cursor = self.table.lock(block);
        for page in block.pages().map(PageIndex) {
            match cursor.get(page) {
                Pte::Device { page: there, .. } if device.contains(there) => return Some(page),
                Pte::Present {
                    frame,
                    copy: Copy::Kept,
                    ..
                } if device.contains(self.kept_copy(frame)) => {
                    self.forget_kept(&mut cursor, page.0..page.0 + 1);
                }
                Pte::Staged {
                    frame,
                    copy: Copy::Kept,
                } if device.contains(self.kept_copy(frame)) => {
                    cursor.set(
                        page,
                        Pte::Staged {
                            frame,
                            copy: Copy::None,
                        },
                    );
                    self.drop_copy(frame, Copy::Kept);
                }
                Pte::None
                | Pte::Present { .. }
                | Pte::Staged { .. }
                | Pte::Device { .. }
                | Pte::Poisoned => {}
            }
        }
        None
    }
}
