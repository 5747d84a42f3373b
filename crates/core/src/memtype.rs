//! Which range is mapped how: cache modes are reserved, so that no two mappings of one byte disagree (REMAP-3, memtype).

use alloc::vec::Vec;
use core::ops::Range;

use pgmap_sync::Mutex;

/// How the CPU's caches treat a mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CacheMode {
    /// Stores stay in the cache until they are flushed or evicted.
    WriteBack,
    /// Every store is on its way to the medium before the next one: the driver flushes after each.
    WriteThrough,
    /// Stores stream past the cache: the driver fences before it relies on them.
    WriteCombining,
}

impl CacheMode {
    /// What `memremap` tries first, second and last.
    pub const IN_ORDER: [Self; 3] = [Self::WriteBack, Self::WriteThrough, Self::WriteCombining];
}

/// A range is mapped in another mode already.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the bytes {range:#x?} are mapped in the mode {mode:?}: ask for that, or unmap them first")]
pub struct Conflict {
    /// The range that is reserved.
    pub range: Range<u64>,
    /// Its mode.
    pub mode: CacheMode,
}

/// The reserved ranges.
#[derive(Debug, Default)]
pub(crate) struct Memtypes {
    reserved: Mutex<Vec<(Range<u64>, CacheMode)>>,
}

impl Memtypes {
    /// Reserves a range for a mode; ranges of one mode may overlap, and count.
    pub(crate) fn reserve(&self, range: &Range<u64>, mode: CacheMode) -> Result<(), Conflict> {
        let mut reserved = self.reserved.lock();
        let overlaps = |other: &Range<u64>| other.start < range.end && range.start < other.end;
        let mut others = reserved.iter();
        if let Some((range, mode)) =
            others.find(|(other, other_mode)| *other_mode != mode && overlaps(other))
        {
            let (range, mode) = (range.clone(), *mode);
            return Err(Conflict { range, mode });
        }
        reserved.push((range.clone(), mode));
        Ok(())
    }

    /// Ends one reservation.
    pub(crate) fn free(&self, range: &Range<u64>, mode: CacheMode) {
        let mut reserved = self.reserved.lock();
        let ours = |other: &(Range<u64>, CacheMode)| other.0 == *range && other.1 == mode;
        let nth = reserved.iter().position(ours);
        debug_assert!(nth.is_some(), "{range:#x?} was not reserved");
        if let Some(nth) = nth {
            reserved.swap_remove(nth);
        }
    }
}
