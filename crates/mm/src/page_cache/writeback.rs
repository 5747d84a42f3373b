//! Writeback: dirty pages go to the file (WB-1 to WB-3).
//!
//! A page is *cleaned* first: its frame is claimed, every mapping of it is write-protected, and its entry says `Clean`; then its
//! bytes are written, without the cursor. Who stores meanwhile makes it dirty again. A page that is pinned cannot be claimed
//! and stays dirty: background writeback leaves it alone, integrity writeback writes a copy of it, in bounded time. What must
//! never happen here: two writes of one page under way at once, of which the older could come last.

use core::fmt;
use core::ops::{ControlFlow, Range};
use core::slice;

use pgmap_core::addr::Pfn;
use pgmap_sync::atomic::Ordering;

use super::entry::{State, Writeback};
use super::{CachePage, Cached, PageCache};
use crate::backing::{BackingError, Transfer};
use crate::page_table::{BLOCK_PAGES, BlockIndex, Cursor, PageIndex};
#[cfg(shuttle)]
use crate::seeded_bug::{self, SeededBug};
use crate::shared_mmu::{Bounce, SharedPages};
use crate::stats::Stats;

/// Runs of pages that are written at once.
const RUNS: usize = 16;
/// Copies of pinned pages that are written at once.
const COPIES: usize = 64;

/// Dirty blocks that three threads write faster than one: 16 MiB.
const SHARED_BLOCKS: usize = 64;

/// What becomes of pages that somebody has pinned, and that may change while they are written.
pub enum OnPinned<'a> {
    /// They stay dirty (WB-1): background writeback.
    Skip,
    /// A copy is written, and they stay dirty (WB-2): integrity writeback.
    Bounce,
    /// As `Bounce`, after waiting: `wait` is called with the page as often as it says to go on, and the page is still pinned.
    Wait(&'a mut dyn FnMut(u32) -> ControlFlow<()>),
}

impl OnPinned<'_> {
    /// Whether pages that cannot be cleaned now are left dirty.
    const fn skips(&self) -> bool {
        matches!(self, Self::Skip)
    }

    /// Waits for a pin, if that is wanted, until the caller has waited for long enough.
    fn wait(&mut self, page: u32) {
        if let Self::Wait(wait) = self
            && wait(page).is_break()
        {
            *self = Self::Bounce;
        }
    }
}

impl fmt::Debug for OnPinned<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Skip => "Skip",
            Self::Bounce => "Bounce",
            Self::Wait(_) => "Wait",
        })
    }
}

/// What one writeback did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Written {
    /// Pages that were written.
    pub pages: u64,
    /// Those of them that were written from a copy, and are dirty still.
    pub bounced: u64,
    /// Pages that were left dirty, as somebody has them pinned.
    pub skipped: u64,
    /// Pages that could not be written, and are dirty still.
    pub failed: u64,
}

/// A run of pages under writeback.
#[derive(Clone, Copy, Debug)]
struct Run {
    first: u32,
    count: u32,
    /// The place of the first one's copy, if somebody has them pinned.
    copy: Option<usize>,
}

impl Run {
    const fn pages(self) -> Range<u32> {
        self.first..self.first + self.count
    }

    /// Whether a page is the next one, in the same block.
    fn is_continued_by(self, page: u32) -> bool {
        let block = PageIndex(self.first).block();
        page == self.pages().end && PageIndex(page).block() == block
    }

    /// Each of the pages, as a run.
    fn singles(self) -> impl Iterator<Item = Self> {
        (0..self.count).map(move |nth| Self {
            first: self.first + nth,
            count: 1,
            copy: self.copy.map(|place| place + nth as usize),
        })
    }

    /// How many of the pages are written from copies.
    fn bounced(self) -> u64 {
        self.copy.map_or(0, |_| u64::from(self.count))
    }
}

/// Runs that are to be written.
#[derive(Debug)]
struct Batch {
    runs: [Run; RUNS],
    len: usize,
    /// Made when the first copy is.
    bounce: Option<Bounce>,
    copies: usize,
    written: Written,
}

impl Batch {
    const fn new() -> Self {
        const NONE: Run = Run {
            first: 0,
            count: 0,
            copy: None,
        };
        Self {
            runs: [NONE; RUNS],
            len: 0,
            bounce: None,
            copies: 0,
            written: Written {
                pages: 0,
                bounced: 0,
                skipped: 0,
                failed: 0,
            },
        }
    }

    const fn is_full(&self) -> bool {
        self.len == RUNS || self.copies == COPIES
    }

    const fn push(&mut self, run: Run) {
        self.runs[self.len] = run;
        self.len += 1;
    }

    /// Adds the copy that was made last: to the run before if that ends there, and is one of copies, too.
    fn push_copy(&mut self, page: u32) {
        let before = self.runs[..self.len].last_mut();
        match before.filter(|run| run.copy.is_some() && run.is_continued_by(page)) {
            Some(run) => run.count += 1,
            None => self.push(Run {
                first: page,
                count: 1,
                copy: Some(self.copies),
            }),
        }
        self.copies += 1;
    }
}

/// Why a block was left before its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Pause {
    /// The batch is full.
    Full,
    /// The page is being written by somebody else, or is about to be truncated.
    Busy,
    /// The page is pinned, and the caller wants to wait.
    Pinned,
    /// There is no room for copies yet. It is not made under the cursor: the allocator may belong to a thread that forks, which
    /// waits for the one that serves faults, which may wait for the cursor.
    NoRoom,
}

impl PageCache {
    /// Writes the dirty pages of a range to the file. When it returns, pages that were dirty when it was called have been
    /// written or counted as not written, unless pinned ones were to be skipped: then so were those that others write.
    ///
    /// Nothing is made durable: see [`Backing::sync`](crate::backing::Backing::sync).
    pub fn write_back(&self, range: Range<u32>, mut on_pinned: OnPinned<'_>) -> Written {
        let mut batch = Batch::new();
        let mut from = PageIndex(range.start);
        while let Some(block) = self.dirty_blocks.next(from.block()) {
            let pages = block.pages();
            let pages = pages.start.max(range.start)..pages.end.min(range.end);
            if pages.start >= range.end {
                break;
            }
            self.write_block(&mut batch, pages, &mut on_pinned);
            from = PageIndex(block.pages().end);
        }
        self.submit(&mut batch);
        let waits = !on_pinned.skips();
        #[cfg(shuttle)]
        let waits = waits && !seeded_bug::has(SeededBug::SyncIgnoresWriteback);
        if waits {
            self.wait_for_writeback(range);
        }
        batch.written
    }

    /// Where the second and the last third of the dirty pages of a range begin, if they are so many that three threads are faster than
    /// one to write them.
    #[must_use]
    pub fn dirty_thirds(&self, range: &Range<u32>) -> Option<[u32; 2]> {
        let end = range.end.min(self.size_pages());
        let blocks = range.start / BLOCK_PAGES..end.div_ceil(BLOCK_PAGES);
        let thirds = self.dirty_blocks.thirds(&blocks, SHARED_BLOCKS)?;
        Some(thirds.map(|block| block.pages().start))
    }

    /// Writes the dirty pages of some blocks, those excepted that somebody has pinned (WB-1). The next call goes on where this one
    /// ends.
    pub fn write_some(&self, blocks: u32) {
        let mut batch = Batch::new();
        // Relaxed, here and below: where two that do this begin does not matter.
        let mut from = BlockIndex(self.flush_from.load(Ordering::Relaxed));
        for _ in 0..blocks {
            let next = self.dirty_blocks.next(from);
            let Some(block) = next.or_else(|| self.dirty_blocks.next(BlockIndex(0))) else {
                break;
            };
            self.write_block(&mut batch, block.pages(), &mut OnPinned::Skip);
            from = BlockIndex(block.0 + 1);
        }
        self.flush_from.store(from.0, Ordering::Relaxed);
        self.submit(&mut batch);
    }

    /// Begins to write the dirty pages of a part of a block.
    fn write_block(&self, batch: &mut Batch, mut pages: Range<u32>, on_pinned: &mut OnPinned<'_>) {
        while let Some(pause) = self.begin(batch, &mut pages, on_pinned) {
            // What is ours has to end before we wait for others.
            self.submit(batch);
            match pause {
                Pause::Full => {}
                Pause::Busy => {
                    self.wait_for_writeback(pages.start..pages.start + 1);
                    self.barrier.wait_while_closed(pages.start);
                }
                Pause::Pinned => on_pinned.wait(pages.start),
                Pause::NoRoom => batch.bounce = Some(Bounce::new(COPIES)),
            }
        }
    }

    /// Takes the dirty pages of a part of a block into the batch. Answers why it stopped, with `pages` at the page where.
    fn begin(
        &self,
        batch: &mut Batch,
        pages: &mut Range<u32>,
        on_pinned: &OnPinned<'_>,
    ) -> Option<Pause> {
        let block = PageIndex(pages.start).block();
        let mut cursor = self.table.lock(block);
        while pages.start < pages.end {
            if batch.is_full() {
                return Some(Pause::Full);
            }
            let at = pages.start;
            let Some(page) = cursor
                .get(PageIndex(at))
                .cached()
                .filter(|page| page.is_dirty())
            else {
                pages.start += 1;
                continue;
            };
            let busy = is_being_written(page) || self.barrier.is_closed(at);
            if busy && !on_pinned.skips() {
                return Some(Pause::Busy);
            }
            if busy {
                pages.start += 1;
                continue;
            }
            let run = self.clean(&mut cursor, pages);
            if !run.is_empty() {
                let (first, count) = (run.start, run.end - run.start);
                batch.push(Run {
                    first,
                    count,
                    copy: None,
                });
                pages.start = run.end;
                continue;
            }
            #[cfg(shuttle)]
            if seeded_bug::has(SeededBug::BackgroundWaits) {
                return Some(Pause::Pinned);
            }
            match on_pinned {
                OnPinned::Wait(_) if self.map.frame(page.frame).is_pinned() => {
                    return Some(Pause::Pinned);
                }
                OnPinned::Skip => batch.written.skipped += 1,
                OnPinned::Bounce | OnPinned::Wait(_) if !self.copy(batch, &mut cursor, at) => {
                    return Some(Pause::NoRoom);
                }
                OnPinned::Bounce | OnPinned::Wait(_) => {}
            }
            pages.start += 1;
        }
        if cursor
            .pages()
            .all(|page| !is_dirty(cursor.get(PageIndex(page))))
        {
            self.dirty_blocks.clear(block);
        }
        None
    }

    /// Cleans dirty pages from the first of `pages` on, as many as can be: claims their frames, protects their mappings, and
    /// says that they are under writeback. Answers which: none if somebody has the first one pinned, or if a mapping could not
    /// be protected (WB-3).
    fn clean(&self, cursor: &mut Cursor<'_, CachePage>, pages: &Range<u32>) -> Range<u32> {
        let mut end = pages.start;
        while end < pages.end && self.claim_dirty(cursor, end).is_some() {
            end += 1;
        }
        let run = pages.start..end;
        let is_mapped = |page| {
            cursor
                .get(PageIndex(page))
                .cached()
                .is_some_and(Cached::is_mapped)
        };
        let clean = !run.clone().any(is_mapped) || self.mkclean(&run);
        for page in run.clone().map(PageIndex) {
            let Some(cached) = cursor.get(page).cached() else {
                continue;
            };
            if clean {
                let (state, writeback) = (State::Clean, Writeback::UnderWay);
                cursor.set(
                    page,
                    CachePage::Cached(Cached {
                        state,
                        writeback,
                        ..cached
                    }),
                );
            }
            self.unclaim(cached.frame);
        }
        if !clean {
            return run.start..run.start;
        }
        // Relaxed: a number that stands alone.
        self.dirty.fetch_sub(run.len() as u64, Ordering::Relaxed);
        run
    }

    fn claim_dirty(&self, cursor: &Cursor<'_, CachePage>, page: u32) -> Option<Pfn> {
        let cached = cursor.get(PageIndex(page)).cached()?;
        let ready = cached.is_dirty() && !is_being_written(cached) && !self.barrier.is_closed(page);
        (ready && self.claim(cached.frame)).then_some(cached.frame)
    }

    /// Takes a copy of a page into the batch, if that has room for copies; the page stays dirty.
    fn copy(&self, batch: &mut Batch, cursor: &mut Cursor<'_, CachePage>, page: u32) -> bool {
        let Some(bounce) = &mut batch.bounce else {
            return false;
        };
        let Some(cached) = cursor.get(PageIndex(page)).cached() else {
            return true;
        };
        bounce.copy(batch.copies, self.mmu.pages(page, 1));
        let writeback = Writeback::UnderWay;
        cursor.set(
            PageIndex(page),
            CachePage::Cached(Cached {
                writeback,
                ..cached
            }),
        );
        batch.push_copy(page);
        true
    }

    /// Writes the batch, and ends its writeback.
    fn submit(&self, batch: &mut Batch) {
        let runs = &batch.runs[..batch.len];
        let size_bytes = self.size_bytes();
        let bounce = batch.bounce.as_ref();
        let mut transfers = batch
            .runs
            .map(|run| Transfer::new(run.first, self.bytes_of(run, bounce), size_bytes));
        let transfers = &mut transfers[..runs.len()];
        if !runs.is_empty() {
            self.backing.write(transfers);
        }
        for (run, transfer) in runs.iter().zip(transfers) {
            match transfer.outcome {
                Err(_) if run.count > 1 => {
                    let singles = run.singles().map(|run| (run, self.write_one(run, bounce)));
                    singles.for_each(|(run, outcome)| self.end(run, outcome, &mut batch.written));
                }
                Ok(()) | Err(_) => self.end(*run, transfer.outcome, &mut batch.written),
            }
        }
        (batch.len, batch.copies) = (0, 0);
    }

    /// Writes a page of a run that could not be written as a whole: the file may refuse only some.
    fn write_one(&self, run: Run, bounce: Option<&Bounce>) -> Result<(), BackingError> {
        let mut transfer = Transfer::new(run.first, self.bytes_of(run, bounce), self.size_bytes());
        self.backing.write(slice::from_mut(&mut transfer));
        transfer.outcome
    }

    /// Where the bytes of a run are that are to be written.
    fn bytes_of<'a>(&'a self, run: Run, bounce: Option<&'a Bounce>) -> SharedPages<'a> {
        let count = run.count as usize;
        match (run.copy, bounce) {
            (Some(place), Some(bounce)) => bounce.pages(place..place + count),
            (Some(_) | None, _) => self.mmu.pages(run.first, count),
        }
    }
}

impl PageCache {
    /// Ends the writeback of a run, whose pages are dirty again if they were not written.
    fn end(&self, run: Run, outcome: Result<(), BackingError>, written: &mut Written) {
        let count = u64::from(run.count);
        match outcome {
            Ok(()) => {
                written.pages += count;
                written.bounced += run.bounced();
                Stats::add(&self.stats.file_pages_written, count);
            }
            #[cfg(shuttle)]
            Err(_) if seeded_bug::has(SeededBug::ErrorsComeLate) => {}
            Err(error) => {
                // Before anybody can find that the pages are not being written any more: who waited for that asks for errors next.
                written.failed += count;
                Stats::add(&self.stats.file_write_errors, 1);
                self.errors.set(error);
            }
        }
        let mut cursor = self.table.lock(PageIndex(run.first).block());
        for page in run.pages().map(PageIndex) {
            if outcome.is_err() {
                // First, too: who looks without the cursor finds it under writeback, or dirty.
                self.set_dirty(&mut cursor, page);
            }
            if let CachePage::Cached(cached) = cursor.get(page) {
                let writeback = Writeback::Idle;
                cursor.set(
                    page,
                    CachePage::Cached(Cached {
                        writeback,
                        ..cached
                    }),
                );
            }
        }
        drop(cursor);
        #[cfg(shuttle)]
        if let Err(error) = outcome
            && seeded_bug::has(SeededBug::ErrorsComeLate)
        {
            self.errors.set(error);
        }
        self.written.wake_all();
    }

    /// Waits until no page of a range is being written that was when this was called.
    pub(super) fn wait_for_writeback(&self, range: Range<u32>) {
        let is_written = |page: u32| {
            let entry = self.peek(page).cached();
            !entry.is_some_and(Cached::is_under_writeback)
        };
        for pages in self.used_parts(&range) {
            for page in pages.filter(|page| !is_written(*page)) {
                self.written.wait_until(None, || is_written(page));
            }
        }
    }
}

/// Whether somebody else writes a page: then nobody does meanwhile.
fn is_being_written(page: Cached) -> bool {
    #[cfg(shuttle)]
    if seeded_bug::has(SeededBug::WritebackIgnoresWriteback) {
        return false;
    }
    page.is_under_writeback()
}

const fn is_dirty(entry: CachePage) -> bool {
    matches!(entry, CachePage::Cached(page) if page.is_dirty())
}
