//! Truncation, holes and extension (WB-5).
//!
//! A range that is to go is *closed* first: nobody reads its pages in, pins them or writes them back any more. Then its pins
//! are looked for; if there are any, nothing has happened. Only then does the file change, and after it the pages. What must
//! never happen here: a pinned page taken away (GUP-3), an old byte read in again (FLT-2).

use core::ops::{ControlFlow, Range};

use pgmap_core::addr::{PAGE_SIZE, Pfn};
use pgmap_core::page::Frame;
use pgmap_sync::MutexGuard;
use pgmap_sync::atomic::{Ordering, spin_loop};

use super::entry::State;
use super::{CachePage, Cached, PageCache, pages_of};
use crate::backing::BackingError;
use crate::page_table::{BLOCK_PAGES, Cursor, PageIndex};
#[cfg(shuttle)]
use crate::seeded_bug::{self, SeededBug};

/// How often a page is looked at before it counts as pinned.
const PASSING_PINS: u32 = if cfg!(any(loom, shuttle)) { 4 } else { 1000 };

/// Why a file could not be cut, punched or extended. It is as it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TruncateError {
    /// Somebody has a page of the range pinned.
    #[error("page {page} of the file is pinned: unpin it, or wait")]
    Pinned {
        /// The first such page.
        page: u32,
    },
    /// It is open for reading only.
    #[error("the file is open to be read only: open it to be written")]
    ReadOnly,
    /// The file is a fork's parent's.
    #[error(
        "the file was opened by the process that forked, which alone may change it: open it again here"
    )]
    Inherited,
    /// The file would be longer than its cache was made for.
    #[error("the file cannot become longer than {most_bytes} bytes while it is open")]
    TooLong {
        /// The longest that it may be.
        most_bytes: u64,
    },
    /// The file did not do it.
    #[error(transparent)]
    Backing(#[from] BackingError),
}

/// A closed range; open again when this is dropped.
struct Closed<'a> {
    cache: &'a PageCache,
    _resizing: MutexGuard<'a, ()>,
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.cache.barrier.open();
    }
}

impl PageCache {
    /// Makes the file shorter or longer. Pages that hold no byte of it any more are dropped, and who touches their addresses
    /// gets SIGBUS; what is new reads as zeros.
    ///
    /// While a page that would be dropped is pinned, `wait` is called with it: it waits a little, or gives up.
    ///
    /// # Errors
    ///
    /// [`TruncateError`].
    pub fn set_len(
        &self,
        bytes: u64,
        wait: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<(), TruncateError> {
        let most_bytes = self.most_bytes();
        if bytes > most_bytes {
            return Err(TruncateError::TooLong { most_bytes });
        }
        let resizing = self.resizing.lock();
        let old = self.size_bytes();
        if bytes >= old {
            self.backing.set_len(bytes)?;
            self.extend(old, bytes);
            return Ok(());
        }
        drop(resizing);
        self.cut(bytes, wait)
    }

    /// Makes bytes of the file zeros, up to its end at most, and gives their room back (`FALLOC_FL_PUNCH_HOLE`).
    ///
    /// While a page that lies in the range as a whole is pinned, `wait` is called with it, as by [`set_len`](Self::set_len).
    ///
    /// # Errors
    ///
    /// [`TruncateError`].
    pub fn punch(
        &self,
        bytes: Range<u64>,
        wait: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<(), TruncateError> {
        let bytes = bytes.start..bytes.end.min(self.size_bytes());
        if bytes.is_empty() {
            return Ok(());
        }
        let closed = self.close(&pages_of(&bytes), &whole_pages(&bytes), wait)?;
        // Somebody may have made the file shorter before the range was closed, and is not to find it longer again.
        let bytes = bytes.start..bytes.end.min(self.size_bytes());
        if bytes.is_empty() {
            return Ok(());
        }
        let whole = whole_pages(&bytes);
        self.backing.punch(bytes.clone())?;
        self.drop_pages(&whole);
        self.zero_edges(&bytes, &whole);
        drop(closed);
        Ok(())
    }

    fn cut(
        &self,
        bytes: u64,
        wait: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<(), TruncateError> {
        let end = self.table.pages();
        let gone = pages_of(&(0..bytes)).end..end;
        // The page in which the file ends is not to be written as long as it was.
        let closed = self.close(&(pages_of(&(bytes..bytes)).start..end), &gone, wait)?;
        if bytes < self.size_bytes() {
            self.backing.set_len(bytes)?;
            // Release: pairs with the acquire in `size_bytes`.
            self.size_bytes.store(bytes, Ordering::Release);
            self.drop_pages(&gone);
            let tail = bytes..u64::from(gone.start) * PAGE_SIZE as u64;
            self.zero_edges(&tail, &gone);
        }
        drop(closed);
        Ok(())
    }

    /// Makes the file longer. The page at the old end may hold bytes behind it, written through a mapping: they become zeros,
    /// and the next write to that page faults.
    fn extend(&self, old: u64, new: u64) {
        let tail = old..old.next_multiple_of(PAGE_SIZE as u64);
        let page = PageIndex(pages_of(&(old..old)).start);
        let cursor = (page.0 < self.table.pages()).then(|| self.table.lock(page.block()));
        if let Some(cursor) = &cursor
            && let Some(cached) = cursor.get(page).cached()
            && !tail.is_empty()
        {
            if cached.is_mapped() {
                // Where that fails, writes go unseen to a page that is dirty or protected already.
                self.mkclean(&(page.0..page.0 + 1));
            }
            #[cfg(shuttle)]
            let tail = if seeded_bug::has(SeededBug::ExtendKeepsTheTail) {
                old..old
            } else {
                tail
            };
            self.mmu.pages(page.0, 1).zero(within_page(&tail));
        }
        // Release: pairs with the acquire in `size_bytes`.
        self.size_bytes.store(new, Ordering::Release);
        drop(cursor);
        // Accesses behind the old end were answered with SIGBUS, and those that have just found it there will be.
        #[cfg(shuttle)]
        if seeded_bug::has(SeededBug::ExtendIgnoresFaults) {
            return self.unmap_pages(&(pages_of(&(0..old)).end..pages_of(&(0..new)).end));
        }
        self.table.synchronize();
        self.unmap_pages(&(pages_of(&(0..old)).end..pages_of(&(0..new)).end));
    }

    /// Closes a range, and answers when nobody has a page of `unpinned` pinned, and nobody writes one of the range.
    fn close(
        &self,
        range: &Range<u32>,
        unpinned: &Range<u32>,
        mut wait: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Closed<'_>, TruncateError> {
        loop {
            let closed = Closed {
                cache: self,
                _resizing: self.resizing.lock(),
            };
            self.barrier.close(range);
            self.table.synchronize();
            let Some(page) = self.first_pinned(unpinned) else {
                self.wait_for_writeback(range.clone());
                return Ok(closed);
            };
            #[cfg(shuttle)]
            if seeded_bug::has(SeededBug::TruncateWaitsClosed) && wait(page).is_break() {
                return Err(TruncateError::Pinned { page });
            }
            // Open while we wait: who lets go of a page may have to pin another one first (WB-7).
            drop(closed);
            if wait(page).is_break() {
                return Err(TruncateError::Pinned { page });
            }
        }
    }

    /// The first page of a closed range that somebody has pinned: exactly.
    fn first_pinned(&self, range: &Range<u32>) -> Option<u32> {
        #[cfg(shuttle)]
        if seeded_bug::has(SeededBug::TruncateEndIsNothing) && range.end == self.table.pages() {
            return None;
        }
        self.used_parts(range).flatten().find(|page| {
            let cursor = self.table.lock(PageIndex(*page).block());
            let Some(cached) = cursor.get(PageIndex(*page)).cached() else {
                return false;
            };
            // Who pins a page of a closed range sees that, and lets go at once.
            (0..PASSING_PINS).all(|_| is_pinned(self.map.frame(cached.frame)))
        })
    }

    /// Drops the pages of a closed range that nobody has pinned.
    fn drop_pages(&self, range: &Range<u32>) {
        for pages in self.used_parts(range) {
            self.drop_block(&pages);
        }
        // Those that are not cached may answer with SIGBUS, and are to be looked at again.
        self.unmap_pages(range);
    }

    fn drop_block(&self, pages: &Range<u32>) {
        let mut cursor = self.table.lock(PageIndex(pages.start).block());
        let mut gone = [Pfn::from_u32(0); BLOCK_PAGES as usize];
        let mut count = 0;
        self.unmap_run(&mut cursor, pages);
        for page in pages.clone() {
            match cursor.get(PageIndex(page)) {
                CachePage::Absent => {}
                CachePage::Poisoned => cursor.set(PageIndex(page), CachePage::Absent),
                CachePage::Cached(cached) => {
                    self.forget_dirty(&mut cursor, PageIndex(page), cached);
                    // Not claimed: a pin that comes now finds the range closed and goes, and may be there at this moment.
                    self.drop_run(&mut cursor, &(page..page + 1));
                    gone[count] = cached.frame;
                    count += 1;
                }
            }
        }
        drop(cursor);
        self.ram.free(&gone[..count]);
    }

    /// Notes that nobody wants the bytes of a page that the file does not have.
    pub(super) fn forget_dirty(
        &self,
        cursor: &mut Cursor<'_, CachePage>,
        page: PageIndex,
        cached: Cached,
    ) {
        if cached.is_dirty() {
            let state = State::Clean;
            cursor.set(page, CachePage::Cached(Cached { state, ..cached }));
            // Relaxed: a number that stands alone.
            self.dirty.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Makes the bytes of a closed range zeros that are in pages of which others stay: the first and the last, if any.
    fn zero_edges(&self, bytes: &Range<u64>, whole: &Range<u32>) {
        let pages = pages_of(bytes);
        let edges = [pages.start, pages.end.saturating_sub(1)];
        let distinct = if edges[0] == edges[1] { 1 } else { 2 };
        for page in edges
            .into_iter()
            .take(distinct)
            .filter(|page| !whole.contains(page))
        {
            let start = u64::from(page) * PAGE_SIZE as u64;
            let part = bytes.start.max(start)..bytes.end.min(start + PAGE_SIZE as u64);
            let cursor = self.table.lock(PageIndex(page).block());
            if cursor.get(PageIndex(page)).cached().is_some() && !part.is_empty() {
                self.mmu.pages(page, 1).zero(part_of(start, &part));
            }
        }
    }
}

/// Whether somebody has a frame pinned just now, whose page's cursor the caller has.
fn is_pinned(frame: &Frame) -> bool {
    let free = frame.freeze(1);
    if free {
        frame.unfreeze(1);
    } else {
        spin_loop();
    }
    !free
}

/// The pages of which all bytes are in a range.
fn whole_pages(bytes: &Range<u64>) -> Range<u32> {
    let page = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
    let start = page(bytes.start.div_ceil(PAGE_SIZE as u64));
    start..page(bytes.end / PAGE_SIZE as u64).max(start)
}

/// Bytes of the page that begins at `start`, counted from there.
fn part_of(start: u64, bytes: &Range<u64>) -> Range<usize> {
    let offset = |at: u64| {
        usize::try_from(at - start)
            .unwrap_or(PAGE_SIZE)
            .min(PAGE_SIZE)
    };
    offset(bytes.start)..offset(bytes.end)
}

/// Bytes of one page, counted from its start.
fn within_page(bytes: &Range<u64>) -> Range<usize> {
    part_of(bytes.start - bytes.start % PAGE_SIZE as u64, bytes)
}
