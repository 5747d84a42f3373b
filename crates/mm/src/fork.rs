//! What a fork's child is given: the bytes of every page that its parent has outside the address space.
//!
//! A child inherits the pages that are mapped, copy-on-write, but not the machine's promise to tell us of
//! its faults: a page that was elsewhere would read as zeros. So before anybody else runs in the child, the
//! missing pages are copied into it; or, where the machine does not tell of forks, all pages are brought into RAM before.

use core::ops::ControlFlow;
use core::slice;

use pgmap_core::addr::{Page, VirtAddr};
use pgmap_core::driver::{DeviceError, Load};
use pgmap_sync::atomic::Ordering;

use crate::fault::{Access, Outcome};
use crate::mmu::Slot;
use crate::page_table::{BlockIndex, Cursor, PageIndex};
use crate::pte::Pte;
use crate::space::{AddressSpace, Worker};
use crate::stats::Stats;

/// What becomes of one of the parent's pages in the child.
#[derive(Debug)]
pub enum ChildPage<'a> {
    /// These bytes.
    Bytes(&'a Page),
    /// The device could not give them: SIGBUS, as in the parent.
    Lost,
}

impl AddressSpace {
    /// Before a fork of which the machine will not tell: brings every page into RAM, whatever the limit, and keeps
    /// them all there until [`after_fork`](Self::after_fork), so that the child inherits them. False if a page could not be
    /// had; then the child must not inherit any. What others discard of a file, or map of one, before the fork is done is zeros in
    /// the child. To be called by a thread that serves no faults.
    #[must_use]
    pub fn before_fork(&self, worker: &mut Worker) -> bool {
        self.note_fork();
        Stats::add(&self.stats.forks, 1);
        *self.forking.lock() += 1;
        self.ram.suspend_limit();
        let mut next = BlockIndex(0);
        while let Some(block) = self.table.next_used(next) {
            next = BlockIndex(block.0 + 1);
            if !block
                .pages()
                .all(|page| self.bring_in(worker, PageIndex(page)))
            {
                return false;
            }
        }
        // Last, when nothing is on its way out any more: a page that only the file has now may have been until just now.
        self.bring_in_files(worker)
    }

    /// The fork is done, or has failed: pages may leave again.
    pub fn after_fork(&self) {
        let mut forking = self.forking.lock();
        *forking -= 1;
        if *forking == 0 {
            self.ram.restore_limit();
        }
    }

    /// Whether a page is where a child inherits it, or needs nothing.
    fn bring_in(&self, worker: &mut Worker, page: PageIndex) -> bool {
        let at = self.table.address(page);
        let is_away = || {
            let pte = self.table.lock(page.block()).get(page);
            matches!(pte, Pte::Staged { .. } | Pte::Device { .. })
        };
        while is_away() {
            match self.fault(worker, at, Access::Read) {
                Outcome::Resolved => {}
                // Somebody has unmapped it since.
                Outcome::BadAddress => return !is_away(),
                Outcome::NoMemory => return false,
            }
        }
        true
    }

    /// Says that a child may share pages, though none has been given its missing ones yet.
    pub fn note_fork(&self) {
        // Relaxed: a hint for reclaim, which looks at it again and again.
        self.forked.store(true, Ordering::Relaxed);
    }

    /// Gives every page that is not mapped to `install`, until that breaks off. Called between the fork and the moment when the child runs on.
    pub fn for_each_missing(
        &self,
        worker: &mut Worker,
        mut install: impl FnMut(VirtAddr, ChildPage<'_>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        self.note_fork();
        let mut next = BlockIndex(0);
        while let Some(block) = self.table.next_used(next) {
            next = BlockIndex(block.0 + 1);
            let cursor = self.table.lock(block);
            for page in block.pages().map(PageIndex) {
                self.give_missing(&cursor, worker, page, &mut install)?;
            }
        }
        self.for_each_untouched(worker, |at, bytes| {
            install(at, bytes.map_or(ChildPage::Lost, ChildPage::Bytes))
        })
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
                    .device_of(cursor, page)
                    .ok_or(DeviceError::Gone)
                    .and_then(|device| {
                        let ops = device.ops().ok_or(DeviceError::Gone)?;
                        let mut load =
                            Load::new(self.map.frame(device_page).data(), &mut worker.pages[0]);
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
