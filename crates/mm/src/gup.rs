//! Pins: pages that stay where they are, for as long as somebody's DMA may use them.
//!
//! A pin is counted on the frame. A page that is there is pinned without a lock: its entry is read, its frame pinned, and the
//! entry read again. Whoever takes a page out, drops it or gives it another frame *claims* the frame first
//! ([`Frame::freeze`](pgmap_core::page::Frame::freeze)), which fails while anybody has it pinned, and ends the claim after the
//! entry says what became of the page: so a pin comes before the claim, or finds another entry (RMAP-1). What is not there is
//! brought in by the fault path, and pinned under the cursor.

use alloc::sync::Arc;
use alloc::vec::Vec;

use alloc::borrow::Cow;
use core::mem::{self, ManuallyDrop};
use core::ops::Range;
use core::panic::Location;

use pgmap_core::addr::{PAGE_SIZE, Pfn, VirtAddr};
use pgmap_core::holders::{Holder, Ticket, Who};
use pgmap_core::ram::{NotReplaced, Target};
use smallvec::SmallVec;

use crate::dax::DaxPin;
use crate::fault::{Access, Outcome};
use crate::mapped::MappedFile;
use crate::page_cache::{NotPinned, PageCache, VmaAccess};
use crate::page_table::PageIndex;
use crate::pinning::Pinning;
use crate::pte::{Copy, Pte};
use crate::reclaim::Caller;
#[cfg(shuttle)]
use crate::seeded_bug::{self, SeededBug};
use crate::space::{AddressSpace, BATCH, Worker};

/// Pages that are pinned without room for their frames being allocated.
const FEW: usize = 4;
/// How often a page that is to be pinned for long is moved, or tried to, before it is refused.
const MOVES: u32 = 8;

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
    pub(crate) access: PinAccess,
    pub(crate) term: PinTerm,
    pub(crate) label: Cow<'static, str>,
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
    /// The range has no page.
    #[error("the range to be pinned is empty: pin a page at least")]
    Empty,
    /// This is a fork's child: the memory is its parent's.
    #[error("this is a fork's child, and the memory is its parent's: make a Memory here")]
    Inherited,
    /// There is not enough RAM to have all the pages there at once, or the group of the file may not have more.
    #[error(
        "no RAM is left for the page at {at:?}; unpin something, or raise the budget, or the limit of the file's group"
    )]
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
    /// Somebody wants to write to pages that are mapped to be read only.
    #[error(
        "the page at {at:?} is mapped to be read only: map it to be written, or pin it to be read"
    )]
    NotWritable {
        /// The first such address.
        at: VirtAddr,
    },
    /// A page that is to be pinned for long is in `ZONE_MOVABLE`, and has no other place (GUP-2).
    #[error(
        "the page at {at:?} is in RAM that is to be such as can go off line (ZONE_MOVABLE), and no other has room for it: bring a block on line in Normal, or pin it for each transfer"
    )]
    Movable {
        /// The first such address.
        at: VirtAddr,
    },
    /// Memory of a device that a file system may be on: who cuts a file there would have to wait for as long (GUP-2).
    #[error(
        "the page at {at:?} is memory of a device in mode fsdax, which cannot be pinned for long: pin it for each transfer, or use mode devdax"
    )]
    FsDax {
        /// The first such address.
        at: VirtAddr,
    },
    /// The device whose memory is mapped there is being taken away, or was.
    #[error("the device whose memory is at {at:?} is being taken away: unmap it")]
    DeviceLeaving {
        /// The first such address.
        at: VirtAddr,
    },
    /// Somebody is letting go of a page of a device just now.
    #[error("somebody is letting go of the device's page at {at:?}: try again")]
    DeviceBusy {
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

/// Whose pages are pinned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Whose {
    /// Pages of anonymous memory: whoever mapped them may have references to their bytes.
    Anonymous,
    /// Pages of files: nobody has references to their bytes.
    File,
    /// Pages of a device: nobody has references to their bytes.
    Device,
}

/// Pages that stay where they are until this is dropped.
///
/// # Invariants
///
/// Each frame has one pin that belongs to this value, and is the one that its page's entry names. Those of devices are in `dax`.
#[derive(Debug)]
pub struct PinnedPages {
    space: Pinning,
    at: VirtAddr,
    pages: u32,
    frames: SmallVec<[Pfn; FEW]>,
    access: PinAccess,
    whose: Whose,
    dax: Vec<DaxPin>,
    /// The files of which they are: what is written through the pins reaches them, even if nobody else has them open any more.
    files: SmallVec<[MappedFile; 1]>,
    ticket: Ticket,
}

impl PinnedPages {
    /// No page yet, of `pages` from `at` on. The caller is who holds them.
    #[track_caller]
    fn begin(space: Pinning, at: VirtAddr, pages: u32, pin: &Pin) -> Self {
        let end = at.get().saturating_add(pages as usize * PAGE_SIZE);
        let (label, site) = (pin.label.clone(), Location::caller());
        let ticket = space.map.holders().add(|| Holder {
            label,
            site,
            since_ns: space.map.now_ns(),
            range: at.get()..end,
        });
        // Of devices only `pin_user_pages` knows: the fast path finds no file there.
        let whose = if space.page_at(at).is_some() {
            Whose::Anonymous
        } else {
            Whose::File
        };
        // INVARIANT: no frame yet.
        Self {
            space,
            at,
            pages,
            frames: SmallVec::new(),
            access: pin.access,
            whose,
            dax: Vec::new(),
            files: SmallVec::new(),
            ticket,
        }
    }

    /// Makes room for the frames: for no more than there are, however long the range is.
    fn reserve(&mut self) {
        let most = usize::try_from(self.space.ram.limit()).unwrap_or(usize::MAX);
        self.frames.reserve_exact(most.min(self.pages as usize));
    }

    /// What the pages were pinned for.
    #[must_use]
    pub const fn access(&self) -> PinAccess {
        self.access
    }

    /// Whose pages they are.
    #[must_use]
    pub const fn whose(&self) -> Whose {
        self.whose
    }

    /// The first pinned address. With [`len_bytes`](Self::len_bytes) it is the one `iovec` that a ring of one's own, `preadv` or
    /// `pwritev` needs: the addresses are mapped for as long as this lives, except for those of a device.
    #[must_use]
    pub const fn start(&self) -> VirtAddr {
        self.at
    }

    /// Pinned bytes.
    #[must_use]
    pub const fn len_bytes(&self) -> usize {
        self.pages as usize * PAGE_SIZE
    }
}

impl Drop for PinnedPages {
    fn drop(&mut self) {
        if self.space.mmu.is_inherited() {
            // The pins are the parent's, and whoever had a lock of this copy may not be here to let go of it.
            let _files = ManuallyDrop::new(mem::take(&mut self.files));
            let _dax = ManuallyDrop::new(mem::take(&mut self.dax));
            return;
        }
        for frame in &self.frames {
            self.space.ram.unpin(*frame);
        }
        self.dax.clear();
        for file in &self.files {
            file.after_unpin();
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
    let site = Location::caller();
    let mut pinned = PinnedPages::begin(Pinning::new(space), at, pages, pin);
    if pinned.whose == Whose::File && space.dax.at(at).is_some() {
        pinned.whose = Whose::Device;
    }
    // INVARIANT: each of these pins the frame that the page's entry names; an early return drops the pins so far.
    match pinned.whose {
        Whose::Anonymous => {
            pinned.reserve();
            for nth in 0..pages {
                let at = nth_page(at, nth)?;
                let pin_page = || space.pin_page(worker, at, pin.access);
                pinned.frames.push(space.pin_for(pin.term, at, pin_page)?);
            }
        }
        Whose::Device => {
            space.pin_dax_pages(at, pages, pin, Who::Site(site), &mut pinned.dax)?;
        }
        Whose::File => {
            pinned.reserve();
            space.pin_file_pages(worker, at, pages, pin, &mut pinned)?;
        }
    }
    Ok(pinned)
}

/// Pins pages of one mapping, for a short time, that are all in RAM and need nothing done to them (`gup_fast`). `None` if there is
/// more to do, or to say, for [`pin_user_pages`]; nothing stays pinned then.
#[track_caller]
pub fn pin_user_pages_fast(
    space: &Pinning,
    at: VirtAddr,
    pages: u32,
    pin: &Pin,
) -> Option<PinnedPages> {
    if pin.term == PinTerm::Long {
        return None;
    }
    let at = at.page_start();
    let mut pinned = PinnedPages::begin(space.clone(), at, pages, pin);
    pinned.reserve();
    // INVARIANT: each of these pins the frame that the page's entry names; an early return drops the pins so far.
    match pinned.whose {
        Whose::Anonymous => {
            let first = space.page_at(at)?.0;
            for page in (first..first.checked_add(pages)?).map(PageIndex) {
                pinned.frames.push(space.pin_fast(page, pin.access)?);
            }
        }
        Whose::File => space.pin_cached(at, pages, pin.access, &mut pinned)?,
        Whose::Device => return None,
    }
    Some(pinned)
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

    /// Pins pages of a mapped file that are there.
    fn pin_cached(
        &self,
        at: VirtAddr,
        pages: u32,
        access: PinAccess,
        pinned: &mut PinnedPages,
    ) -> Option<()> {
        let (vma, cache) = self.files.mapping_at(at)?;
        let first = vma.page_at(at)?;
        let run = first..first.checked_add(pages)?;
        let may_not = access == PinAccess::Write && vma.access == VmaAccess::Read;
        if may_not || run.end > vma.file_pages().end {
            return None;
        }
        for page in run.map(PageIndex) {
            pinned.frames.push(cache.try_pin(page, access)?);
        }
        pinned.files.push(cache);
        Some(())
    }

    /// Pins pages of mapped files.
    fn pin_file_pages(
        &self,
        worker: &mut Worker,
        at: VirtAddr,
        pages: u32,
        pin: &Pin,
        pinned: &mut PinnedPages,
    ) -> Result<(), PinError> {
        let mut done = 0;
        while done < pages {
            let start = nth_page(at, done)?;
            let found = self.files.mapping_at(start);
            let found = found.and_then(|(vma, cache)| Some((vma.page_at(start)?, vma, cache)));
            let (first, vma, cache) = found.ok_or(PinError::BadAddress { at: start })?;
            match (pin.access, pin.term, vma.access) {
                (PinAccess::Write, _, VmaAccess::Read) => {
                    return Err(PinError::NotWritable { at: start });
                }
                (PinAccess::Write, PinTerm::Long, VmaAccess::ReadWrite) => {
                    return Err(PinError::LongTerm { at: start });
                }
                (PinAccess::Write, PinTerm::Short, VmaAccess::ReadWrite)
                | (PinAccess::Read, ..) => {}
            }
            let end = vma.file_pages().end.min(first.saturating_add(pages - done));
            for page in first..end {
                let at = nth_page(start, page - first)?;
                let mut pin_one = || self.pin_file_page(worker, &cache, (page, at), pin.access);
                let frame = self.pin_for(pin.term, at, &mut pin_one)?;
                pinned.frames.push(frame);
            }
            pinned.files.push(cache);
            done += end - first;
        }
        Ok(())
    }

    /// Pins a page, and first moves it to where it may be pinned for so long (GUP-2; `check_and_migrate_movable_pages`).
    fn pin_for(
        &self,
        term: PinTerm,
        at: VirtAddr,
        mut pin: impl FnMut() -> Result<Pfn, PinError>,
    ) -> Result<Pfn, PinError> {
        for _ in 0..MOVES {
            let frame = pin()?;
            match term {
                PinTerm::Short => return Ok(frame),
                PinTerm::Long if !self.ram.is_movable(frame) => return Ok(frame),
                PinTerm::Long => self.ram.unpin(frame),
            }
            match self.replace_frame(frame, Target::Unmovable) {
                // Somebody else has it pinned: perhaps not for long.
                Ok(()) | Err(NotReplaced::Held) => {}
                Err(NotReplaced::Full) => {
                    self.make_room(Caller::Reclaimer, BATCH);
                }
            }
        }
        Err(PinError::Movable { at })
    }

    fn pin_file_page(
        &self,
        worker: &mut Worker,
        cache: &PageCache,
        (page, at): (u32, VirtAddr),
        access: PinAccess,
    ) -> Result<Pfn, PinError> {
        loop {
            let pinned = cache.pin(worker, page, access);
            let wants_more = pinned == Err(NotPinned::NoMemory);
            if !wants_more || self.make_room_for(cache, Caller::Reclaimer) == 0 {
                return pinned.map_err(|error| error.at(at));
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
            if let Some(frame) = self.pin_fast(page, access) {
                return Ok(frame);
            }
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

    /// Pins a page that is there, without a lock; `None` if that takes more.
    fn pin_fast(&self, page: PageIndex, access: PinAccess) -> Option<Pfn> {
        let frame = may_pin(self.table.peek(page), access)?;
        self.map.frame(frame).try_pin().ok()?;
        // From here on nobody can claim the frame, and what was done under a claim before we see.
        if self.is_same(page, access, frame) {
            return Some(frame);
        }
        self.ram.unpin(frame);
        None
    }

    fn is_same(&self, page: PageIndex, access: PinAccess, frame: Pfn) -> bool {
        #[cfg(shuttle)]
        if seeded_bug::has(SeededBug::PinLooksOnce) {
            return true;
        }
        may_pin(self.table.peek(page), access) == Some(frame)
    }

    /// Pins a page that is there, under its cursor; `None` if it has to be brought in first.
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

/// The frame of an entry that can be pinned as it is: somebody who writes must leave no clean copy behind (GUP-4).
const fn may_pin(pte: Pte, access: PinAccess) -> Option<Pfn> {
    match (pte, access) {
        (Pte::Present { frame, .. }, PinAccess::Read)
        | (
            Pte::Present {
                frame,
                copy: Copy::None,
                ..
            },
            PinAccess::Write,
        ) => Some(frame),
        (
            Pte::Present {
                copy: Copy::Kept | Copy::File,
                ..
            },
            PinAccess::Write,
        )
        | (Pte::None | Pte::Staged { .. } | Pte::Device { .. } | Pte::Poisoned, _) => None,
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
