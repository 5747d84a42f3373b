//! A range of pages that a truncation is about to take away: nobody reads it in, pins it or writes it back meanwhile.

use core::ops::Range;

use pgmap_sync::WaitQueue;
use pgmap_sync::atomic::{AtomicU64, Ordering};

/// The pages that are closed; at most one range at a time, whose owner has the cache's `resizing`.
#[derive(Debug, Default)]
pub(super) struct Barrier {
    /// The first page in the upper half, the page after the last in the lower one.
    range: AtomicU64,
    /// Who waits for the range to be open.
    opened: WaitQueue,
}

impl Barrier {
    /// Closes a range. Who holds a cursor at this moment may not have seen it: see `PageTable::synchronize`.
    pub(super) fn close(&self, pages: &Range<u32>) {
        let word = u64::from(pages.start) << 32 | u64::from(pages.end);
        // Release, here and below: pairs with the acquire in `is_closed`.
        self.range.store(word, Ordering::Release);
    }

    pub(super) fn open(&self) {
        self.range.store(0, Ordering::Release);
        self.opened.wake_all();
    }

    /// Waits until a page is not closed, and takes no lock that its owner has: who pins a page must not wait for what is held
    /// while all pages of a range are looked at (WB-7). The caller has no cursor.
    pub(super) fn wait_while_closed(&self, page: u32) {
        self.opened.wait_until(None, || !self.is_closed(page));
    }

    /// Whether a page is closed. Exact under the page's cursor, and for who has pinned the page before asking: who closed the
    /// range claims the frame afterwards, and then fails, or the pin comes later and sees the range closed.
    pub(super) fn is_closed(&self, page: u32) -> bool {
        let word = self.range.load(Ordering::Acquire);
        #[allow(clippy::cast_possible_truncation, reason = "two halves of a word")]
        let (start, end) = ((word >> 32) as u32, word as u32);
        (start..end).contains(&page)
    }
}
