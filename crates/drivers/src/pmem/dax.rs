//! Direct access to a namespace: its frames, and who may map and pin them (DAX-1).
//!
//! The server calls this for its clients, who get a file descriptor to map. A mapping is shared and aligned, or refused.

use core::ops::Range;
use std::borrow::Cow;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use pgmap_core::addr::{PAGE_SIZE, Pfn, PfnRange};
use pgmap_core::dax::{DaxDevice, DaxError};
use pgmap_core::holders::{FrameHolder, FrameTicket, Who};
use pgmap_core::memremap::{DevPagemap, HeldPages, Hold, MemoryMap, PageError, PgmapGuard};
use pgmap_sync::{Mutex, PercpuRef};
use rustix::io::Errno;

use super::badblocks::SECTOR_BYTES;
use super::device::Pmem;
use super::hold;
use super::namespace::Align;
use super::storage::Storage;

const PAGE: u64 = PAGE_SIZE as u64;

/// What of a namespace can be mapped and pinned.
#[derive(Debug)]
pub(super) struct Dax {
    pub(super) map: Arc<MemoryMap>,
    pub(super) pagemap: DevPagemap,
    /// Those of its bytes; the device may have more, for their metadata.
    pub(super) frames: PfnRange,
    /// Mappings of volatile memory, which hold no frames.
    pub(super) mappings: PercpuRef,
    /// Held while a hole is punched, and while a hold is entered: never both.
    pub(super) holes: Mutex<()>,
}

/// Whether a client wants to see what others write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sharing {
    /// Everybody sees every store.
    Shared,
    /// A copy of its own for each page that is written.
    Private,
}

/// Who wants to hold bytes.
#[derive(Clone, Debug)]
pub struct Client {
    /// What they say they are.
    pub label: Cow<'static, str>,
    /// Their process.
    pub pid: u32,
}

/// Why bytes cannot be accessed directly.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AccessError {
    /// The namespace has no frames.
    #[error("the namespace is in mode raw, which has nothing to map or pin: use fsdax or devdax")]
    NoFrames,
    /// The device is being taken away.
    #[error("the device is being taken away")]
    Leaving,
    /// The range is empty, or not all on the device.
    #[error("the range is not on the device")]
    OutOfRange,
    /// A private mapping (DAX-1).
    #[error("a private mapping would copy what it writes: map the device shared")]
    NotShared,
    /// The range does not begin and end at a multiple of the alignment (DAX-1).
    #[error("the range must begin and end at a multiple of {0}, the alignment of the namespace")]
    NotAligned(Align),
    /// Bytes in the range are lost (PMEM-3): direct access can neither tell a reader so, nor mend them.
    #[error("block {} is bad (512 bytes at {offset:#x}): write all of it over NBD, or give its bytes up with clear-error", offset / SECTOR_BYTES)]
    Bad {
        /// The first of them.
        offset: u64,
    },
    /// A frame has as many references or pins as can be counted (REF-5).
    #[error("the range is held as often as can be counted: somebody leaks holds")]
    TooMany,
    /// Somebody is letting go of a page of the range just now.
    #[error("somebody is letting go of the range: try again")]
    Busy,
    /// There is no room for all of the range, and a store to it would be a SIGBUS.
    #[error("there is no room for all of the range: {0}")]
    NoRoom(Errno),
}

/// Frames that follow one another, held while this is.
#[derive(Debug)]
pub struct DirectAccess<'a> {
    /// The first.
    pub first: Pfn,
    /// How many.
    pub pages: u64,
    _held: PgmapGuard<'a>,
}

impl Pmem {
    /// The frames of the namespace from page `first` on: how many follow one another, at most `pages`; fewer at the
    /// namespace's end and before a lost block, and never more (PMEM-1).
    ///
    /// # Errors
    ///
    /// [`AccessError`].
    #[doc(alias = "dax_direct_access")]
    pub fn direct_access(&self, first: u64, pages: u64) -> Result<DirectAccess<'_>, AccessError> {
        let dax = self.dax.as_ref().ok_or(AccessError::NoFrames)?;
        let held = dax.pagemap.try_get().ok_or(AccessError::Leaving)?;
        let all = dax.frames.count();
        let end = first.saturating_add(pages).min(all);
        let start = dax
            .frames
            .start()
            .checked_add(first)
            .filter(|_| first < end);
        let start = start.ok_or(AccessError::OutOfRange)?;
        let bad = self.bad.first_in(&(first * PAGE..end * PAGE));
        let end = bad.map_or(end, |sector| sector * SECTOR_BYTES / PAGE);
        if end == first {
            let offset = bad.unwrap_or(0) * SECTOR_BYTES;
            return Err(AccessError::Bad { offset });
        }
        Ok(DirectAccess {
            first: start,
            pages: end - first,
            _held: held,
        })
    }

    /// Pins whole pages: they stay where they are until the guard is dropped, and taking the device away waits for it.
    /// Exactly one pin on each frame (REF-5), and the client's name on it (REF-7).
    ///
    /// # Errors
    ///
    /// [`AccessError`]; nothing is pinned then.
    #[doc(alias = "pin_user_pages")]
    pub fn pin(
        self: &Arc<Self>,
        bytes: Range<u64>,
        client: Client,
    ) -> Result<PinGuard, AccessError> {
        let held = self.pin_for(&bytes, client.label, Who::Process(client.pid))?;
        Ok(PinGuard {
            held,
            _pmem: Arc::clone(self),
        })
    }

    fn pin_for(
        &self,
        bytes: &Range<u64>,
        label: Cow<'static, str>,
        who: Who,
    ) -> Result<HeldPages, AccessError> {
        let dax = self.dax.as_ref().ok_or(AccessError::NoFrames)?;
        let frames = self.frames_of(bytes, Align::Page)?;
        let held = dax.hold(frames, Hold::Pin, label, who)?;
        // Looked at while it is held: what is not lost now is pinned.
        self.whole(bytes)?;
        Ok(held)
    }

    /// Lets a client map bytes: it gets the guard's descriptor, and says when it has unmapped by dropping the guard.
    /// Taking the device away waits for that, unless it is volatile memory that nobody wants to keep.
    ///
    /// # Errors
    ///
    /// [`AccessError`]: shared and aligned mappings only (DAX-1), and of bytes of which none is lost (PMEM-3).
    pub fn map(
        self: &Arc<Self>,
        bytes: Range<u64>,
        sharing: Sharing,
        client: Client,
    ) -> Result<MapGuard, AccessError> {
        let dax = self.dax.as_ref().ok_or(AccessError::NoFrames)?;
        let shared = self.medium.frames().ok_or(AccessError::NoFrames)?;
        match sharing {
            Sharing::Shared => {}
            Sharing::Private => return Err(AccessError::NotShared),
        }
        let frames = self.frames_of(&bytes, self.namespace.align)?;
        // Until there is room: memory that was revoked meanwhile would get some again.
        let _alive = dax.pagemap.try_get().ok_or(AccessError::Leaving)?;
        let range = self.start + bytes.start..self.start + bytes.end;
        let (stake, needs_room) = match self.region.storage() {
            Storage::MemoryFiles(huge) => (
                Stake::Revocable(dax.register(frames, client)?),
                huge.is_some(),
            ),
            Storage::Medium => {
                let who = Who::Process(client.pid);
                let held = dax.hold(frames, Hold::Reference, client.label, who)?;
                (Stake::Frames { _held: held }, true)
            }
        };
        let guard = MapGuard {
            stake,
            pmem: Arc::clone(self),
            bytes,
        };
        self.whole(&guard.bytes)?;
        // While it is held, so that nobody makes a hole again.
        let room = if needs_room {
            shared.allocate(&range)
        } else {
            Ok(())
        };
        match room {
            Ok(()) | Err(Errno::OPNOTSUPP) => Ok(guard),
            Err(errno) => Err(AccessError::NoRoom(errno)),
        }
    }

    /// Who maps or pins what, oldest first. Nobody does once the device is out of use: its frames are others' then.
    #[must_use]
    pub fn holds(&self) -> Vec<hold::Hold> {
        let ours = |dax: &&Dax| dax.pagemap.contains(dax.frames.start());
        let Some(dax) = self.dax.as_ref().filter(ours) else {
            return Vec::new();
        };
        let holders = dax.map.holders().of_frames(dax.frames).into_iter();
        holders
            .map(|holder| hold::Hold::of(holder, dax.frames))
            .collect()
    }

    /// Refuses bytes of which some are lost.
    fn whole(&self, bytes: &Range<u64>) -> Result<(), AccessError> {
        match self.bad.first_in(bytes) {
            None => Ok(()),
            Some(sector) => Err(AccessError::Bad {
                offset: sector * SECTOR_BYTES,
            }),
        }
    }

    /// The frames that bytes touch.
    pub(super) fn frames_around(&self, bytes: &Range<u64>) -> Option<PfnRange> {
        let first = bytes.start / PAGE;
        let start = self.dax.as_ref()?.frames.start().checked_add(first)?;
        PfnRange::new(start, bytes.end.div_ceil(PAGE).checked_sub(first)?)
    }

    /// The frames of whole units of bytes.
    fn frames_of(&self, bytes: &Range<u64>, unit: Align) -> Result<PfnRange, AccessError> {
        let dax = self.dax.as_ref().ok_or(AccessError::NoFrames)?;
        if bytes.is_empty() || self.check(bytes).is_err() {
            return Err(AccessError::OutOfRange);
        }
        let aligned = |at: u64| at.is_multiple_of(unit.bytes());
        if !aligned(bytes.start) || !aligned(bytes.end) {
            return Err(AccessError::NotAligned(unit));
        }
        let start = dax.frames.start().checked_add(bytes.start / PAGE);
        let count = (bytes.end - bytes.start) / PAGE;
        start
            .and_then(|start| PfnRange::new(start, count))
            .ok_or(AccessError::OutOfRange)
    }
}

impl DaxDevice for Pmem {
    fn pagemap(&self) -> Option<&DevPagemap> {
        self.pagemap()
    }

    fn pin_bytes(
        &self,
        bytes: &Range<u64>,
        label: Cow<'static, str>,
        who: Who,
    ) -> Result<HeldPages, DaxError> {
        self.pin_for(bytes, label, who)
            .map_err(|error| match error {
                AccessError::Leaving => DaxError::Leaving,
                AccessError::Bad { offset } => DaxError::Lost { offset },
                AccessError::TooMany => DaxError::TooMany,
                AccessError::Busy => DaxError::Busy,
                AccessError::NoFrames
                | AccessError::OutOfRange
                | AccessError::NotShared
                | AccessError::NotAligned(_)
                | AccessError::NoRoom(_) => DaxError::OutOfRange,
            })
    }
}

impl Dax {
    /// Holds the pages that frames are in, unless a hole is being punched there.
    fn hold(
        &self,
        frames: PfnRange,
        how: Hold,
        label: Cow<'static, str>,
        who: Who,
    ) -> Result<HeldPages, AccessError> {
        let _no_hole = self.holes.lock();
        let held = self.pagemap.hold(frames, how, label, who);
        held.map_err(|error| match error {
            PageError::Dying => AccessError::Leaving,
            PageError::NotOurs(_) => AccessError::OutOfRange,
            PageError::TooMany(_) => AccessError::TooMany,
            PageError::Busy(_) => AccessError::Busy,
            PageError::Poisoned(pfn) => AccessError::Bad {
                offset: (pfn.get() - self.frames.start().get()) * PAGE,
            },
        })
    }

    /// Enters a mapping that holds no frames, since it can be revoked.
    fn register(&self, frames: PfnRange, client: Client) -> Result<FrameTicket, AccessError> {
        if !self.mappings.try_get_live() {
            return Err(AccessError::Leaving);
        }
        let _no_hole = self.holes.lock();
        Ok(self.map.holders().add_frames(FrameHolder {
            label: client.label,
            who: Who::Process(client.pid),
            how: Hold::Reference,
            since_ns: self.map.now_ns(),
            frames,
        }))
    }

    /// Does something to frames, unless somebody holds them; nobody begins to meanwhile.
    pub(super) fn unless_held(
        &self,
        frames: PfnRange,
        punch: impl FnOnce() -> Result<(), Errno>,
    ) -> Option<Result<(), Errno>> {
        let _no_hold = self.holes.lock();
        let held = self.map.holders().of_frames(frames);
        held.is_empty().then(punch)
    }
}

/// Pins on whole pages; dropping it unpins them.
#[derive(Debug)]
pub struct PinGuard {
    // Dropped in this order: the device waits for its frames.
    held: HeldPages,
    _pmem: Arc<Pmem>,
}

impl PinGuard {
    /// The pinned frames.
    #[must_use]
    pub const fn frames(&self) -> PfnRange {
        self.held.range()
    }
}

/// What a mapping has of the device.
#[derive(Debug)]
enum Stake {
    /// References: it is waited for.
    Frames { _held: HeldPages },
    /// A place in the register: it may be revoked.
    Revocable(FrameTicket),
}

/// Bytes that a client maps; dropping it says that it has unmapped them.
#[derive(Debug)]
pub struct MapGuard {
    // Dropped in this order: the device waits for its frames.
    stake: Stake,
    pmem: Arc<Pmem>,
    bytes: Range<u64>,
}

impl MapGuard {
    /// The file to map, shared.
    ///
    /// Of an image it is the whole file: a client sees the label area and the other namespaces, too.
    #[must_use]
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.pmem
            .medium
            .frames()
            .map(pgmap_host::shared::SharedFrames::fd)
    }

    /// Where in the file the bytes are.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.pmem.start + self.bytes.start
    }

    /// The unit in which the machine maps them, in bytes.
    #[must_use]
    pub fn unit_bytes(&self) -> u64 {
        let frames = self.pmem.medium.frames();
        frames.map_or(PAGE, pgmap_host::shared::SharedFrames::unit_bytes)
    }

    /// The bytes, counted from the namespace's start.
    #[must_use]
    pub const fn bytes(&self) -> &Range<u64> {
        &self.bytes
    }

    pub(super) const fn pmem(&self) -> &Arc<Pmem> {
        &self.pmem
    }

    /// How many bytes.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.bytes.end - self.bytes.start
    }

    /// Never: there are no empty mappings.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Drop for MapGuard {
    fn drop(&mut self) {
        match (&self.stake, &self.pmem.dax) {
            (Stake::Revocable(ticket), Some(dax)) => {
                dax.map.holders().remove_frames(ticket);
                dax.mappings.put();
            }
            (Stake::Frames { .. }, _) | (Stake::Revocable(_), None) => {}
        }
    }
}
