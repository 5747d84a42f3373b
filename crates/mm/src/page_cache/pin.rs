//! Pins of a file's pages: counted on the frames, without a lock where the page is there.
//!
//! A pin through which somebody may write makes its page dirty at once, and a page that is pinned is never taken for clean,
//! so it is dirty when the pin ends, whatever was written behind the page tables' back (GUP-4). Whoever evicts, cleans or
//! truncates claims the frame first, and so a pin comes before that or finds another entry (GUP-3, RMAP-1).

use pgmap_core::addr::Pfn;
use pgmap_core::page::GetError;

use super::fault::ReadIn;
use super::{CachePage, Cached, PageCache};
use crate::gup::PinAccess;
use crate::page_table::{Cursor, PageIndex};
#[cfg(any(loom, shuttle))]
use crate::seeded_bug::{self, SeededBug};
use crate::space::Worker;

/// Why a page of a file could not be pinned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum NotPinned {
    /// No frame is to be had: make some free, and try again.
    NoMemory,
    /// The file is not that long.
    BeyondTheEnd,
    /// The file could not give the page.
    Poisoned,
    /// It has as many pins as can be counted (REF-5).
    TooMany,
}

impl PageCache {
    /// Pins a page, reading it in if it is not in RAM.
    pub(crate) fn pin(
        &self,
        worker: &mut Worker,
        page: u32,
        access: PinAccess,
    ) -> Result<Pfn, NotPinned> {
        let page = PageIndex(page);
        if let Some(frame) = self.try_pin(page, access) {
            return Ok(frame);
        }
        let pinned = self.pin_slow(worker, page, access);
        worker.frames.give_all(&self.ram);
        pinned
    }

    /// Pins a page that is there, without a lock; `None` if that takes more.
    pub(crate) fn try_pin(&self, page: PageIndex, access: PinAccess) -> Option<Pfn> {
        let frame = self.table.peek(page).cached()?.frame;
        self.map.frame(frame).try_pin().ok()?;
        // From here on nobody can claim the frame; what was done before we see. The barrier comes first: who finds it open has
        // pinned before it closes, or finds the entry of who has closed and opened it.
        let is_closed = self.barrier.is_closed(page.0);
        #[cfg(any(loom, shuttle))]
        let is_closed = is_closed && !seeded_bug::has(SeededBug::PinIgnoresTheBarrier);
        let entry = self.table.peek(page).cached();
        let same = entry.is_some_and(|entry| {
            entry.frame == frame && (access == PinAccess::Read || entry.is_dirty())
        });
        if same && !is_closed {
            return Some(frame);
        }
        self.ram.unpin(frame);
        None
    }

    /// Claims the frame of a page, under its cursor, if nobody has it pinned: nobody can pin it until the claim ends.
    pub(super) fn claim(&self, frame: Pfn) -> bool {
        #[cfg(any(loom, shuttle))]
        if seeded_bug::has(SeededBug::ClaimIgnoresPins) {
            return true;
        }
        #[cfg(any(loom, shuttle))]
        if seeded_bug::has(SeededBug::ClaimLooksFirst) {
            return !self.map.frame(frame).is_pinned();
        }
        self.map.frame(frame).freeze(1)
    }

    /// Ends a claim: who pins the frame from here on finds what was done under it.
    pub(super) fn unclaim(&self, frame: Pfn) {
        #[cfg(any(loom, shuttle))]
        if seeded_bug::has(SeededBug::ClaimIgnoresPins)
            || seeded_bug::has(SeededBug::ClaimLooksFirst)
        {
            return;
        }
        self.map.frame(frame).unfreeze(1);
    }

    fn pin_slow(
        &self,
        worker: &mut Worker,
        page: PageIndex,
        access: PinAccess,
    ) -> Result<Pfn, NotPinned> {
        if page.0 >= self.table.pages() {
            return Err(NotPinned::BeyondTheEnd);
        }
        loop {
            #[cfg(shuttle)]
            let _walked = seeded_bug::has(SeededBug::PinLocksTheMappings).then(|| self.vmas.lock());
            let mut cursor = self.table.lock(page.block());
            if self.barrier.is_closed(page.0) {
                drop(cursor);
                self.barrier.wait_while_closed(page.0);
                continue;
            }
            match cursor.get(page) {
                CachePage::Cached(cached) => {
                    return self.pin_cached(&mut cursor, page, cached, access);
                }
                CachePage::Poisoned => return Err(NotPinned::Poisoned),
                CachePage::Absent if page.0 >= self.size_pages() => {
                    return Err(NotPinned::BeyondTheEnd);
                }
                CachePage::Absent => {}
            }
            if !self.has_room(worker) {
                return Err(NotPinned::NoMemory);
            }
            // Who pins a page is likely to pin those behind it.
            let wanted = page.0..cursor.pages().end;
            if self.read_in(&mut cursor, worker, page, &wanted) == ReadIn::Failed {
                return Err(NotPinned::Poisoned);
            }
        }
    }

    /// Pins a page that is in RAM: under the cursor nobody else has claimed its frame.
    fn pin_cached(
        &self,
        cursor: &mut Cursor<'_, CachePage>,
        page: PageIndex,
        cached: Cached,
        access: PinAccess,
    ) -> Result<Pfn, NotPinned> {
        match access {
            PinAccess::Read => {}
            PinAccess::Write => self.set_dirty(cursor, page),
        }
        match self.map.frame(cached.frame).try_pin() {
            Ok(()) => Ok(cached.frame),
            Err(GetError::TooMany(_) | GetError::NotLive) => Err(NotPinned::TooMany),
        }
    }
}
