//! Which addresses are in use: the virtual memory areas of an address space.
//!
//! Addresses are handed out first-fit, by the page. What an area allows (read, write) is the machine's
//! business; here is only who owns which addresses.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::Range;

/// Areas of one address space, in pages counted from its base.
#[derive(Debug)]
pub struct Vmas {
    /// Start and end of each area; no two overlap or touch.
    areas: BTreeMap<u32, u32>,
    pages: u32,
    used: u64,
    /// No gap begins before this page.
    search_from: u32,
}

impl Vmas {
    /// No areas, in an address space of `pages` pages.
    #[must_use]
    pub const fn new(pages: u32) -> Self {
        Self {
            areas: BTreeMap::new(),
            pages,
            used: 0,
            search_from: 0,
        }
    }

    /// Pages inside areas.
    #[must_use]
    pub const fn used(&self) -> u64 {
        self.used
    }

    /// Takes the first gap of `count` pages whose start is a multiple of `align` pages.
    pub fn allocate(&mut self, count: u32, align: u32) -> Option<Range<u32>> {
        let align = align.max(1);
        let mut gap = self.search_from;
        let mut first_gap = None;
        for (&start, &end) in self.areas.range(..) {
            if end <= gap {
                continue;
            }
            if start > gap {
                first_gap.get_or_insert(gap);
            }
            if let Some(found) = fit(gap..start.max(gap), count, align) {
                return Some(self.take(found, first_gap));
            }
            gap = end;
        }
        first_gap.get_or_insert(gap);
        let found = fit(gap..self.pages, count, align)?;
        Some(self.take(found, first_gap))
    }

    /// Takes exactly these pages, whatever areas they were in.
    pub fn insert(&mut self, range: Range<u32>) {
        self.remove(range.clone());
        let mut merged = range.clone();
        if let Some((&start, &end)) = self.areas.range(..range.start).next_back()
            && end == range.start
        {
            merged.start = start;
        }
        if let Some(&end) = self.areas.get(&range.end) {
            self.areas.remove(&range.end);
            merged.end = end;
        }
        self.used += u64::from(range.end - range.start);
        self.areas.insert(merged.start, merged.end);
    }

    /// Gives pages back, whatever areas they are in.
    pub fn remove(&mut self, range: Range<u32>) {
        let before = self
            .areas
            .range(..range.start)
            .next_back()
            .map(|(start, _)| *start);
        let first = before.unwrap_or(range.start);
        let overlapping: Vec<(u32, u32)> = self
            .areas
            .range(first..range.end)
            .filter(|(_, end)| **end > range.start)
            .map(|(start, end)| (*start, *end))
            .collect();
        for (start, end) in overlapping {
            self.areas.remove(&start);
            if start < range.start {
                self.areas.insert(start, range.start);
            }
            if end > range.end {
                self.areas.insert(range.end, end);
            }
            self.used -= u64::from(end.min(range.end) - start.max(range.start));
        }
        self.search_from = self.search_from.min(range.start);
    }

    /// Whether an area holds the page.
    #[must_use]
    pub fn contains(&self, page: u32) -> bool {
        self.areas
            .range(..=page)
            .next_back()
            .is_some_and(|(_, end)| *end > page)
    }

    /// Whether an area holds any of the pages.
    #[must_use]
    pub fn overlaps(&self, range: &Range<u32>) -> bool {
        self.areas
            .range(..range.end)
            .next_back()
            .is_some_and(|(_, end)| *end > range.start)
    }

    /// Where the first area after a page begins.
    #[must_use]
    pub fn next_start(&self, page: u32) -> Option<u32> {
        self.areas
            .range(page.checked_add(1)?..)
            .next()
            .map(|(start, _)| *start)
    }

    /// The area around a page.
    #[must_use]
    pub fn find(&self, page: u32) -> Option<Range<u32>> {
        let (start, end) = self.areas.range(..=page).next_back()?;
        (*end > page).then_some(*start..*end)
    }

    /// The pages outside areas.
    pub fn gaps(&self) -> impl Iterator<Item = Range<u32>> {
        let starts = core::iter::once(0).chain(self.areas.values().copied());
        let ends = self.areas.keys().copied().chain([self.pages]);
        starts
            .zip(ends)
            .map(|(start, end)| start..end)
            .filter(|gap| !gap.is_empty())
    }

    fn take(&mut self, range: Range<u32>, first_gap: Option<u32>) -> Range<u32> {
        self.insert(range.clone());
        // Nothing was free before the first gap that was looked at.
        self.search_from = match first_gap {
            Some(gap) if gap == range.start => range.end,
            Some(gap) => gap,
            None => range.end,
        };
        range
    }
}

fn fit(gap: Range<u32>, count: u32, align: u32) -> Option<Range<u32>> {
    let start = gap.start.checked_next_multiple_of(align)?;
    let end = start.checked_add(count)?;
    (end <= gap.end).then_some(start..end)
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Allocate(u32, u32),
        Insert(Range<u32>),
        Remove(Range<u32>),
    }

    fn any_step() -> impl Strategy<Value = Step> {
        let range = || (0u32..500, 1u32..60).prop_map(|(start, len)| start..(start + len).min(512));
        prop_oneof![
            (1u32..40, prop_oneof![Just(1u32), Just(8)])
                .prop_map(|(n, align)| Step::Allocate(n, align)),
            range().prop_map(Step::Insert),
            range().prop_map(Step::Remove),
        ]
    }

    proptest! {
        /// Areas agree with a list of pages: nothing is handed out twice, and no gap that fits is missed.
        #[test]
        fn areas_agree_with_a_list_of_pages(steps in prop::collection::vec(any_step(), 1..60)) {
            let mut vmas = Vmas::new(512);
            let mut model = [false; 512];
            for step in steps {
                match step {
                    Step::Allocate(count, align) => {
                        let fits = (0..=512 - count).step_by(align as usize).find(|start| {
                            (*start..start + count).all(|page| !model[page as usize])
                        });
                        let got = vmas.allocate(count, align);
                        prop_assert_eq!(got.clone().map(|range| range.start), fits);
                        got.into_iter().flatten().for_each(|page| model[page as usize] = true);
                    }
                    Step::Insert(range) => {
                        vmas.insert(range.clone());
                        range.for_each(|page| model[page as usize] = true);
                    }
                    Step::Remove(range) => {
                        vmas.remove(range.clone());
                        range.for_each(|page| model[page as usize] = false);
                    }
                }
                for page in 0..512 {
                    prop_assert_eq!(vmas.contains(page), model[page as usize]);
                }
                let gaps: Vec<u32> = vmas.gaps().flatten().collect();
                let free: Vec<u32> = (0..512).filter(|page| !model[*page as usize]).collect();
                prop_assert_eq!(gaps, free);
                prop_assert_eq!(vmas.used(), model.iter().filter(|used| **used).count() as u64);
            }
        }
    }
}
