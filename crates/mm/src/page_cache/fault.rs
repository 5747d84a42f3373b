//! The fault path of mapped files (the kernel's `filemap_fault` and `page_mkwrite`).
//!
//! Called by the thread that serves the machine's faults, and by whoever pins. It reads under the cursor, and maps under the
//! same cursor.

use core::ops::Range;
use core::slice;

use pgmap_core::addr::VirtAddr;
use pgmap_sync::atomic::Ordering;

use super::ahead::{Ahead, Found};
use super::entry::Mapping;
use super::rmap::FileVma;
use super::{CachePage, Cached, FilePage, PageCache};
use crate::backing::Transfer;
use crate::fault::{Access, Outcome};
use crate::mmu::{Protect, Stop};
use crate::page_table::{Cursor, PageIndex};
use crate::readahead::Plan;
#[cfg(any(loom, shuttle))]
use crate::seeded_bug::{self, SeededBug};
use crate::space::Worker;
use crate::stats::Stats;

/// Pages that a fault maps along with the faulting one, if they are in RAM: at most this many, itself included. For a long
/// stream it is the rest of the block.
const FAULT_AROUND: u32 = 16;

/// What came of reading a page in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ReadIn {
    /// It is there, or there was no room for it.
    Done,
    /// The file could not give it; nothing has changed.
    Failed,
}

impl PageCache {
    /// Serves one fault at an address of a mapping of this file.
    ///
    /// [`Outcome::NoMemory`] only says that the worker found no frame: who calls makes some free, and calls again.
    pub fn fault(&self, worker: &mut Worker, at: VirtAddr, access: Access) -> Outcome {
        let at = at.page_start();
        let Some(Some(page)) = self.vmas.with(at, |vma| vma.page_at(at)) else {
            // Unmapped meanwhile.
            return Outcome::BadAddress;
        };
        let page = PageIndex(page);
        let plan = worker.file_readahead.plan(page);
        worker.ahead = Ahead {
            groups: self.ahead_of(&plan),
            found: Found::Cached,
        };
        let outcome = self.serve(worker, page, &plan, at, access);
        worker.frames.give_all(&self.ram);
        outcome
    }

    fn serve(
        &self,
        worker: &mut Worker,
        page: PageIndex,
        plan: &Plan,
        at: VirtAddr,
        access: Access,
    ) -> Outcome {
        loop {
            let mut cursor = self.table.lock(page.block());
            match cursor.get(page) {
                CachePage::Cached(_) => {
                    let end = self.map_page(&mut cursor, page, plan, at, access);
                    worker.file_readahead.reached(plan, end);
                    return Outcome::Resolved;
                }
                CachePage::Poisoned => return self.sigbus(&cursor, page, at),
                CachePage::Absent if page.0 >= self.size_pages() => {
                    return self.sigbus(&cursor, page, at);
                }
                CachePage::Absent => {}
            }
            if self.is_closed_to_reads(page.0) {
                drop(cursor);
                self.barrier.wait_while_closed(page.0);
                continue;
            }
            if !self.has_room(worker) {
                return Outcome::NoMemory;
            }
            worker.ahead.found = Found::Absent;
            let mapped = self.vmas.with_page(at, page, FileVma::file_pages);
            let wanted = mapped.unwrap_or(page.0..page.0 + 1);
            let run = plan.forwards().map_or(plan.run(), rest);
            if self.read_in(&mut cursor, worker, page, &clip(run, &wanted)) == ReadIn::Failed {
                return self.unread(&cursor, page, at);
            }
        }
    }

    /// Whether a page is not to be read in now, as it is about to be truncated. Exact under its cursor.
    pub(super) fn is_closed_to_reads(&self, page: u32) -> bool {
        #[cfg(any(loom, shuttle))]
        if seeded_bug::has(SeededBug::ReadIgnoresTheBarrier) {
            return false;
        }
        self.barrier.is_closed(page)
    }

    /// Whether there is a frame for one more page, and the page's group may have it.
    pub(super) fn has_room(&self, worker: &mut Worker) -> bool {
        !self.is_at_limit() && worker.frames.prepare(&self.ram, 1) == 1
    }

    /// Reads a page that is not in RAM into it, with those of its neighbours in `wanted` that are not either. Nothing if somebody
    /// has taken the last room meanwhile.
    pub(super) fn read_in(
        &self,
        cursor: &mut Cursor<'_, CachePage>,
        worker: &mut Worker,
        page: PageIndex,
        wanted: &Range<u32>,
    ) -> ReadIn {
        let wanted = clip(wanted.clone(), &(0..self.size_pages()));
        let absent = |entry| entry == CachePage::Absent;
        let run = cursor.run(page.0, &wanted, absent);
        let closed = |page: &u32| self.is_closed_to_reads(*page);
        let start = (run.start..page.0).rev().find(closed);
        let end = (page.0..run.end).find(closed);
        let run = start.map_or(run.start, |page| page + 1)..end.unwrap_or(run.end);
        let charged = self.charge(worker.frames.prepare(&self.ram, run.len()));
        if charged == 0 || run.is_empty() {
            self.uncharge(charged);
            return ReadIn::Done;
        }
        let run = around(page.0, &run, charged);
        let run = if self.load(&run) {
            run
        } else if run.len() > 1 && self.load(&(page.0..page.0 + 1)) {
            page.0..page.0 + 1
        } else {
            self.uncharge(charged);
            Stats::add(&self.stats.poisoned, 1);
            return ReadIn::Failed;
        };
        self.uncharge(charged - run.len());
        self.enter(cursor, worker, &run);
        ReadIn::Done
    }

    /// Notes that pages of a block have been read in. The worker has frames for them.
    pub(super) fn enter(
        &self,
        cursor: &mut Cursor<'_, CachePage>,
        worker: &mut Worker,
        run: &Range<u32>,
    ) {
        for page in run.clone().map(PageIndex) {
            let frame = worker.frames.take();
            let owner = FilePage {
                file: self.number,
                page: page.0,
            };
            self.map.frame(frame).set_mapping(owner.to_word());
            cursor.set(page, CachePage::Cached(Cached::fresh(frame)));
        }
        // Relaxed: a number that stands alone.
        self.cached.fetch_add(run.len() as u64, Ordering::Relaxed);
        self.queue(PageIndex(run.start), Mapping::Unmapped);
        Stats::add(&self.stats.file_pages_read, run.len() as u64);
    }

    /// Reads pages. Their memory is given back if that fails.
    fn load(&self, run: &Range<u32>) -> bool {
        let pages = self.mmu.pages(run.start, run.len());
        let mut transfer = Transfer::new(run.start, pages, self.size_bytes());
        self.backing.read(slice::from_mut(&mut transfer));
        let good = transfer.outcome.is_ok();
        if !good {
            Stats::add(&self.stats.file_read_errors, 1);
            self.mmu.free(run.start, run.len());
        }
        good
    }

    /// Maps a page that is in RAM, or lets it be written. Answers the end of the pages that are mapped then.
    fn map_page(
        &self,
        cursor: &mut Cursor<'_, CachePage>,
        page: PageIndex,
        plan: &Plan,
        at: VirtAddr,
        access: Access,
    ) -> u32 {
        let next = self.written_next(cursor, page, plan);
        match access {
            Access::Read => {}
            Access::Write | Access::WriteProtected => {
                next.clone()
                    .for_each(|page| self.set_dirty(cursor, PageIndex(page)));
            }
        }
        // Nothing to do if the mapping is gone: so is the access.
        let end = self.vmas.with_page(at, page, |vma| match access {
            Access::WriteProtected => {
                Stats::add(&self.stats.faults_file_write, 1);
                let next = clip(next, &vma.file_pages());
                self.mmu.unprotect(at, next.len());
                next.end
            }
            Access::Read | Access::Write => {
                Stats::add(&self.stats.faults_file, 1);
                let around = page.0..page.0.saturating_add(FAULT_AROUND);
                self.map_run(cursor, page, plan.forwards().map_or(around, rest), vma)
            }
        });
        end.unwrap_or(page.0)
    }

    /// The pages from this one on that become dirty together, all of them in RAM. Who has written so many in a row is let write the
    /// next ones, too: at worst they are written as they are. Not who makes each page durable before the next: a page that is
    /// clean again ends the row.
    fn written_next(
        &self,
        cursor: &Cursor<'_, CachePage>,
        page: PageIndex,
        plan: &Plan,
    ) -> Range<u32> {
        let is_dirty = |page| self.peek(page).cached().is_some_and(Cached::is_dirty);
        let goes_on = plan.forwards().is_some() && page.0.checked_sub(1).is_some_and(is_dirty);
        let most = if goes_on { FAULT_AROUND } else { 1 };
        let limit = page.0..page.0.saturating_add(most).min(self.size_pages());
        let run = cursor.run(page.0, &limit, |entry| entry.cached().is_some());
        page.0..run.end.max(page.0 + 1)
    }

    /// Maps a page at its place in a mapping, and the pages after it that may be mapped alike. Answers where they end.
    fn map_run(
        &self,
        cursor: &mut Cursor<'_, CachePage>,
        page: PageIndex,
        around: Range<u32>,
        vma: &FileVma,
    ) -> u32 {
        let Some(first) = cursor.get(page).cached() else {
            return page.0;
        };
        let limit = clip(around, &clip(vma.file_pages(), &(0..self.size_pages())));
        let alike = |entry: CachePage| {
            let page = entry.cached();
            page.is_some_and(|page| page.state == first.state)
        };
        let run = page.0..cursor.run(page.0, &limit, alike).end.max(page.0 + 1);
        let protect = if first.is_dirty() {
            Protect::ReadWrite
        } else {
            Protect::ReadOnly
        };
        let at = vma.address_of(page.0);
        // A mapping is noted before it can be there: one that is not does no harm.
        for page in run.clone().map(PageIndex) {
            if let CachePage::Cached(cached) = cursor.get(page) {
                let mapping = Mapping::Mapped;
                cursor.set(page, CachePage::Cached(Cached { mapping, ..cached }));
            }
        }
        self.queue(page, Mapping::Mapped);
        let progress = self.mmu.map(at, run.len(), protect);
        match progress.stop {
            None => {}
            // Somebody was faster, or there is a neighbour already.
            Some(Stop::Exists) if progress.done > 0 => {}
            Some(
                Stop::Busy
                | Stop::Unevictable
                | Stop::Hole
                | Stop::Exists
                | Stop::NoMemory
                | Stop::Gone
                | Stop::Other(_),
            ) => {
                // The file may have left the page as it was: then nothing is there that could be mapped.
                self.mmu.pages(page.0, 1).touch(0);
                self.mmu.wake(at, 1);
            }
        }
        page.0 + u32::try_from(progress.done).map_or(1, |done| done.max(1))
    }

    /// Answers an access with SIGBUS: there is no such page, or its bytes are lost (FLT-1).
    pub(super) fn sigbus(
        &self,
        _cursor: &Cursor<'_, CachePage>,
        page: PageIndex,
        at: VirtAddr,
    ) -> Outcome {
        self.vmas.with_page(at, page, |_| {
            if self.mmu.poison(at, 1).done == 0 {
                self.mmu.wake(at, 1);
            }
        });
        Outcome::Resolved
    }
}

/// The pages from this one to the end of its block.
const fn rest(page: PageIndex) -> Range<u32> {
    page.0..page.block().pages().end
}

fn clip(range: Range<u32>, to: &Range<u32>) -> Range<u32> {
    range.start.max(to.start)..range.end.min(to.end)
}

/// At most `most` pages of `run`, with `page` among them.
fn around(page: u32, run: &Range<u32>, most: usize) -> Range<u32> {
    let most = u32::try_from(most).unwrap_or(u32::MAX).max(1);
    let start = run.start.max((page + 1).saturating_sub(most));
    start..run.end.min(start + most)
}
