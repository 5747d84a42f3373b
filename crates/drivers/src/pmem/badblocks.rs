//! Blocks whose bytes are lost (PMEM-3), as ranges of 512-byte sectors, sorted, apart from one another.
//!
//! The region keeps one list of its whole medium in its label area; a namespace looks here before it reads.

use core::ops::Range;

/// Bytes of a sector, the unit in which bytes are lost and mended.
pub const SECTOR_BYTES: u64 = 512;

/// Sectors that are lost.
///
/// # Invariants
///
/// No range is empty; they are in order, and there is a gap between any two.
#[doc(alias = "struct badblocks")]
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BadBlocks {
    ranges: Vec<Range<u64>>,
}

/// All sectors that a range of bytes touches.
#[must_use]
pub const fn sectors_around(bytes: &Range<u64>) -> Range<u64> {
    if bytes.start >= bytes.end {
        return bytes.start / SECTOR_BYTES..bytes.start / SECTOR_BYTES;
    }
    bytes.start / SECTOR_BYTES..bytes.end.div_ceil(SECTOR_BYTES)
}

/// The sectors that are wholly in a range of bytes; it may be empty.
#[must_use]
pub const fn sectors_within(bytes: &Range<u64>) -> Range<u64> {
    bytes.start.div_ceil(SECTOR_BYTES)..bytes.end / SECTOR_BYTES
}

impl BadBlocks {
    /// The list of these ranges; `None` if they are not as the invariant wants them.
    #[must_use]
    pub fn from_ranges(ranges: Vec<Range<u64>>) -> Option<Self> {
        let none_empty = ranges.iter().all(|range| range.start < range.end);
        let apart = ranges.is_sorted_by(|one, next| one.end < next.start);
        // INVARIANT: just looked at.
        (none_empty && apart).then_some(Self { ranges })
    }

    /// The lost sectors.
    #[must_use]
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }

    /// Adds sectors.
    #[doc(alias = "badblocks_set")]
    pub fn set(&mut self, sectors: Range<u64>) {
        if sectors.is_empty() {
            return;
        }
        // Those that touch the new ones become one with them.
        let first = self
            .ranges
            .partition_point(|range| range.end < sectors.start);
        let last = self
            .ranges
            .partition_point(|range| range.start <= sectors.end);
        let start = self.ranges.get(first).filter(|_| first < last);
        let start = start.map_or(sectors.start, |range| range.start.min(sectors.start));
        let end = self.ranges[first..last].last();
        let end = end.map_or(sectors.end, |range| range.end.max(sectors.end));
        self.ranges
            .splice(first..last, core::iter::once(start..end));
    }

    /// Takes sectors away. Says whether any was lost before.
    #[doc(alias = "badblocks_clear")]
    pub fn clear(&mut self, sectors: &Range<u64>) -> bool {
        let found = self.of(sectors);
        if found.is_empty() {
            return false;
        }
        let touched: Vec<_> = self.ranges[found.clone()].to_vec();
        let left = touched
            .into_iter()
            .flat_map(|range| {
                [
                    range.start..sectors.start.max(range.start),
                    sectors.end.min(range.end)..range.end,
                ]
            })
            .filter(|range| range.start < range.end);
        let left: Vec<_> = left.collect();
        self.ranges.splice(found, left);
        true
    }

    /// Those that another list does not have.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        let mut left = self.clone();
        for sectors in &other.ranges {
            left.clear(sectors);
        }
        left
    }

    /// The first lost sector among these.
    #[must_use]
    #[doc(alias = "badblocks_check")]
    pub fn first_in(&self, sectors: &Range<u64>) -> Option<u64> {
        let found = self.of(sectors);
        let first = self.ranges[found].first()?;
        Some(first.start.max(sectors.start))
    }

    /// The lost sectors among these.
    pub fn within<'a>(&'a self, sectors: &'a Range<u64>) -> impl Iterator<Item = Range<u64>> + 'a {
        let found = self.of(sectors);
        self.ranges[found]
            .iter()
            .map(|range| range.start.max(sectors.start)..range.end.min(sectors.end))
    }

    /// Which of the ranges share a sector with these.
    fn of(&self, sectors: &Range<u64>) -> Range<usize> {
        if sectors.is_empty() {
            return 0..0;
        }
        let first = self
            .ranges
            .partition_point(|range| range.end <= sectors.start);
        let last = self
            .ranges
            .partition_point(|range| range.start < sectors.end);
        first..last
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// A range of bytes touches more sectors than are wholly in it.
    #[test]
    fn sectors_are_counted_around_and_within() {
        assert_eq!(sectors_around(&(511..513)), 0..2);
        assert!(sectors_within(&(511..513)).is_empty());
        assert_eq!(sectors_within(&(512..1536)), 1..3);
        assert!(sectors_around(&(512..512)).is_empty());
    }

    /// A list that is not sorted, or could be shorter, is none.
    #[test]
    fn only_a_sorted_list_is_taken() {
        let list = |ranges: &[Range<u64>]| BadBlocks::from_ranges(ranges.to_vec()).is_some();
        assert!(list(&[]) && list(&[0..1, 2..9]));
        assert!(!list(&[0..1, 1..2]) && !list(&[2..3, 0..1]) && !list(&[0..1, 2..2]));
    }

    proptest! {
        /// PMEM-3: whatever is set and cleared, the list says what a set of single sectors would say, and stays as short
        /// as it can be.
        #[test]
        fn the_list_is_a_set_of_sectors(
            steps in prop::collection::vec((any::<bool>(), 0_u64..64, 0_u64..20), 0..40),
        ) {
            let (mut list, mut model) = (BadBlocks::default(), BTreeSet::new());
            for (set, start, len) in steps {
                let sectors = start..start + len;
                if set {
                    list.set(sectors.clone());
                    model.extend(sectors);
                } else {
                    let any = sectors.clone().any(|sector| model.contains(&sector));
                    prop_assert_eq!(list.clear(&sectors), any);
                    model.retain(|sector| !sectors.contains(sector));
                }
                prop_assert!(BadBlocks::from_ranges(list.ranges().to_vec()).is_some());
                let all: BTreeSet<u64> = list.ranges().iter().cloned().flatten().collect();
                prop_assert_eq!(&all, &model);
                let some: Vec<u64> = list.within(&(10..30)).flatten().collect();
                let expected: Vec<u64> = model.range(10..30).copied().collect();
                prop_assert_eq!(&some, &expected);
                prop_assert_eq!(list.first_in(&(10..30)), expected.first().copied());
            }
        }
    }
}
