//! Pages that nobody wants any more: `munmap`, `MADV_DONTNEED`.
//!
//! Called by the program's threads. What must never happen here: a page's bytes seen again after it was
//! discarded (FLT-2), a frame used again while the machine still maps it, or a pinned page taken away (GUP-3).

use core::ops::Range;

use pgmap_core::addr::{PAGE_SIZE, Pfn, VirtAddr};
use pgmap_sync::atomic::spin_loop;

use crate::mmu::Slot;
use crate::page_table::{BLOCK_PAGES, BlockIndex, Cursor, PageIndex};
use crate::pte::{Copy, Pte};
#[cfg(shuttle)]
use crate::seeded_bug::{self, SeededBug};
use crate::space::AddressSpace;
use crate::stats::Stats;

/// How often a discard looks again at a page whose frame is held, and by nobody who says so: for some milliseconds.
const TRIES: u32 = 100_000;

/// A page that somebody has pinned: it cannot be discarded now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the page at {at:?} is pinned; drop its pins first")]
pub struct Pinned {
    /// The first such page. Those before it have been discarded.
    pub at: VirtAddr,
}

impl AddressSpace {
    /// Drops the bytes of `pages` pages from `at` on: they read as zeros from now on, or as what the file has that is mapped there.
    ///
    /// # Errors
    ///
    /// [`Pinned`] if somebody has one of them pinned.
    pub fn discard(&self, at: VirtAddr, pages: u32) -> Result<(), Pinned> {
        let Some(first) = self.page_at(at) else {
            return Ok(());
        };
        let end = first.0.saturating_add(pages).min(self.table.pages());
        let (mut next, mut tries) = (first, 0);
        while next.0 < end {
            // What was never used has nothing to drop, however large it is.
            let Some(block) = self.table.next_used(next.block()) else {
                break;
            };
            let start = next.0.max(block.pages().start);
            if start >= end {
                break;
            }
            next = PageIndex(block.pages().end.min(end));
            let reached = self.discard_in_block(block, start, next.0)?;
            if reached < next.0 {
                // Somebody has pinned the frame for another page that had it before, and is about to find that out.
                next = PageIndex(reached);
                tries += 1;
                spin_loop();
            }
            if tries > TRIES {
                let at = self.table.address(next);
                return Err(Pinned { at });
            }
        }
        Ok(())
    }

    /// Drops the bytes, and gives the addresses back. An access that comes too late finds no area, so that
    /// nothing is left behind for the next owner of the addresses.
    ///
    /// # Errors
    ///
    /// [`Pinned`] if somebody has one of the pages pinned; the addresses stay taken then.
    pub fn unmap(&self, at: VirtAddr, pages: u32) -> Result<(), Pinned> {
        let Some(range) = self.retire(at, pages) else {
            return Ok(());
        };
        self.discard(at, pages)?;
        self.areas.lock().taken.remove(range);
        Ok(())
    }

    /// Says that nobody may touch these addresses any more, and that they are never to be handed out again until
    /// [`unmap`](Self::unmap).
    pub fn retire(&self, at: VirtAddr, pages: u32) -> Option<Range<u32>> {
        let first = self.page_at(at)?.0;
        let range = first..first.saturating_add(pages).min(self.table.pages());
        let mut areas = self.areas.lock();
        areas.live.remove(range.clone());
        let files = areas.files.remove(&range);
        drop(areas);
        // Without the lock: they may be the last that hold their files.
        drop(files);
        Some(range)
    }

    /// Drops pages of a block. Answers where to go on: before the end if a page's frame is held, and not for that page.
    fn discard_in_block(&self, block: BlockIndex, start: u32, end: u32) -> Result<u32, Pinned> {
        let mut cursor = self.table.lock(block);
        // Nobody can pin what is claimed, until the entries say that the pages are gone (RMAP-1).
        let pinned = (start..end).find(|page| !self.claim_mapped(cursor.get(PageIndex(*page))));
        let end = pinned.unwrap_or(end);
        let mut frames = [Pfn::from_u32(0); BLOCK_PAGES as usize];
        let (mut freed, mut mapped) = (0, false);
        for page in (start..end).map(PageIndex) {
            mapped |= matches!(cursor.get(page), Pte::Present { .. } | Pte::Poisoned);
            if let Some(frame) = self.forget(&mut cursor, page) {
                frames[freed] = frame;
                freed += 1;
            }
        }
        if mapped {
            self.mmu
                .zap(self.table.address(PageIndex(start)), (end - start) as usize);
        }
        // Only now does nobody map the frames any more.
        self.ram.free(&frames[..freed]);
        Stats::add(&self.stats.pages_discarded, freed as u64);
        drop(cursor);
        match pinned.map(|page| self.table.address(PageIndex(page))) {
            Some(at) if self.is_held(at) => Err(Pinned { at }),
            Some(_) | None => Ok(end),
        }
    }

    /// Whether somebody says that he has pinned the page at an address: before he does, and until he has let go.
    fn is_held(&self, at: VirtAddr) -> bool {
        !self.holders(&(at.get()..at.get() + PAGE_SIZE)).is_empty()
    }

    /// Claims the frame of a page that is mapped. False if it is pinned. Nobody pins what is not mapped.
    pub(crate) fn claim_mapped(&self, pte: Pte) -> bool {
        let Pte::Present { frame, .. } = pte else {
            return true;
        };
        #[cfg(shuttle)]
        if seeded_bug::has(SeededBug::DiscardClaimsNothing) {
            return !self.map.frame(frame).is_pinned();
        }
        self.map.frame(frame).freeze(1)
    }

    /// Ends a claim, after the entry has been emptied.
    fn end_mapped_claim(&self, frame: Pfn) {
        #[cfg(shuttle)]
        if seeded_bug::has(SeededBug::DiscardClaimsNothing) {
            return;
        }
        self.map.frame(frame).unfreeze(1);
    }

    /// Empties one entry. Answers the frame that accounted for the page.
    pub(crate) fn forget(&self, cursor: &mut Cursor<'_>, page: PageIndex) -> Option<Pfn> {
        let pte = cursor.get(page);
        if pte != Pte::None {
            cursor.set(page, Pte::None);
        }
        match pte {
            Pte::None | Pte::Poisoned => None,
            Pte::Present { frame, copy, .. } => {
                self.forget_frame(frame, copy);
                self.end_mapped_claim(frame);
                Some(frame)
            }
            Pte::Staged { frame, copy } => {
                let slot = Slot(self.map.frame(frame).link());
                // Who stores the page now sees that its entry has changed, and empties the slot itself.
                if self.staging.claim(slot) {
                    self.mmu.empty(slot, 1);
                    self.staging.release(slot);
                }
                self.forget_frame(frame, copy);
                Some(frame)
            }
            Pte::Device { page, .. } => {
                self.map.put_dev_page(page);
                None
            }
        }
    }

    fn forget_frame(&self, frame: Pfn, copy: Copy) {
        self.drop_copy(frame, copy);
        self.map.frame(frame).set_mapping(0);
    }
}
