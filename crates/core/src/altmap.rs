//! The frames' own metadata, kept on the device that the frames belong to (MAP-8).
//!
//! A frame's 32 bytes are 8 GiB for each TiB of a device: too much RAM where the device is large. An [`Altmap`] sets pages of the
//! device aside for them. `memremap` clears them, puts them in the place of the map's own pages, and gives them back when the
//! mapping is removed. Nobody else may use those pages meanwhile.

use alloc::sync::Arc;

use pgmap_sync::atomic::{AtomicU64, Ordering};

use crate::addr::{PAGE_SIZE, Pfn, PfnRange};
use crate::driver::AltmapOps;

/// Bytes of one frame's metadata.
const FRAME_BYTES: u64 = 32;
/// Pages of a device for the metadata of its frames.
///
/// # Invariants
///
/// `reserve` is at most the area's length, and `allocated` at most the rest.
#[derive(Debug)]
pub struct Altmap {
    device: Arc<dyn AltmapOps>,
    area: PfnRange,
    reserve: u64,
    allocated: AtomicU64, // changed by who maps and unmaps, read by anybody
}

impl Altmap {
    /// Frames whose metadata fills a page of the device.
    pub const FRAMES_PER_PAGE: u64 = PAGE_SIZE as u64 / FRAME_BYTES;

    /// Pages of `area`, which is a part of the device's frames, but for its first `reserve`, which are somebody else's: labels,
    /// a superblock. `None` if that is more than there are.
    #[must_use]
    pub fn new(device: Arc<dyn AltmapOps>, area: PfnRange, reserve: u64) -> Option<Self> {
        // INVARIANT: compared.
        (reserve <= area.count()).then_some(Self {
            device,
            area,
            reserve,
            allocated: AtomicU64::new(0),
        })
    }

    /// Pages that the metadata of this range takes: its whole sub-sections count.
    #[must_use]
    pub fn pages_for(range: PfnRange) -> u64 {
        let (start, end) = crate::memremap::aligned(range);
        (end - start).div_ceil(Self::FRAMES_PER_PAGE)
    }

    /// The pages that no data may be kept in: reserved and free ones.
    #[must_use]
    pub const fn area(&self) -> PfnRange {
        self.area
    }

    /// Pages at the area's beginning that are somebody else's.
    #[must_use]
    pub const fn reserve(&self) -> u64 {
        self.reserve
    }

    /// Pages that metadata may take, taken or not.
    #[must_use]
    pub const fn free(&self) -> u64 {
        self.area.count() - self.reserve
    }

    /// Pages that metadata takes now: 0 before the frames are mapped, and after they were removed.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        // Relaxed: a snapshot.
        self.allocated.load(Ordering::Relaxed)
    }

    pub(crate) fn device(&self) -> &dyn AltmapOps {
        &*self.device
    }

    /// The nth page after the reserved ones.
    pub(crate) fn page(&self, nth: u64) -> Option<Pfn> {
        self.area.start().checked_add(self.reserve + nth)
    }

    /// Takes the next pages. By who maps, who has seen that there are enough.
    pub(crate) fn take(&self, pages: u64) -> Option<Pfn> {
        // Relaxed: one thread maps or unmaps at a time.
        let first = self.allocated.fetch_add(pages, Ordering::Relaxed);
        debug_assert!(first + pages <= self.free(), "the altmap is too small");
        self.page(first)
    }

    /// Gives pages back. By who unmaps.
    pub(crate) fn give(&self, pages: u64) {
        // Relaxed: as above.
        self.allocated.fetch_sub(pages, Ordering::Relaxed);
    }
}
