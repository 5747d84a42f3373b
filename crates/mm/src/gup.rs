//! Pins: pages that stay where they are, for as long as somebody's DMA may use them.
//!
//! A pin is counted on the frame, under the cursor of its page; reclaim and discard look at the count under
//! the same cursor, so a pin cannot slip in between their check and their act (RMAP-1).

use alloc::sync::Arc;
use alloc::vec::Vec;

use alloc::borrow::Cow;
use core::ops::Range;
use core::panic::Location;

use pgmap_core::addr::{PAGE_SIZE, Pfn, VirtAddr};
use pgmap_core::holders::{Holder, Ticket};

use crate::fault::{Access, Outcome};
use crate::page_table::PageIndex;
use crate::pte::Pte;
use crate::space::{AddressSpace, Worker};

/// What the holder of a pin does with the page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PinAccess {
    /// It reads.
    Read,
    /// It writes, perhaps behind the page tables' back: no clean copy is kept (GUP-4).
    Write,
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
}

/// Pages that stay where they are until this is dropped.
///
/// # Invariants
///
/// Each frame has one pin that belongs to this value, and is the one that its page's entry names.
#[derive(Debug)]
pub struct Pin {
    space: Arc<AddressSpace>,
    at: VirtAddr,
    frames: Vec<Pfn>,
    ticket: Ticket,
}

impl Pin {
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

impl Drop for Pin {
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
    access: PinAccess,
    label: Cow<'static, str>,
) -> Result<Pin, PinError> {
    let at = at.page_start();
    let end = at.get().saturating_add(pages as usize * PAGE_SIZE);
    let ticket = space.map.holders().add(Holder {
        label,
        site: Location::caller(),
        since_ns: space.map.now_ns(),
        range: at.get()..end,
    });
    let frames = Vec::with_capacity(pages as usize);
    let mut pin = Pin {
        space: Arc::clone(space),
        at,
        frames,
        ticket,
    };
    for nth in 0..pages as usize {
        let at = at
            .checked_add(nth * PAGE_SIZE)
            .ok_or(PinError::BadAddress { at })?;
        // INVARIANT: `pin_page` pinned the frame that the page's entry names; an early return drops
        // the pins so far.
        pin.frames.push(space.pin_page(worker, at, access)?);
    }
    Ok(pin)
}

impl AddressSpace {
    /// Who has pinned any of these addresses, oldest first (REF-7).
    #[must_use]
    pub fn holders(&self, range: &Range<usize>) -> Vec<Holder> {
        self.map.holders().of(range)
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
