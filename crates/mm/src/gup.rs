//! Pins: pages that stay where they are, for as long as somebody's DMA may use them.
//!
//! A pin is counted on the frame. Pages of anonymous memory are pinned under the cursor of the page, and reclaim and discard
//! look at the count under the same cursor, so a pin cannot slip in between their check and their act (RMAP-1); those of files
//! are pinned without it, and whoever wants such a page to himself claims its frame.

use alloc::sync::Arc;
use alloc::vec::Vec;

use alloc::borrow::Cow;
use core::ops::Range;
use core::panic::Location;

use pgmap_core::addr::{PAGE_SIZE, Pfn, VirtAddr};
use pgmap_core::holders::{Holder, Ticket};

use crate::fault::{Access, Outcome};
use crate::page_cache::{NotPinned, PageCache};
use crate::page_table::PageIndex;
use crate::pte::Pte;
use crate::reclaim::Caller;
use crate::space::{AddressSpace, BATCH, Worker};

/// What the holder of a pin does with the page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PinAccess {
    /// It reads.
    Read,
    /// It writes, perhaps behind the page tables' back: no clean copy is kept (GUP-4).
    Write,
}

/// For how long a pin is meant to last.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PinTerm {
    /// For one transfer.
    Short,
    /// For as long as somebody likes, as registered buffers are (`FOLL_LONGTERM`).
    Long,
}

/// What is asked for when pages are pinned.
#[derive(Clone, Debug)]
pub struct Pin {
    access: PinAccess,
    term: PinTerm,
    label: Cow<'static, str>,
}

impl Pin {
    /// To read.
    pub const READ: Self = Self::new(PinAccess::Read);
    /// To write, or to read and write.
    pub const WRITE: Self = Self::new(PinAccess::Write);

    const fn new(access: PinAccess) -> Self {
        Self {
            access,
            term: PinTerm::Short,
            label: Cow::Borrowed("unnamed"),
        }
    }

    /// Who the holder is, for those who ask why a page is busy (REF-7).
    #[must_use]
    pub fn label(mut self, label: impl Into<Cow<'static, str>>) -> Self {
        self.label = label.into();
        self
    }

    /// To be kept for long. Refused with [`PinError::LongTerm`] where somebody would have to wait for that (GUP-2).
    #[must_use]
    pub const fn long_term(mut self) -> Self {
        self.term = PinTerm::Long;
        self
    }
}

/// Why pages could not be pinned.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PinError {
    /// No area holds the address.
    #[error("{at:?} is not in managed memory")]
    BadAddress {
        /// The first such address.
        at: VirtAddr,
    },
    /// There is not enough RAM to have all the pages there at once.
    #[error("no RAM is left for the page at {at:?}; unpin something, or raise the budget")]
    NoMemory {
        /// The first page that could not be had.
        at: VirtAddr,
    },
    /// The bytes of a page are lost.
    #[error("the page at {at:?} is poisoned: its device could not give its bytes back")]
    Poisoned {
        /// The first such page.
        at: VirtAddr,
    },
    /// A page has as many pins as can be counted (REF-5).
    #[error("the page at {at:?} has too many pins")]
    TooManyPins {
        /// The page.
        at: VirtAddr,
    },
    /// The file that is mapped there is not that long.
    #[error("the file that is mapped at {at:?} ends before that page")]
    BeyondTheEnd {
        /// The first such address.
        at: VirtAddr,
    },
    /// Somebody wants to write to pages of a file for long, and writeback would never know whether they are clean (GUP-2).
    #[error(
        "the page at {at:?} is a file's: it cannot be pinned for long to be written; pin it for each transfer"
    )]
    LongTerm {
        /// The first such address.
        at: VirtAddr,
    },
}

/// Pages that stay where they are until this is dropped.
///
/// # Invariants
///
/// Each frame has one pin that belongs to this value, and is the one that its page's entry names.
#[derive(Debug)]
pub struct PinnedPages {
    space: Arc<AddressSpace>,
    at: VirtAddr,
    frames: Vec<Pfn>,
    ticket: Ticket,
}

impl PinnedPages {
    /// No page yet, of `pages` from `at` on. The caller is who holds them.
    #[track_caller]
    fn begin(space: &Arc<AddressSpace>, at: VirtAddr, pages: u32, pin: &Pin) -> Self {
        let end = at.get().saturating_add(pages as usize * PAGE_SIZE);
        let ticket = space.map.holders().add(Holder {
            label: pin.label.clone(),
            site: Location::caller(),
            since_ns: space.map.now_ns(),
            range: at.get()..end,
        });
        // INVARIANT: no frame yet.
        Self {
            space: Arc::clone(space),
            at,
            frames: Vec::with_capacity(pages as usize),
            ticket,
        }
    }

    /// The first pinned address.
    #[must_use]
    pub const fn start(&self) -> VirtAddr {
        self.at
    }

    /// Pinned bytes.
    #[must_use]
    pub const fn len_bytes(&self) -> usize {
        self.frames.len() * PAGE_SIZE
    }
}

impl Drop for PinnedPages {
    fn drop(&mut self) {
        for frame in &self.frames {
            self.space.ram.unpin(*frame);
        }
        self.space.map.holders().remove(&self.ticket);
    }
}

/// Pins `pages` pages from `at`, bringing back those that are not in RAM (GUP-1, GUP-2).
///
/// The label and the caller's place in the source are what `holders` shows (REF-7).
///
/// # Errors
///
/// See [`PinError`]. Nothing stays pinned then.
#[track_caller]
pub fn pin_user_pages(
    space: &Arc<AddressSpace>,
    worker: &mut Worker,
    at: VirtAddr,
    pages: u32,
    pin: &Pin,
) -> Result<PinnedPages, PinError> {
    let at = at.page_start();
    let mut pinned = PinnedPages::begin(space, at, pages, pin);
    // INVARIANT: each of these pins the frame that the page's entry names; an early return drops the pins so far.
    if space.page_at(at).is_some() {
        for nth in 0..pages {
            let frame = space.pin_page(worker, nth_page(at, nth)?, pin.access)?;
            pinned.frames.push(frame);
        }
    } else {
        space.pin_file_pages(worker, at, pages, pin, &mut pinned.frames)?;
    }
    Ok(pinned)
}

/// Pins pages of one mapping that are all in RAM, and need nothing done to them (`gup_fast`). `None` if there is more to do, or
/// to say, for [`pin_user_pages`]; nothing stays pinned then.
#[track_caller]
pub fn pin_user_pages_fast(
    space: &Arc<AddressSpace>,
    at: VirtAddr,
    pages: u32,
    pin: &Pin,
) -> Option<PinnedPages> {
    let at = at.page_start();
    let mut pinned = PinnedPages::begin(space, at, pages, pin);
    let frames = &mut pinned.frames;
    // INVARIANT: each of these pins the frame that the page's entry names; an early return drops the pins so far.
    let all = match space.page_at(at) {
        Some(first) => space.pin_present(first, pages, pin.access, frames),
        None => space.pin_cached(at, pages, pin, frames),
    };
    all.map(|()| pinned)
}

/// The page `nth` pages after an address.
fn nth_page(at: VirtAddr, nth: u32) -> Result<VirtAddr, PinError> {
    at.checked_add(nth as usize * PAGE_SIZE)
        .ok_or(PinError::BadAddress { at })
}

impl AddressSpace {
    /// Who has pinned any of these addresses, oldest first (REF-7).
    #[must_use]
    pub fn holders(&self, range: &Range<usize>) -> Vec<Holder> {
        self.map.holders().of(range)
    }

    /// Pins pages of anonymous memory that are there, a block under one lock.
    fn pin_present(
        &self,
        first: PageIndex,
        pages: u32,
        access: PinAccess,
        frames: &mut Vec<Pfn>,
    ) -> Option<()> {
        let end = first.0.checked_add(pages)?;
        if end > self.table.pages() {
            return None;
        }
        let mut from = first.0;
        while from < end {
            let mut cursor = self.table.lock(PageIndex(from).block());
            let run = from..end.min(cursor.pages().end);
            if access == PinAccess::Write {
                self.forget_kept(&mut cursor, run.clone());
            }
            for page in run.clone() {
                let frame = present(cursor.get(PageIndex(page)))?;
                self.map.frame(frame).try_pin().ok()?;
                frames.push(frame);
            }
            from = run.end;
        }
        Some(())
    }

    /// Pins pages of a mapped file that are there.
    fn pin_cached(&self, at: VirtAddr, pages: u32, pin: &Pin, frames: &mut Vec<Pfn>) -> Option<()> {
        if pin.term == PinTerm::Long && pin.access == PinAccess::Write {
            return None;
        }
        let (vma, cache) = self.files.at(at)?;
        let first = vma.page_at(at)?;
        let run = first..first.checked_add(pages)?;
        if run.end > vma.file_pages().end {
            return None;
        }
        for page in run.map(PageIndex) {
            frames.push(cache.try_pin(page, pin.access)?);
        }
        Some(())
    }

    /// Pins pages of mapped files.
    fn pin_file_pages(
        &self,
        worker: &mut Worker,
        at: VirtAddr,
        pages: u32,
        pin: &Pin,
        frames: &mut Vec<Pfn>,
    ) -> Result<(), PinError> {
        let mut done = 0;
        while done < pages {
            let start = nth_page(at, done)?;
            let found = self.files.at(start);
            let found = found.and_then(|(vma, cache)| Some((vma.page_at(start)?, vma, cache)));
            let (first, vma, cache) = found.ok_or(PinError::BadAddress { at: start })?;
            if pin.term == PinTerm::Long && pin.access == PinAccess::Write {
                return Err(PinError::LongTerm { at: start });
            }
            let end = vma.file_pages().end.min(first.saturating_add(pages - done));
            for page in first..end {
                let frame = self.pin_file_page(worker, &cache, page, pin.access);
                let at = nth_page(start, page - first)?;
                frames.push(frame.map_err(|error| error.at(at))?);
            }
            done += end - first;
        }
        Ok(())
    }

    fn pin_file_page(
        &self,
        worker: &mut Worker,
        cache: &PageCache,
        page: u32,
        access: PinAccess,
    ) -> Result<Pfn, NotPinned> {
        loop {
            let pinned = cache.pin(worker, page, access);
            let wants_more = pinned == Err(NotPinned::NoMemory);
            if !wants_more || self.make_room(Caller::Reclaimer, BATCH) == 0 {
                return pinned;
            }
        }
    }

    fn pin_page(
        &self,
        worker: &mut Worker,
        at: VirtAddr,
        access: PinAccess,
    ) -> Result<Pfn, PinError> {
        let page = self.page_at(at).ok_or(PinError::BadAddress { at })?;
        loop {
            if let Some(frame) = self.try_pin_page(page, at, access)? {
                return Ok(frame);
            }
            let fault = match access {
                PinAccess::Read => Access::Read,
                PinAccess::Write => Access::Write,
            };
            match self.fault(worker, at, fault) {
                Outcome::Resolved => {}
                Outcome::NoMemory => return Err(PinError::NoMemory { at }),
                Outcome::BadAddress => return Err(PinError::BadAddress { at }),
            }
        }
    }

    /// Pins a page that is there; `None` if it has to be brought in first.
    fn try_pin_page(
        &self,
        page: PageIndex,
        at: VirtAddr,
        access: PinAccess,
    ) -> Result<Option<Pfn>, PinError> {
        let mut cursor = self.table.lock(page.block());
        match cursor.get(page) {
            Pte::Present { frame, .. } => {
                if access == PinAccess::Write {
                    self.forget_kept(&mut cursor, page.0..page.0 + 1);
                }
                let pinned = self.map.frame(frame).try_pin();
                pinned
                    .map(|()| Some(frame))
                    .map_err(|_| PinError::TooManyPins { at })
            }
            Pte::Poisoned => Err(PinError::Poisoned { at }),
            Pte::None | Pte::Staged { .. } | Pte::Device { .. } => Ok(None),
        }
    }
}

/// The frame of a page that is there.
const fn present(pte: Pte) -> Option<Pfn> {
    match pte {
        Pte::Present { frame, .. } => Some(frame),
        Pte::None | Pte::Staged { .. } | Pte::Device { .. } | Pte::Poisoned => None,
    }
}

impl NotPinned {
    const fn at(self, at: VirtAddr) -> PinError {
        match self {
            Self::NoMemory => PinError::NoMemory { at },
            Self::BeyondTheEnd => PinError::BeyondTheEnd { at },
            Self::Poisoned => PinError::Poisoned { at },
            Self::TooMany => PinError::TooManyPins { at },
        }
    }
}
