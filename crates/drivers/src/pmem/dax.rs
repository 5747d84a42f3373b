//! Direct access to a namespace: its frames, and who may map and pin them (DAX-1).
//!
//! The server calls this for its clients, who get a file descriptor to map. A mapping is shared and aligned, or refused.

use core::mem::ManuallyDrop;
use core::ops::Range;
use core::panic::Location;
use std::borrow::Cow;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use pgmap_core::addr::{PAGE_SIZE, Pfn, PfnRange};
use pgmap_core::holders::Holder;
use pgmap_core::memremap::{DevPagemap, MemoryMap, PgmapGuard};
use pgmap_core::page::GetError;
use rustix::io::Errno;

use super::badblocks::SECTOR_BYTES;
use super::device::Pmem;
use super::ledger::{Entry, Hold, HoldKind, Ledger};
use super::namespace::Align;
use super::region::Storage;

const PAGE: u64 = PAGE_SIZE as u64;

/// What of a namespace can be mapped and pinned.
#[derive(Debug)]
pub(super) struct Dax {
    pub(super) map: Arc<MemoryMap>,
    pub(super) pagemap: DevPagemap,
    pub(super) frames: PfnRange,
    pub(super) ledger: Ledger,
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
    /// Bytes in the range are lost.
    #[error("the bytes from {offset} on are lost: write the whole block to mend it")]
    Bad {
        /// The first of them.
        offset: u64,
    },
    /// A frame has as many references or pins as can be counted (REF-5).
    #[error("the range is held as often as can be counted: somebody leaks holds")]
    TooMany,
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
    #[track_caller]
    pub fn pin(
        self: &Arc<Self>,
        bytes: Range<u64>,
        client: Client,
    ) -> Result<PinGuard, AccessError> {
        let dax = self.dax.as_ref().ok_or(AccessError::NoFrames)?;
        let _held = dax.pagemap.try_get().ok_or(AccessError::Leaving)?;
        let frames = self.frames_of(&bytes, Align::Page)?;
        // Entered first: no hole is punched from here on.
        let entry = dax.enter(HoldKind::Pinned, &bytes, client);
        let pinned = match self.bad.first_in(&bytes) {
            Some(sector) => Err(AccessError::Bad {
                offset: sector * SECTOR_BYTES,
            }),
            None => dax.pin_all(frames),
        };
        if let Err(error) = pinned {
            dax.ledger.remove(entry);
            return Err(error);
        }
        Ok(PinGuard {
            pmem: Arc::clone(self),
            frames,
            entry,
        })
    }

    /// Lets a client map bytes: it gets the guard's descriptor, and says when it has unmapped by dropping the guard.
    /// Of a file, taking the device away waits for that; volatile memory is taken away from under the mapping.
    ///
    /// # Errors
    ///
    /// [`AccessError`]: shared and aligned mappings only (DAX-1).
    #[track_caller]
    pub fn map(
        self: &Arc<Self>,
        bytes: Range<u64>,
        sharing: Sharing,
        client: Client,
    ) -> Result<MapGuard, AccessError> {
        let dax = self.dax.as_ref().ok_or(AccessError::NoFrames)?;
        let shared = self.medium.frames().ok_or(AccessError::NoFrames)?;
        let _held = dax.pagemap.try_get().ok_or(AccessError::Leaving)?;
        match sharing {
            Sharing::Shared => {}
            Sharing::Private => return Err(AccessError::NotShared),
        }
        let frames = self.frames_of(&bytes, self.namespace.align)?;
        let entry = dax.enter(HoldKind::Mapped, &bytes, client);
        let held = match self.region.storage() {
            // Revoked by truncation, so it holds nothing.
            Storage::MemoryFiles => Ok(Units::None),
            Storage::Medium => {
                let range = self.start + bytes.start..self.start + bytes.end;
                match shared.allocate(&range) {
                    Ok(()) | Err(Errno::OPNOTSUPP) => dax.hold_units(frames, self.namespace.align),
                    Err(errno) => Err(AccessError::NoRoom(errno)),
                }
            }
        };
        match held {
            Ok(units) => Ok(MapGuard {
                pmem: Arc::clone(self),
                bytes,
                units,
                entry,
            }),
            Err(error) => {
                dax.ledger.remove(entry);
                Err(error)
            }
        }
    }

    /// Who maps or pins what, oldest first.
    #[must_use]
    pub fn holds(&self) -> Vec<Hold> {
        self.dax
            .as_ref()
            .map_or_else(Vec::new, |dax| dax.ledger.all())
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

/// The frames of a range, one in each `step`.
fn each(frames: PfnRange, step: u64) -> impl Iterator<Item = Pfn> {
    let steps = frames.count().div_ceil(step);
    (0..steps).filter_map(move |nth| frames.start().checked_add(nth * step))
}

impl Dax {
    #[track_caller]
    fn enter(&self, kind: HoldKind, bytes: &Range<u64>, client: Client) -> Entry {
        let as_usize = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        let holder = Holder {
            label: client.label,
            site: Location::caller(),
            since_ns: self.map.now_ns(),
            range: as_usize(bytes.start)..as_usize(bytes.end),
        };
        let pid = client.pid;
        self.ledger.add(Hold { kind, pid, holder })
    }

    /// Takes a reference to a frame, the first of which keeps the device from being taken away (REF-2).
    fn hold(&self, pfn: Pfn) -> Result<(), AccessError> {
        let frame = self.map.frame(pfn);
        loop {
            match frame.try_get() {
                Ok(()) => return Ok(()),
                Err(GetError::TooMany(_)) => return Err(AccessError::TooMany),
                Err(GetError::NotLive) => {}
            }
            let guard = self.pagemap.try_get().ok_or(AccessError::Leaving)?;
            if frame.allocate() {
                // The frame keeps the guard's reference, until `put_page` finds it unused.
                let _kept = ManuallyDrop::new(guard);
                return Ok(());
            }
            if frame.is_poisoned() {
                let offset = (pfn.get() - self.frames.start().get()) * PAGE;
                return Err(AccessError::Bad { offset });
            }
        }
    }

    fn pin_all(&self, frames: PfnRange) -> Result<(), AccessError> {
        for (done, pfn) in each(frames, 1).enumerate() {
            let pinned = self.pin_one(pfn);
            if let Err(error) = pinned {
                each(frames, 1).take(done).for_each(|pfn| self.unpin(pfn));
                return Err(error);
            }
        }
        Ok(())
    }

    fn pin_one(&self, pfn: Pfn) -> Result<(), AccessError> {
        self.hold(pfn)?;
        self.map.frame(pfn).try_pin().map_err(|_| {
            self.pagemap.put_page(pfn);
            AccessError::TooMany
        })
    }

    fn unpin(&self, pfn: Pfn) {
        // Never the last hold: the reference that came with the pin is still there.
        let _held = self.map.frame(pfn).unpin();
        self.pagemap.put_page(pfn);
    }

    /// A reference to the first frame of each unit of mapping: it stands for the unit.
    fn hold_units(&self, frames: PfnRange, unit: Align) -> Result<Units, AccessError> {
        let step = unit.bytes() / PAGE;
        for (done, pfn) in each(frames, step).enumerate() {
            if let Err(error) = self.hold(pfn) {
                let held = each(frames, step).take(done);
                held.for_each(|pfn| self.pagemap.put_page(pfn));
                return Err(error);
            }
        }
        Ok(Units::Held { frames, step })
    }
}

/// Pins on whole pages; dropping it unpins them.
#[derive(Debug)]
pub struct PinGuard {
    pmem: Arc<Pmem>,
    frames: PfnRange,
    entry: Entry,
}

impl PinGuard {
    /// The pinned frames.
    #[must_use]
    pub const fn frames(&self) -> PfnRange {
        self.frames
    }
}

impl Drop for PinGuard {
    fn drop(&mut self) {
        let Some(dax) = &self.pmem.dax else { return };
        each(self.frames, 1).for_each(|pfn| dax.unpin(pfn));
        dax.ledger.remove(self.entry);
    }
}

#[derive(Debug)]
enum Units {
    None,
    Held { frames: PfnRange, step: u64 },
}

/// Bytes that a client maps; dropping it says that it has unmapped them.
#[derive(Debug)]
pub struct MapGuard {
    pmem: Arc<Pmem>,
    bytes: Range<u64>,
    units: Units,
    entry: Entry,
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
        let Some(dax) = &self.pmem.dax else { return };
        dax.ledger.remove(self.entry);
        if let Units::Held { frames, step } = self.units {
            each(frames, step).for_each(|pfn| dax.pagemap.put_page(pfn));
        }
    }
}
