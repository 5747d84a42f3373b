//! `memremap_pages`: frames for a device's memory, and how they are taken away again.
//!
//! A [`MemoryMap`] knows every frame. [`MemoryMap::memremap_pages`] gives ranges of frame numbers to a device;
//! [`MemoryMap::get_dev_pagemap`] finds the device of a frame without a lock; and the teardown is a chain of
//! types, [`DevPagemap`] -> [`Killed`] -> [`Drained`], so that nothing is removed while somebody uses it (MAP-6).

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use pgmap_sync::atomic::{AtomicBool, Ordering};
use pgmap_sync::{Mutex, RwSem};

use crate::addr::{Pfn, PfnRange};
use crate::altmap::Altmap;
use crate::devres::Devres;
use crate::driver::PrivateOps;
use crate::holders::Holders;
use crate::memtype::Memtypes;
use crate::page::Frame;
use crate::platform::{OutOfAddressSpace, Platform};
use crate::ram::Ram;
use crate::resource::Resources;
use crate::vmemmap::ZeroedSlice;

mod frames;
mod hold;
mod kind;
mod lookup;
mod page_pgmap;
mod pgmap;
mod populate;
mod request;
mod teardown;

pub use frames::PageError;
pub use hold::{HeldPages, Hold};
pub use kind::MemoryType;
pub use lookup::PgmapGuard;
pub use page_pgmap::PagePgmap;
pub use pgmap::DevPagemap;
pub use request::{MapError, Order, Owner, PROGRESS_FRAMES, Place, Progress, Request};
pub use teardown::{Drained, Killed, StillHeld};

use lookup::{Lookup, MAX_PGMAPS};
use pgmap::Pgmap;

pub use crate::sparse::SUBSECTION_FRAMES;

/// All frames, and who has them.
pub struct MemoryMap {
    platform: &'static dyn Platform,
    frames: ZeroedSlice<Frame>,
    lookup: Lookup,
    pub(crate) resources: Mutex<Resources>,
    /// Held by who adds or removes memory, and by readers that rely on what there is (HOT-3).
    pub(crate) hotplug: RwSem,
    memtypes: Memtypes,
    pub(crate) max_frames: u64,
    holders: Holders,
}

/// Short: everything that a user has of us leads here, and may be printed.
impl fmt::Debug for MemoryMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("MemoryMap");
        f.field("max_frames", &self.max_frames)
            .finish_non_exhaustive()
    }
}

impl MemoryMap {
    /// A map of `max_frames` frames that nobody has.
    ///
    /// # Errors
    ///
    /// [`OutOfAddressSpace`] if the platform has no room for 32 bytes a frame.
    pub fn new(
        platform: &'static dyn Platform,
        max_frames: u64,
    ) -> Result<Arc<Self>, OutOfAddressSpace> {
        let bytes = usize::MAX;
        let len = usize::try_from(max_frames).map_err(|_| OutOfAddressSpace { bytes })?;
        Ok(Arc::new(Self {
            platform,
            frames: ZeroedSlice::new(platform, len)?,
            lookup: Lookup::new(platform, max_frames)?,
            resources: Mutex::new(Resources::default()),
            hotplug: RwSem::new(),
            memtypes: Memtypes::default(),
            max_frames,
            holders: Holders::default(),
        }))
    }

    /// The frame with this number.
    ///
    /// # Panics
    ///
    /// If the map is not that long.
    #[must_use]
    pub fn frame(&self, pfn: Pfn) -> &Frame {
        &self.frames[pfn.as_u32() as usize]
    }

    /// Who holds what.
    #[must_use]
    pub const fn holders(&self) -> &Holders {
        &self.holders
    }

    pub(crate) const fn memtypes(&self) -> &Memtypes {
        &self.memtypes
    }

    /// How many frames of a range are System RAM; `None` if it is not inside the map.
    pub(crate) fn ram_frames(&self, range: PfnRange) -> Option<u64> {
        (range.end() <= self.max_frames).then(|| self.resources.lock().ram_frames(range))
    }

    /// The machine's clock, for ages.
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        self.platform.now_ns()
    }

    /// Makes the first `frames` frames System RAM.
    ///
    /// # Errors
    ///
    /// [`MapError::RamTwice`], or [`MapError::NoRoom`] if the map is not that long.
    pub fn add_ram(self: &Arc<Self>, frames: u64) -> Result<Ram, MapError> {
        self.add_ram_with_spare(frames, 0)
    }

    /// The same, with `spare` frames behind them that are in no block, and had only while the limit is suspended.
    ///
    /// # Errors
    ///
    /// As [`add_ram`](Self::add_ram).
    pub fn add_ram_with_spare(self: &Arc<Self>, frames: u64, spare: u64) -> Result<Ram, MapError> {
        let range = PfnRange::new(Pfn::from_u32(0), frames).ok_or(MapError::NoRoom)?;
        let all = PfnRange::new(Pfn::from_u32(0), frames.saturating_add(spare));
        let all = all.filter(|all| all.end() <= self.max_frames);
        let all = all.ok_or(MapError::NoRoom)?;
        let _hotplug = self.mem_hotplug_begin();
        self.resources.lock().add_ram(all)?;
        let spare = Pfn::new(frames).and_then(|start| PfnRange::new(start, spare));
        Ok(Ram::new(Arc::clone(self), range, spare))
    }

    /// Gives frame numbers to memory that the CPU cannot address: `frames` of them, in an offset space of their own (MAP-10).
    ///
    /// # Errors
    ///
    /// [`MapError::NoRoom`].
    pub fn memremap_private(
        self: &Arc<Self>,
        ops: Arc<dyn PrivateOps>,
        frames: u64,
    ) -> Result<DevPagemap, MapError> {
        let name = String::from(ops.name());
        self.memremap_request(Request::anywhere(name, frames, MemoryType::Private(ops)))
    }

    /// Gives the frames of one or more physical ranges to a device (MAP-1): base pages, with their metadata in RAM. All or
    /// nothing (MAP-3).
    ///
    /// # Errors
    ///
    /// [`MapError::IntersectsRam`] and [`MapError::Conflict`] for the range, aligned to sub-sections, that stands in the
    /// way; others' mappings stay as they are (MAP-2). [`MapError::NoRoom`].
    #[doc(alias = "devm_memremap_pages")]
    pub fn memremap_pages(
        self: &Arc<Self>,
        ranges: &[PfnRange],
        kind: MemoryType,
    ) -> Result<DevPagemap, MapError> {
        let name = kind.name();
        self.memremap_request(Request::at(name, ranges, kind))
    }

    /// As [`memremap_pages`](Self::memremap_pages), with all that can be asked for. All or nothing (MAP-3).
    ///
    /// # Errors
    ///
    /// See [`MapError`].
    pub fn memremap_request(
        self: &Arc<Self>,
        request: Request<'_>,
    ) -> Result<DevPagemap, MapError> {
        let (entry, ranges) = self.reserve(&request)?;
        let progress = request.progress;
        let pgmap = Arc::new(Pgmap::new(entry, ranges, request));
        let stuck = AtomicBool::new(false);
        let mut undo = Devres::new();
        // Relaxed, here and where it is set: this thread's own. Frames whose metadata stays on the device stay reserved.
        undo.push(|| {
            if !stuck.load(Ordering::Relaxed) {
                let _hotplug = self.mem_hotplug_begin();
                self.resources.lock().remove(pgmap.entry);
            }
        });
        // SAFETY: the ranges were reserved just now, so that they are nobody else's, and they cannot be found yet.
        unsafe { self.populate(&pgmap, progress, &stuck, &mut undo)? };
        undo.keep();
        let _hotplug = self.mem_hotplug_begin();
        let resources = self.resources.lock();
        // SAFETY: we hold the lock of `resources`. The entry is reserved for us, so its count is dead and at zero.
        unsafe { self.lookup.publish(&pgmap) };
        drop(resources);
        Ok(DevPagemap {
            map: Arc::clone(self),
            pgmap,
        })
    }

    /// Reserves what is asked for, if nothing stands in the way: the number of an entry, and the ranges.
    fn reserve(&self, request: &Request<'_>) -> Result<(u8, Vec<PfnRange>), MapError> {
        let _hotplug = self.mem_hotplug_begin();
        let mut resources = self.resources.lock();
        let ranges = match request.place {
            Place::At(ranges) => ranges.to_vec(),
            Place::Anywhere { frames } => {
                let room = resources.find_room(frames);
                alloc::vec![room.ok_or(MapError::NoRoom)?]
            }
        };
        request.check(&ranges, self.max_frames)?;
        let entry = (0..MAX_PGMAPS).find(|number| !resources.is_used(*number));
        let entry = entry.ok_or(MapError::NoRoom)?;
        resources.insert(entry, &ranges)?;
        resources.describe(entry, request.kind.descriptor(), &request.name);
        Ok((entry, ranges))
    }

    /// The pages of its device in which the metadata of a frame's sub-section lives, if it lives on a device. Answers until the
    /// device is removed, dying or not (MAP-8).
    #[must_use]
    #[doc(alias = "to_vmem_altmap")]
    pub fn altmap_area(&self, pfn: Pfn) -> Option<PfnRange> {
        let _resources = self.resources.lock();
        // SAFETY: we hold the lock of `resources`.
        let pgmap = unsafe { self.lookup.section(pfn) }?;
        pgmap.altmap.as_ref().map(Altmap::area)
    }

    /// The device that has a frame, held so that it cannot go away. Without a lock, and exact at both ends (MAP-5).
    #[must_use]
    pub fn get_dev_pagemap(&self, pfn: Pfn) -> Option<PgmapGuard<'_>> {
        self.lookup.find(pfn)
    }
}

/// The whole sub-sections around a range, as first frame and end: the one computation that map and unmap use (MAP-4).
pub(crate) const fn aligned(range: PfnRange) -> (u64, u64) {
    let start = range.start().get();
    (
        start - start % SUBSECTION_FRAMES,
        range.end().next_multiple_of(SUBSECTION_FRAMES),
    )
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
