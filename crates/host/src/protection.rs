//! What the program allows itself to do with its pages (`mprotect`), where that is not reading and writing.
//!
//! The machine knows it as well, but tells nobody; and pages that may not be written leave by another way than
//! others (`transit`). Written by the program's threads, read by whoever takes pages out, both under one lock.

use core::ops::Range;
use std::collections::BTreeMap;

use rustix::mm::MprotectFlags;

/// What pages allow of which nobody has said anything.
pub(crate) const READ_WRITE: MprotectFlags = MprotectFlags::READ.union(MprotectFlags::WRITE);

/// What pages allow that have a protection key: the machine knows, and moves them nowhere.
pub(crate) const KEYED: MprotectFlags = MprotectFlags::from_bits_retain(1 << 31);

/// Protections of pages, by their number.
///
/// # Invariants
///
/// No two neighbouring changes are to the same protection, and the first is not to [`READ_WRITE`].
#[derive(Debug, Default)]
pub(crate) struct Protections {
    /// The pages at which the protection changes, and to what; before the first of them is [`READ_WRITE`].
    changes: BTreeMap<u32, MprotectFlags>,
}

impl Protections {
    /// What a page allows.
    pub(crate) fn of(&self, page: u32) -> MprotectFlags {
        let change = self.changes.range(..=page).next_back();
        change.map_or(READ_WRITE, |(_, protection)| *protection)
    }

    /// What the first of these pages allows, and how many of them allow the same, from the first on.
    ///
    /// # Panics
    ///
    /// If there are no pages.
    pub(crate) fn run(&self, pages: &Range<u32>) -> (MprotectFlags, u32) {
        assert!(!pages.is_empty(), "a run has a first page");
        let change = self.changes.range(pages.start + 1..pages.end).next();
        let end = change.map_or(pages.end, |(page, _)| *page);
        (self.of(pages.start), end - pages.start)
    }

    /// Notes that pages have a new protection.
    pub(crate) fn set(&mut self, pages: Range<u32>, protection: MprotectFlags) {
        let after = self.of(pages.end);
        while let Some((&page, _)) = self.changes.range(pages.start..=pages.end).next() {
            self.changes.remove(&page);
        }
        // INVARIANT: of the two places where the protection may change now, only those where it does are noted.
        if self.of(pages.start) != protection {
            self.changes.insert(pages.start, protection);
        }
        if protection != after {
            self.changes.insert(pages.end, after);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_protection() -> impl Strategy<Value = MprotectFlags> {
        (0u32..8).prop_map(MprotectFlags::from_bits_retain)
    }

    proptest! {
        /// Protections agree with a list of pages, and a run ends where the protection changes and nowhere else.
        #[test]
        fn protections_agree_with_a_list_of_pages(
            steps in prop::collection::vec((0u32..60, 1u32..20, any_protection()), 1..40),
        ) {
            let mut protections = Protections::default();
            let mut model = [READ_WRITE; 80];
            for (start, len, protection) in steps {
                protections.set(start..start + len, protection);
                model[start as usize..(start + len) as usize].fill(protection);
                for page in 0..80u32 {
                    let here = model[page as usize];
                    let same = model[page as usize..].iter().take_while(|other| **other == here).count();
                    prop_assert_eq!(protections.run(&(page..80)), (here, u32::try_from(same).unwrap()));
                }
            }
        }
    }
}
