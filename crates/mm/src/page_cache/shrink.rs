//! Reclaim of a file's pages: mapped ones are unmapped, and those that nobody touches again leave (two lists, in the manner
//! of the kernel's active and inactive LRU).
//!
//! Called by the reclaimer, and by the fault path when there is no frame. What must never happen here: a dirty page, a pinned
//! one, or one under writeback dropped (FLT-4, GUP-3, WB-4).

use core::ops::Range;

use pgmap_core::addr::Pfn;
use pgmap_sync::atomic::Ordering;

use super::entry::Mapping;
use super::{CachePage, Cached, OnPinned, PageCache};
use crate::page_table::{BLOCK_PAGES, BlockIndex, Cursor, PageIndex};
#[cfg(shuttle)]
use crate::seeded_bug::{self, SeededBug};
use crate::stats::Stats;

/// Of the pages in RAM, one of so many waits on the inactive list, so that a touch can show that it is used.
const INACTIVE: u32 = 4;

impl PageCache {
    /// Frees at least `want` frames if that is possible, writing dirty pages back where it must. Says how many it freed.
    pub fn shrink(&self, want: usize) -> usize {
        let mut freed = 0;
        // Every block is looked at twice: to be unmapped, and to be emptied.
        let mut patience = 2 * (self.active.len() + self.inactive.len()) + 2;
        // Inactive blocks that gave up nothing, as their pages are pinned or cannot be written: they do not count as waiting
        // there, or they would spare the active ones for as long as the pins last.
        let mut fruitless = 0;
        while freed < want && patience > 0 {
            patience -= 1;
            if self.inactive.len() <= self.active.len() / INACTIVE + fruitless
                && let Some((block, _)) = self.active.pop(0)
            {
                self.deactivate(block);
                fruitless = fruitless.saturating_sub(1);
            } else if let Some((block, _)) = self.inactive.pop(0) {
                let evicted = self.evict(block);
                fruitless = u32::from(evicted == 0) * (fruitless + 1);
                freed += evicted;
            } else {
                break;
            }
        }
        freed
    }

    /// Drops every page that may leave: nobody reclaims them any more.
    pub(crate) fn shrink_all(&self) {
        while self.shrink(usize::MAX) > 0 {}
    }

    /// Unmaps the pages of a block. Who touches one before it leaves finds it again.
    fn deactivate(&self, block: BlockIndex) {
        let mut cursor = self.table.lock(block);
        let (mut at, mut stays) = (cursor.pages().start, false);
        while at < cursor.pages().end {
            let run = cursor.run(at, &cursor.pages(), |entry| {
                entry.cached().is_some_and(|page| self.may_rest(page))
            });
            if run.is_empty() {
                stays |= cursor
                    .get(PageIndex(at))
                    .cached()
                    .is_some_and(Cached::is_mapped);
                at += 1;
                continue;
            }
            let run = at..run.end;
            self.unmap_run(&mut cursor, &run);
            at = run.end;
        }
        self.queue(PageIndex(block.pages().start), Mapping::Unmapped);
        if stays {
            self.queue(PageIndex(block.pages().start), Mapping::Mapped);
        }
    }

    fn may_rest(&self, page: Cached) -> bool {
        page.is_mapped() && !self.map.frame(page.frame).is_pinned()
    }

    /// Removes every mapping of pages that are in RAM.
    pub(super) fn unmap_run(&self, cursor: &mut Cursor<'_, CachePage>, run: &Range<u32>) {
        self.unmap_pages(run);
        for page in run.clone().map(PageIndex) {
            if let CachePage::Cached(cached) = cursor.get(page) {
                let mapping = Mapping::Unmapped;
                cursor.set(page, CachePage::Cached(Cached { mapping, ..cached }));
            }
        }
    }

    /// Drops the pages of a block that are not mapped, and writes dirty ones back first. Says how many frames it freed.
    fn evict(&self, block: BlockIndex) -> usize {
        let is_dirty = |page: Cached| page.is_dirty() && !page.is_mapped();
        let pages = block.pages();
        let dirty = pages
            .clone()
            .any(|page| self.peek(page).cached().is_some_and(is_dirty));
        if dirty {
            // What cannot be written stays dirty, and here.
            self.write_back(pages.clone(), OnPinned::Skip);
        }
        let mut cursor = self.table.lock(block);
        let mut gone = [Pfn::from_u32(0); BLOCK_PAGES as usize];
        let (mut count, mut at) = (0, pages.start);
        let mut stays = false;
        while at < pages.end {
            let start = at;
            let before = count;
            while at < pages.end
                && let Some(frame) = self.claim_cold(&cursor, at)
            {
                gone[count] = frame;
                count += 1;
                at += 1;
            }
            if start == at {
                let left = cursor.get(PageIndex(at)).cached();
                stays |= left.is_some_and(|page| !page.is_mapped());
                #[cfg(shuttle)]
                if seeded_bug::has(SeededBug::ReclaimStripsPinned)
                    && let Some(left) = left
                {
                    self.forget_dirty(&mut cursor, PageIndex(at), left);
                }
                at += 1;
                continue;
            }
            self.drop_run(&mut cursor, &(start..at));
            for frame in &gone[before..count] {
                self.unclaim(*frame);
            }
        }
        drop(cursor);
        self.ram.free(&gone[..count]);
        #[cfg(shuttle)]
        let stays = stays && !seeded_bug::has(SeededBug::ReclaimForgetsPinned);
        if stays {
            self.queue(PageIndex(pages.start), Mapping::Unmapped);
        }
        Stats::add(&self.stats.file_pages_evicted, count as u64);
        count
    }

    /// Claims the frame of a page that may leave; nobody can pin it until the claim ends.
    fn claim_cold(&self, cursor: &Cursor<'_, CachePage>, page: u32) -> Option<Pfn> {
        let page = cursor.get(PageIndex(page)).cached()?;
        let cold = !page.is_mapped() && !page.is_dirty() && !page.is_under_writeback();
        (cold && self.claim(page.frame)).then_some(page.frame)
    }

    /// Forgets pages that are mapped nowhere, and that nobody can pin: their frames are claimed, or the range is closed. The
    /// frames are the caller's to free.
    pub(super) fn drop_run(&self, cursor: &mut Cursor<'_, CachePage>, run: &Range<u32>) {
        self.mmu.free(run.start, run.len());
        for page in run.clone().map(PageIndex) {
            cursor.set(page, CachePage::Absent);
        }
        // Relaxed: a number that stands alone.
        self.cached.fetch_sub(run.len() as u64, Ordering::Relaxed);
        self.uncharge(run.len());
    }
}
