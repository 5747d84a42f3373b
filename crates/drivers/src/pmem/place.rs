//! Where a region is among the physical addresses.

use std::sync::Arc;

use pgmap_core::addr::{PAGE_SIZE, Pfn, PfnRange};
use pgmap_core::memremap::{MapError, MemoryMap};
use pgmap_core::resource::{Descriptor, Flags, Resource};

/// Regions begin at multiples of 1 GiB, so that a namespace can be mapped in such units; not at 0, where RAM is.
const REGION_FRAMES: u64 = (1 << 30) / PAGE_SIZE as u64;

/// A range that is a region's, and in the resource tree as such until this is dropped (HOT-1).
#[derive(Debug)]
pub(crate) struct Place {
    map: Arc<MemoryMap>,
    range: PfnRange,
}

impl Place {
    /// The lowest addresses that have room for a region of so many bytes.
    pub(super) fn new(map: &Arc<MemoryMap>, bytes: u64) -> Result<Self, MapError> {
        let frames = (bytes / PAGE_SIZE as u64).max(1);
        let described = |range| {
            let descriptor = Descriptor::PersistentMemory;
            Resource::new(range, Flags::MEMORY, descriptor, "Persistent Memory")
        };
        let range = map.allocate_resource(frames, REGION_FRAMES, REGION_FRAMES, described)?;
        let map = Arc::clone(map);
        Ok(Self { map, range })
    }

    /// Whether it is on this map.
    pub(super) fn is_on(&self, map: &Arc<MemoryMap>) -> bool {
        Arc::ptr_eq(&self.map, map)
    }

    /// The frames of bytes of the region, which begin and end at whole pages.
    pub(super) fn frames(&self, bytes: &core::ops::Range<u64>) -> Option<PfnRange> {
        let start: Pfn = self.range.start();
        let start = start.checked_add(bytes.start / PAGE_SIZE as u64)?;
        PfnRange::new(start, (bytes.end - bytes.start) / PAGE_SIZE as u64)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Namespaces in use keep their region. If frames could not be taken out of one, its addresses stay taken.
        let _still_there = self.map.remove_resource(self.range);
    }
}
