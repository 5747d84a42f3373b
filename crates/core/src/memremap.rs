//! `memremap_pages`: frames for a device's memory, and how they are taken away again.
//!
//! A [`MemoryMap`] knows every frame. [`MemoryMap::memremap_pages`] gives a range of frame numbers to a device;
//! [`MemoryMap::get_dev_pagemap`] finds the device of a frame without a lock; and the teardown is a chain of
//! types, [`DevPagemap`] -> [`Killed`] -> [`Drained`], so that nothing is removed while somebody uses it (MAP-6).

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::fmt;
use core::mem::ManuallyDrop;
use core::time::Duration;

use pgmap_sync::atomic::{AtomicU8, Ordering};
use pgmap_sync::{Mutex, PercpuRef, RwSem, WaitQueue};

use crate::addr::{Pfn, PfnRange};
use crate::driver::{DeviceData, PrivateOps};
use crate::holders::Holders;
use crate::page::{Frame, Put};
use crate::platform::{OutOfAddressSpace, Platform};
use crate::ram::{FreeList, Ram};
use crate::resource::{Descriptor, Resources};
pub use crate::sparse::SUBSECTION_FRAMES;
use crate::vmemmap::ZeroedSlice;

pub use page_pgmap::PagePgmap;

mod page_pgmap;

/// Device mappings that there can be at once.
const MAX_PGMAPS: usize = 32;

/// What kind of memory a device has, and what it must be able to do (MAP-1).
#[derive(Debug)]
pub enum MemoryType {
    /// The CPU cannot address it. Its pages are migrated to RAM when they are touched.
    Private(Arc<dyn PrivateOps>),
    /// A file system maps it directly; who waits for a page to be idle is woken by its last put.
    FsDax(Arc<WaitQueue>),
    /// A character device maps it directly.
    Generic,
}

impl MemoryType {
    /// What the resource tree says of it.
    fn resource(&self) -> (Descriptor, &str) {
        match self {
            Self::Private(ops) => (Descriptor::DevicePrivate, ops.name()),
            Self::FsDax(_) => (Descriptor::PersistentMemory, "fsdax"),
            Self::Generic => (Descriptor::None, "devdax"),
        }
    }
}

/// Why frames could not be given to a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MapError {
    /// The range, or a part of it, is System RAM (MAP-2; the kernel's ENXIO).
    #[error("the frames from {:?} on are System RAM", .0.start())]
    IntersectsRam(PfnRange),
    /// The range conflicts with another device's (MAP-2; the kernel's ENOMEM).
    #[error("the frames from {:?} on belong to another device", .0.start())]
    Conflict(PfnRange),
    /// There are as many device mappings as there can be, or no frame numbers are left.
    #[error("there is no room for another device mapping")]
    NoRoom,
    /// RAM was given out already.
    #[error("this map has its RAM already")]
    RamTwice,
}

/// All frames, and who has them.
#[derive(Debug)]
pub struct MemoryMap {
    platform: &'static dyn Platform,
    frames: ZeroedSlice<Frame>,
    /// For each sub-section one more than the number of the entry of the device that has it; 0 for none.
    sections: ZeroedSlice<AtomicU8>, // written under `resources`' lock, read by anybody
    entries: Vec<Entry>,
    pub(crate) resources: Mutex<Resources>,
    /// Held by who adds or removes memory, and by readers that rely on what there is (HOT-3).
    pub(crate) hotplug: RwSem,
    pub(crate) max_frames: u64,
    holders: Holders,
}

/// A place for one device mapping.
///
/// # Invariants
///
/// `pgmap` changes only while `users` is dead and at zero, under the lock of `resources`.
struct Entry {
    users: PercpuRef,
    pgmap: UnsafeCell<Option<Arc<Pgmap>>>,
}

// SAFETY: by the type invariant `pgmap` is only changed while nobody reads it.
unsafe impl Sync for Entry {}
// SAFETY: `PercpuRef` and `Arc<Pgmap>` may be sent.
unsafe impl Send for Entry {}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("users", &self.users)
            .finish_non_exhaustive()
    }
}

impl Entry {
    fn try_get(&self) -> Option<PgmapGuard<'_>> {
        // Lazily: a guard that is made is also dropped.
        let live = self.users.try_get_live();
        live.then(|| PgmapGuard { entry: self })
    }
}

/// One device's frames.
#[derive(Debug)]
struct Pgmap {
    /// What was asked for, and what is reserved: the same, aligned to sub-sections.
    ranges: Vec<PfnRange>,
    entry: u8,
    kind: MemoryType,
    /// Free frames of the first range of a private mapping.
    free: Mutex<FreeList>,
    stage: AtomicU8, // A: LIVE -> KILLED by compare-exchange; from there on by who did that
}

impl Pgmap {
    /// In use.
    const LIVE: u8 = 0;
    /// One handle is taking it away: it is that handle's [`Killed`] or [`Drained`].
    const KILLED: u8 = 1;
    /// Taken away, for ever. Its entry may be another mapping's by now, and so may its frame numbers.
    const REMOVED: u8 = 2;

    fn stage(&self) -> u8 {
        // Acquire: pairs with the releases in `kill`, `resurrect` and `remove`.
        self.stage.load(Ordering::Acquire)
    }

    /// Drops a reference of a page. If it was the last, the page is free, and who dropped it takes its user away.
    fn put(&self, map: &MemoryMap, pfn: Pfn) -> Put {
        let frame = map.frame(pfn);
        if frame.put() == Put::Held {
            return Put::Held;
        }
        match &self.kind {
            MemoryType::Private(ops) => ops.page_free(frame.data()),
            MemoryType::FsDax(idle) => idle.wake_all(),
            MemoryType::Generic => {}
        }
        self.free.lock().give(map, self.ranges[0].start(), pfn);
        Put::Last
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
        let sections = len.div_ceil(usize::try_from(SUBSECTION_FRAMES).unwrap_or(512));
        let entry = || Entry {
            users: PercpuRef::new_dead(),
            pgmap: UnsafeCell::new(None),
        };
        Ok(Arc::new(Self {
            platform,
            frames: ZeroedSlice::new(platform, len)?,
            sections: ZeroedSlice::new(platform, sections)?,
            entries: (0..MAX_PGMAPS).map(|_| entry()).collect(),
            resources: Mutex::new(Resources::default()),
            hotplug: RwSem::new(),
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

    /// The machine's clock, for ages.
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        self.platform.now_ns()
    }

    /// Makes the first `frames` frames System RAM, all of it on line.
    ///
    /// # Errors
    ///
    /// [`MapError::RamTwice`], or [`MapError::NoRoom`] if the map is not that long.
    pub fn add_ram(self: &Arc<Self>, frames: u64) -> Result<Ram, MapError> {
        let range = PfnRange::new(Pfn::from_u32(0), frames).ok_or(MapError::NoRoom)?;
        if range.end() > self.max_frames {
            return Err(MapError::NoRoom);
        }
        let _hotplug = self.mem_hotplug_begin();
        self.resources.lock().add_ram(range)?;
        Ok(Ram::new(Arc::clone(self), range))
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
        let _hotplug = self.mem_hotplug_begin();
        let mut resources = self.resources.lock();
        let range = resources.find_room(frames).ok_or(MapError::NoRoom)?;
        self.map_locked(&mut resources, alloc::vec![range], MemoryType::Private(ops))
    }

    /// Gives the frames of one or more physical ranges to a device (MAP-1). All or nothing (MAP-3).
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
        let _hotplug = self.mem_hotplug_begin();
        let mut resources = self.resources.lock();
        self.map_locked(&mut resources, ranges.to_vec(), kind)
    }

    fn map_locked(
        self: &Arc<Self>,
        resources: &mut Resources,
        ranges: Vec<PfnRange>,
        kind: MemoryType,
    ) -> Result<DevPagemap, MapError> {
        if ranges.is_empty()
            || ranges
                .iter()
                .any(|range| aligned(*range).1 > self.max_frames)
        {
            return Err(MapError::NoRoom);
        }
        let mut numbers = 0..u8::try_from(MAX_PGMAPS).unwrap_or(u8::MAX);
        let number = numbers.find(|number| !resources.is_used(*number));
        let number = number.ok_or(MapError::NoRoom)?;
        let entry = &self.entries[usize::from(number)];
        resources.insert(number, &ranges)?;
        let (descriptor, name) = kind.resource();
        resources.describe(number, descriptor, name);
        let free = Mutex::default();
        let pgmap = Arc::new(Pgmap {
            ranges,
            entry: number,
            kind,
            free,
            stage: AtomicU8::new(Pgmap::LIVE),
        });
        // SAFETY: the entry is not used, so its count is dead and at zero and nobody reads `pgmap`; we hold the lock
        // of `resources`, so nobody else changes it.
        unsafe { *entry.pgmap.get() = Some(Arc::clone(&pgmap)) };
        entry.users.resurrect();
        self.publish(&pgmap, number + 1);
        Ok(DevPagemap {
            map: Arc::clone(self),
            pgmap,
        })
    }

    fn publish(&self, pgmap: &Pgmap, value: u8) {
        for range in &pgmap.ranges {
            let (start, end) = aligned(*range);
            for section in start / SUBSECTION_FRAMES..end / SUBSECTION_FRAMES {
                let section = usize::try_from(section).unwrap_or(usize::MAX);
                // Release: pairs with the acquire in `get_dev_pagemap`, so that who finds the entry finds its pgmap.
                self.sections[section].store(value, Ordering::Release);
            }
        }
    }

    /// The device that has a frame, held so that it cannot go away. Without a lock, and exact at both ends (MAP-5).
    #[must_use]
    pub fn get_dev_pagemap(&self, pfn: Pfn) -> Option<PgmapGuard<'_>> {
        let guard = self.entry_of(pfn)?.try_get()?;
        // The entry may have a new device since we looked at the section, and a section's ends may be nobody's.
        guard.covers(pfn).then_some(guard)
    }

    /// The entry of the device that had a frame's section a moment ago.
    fn entry_of(&self, pfn: Pfn) -> Option<&Entry> {
        if pfn.get() >= self.max_frames {
            return None;
        }
        let section = usize::try_from(pfn.get() / SUBSECTION_FRAMES).ok()?;
        // Acquire: pairs with the release in `publish`.
        let number = self.sections[section]
            .load(Ordering::Acquire)
            .checked_sub(1)?;
        Some(&self.entries[usize::from(number)])
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

/// A device mapping that cannot go away while this is held.
#[derive(Debug)]
pub struct PgmapGuard<'a> {
    entry: &'a Entry,
}

impl PgmapGuard<'_> {
    /// Whether the mapping has this frame too: then no second lookup is needed.
    #[must_use]
    pub fn covers(&self, pfn: Pfn) -> bool {
        self.pgmap()
            .is_some_and(|pgmap| pgmap.ranges.iter().any(|range| range.contains(pfn)))
    }

    fn pgmap(&self) -> Option<&Arc<Pgmap>> {
        // SAFETY: we hold one of the entry's users, so by the type invariant nobody changes `pgmap`.
        let pgmap = unsafe { &*self.entry.pgmap.get() };
        pgmap.as_ref()
    }
}

impl Drop for PgmapGuard<'_> {
    fn drop(&mut self) {
        self.entry.users.put();
    }
}

/// A device mapping, live, dying or gone: once it was removed, nothing more comes from any handle to it.
#[derive(Clone, Debug)]
pub struct DevPagemap {
    map: Arc<MemoryMap>,
    pgmap: Arc<Pgmap>,
}

impl DevPagemap {
    fn users(&self) -> &PercpuRef {
        &self.map.entries[usize::from(self.pgmap.entry)].users
    }

    fn first_range(&self) -> PfnRange {
        self.pgmap.ranges[0]
    }

    /// Whether the device has this frame. A device that was removed has none.
    #[must_use]
    pub fn contains(&self, pfn: Pfn) -> bool {
        self.pgmap.ranges.iter().any(|range| range.contains(pfn))
            && self.pgmap.stage() != Pgmap::REMOVED
    }

    /// Whether another handle is to the same mapping.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.pgmap, &other.pgmap)
    }

    /// The device's frames.
    #[must_use]
    pub fn ranges(&self) -> &[PfnRange] {
        &self.pgmap.ranges
    }

    /// What a private device can do; `None` for memory of another kind.
    #[must_use]
    pub fn ops(&self) -> Option<&dyn PrivateOps> {
        match &self.pgmap.kind {
            MemoryType::Private(ops) => Some(&**ops),
            MemoryType::FsDax(_) | MemoryType::Generic => None,
        }
    }

    /// Holds the mapping while something is under way on it; `None` if it is dying.
    #[must_use]
    pub fn try_get(&self) -> Option<PgmapGuard<'_>> {
        let guard = self.map.entries[usize::from(self.pgmap.entry)].try_get()?;
        // The entry may be another mapping's, if this one has been removed.
        let ours = guard
            .pgmap()
            .is_some_and(|pgmap| Arc::ptr_eq(pgmap, &self.pgmap));
        ours.then_some(guard)
    }

    /// Whether the mapping has been killed: nothing may go there any more.
    #[must_use]
    pub fn is_dying(&self) -> bool {
        self.pgmap.stage() != Pgmap::LIVE
    }

    /// Users now: pages in use, and guards. A guess while the mapping is live.
    #[must_use]
    pub fn users_now(&self) -> u64 {
        if self.pgmap.stage() == Pgmap::REMOVED {
            return 0;
        }
        self.users().count()
    }

    /// Takes a free frame of the device, with one reference, and one live reference on the mapping (REF-2). `None` if no
    /// frame is free or the mapping is dying.
    #[must_use]
    pub fn alloc(&self) -> Option<Pfn> {
        let guard = self.try_get()?;
        let range = self.first_range();
        let mut free = self.pgmap.free.lock();
        let taken = free.take(&self.map, range.start(), range.count())?;
        // The page keeps the guard's reference, until `put_page` finds it unused.
        let _kept = ManuallyDrop::new(guard);
        Some(taken)
    }

    /// Notes what the driver keeps about a page.
    pub fn set_data(&self, pfn: Pfn, data: DeviceData) {
        self.map.frame(pfn).set_private(data.0);
    }

    /// What the driver keeps about a page.
    #[must_use]
    pub fn data(&self, pfn: Pfn) -> DeviceData {
        self.map.frame(pfn).data()
    }

    /// Drops a reference of a page. The last one gives the page back as its kind of memory demands (REF-3).
    pub fn put_page(&self, pfn: Pfn) {
        debug_assert!(self.contains(pfn), "{pfn:?} is not this device's");
        if self.pgmap.put(&self.map, pfn) == Put::Last {
            self.users().put();
        }
    }

    /// Ends the mapping's life: lookups and allocations fail from here on. Who has pages of it keeps them.
    ///
    /// # Panics
    ///
    /// If another handle is taking the mapping away, or has: there is one teardown, and one who does it.
    #[must_use = "a killed mapping has to be drained and removed"]
    pub fn kill(self) -> Killed {
        // Acquire: pairs with the release in `resurrect`, so that the count is killed after it was resurrected.
        // Release: pairs with the acquire in `stage`. Relaxed on failure: nothing is read then.
        let first = self.pgmap.stage.compare_exchange(
            Pgmap::LIVE,
            Pgmap::KILLED,
            Ordering::AcqRel,
            Ordering::Relaxed,
        );
        assert!(
            first.is_ok(),
            "a device mapping is taken away by one handle, once"
        );
        self.users().kill();
        Killed { device: self }
    }
}

/// A mapping that nobody can get any more, but that some still use.
#[derive(Debug)]
pub struct Killed {
    device: DevPagemap,
}

/// Somebody still uses a mapping; everything is still usable by them.
#[derive(Debug)]
pub struct StillHeld {
    /// The mapping, to try again.
    pub killed: Killed,
    /// How many pages and guards are left.
    pub users: u64,
}

impl Killed {
    /// The mapping.
    #[must_use]
    pub const fn device(&self) -> &DevPagemap {
        &self.device
    }

    /// Waits until nobody uses the mapping, at most `patience`.
    ///
    /// # Errors
    ///
    /// [`StillHeld`] when the patience ends.
    pub fn drain(self, patience: Option<Duration>) -> Result<Drained, StillHeld> {
        if self.device.users().wait_for_zero(patience) {
            // INVARIANT: dead and at zero, so it stays at zero.
            return Ok(Drained {
                device: self.device,
            });
        }
        let users = self.device.users_now();
        Err(StillHeld {
            killed: self,
            users,
        })
    }

    /// Gives the mapping its life back.
    #[must_use]
    pub fn resurrect(self) -> DevPagemap {
        self.device.users().resurrect();
        // Release: pairs with the acquires in `kill` and `stage`.
        self.device
            .pgmap
            .stage
            .store(Pgmap::LIVE, Ordering::Release);
        self.device
    }
}

/// A mapping that nobody uses.
///
/// # Invariants
///
/// Its count of users is dead and at zero.
#[derive(Debug)]
pub struct Drained {
    device: DevPagemap,
}

impl Drained {
    /// The mapping.
    #[must_use]
    pub const fn device(&self) -> &DevPagemap {
        &self.device
    }

    /// Takes the frames away from the device.
    pub fn remove(self) {
        let DevPagemap { map, pgmap } = self.device;
        let _hotplug = map.mem_hotplug_begin();
        let mut resources = map.resources.lock();
        map.publish(&pgmap, 0);
        // Release: pairs with the acquire in `stage`.
        pgmap.stage.store(Pgmap::REMOVED, Ordering::Release);
        let entry = &map.entries[usize::from(pgmap.entry)];
        // SAFETY: by the type invariant nobody uses the entry, nor can anybody begin to; we hold the lock of `resources`.
        unsafe { *entry.pgmap.get() = None };
        resources.remove(pgmap.entry);
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
