//! Which page of which file a frame accounts for: what the frame's `mapping` word says of it.

use pgmap_core::addr::{Pfn, VirtAddr};
use pgmap_core::ram::{NotReplaced, Target};

use super::{CachePage, Cached, PageCache};
use crate::page_table::PageIndex;

/// The number of an open file, of which no two are open at the same time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct FileNumber(pub(crate) u32);

/// A page of an open file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct FilePage {
    pub(crate) file: FileNumber,
    pub(crate) page: u32,
}

/// The bit by which the word is told from that of an anonymous page. Of a file's number 31 bits are left.
const FILE: u64 = 1 << 63;

impl FilePage {
    /// The page, as a frame's `mapping` word.
    pub(crate) const fn to_word(self) -> u64 {
        FILE | (self.file.0 as u64) << 32 | self.page as u64
    }

    /// The page in a frame's `mapping` word, if it is a file's.
    #[allow(clippy::cast_possible_truncation, reason = "two parts of a word")]
    pub(crate) const fn from_word(word: u64) -> Option<Self> {
        if word & FILE == 0 {
            return None;
        }
        let file = FileNumber(((word & !FILE) >> 32) as u32);
        let page = word as u32;
        Some(Self { file, page })
    }
}

impl PageCache {
    /// The number by which its frames name it.
    #[must_use]
    pub const fn number(&self) -> FileNumber {
        self.number
    }

    /// Replaces the frame of a page, which is no place for it any more, by another (HOT-4, GUP-2). Nothing if the page has
    /// another frame by now.
    pub(crate) fn replace_frame(&self, page: u32, old: Pfn, to: Target) -> Result<(), NotReplaced> {
        let page = PageIndex(page);
        let mut cursor = self.table.lock(page.block());
        match cursor.get(page) {
            CachePage::Cached(cached) if cached.frame == old => {
                self.ram.replace(old, to, |frame| {
                    cursor.set(page, CachePage::Cached(Cached { frame, ..cached }));
                })
            }
            CachePage::Cached(_) | CachePage::Absent | CachePage::Poisoned => Ok(()),
        }
    }

    /// An address at which a page is mapped, if there is one.
    pub(crate) fn address_of(&self, page: u32) -> Option<VirtAddr> {
        let mut found = None;
        self.vmas.each(&(page..page + 1), |at, _| {
            found = Some(at);
            false
        });
        found
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    /// A frame's word tells a page of a file from one of an address space, whose words are small numbers.
    #[test]
    fn words_name_pages_of_files() {
        let page = FilePage {
            file: FileNumber(u32::MAX >> 1),
            page: u32::MAX,
        };
        assert_eq!(FilePage::from_word(page.to_word()), Some(page));
        for anonymous in [0, 1, u64::from(u32::MAX) + 1] {
            assert_eq!(FilePage::from_word(anonymous), None);
        }
    }
}
