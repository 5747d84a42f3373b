//! What a fork's child is given: the bytes of every page that its parent has outside the address space.
//!
//! A child inherits the pages that are mapped, copy-on-write, but not the machine's promise to tell us of
//! its faults: a page that was elsewhere would read as zeros. So before anybody else runs in the child, the
//! missing pages are copied into it.

use core::ops::ControlFlow;
use core::slice;

use pgmap_core::addr::{Page, VirtAddr};
use pgmap_core::driver::{DeviceError, Load};
use pgmap_sync::atomic::Ordering;

use crate::mmu::Slot;
use crate::page_table::{BlockIndex, Cursor, PageIndex};
use crate::pte::Pte;
use crate::space::{AddressSpace, Worker};

/// What becomes of one of the parent's pages in the child.
#[derive(Debug)]
pub enum ChildPage<'a> {
    /// These bytes.
    Bytes(&'a Page),
    /// The device could not give them: SIGBUS, as in the parent.
    Lost,
}

impl AddressSpace {
    /// Gives every page that is not mapped to `install`, until that breaks off. Called between the fork and the moment when the child runs on.
    pub fn for_each_missing(
        &self,
        worker: &mut Worker,
        mut install: impl FnMut(VirtAddr, ChildPage<'_>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        // Relaxed: a hint for reclaim, which looks at it again and again.
        self.forked.store(true, Ordering::Relaxed);
        let mut next = BlockIndex(0);
        while let Some(block) = self.table.next_used(next) {
            next = BlockIndex(block.0 + 1);
            let cursor = self.table.lock(block);
            for page in block.pages().map(PageIndex) {
                self.give_missing(&cursor, worker, page, &mut install)?;
            }
        }
        ControlFlow::Continue(())
    }

    fn give_missing(
        &self,
        cursor: &Cursor<'_>,
        worker: &mut Worker,
        page: PageIndex,
        install: &mut impl FnMut(VirtAddr, ChildPage<'_>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let at = self.table.address(page);
        match cursor.get(page) {
            Pte::None | Pte::Present { .. } => ControlFlow::Continue(()),
            Pte::Staged { frame, .. } => {
                let slot = Slot(self.map.frame(frame).link());
                // SAFETY: the entry says that the slot is filled, and whoever claimed it empties it only
                // after changing the entry, under the cursor that we hold.
                install(at, ChildPage::Bytes(unsafe { self.mmu.staged(slot) }))
            }
            Pte::Device {
                page: device_page, ..
            } => {
                let loaded = self
                    .device_of(device_page)
                    .ok_or(DeviceError::Gone)
                    .and_then(|device| {
                        let ops = device.ops().ok_or(DeviceError::Gone)?;
                        let mut load = Load::new(device.data(device_page), &mut worker.pages[0]);
                        ops.migrate_to_ram(slice::from_mut(&mut load));
                        load.outcome
                    });
                match loaded {
                    Ok(()) => install(at, ChildPage::Bytes(&worker.pages[0])),
                    Err(_) => install(at, ChildPage::Lost),
                }
            }
            Pte::Poisoned => install(at, ChildPage::Lost),
        }
    }
}
