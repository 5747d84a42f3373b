//! From a frame's number to the device that has it: without a lock, in two loads, exact at both ends (MAP-5).
//!
//! Two tables of bytes say which entry has a frame: one byte for each GiB that one mapping has whole, and one for each sub-section
//! elsewhere. So mapping a TiB writes a thousand bytes (MAP-7). What the tables say may be out of date at once; the entry, once it is
//! held, is asked for its exact ranges.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use pgmap_sync::PercpuRef;
use pgmap_sync::atomic::{AtomicU8, Ordering};
use pgmap_sync::cell::UnsafeCell;

use crate::addr::{Pfn, PfnRange};
use crate::platform::{OutOfAddressSpace, Platform};
use crate::vmemmap::ZeroedSlice;

use super::pgmap::Pgmap;
use super::request::Owner;
use super::{SUBSECTION_FRAMES, aligned};

/// Device mappings that there can be at once.
pub(super) const MAX_PGMAPS: u8 = if cfg!(loom) { 1 } else { 32 };
/// Frames of a cell of the coarse table: 1 GiB.
const CELL_FRAMES: u64 = SUBSECTION_FRAMES * if cfg!(any(loom, shuttle)) { 2 } else { 512 };

/// The tables and the entries.
#[derive(Debug)]
pub(super) struct Lookup {
    /// For each GiB, one more than the number of the entry that has it whole; 0 for none.
    cells: ZeroedSlice<AtomicU8>, // written under `MemoryMap::resources`' lock, read by anybody
    /// The same for each sub-section of a GiB that no entry has whole.
    sections: ZeroedSlice<AtomicU8>, // as `cells`
    entries: Vec<Entry>,
    max_frames: u64,
}

/// A place for one device mapping.
///
/// # Invariants
///
/// `pgmap` changes only while `users` is dead and at zero, under the lock of `MemoryMap::resources`.
pub(super) struct Entry {
    pub(super) users: PercpuRef,
    pub(super) pgmap: UnsafeCell<Option<Arc<Pgmap>>>,
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

impl Lookup {
    pub(super) fn new(
        platform: &'static dyn Platform,
        max_frames: u64,
    ) -> Result<Self, OutOfAddressSpace> {
        let entry = |_| Entry {
            users: PercpuRef::new_dead(),
            pgmap: UnsafeCell::new(None),
        };
        Ok(Self {
            cells: ZeroedSlice::new(platform, index(max_frames.div_ceil(CELL_FRAMES)))?,
            sections: ZeroedSlice::new(platform, index(max_frames.div_ceil(SUBSECTION_FRAMES)))?,
            entries: (0..MAX_PGMAPS).map(entry).collect(),
            max_frames,
        })
    }

    pub(super) fn users(&self, entry: u8) -> &PercpuRef {
        &self.entries[usize::from(entry)].users
    }

    /// Lets a mapping be found.
    ///
    /// # Safety
    ///
    /// The caller holds the lock of `MemoryMap::resources`, and the mapping's entry is not used by another: its count is dead
    /// and at zero.
    pub(super) unsafe fn publish(&self, pgmap: &Arc<Pgmap>) {
        let entry = &self.entries[usize::from(pgmap.entry)];
        entry.pgmap.with_mut(|place| {
            // SAFETY: by this function's contract nobody reads `pgmap`, and nobody else changes it.
            unsafe { *place = Some(Arc::clone(pgmap)) };
        });
        entry.users.resurrect();
        self.write(&pgmap.ranges, pgmap.entry + 1);
    }

    /// Lets a mapping be found no more.
    ///
    /// # Safety
    ///
    /// The caller holds the lock of `MemoryMap::resources`, and the count of the mapping's users is dead and at zero.
    pub(super) unsafe fn unpublish(&self, pgmap: &Pgmap) {
        self.write(&pgmap.ranges, 0);
        let entry = &self.entries[usize::from(pgmap.entry)];
        entry.pgmap.with_mut(|place| {
            // SAFETY: by this function's contract nobody reads `pgmap` nor begins to, and nobody else changes it.
            unsafe { *place = None };
        });
    }

    fn write(&self, ranges: &[PfnRange], value: u8) {
        for range in ranges {
            let (mut at, end) = aligned(*range);
            while at < end {
                let (place, frames) = self.place(at, end);
                // Release: pairs with the acquires in `entry_of`, so that who finds the entry finds its count made live.
                place.store(value, Ordering::Release);
                at += frames;
            }
        }
    }

    /// Where the tables say who has the frames from `at` on, which are one mapping's up to `end`, and of how many.
    fn place(&self, at: u64, end: u64) -> (&AtomicU8, u64) {
        if at.is_multiple_of(CELL_FRAMES) && end - at >= CELL_FRAMES {
            (&self.cells[index(at / CELL_FRAMES)], CELL_FRAMES)
        } else {
            let section = index(at / SUBSECTION_FRAMES);
            (&self.sections[section], SUBSECTION_FRAMES)
        }
    }

    /// The entry of the device that had a frame a moment ago.
    pub(super) fn entry_of(&self, pfn: Pfn) -> Option<&Entry> {
        if pfn.get() >= self.max_frames {
            return None;
        }
        // Acquire, twice: pairs with the release in `write`.
        let cell = self.cells[index(pfn.get() / CELL_FRAMES)].load(Ordering::Acquire);
        let number = if cell == 0 {
            self.sections[index(pfn.get() / SUBSECTION_FRAMES)].load(Ordering::Acquire)
        } else {
            cell
        };
        Some(&self.entries[usize::from(number.checked_sub(1)?)])
    }

    /// The mapping that has a frame, held.
    pub(super) fn find(&self, pfn: Pfn) -> Option<PgmapGuard<'_>> {
        let guard = PgmapGuard::try_new(self.entry_of(pfn)?)?;
        #[cfg(shuttle)]
        if crate::seeded_bug::has(crate::seeded_bug::SeededBug::LookupIgnoresRanges) {
            return Some(guard);
        }
        // The entry may have a new device since we looked at the tables, and a section's ends may be nobody's.
        guard.covers(pfn).then_some(guard)
    }

    /// The mapping that has an entry, held.
    pub(super) fn try_get(&self, pgmap: &Arc<Pgmap>) -> Option<PgmapGuard<'_>> {
        let guard = PgmapGuard::try_new(&self.entries[usize::from(pgmap.entry)])?;
        // The entry may be another mapping's, if this one has been removed.
        let ours = guard.pgmap().is_some_and(|found| Arc::ptr_eq(found, pgmap));
        ours.then_some(guard)
    }

    /// The mapping whose sub-section a frame is in, dying or not.
    ///
    /// # Safety
    ///
    /// The caller holds the lock of `MemoryMap::resources`.
    pub(super) unsafe fn section(&self, pfn: Pfn) -> Option<Arc<Pgmap>> {
        self.entry_of(pfn)?.pgmap.with(|pgmap| {
            // SAFETY: by this function's contract nobody changes `pgmap`.
            let pgmap = unsafe { &*pgmap };
            pgmap.clone()
        })
    }

    /// What the tables say, for tests that compare.
    #[cfg(all(test, not(any(loom, shuttle))))]
    pub(super) fn snapshot(&self) -> Vec<u8> {
        let table = |table: &ZeroedSlice<AtomicU8>, len: u64| {
            let cells = (0..index(len)).map(|nth| table[nth].load(Ordering::Relaxed));
            cells.collect::<Vec<u8>>()
        };
        let mut all = table(&self.cells, self.max_frames.div_ceil(CELL_FRAMES));
        all.extend(table(
            &self.sections,
            self.max_frames.div_ceil(SUBSECTION_FRAMES),
        ));
        all
    }
}

/// A place in a table. The tables were reserved, so that their length is a `usize`; what is not inside panics there.
fn index(place: u64) -> usize {
    usize::try_from(place).unwrap_or(usize::MAX)
}

/// A device mapping that cannot go away while this is held.
#[derive(Debug)]
pub struct PgmapGuard<'a> {
    entry: &'a Entry,
}

impl<'a> PgmapGuard<'a> {
    fn try_new(entry: &'a Entry) -> Option<Self> {
        // Lazily: a guard that is made is also dropped.
        let live = entry.users.try_get_live();
        live.then(|| PgmapGuard { entry })
    }

    /// Whether the mapping has this frame too: then no second lookup is needed.
    #[must_use]
    pub fn covers(&self, pfn: Pfn) -> bool {
        self.pgmap().is_some_and(|pgmap| pgmap.has(pfn))
    }

    /// The frame that stands for the page which `pfn` is in: `pfn` itself but for compound pages.
    #[must_use]
    #[doc(alias = "compound_head")]
    pub fn head(&self, pfn: Pfn) -> Pfn {
        self.pgmap().map_or(pfn, |pgmap| pgmap.order.head(pfn))
    }

    /// Whether somebody who migrates or walks on behalf of `owner` may see the device's pages (MAP-9).
    #[must_use]
    pub fn is_visible_to(&self, owner: Option<Owner>) -> bool {
        self.pgmap().is_some_and(|pgmap| pgmap.is_visible_to(owner))
    }

    pub(super) fn pgmap(&self) -> Option<&Arc<Pgmap>> {
        self.entry.pgmap.with(|pgmap| {
            // SAFETY: we hold one of the entry's users, so by the type invariant nobody changes `pgmap` while we live.
            let pgmap = unsafe { &*pgmap };
            pgmap.as_ref()
        })
    }
}

impl Drop for PgmapGuard<'_> {
    fn drop(&mut self) {
        self.entry.users.put();
    }
}
