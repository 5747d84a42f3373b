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

impl AddressSpace {
    /// Brings back every page that is on a device that has been killed, and forgets the copies that it keeps.
    ///
    /// # Errors
    ///
    /// [`NoRoom`] if there is no other place for them.
    pub fn evacuate(&self, worker: &mut Worker, device: &DevPagemap) -> Result<(), NoRoom> {
        let mut next = BlockIndex(0);
        while let Some(block) = self.table.next_used(next) {
            next = BlockIndex(block.0 + 1);
            self.evacuate_block(worker, device, block)?;
        }
        Ok(())
    }

    fn evacuate_block(
        &self,
        worker: &mut Worker,
        device: &DevPagemap,
        block: BlockIndex,
    ) -> Result<(), NoRoom> {
        while let Some(page) = self.forget_copies(block, device) {
            let outcome = self.fault(worker, self.table.address(page), Access::Write);
            if outcome != Outcome::Resolved {
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
