//! References and pins on frames that their user names: pages of a file on a device, of a direct mapping.
//!
//! A frame in use holds one live reference on its mapping, from the first get to the last put or unpin (REF-2); everything
//! between touches only the frame. Of a compound page only the head is touched.

use core::time::Duration;

use crate::addr::{Pfn, PfnRange};
use crate::page::{Frame, GetError, Got, Put};

use super::kind::{MemoryType, Supply};
use super::pgmap::DevPagemap;

/// Why a page of a device could not be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PageError {
    /// The device is being taken away, or was: give up what you have of it.
    #[error("the device is being taken away")]
    Dying,
    /// The caller's mistake: these are not frames of the device, or its metadata lives there.
    #[error("{0:?} is no page of the device that can be used")]
    NotOurs(Pfn),
    /// Somebody else is giving the page up or has claimed it, or only pins are left of it: wait until it is idle.
    #[error("{0:?} is not free, and not in use by somebody who would share it")]
    Busy(Pfn),
    /// The page's bytes are lost: write it anew, and clear the error.
    #[error("the bytes of {0:?} are lost")]
    Poisoned(Pfn),
    /// The page has as many references or pins as can be counted (REF-5): somebody leaks them.
    #[error("{0:?} has as many references or pins as can be counted")]
    TooMany(Pfn),
}

impl DevPagemap {
    /// Takes a reference on the page that a frame is in: the first, if nobody uses it. Pages of private and coherent memory begin
    /// with [`alloc`](Self::alloc).
    ///
    /// # Errors
    ///
    /// See [`PageError`].
    pub fn get_page(&self, pfn: Pfn) -> Result<(), PageError> {
        self.get_pages(one(pfn)?)
    }

    /// As [`get_page`](Self::get_page), one reference for each page that the range touches: all or none.
    ///
    /// # Errors
    ///
    /// See [`PageError`].
    pub fn get_pages(&self, range: PfnRange) -> Result<(), PageError> {
        self.check(range)?;
        let pages = self.pages(range);
        // One live reference for each page that may be free, before the first of them is touched.
        if !self.try_get_many(pages) {
            return Err(PageError::Dying);
        }
        let mut firsts = 0;
        let mut result = Ok(());
        let mut done = 0;
        for head in self.heads(range) {
            match self.get_head(head) {
                Ok(Got::First) => firsts += 1,
                Ok(Got::Another) => {}
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
            done += 1;
        }
        #[cfg(shuttle)]
        if crate::seeded_bug::has(crate::seeded_bug::SeededBug::GetKeepsNoReference) {
            firsts = 0;
        }
        // While the others are given back, these keep the mapping.
        if result.is_err() {
            self.drop_holds(self.heads(range).take(done), Frame::put);
        }
        self.users().put_many(pages - firsts);
        result
    }

    fn get_head(&self, head: Pfn) -> Result<Got, PageError> {
        let frame = self.map.frame(head);
        let got = match self.pgmap.kind.supply() {
            Supply::Given => frame.get_or_allocate(),
            Supply::Allocated => frame.try_get().map(|()| Got::Another),
        };
        got.map_err(|error| refusal(frame, head, error))
    }

    /// Live references on the mapping, all or none.
    fn try_get_many(&self, count: u64) -> bool {
        if !self.users().try_get_live_many(count) {
            return false;
        }
        // The entry may be another mapping's, if this one has been removed: while we have its users it stays what it is.
        let ours = self.try_get().is_some();
        if !ours {
            self.users().put_many(count);
        }
        ours
    }

    /// Drops a reference of a page. The last hold gives the page back as its kind of memory demands (REF-3).
    pub fn put_page(&self, pfn: Pfn) {
        debug_assert!(self.contains(pfn), "{pfn:?} is not this device's");
        self.drop_holds([self.pgmap.order.head(pfn)], Frame::put);
    }

    /// Drops one reference of each page that the range touches.
    pub fn put_pages(&self, range: PfnRange) {
        debug_assert_eq!(self.check(range), Ok(()));
        self.drop_holds(self.heads(range), Frame::put);
    }

    /// Pins the page that a frame is in. The caller has a reference on it.
    ///
    /// # Errors
    ///
    /// See [`PageError`].
    pub fn pin_page(&self, pfn: Pfn) -> Result<(), PageError> {
        self.pin_pages(one(pfn)?)
    }

    /// Pins each page that the range touches: all or none. The caller has references on them. A 2 MiB page is pinned with one
    /// operation (GUP-1).
    ///
    /// # Errors
    ///
    /// See [`PageError`].
    pub fn pin_pages(&self, range: PfnRange) -> Result<(), PageError> {
        self.check(range)?;
        let _guard = self.try_get().ok_or(PageError::Dying)?;
        for (done, head) in self.heads(range).enumerate() {
            let frame = self.map.frame(head);
            if let Err(error) = frame.try_pin() {
                self.drop_holds(self.heads(range).take(done), Frame::unpin);
                return Err(refusal(frame, head, error));
            }
        }
        Ok(())
    }

    /// Drops a pin of a page. If its references are gone, the last pin gives the page back (REF-3).
    pub fn unpin_page(&self, pfn: Pfn) {
        debug_assert!(self.contains(pfn), "{pfn:?} is not this device's");
        self.drop_holds([self.pgmap.order.head(pfn)], Frame::unpin);
    }

    /// Drops one pin of each page that the range touches.
    pub fn unpin_pages(&self, range: PfnRange) {
        debug_assert_eq!(self.check(range), Ok(()));
        self.drop_holds(self.heads(range), Frame::unpin);
    }

    /// Waits until nobody holds or pins any page that the range touches, at most `patience`. Says whether nobody does (WB-5). It
    /// does not keep them from being used again. For file system and generic memory; of other kinds it only looks.
    #[must_use]
    pub fn wait_idle(&self, range: PfnRange, patience: Option<Duration>) -> bool {
        let idle = || self.heads(range).all(|head| self.map.frame(head).is_idle());
        match &self.pgmap.kind {
            MemoryType::FsDax(queue) => queue.wait_until(patience, idle),
            MemoryType::Generic => self.pgmap.idle.wait_until(patience, idle),
            MemoryType::Private(_) | MemoryType::Coherent(_) | MemoryType::P2pDma(_) => idle(),
        }
    }

    /// Says that the bytes of the page that a frame is in are lost (WB-6). Nothing if the frame is not the device's, or not
    /// any more.
    pub fn poison_page(&self, pfn: Pfn) {
        if self.contains(pfn) {
            self.map.frame(self.pgmap.order.head(pfn)).poison();
        }
    }

    /// Says that they were written anew. Nothing if the frame is not the device's, or not any more.
    pub fn heal_page(&self, pfn: Pfn) {
        if self.contains(pfn) {
            self.map.frame(self.pgmap.order.head(pfn)).heal();
        }
    }

    /// Drops one hold of each page; those that were the last give their live references back together.
    fn drop_holds(&self, heads: impl IntoIterator<Item = Pfn>, drop_one: impl Fn(&Frame) -> Put) {
        let mut freed = 0;
        for head in heads {
            if drop_one(self.map.frame(head)) == Put::Last {
                self.pgmap.free_page(&self.map, head);
                freed += 1;
            }
        }
        #[cfg(shuttle)]
        if crate::seeded_bug::has(crate::seeded_bug::SeededBug::GetKeepsNoReference) {
            freed = 0;
        }
        if freed > 0 {
            self.users().put_many(freed);
        }
    }

    /// Whether every page that the range touches is the device's, and holds data.
    fn check(&self, range: PfnRange) -> Result<(), PageError> {
        let inside = |ours: &PfnRange| ours.start() <= range.start() && range.end() <= ours.end();
        if !self.pgmap.ranges.iter().any(inside) {
            return Err(PageError::NotOurs(range.start()));
        }
        let Some(altmap) = &self.pgmap.altmap else {
            return Ok(());
        };
        let head = self.pgmap.order.head(range.start());
        let whole = PfnRange::new(head, self.pages(range) * self.pgmap.order.frames());
        if whole.is_some_and(|whole| whole.intersects(altmap.area())) {
            return Err(PageError::NotOurs(range.start()));
        }
        Ok(())
    }

    /// Pages that the range touches.
    fn pages(&self, range: PfnRange) -> u64 {
        let head = self.pgmap.order.head(range.start());
        (range.end() - head.get()).div_ceil(self.pgmap.order.frames())
    }

    fn heads(&self, range: PfnRange) -> impl Iterator<Item = Pfn> + use<> {
        let (head, frames) = (
            self.pgmap.order.head(range.start()),
            self.pgmap.order.frames(),
        );
        (0..self.pages(range)).filter_map(move |nth| head.checked_add(nth * frames))
    }
}

fn one(pfn: Pfn) -> Result<PfnRange, PageError> {
    PfnRange::new(pfn, 1).ok_or(PageError::NotOurs(pfn))
}

fn refusal(frame: &Frame, head: Pfn, error: GetError) -> PageError {
    match error {
        GetError::NotLive if frame.is_poisoned() => PageError::Poisoned(head),
        GetError::NotLive => PageError::Busy(head),
        GetError::TooMany(_) => PageError::TooMany(head),
    }
}
