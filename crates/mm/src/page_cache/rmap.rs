//! Who maps the pages of a file: the reverse map (the kernel's `i_mmap`).

use alloc::vec::Vec;
use core::ops::Range;

use pgmap_core::addr::{PAGE_SHIFT, PAGE_SIZE, VirtAddr};
use pgmap_sync::Mutex;

use super::PageCache;
use crate::page_table::PageIndex;
#[cfg(shuttle)]
use crate::seeded_bug::{self, SeededBug};

/// One mapping of a part of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileVma {
    /// Its first address.
    pub at: VirtAddr,
    /// The page of the file that is there.
    pub first: u32,
    /// How many pages.
    pub pages: u32,
    /// What it allows.
    pub access: VmaAccess,
}

/// What a mapping of a file allows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VmaAccess {
    /// Loads.
    Read,
    /// Loads and stores.
    ReadWrite,
}

impl FileVma {
    /// The page of the file at an address of this mapping.
    #[must_use]
    pub fn page_at(&self, at: VirtAddr) -> Option<u32> {
        let nth = at.checked_offset_from(self.at)? >> PAGE_SHIFT;
        let nth = u32::try_from(nth).ok().filter(|nth| *nth < self.pages)?;
        self.first.checked_add(nth)
    }

    /// The pages of the file that it shows.
    #[must_use]
    pub const fn file_pages(&self) -> Range<u32> {
        self.first..self.first.saturating_add(self.pages)
    }

    /// Where a page of the file is that it shows.
    pub(super) fn address_of(&self, page: u32) -> VirtAddr {
        let offset = (page - self.first) as usize * PAGE_SIZE;
        self.at.checked_add(offset).unwrap_or(self.at)
    }
}

/// All mappings of a file. The lock is taken under a cursor, and held while the machine's mappings are changed: so whoever
/// takes a mapping off the list knows that nobody changes it any more.
#[derive(Debug, Default)]
pub(super) struct FileVmas(Mutex<Vec<FileVma>>);

impl FileVmas {
    #[cfg(shuttle)]
    pub(super) fn lock(&self) -> pgmap_sync::MutexGuard<'_, Vec<FileVma>> {
        self.0.lock()
    }

    /// Calls `act` with the mapping at an address, unless there is none any more.
    pub(super) fn with<R>(&self, at: VirtAddr, act: impl FnOnce(&FileVma) -> R) -> Option<R> {
        let vmas = self.0.lock();
        #[cfg(shuttle)]
        if seeded_bug::has(SeededBug::FaultOutlivesTheMapping) {
            let found = vmas.iter().find(|vma| vma.page_at(at).is_some()).copied();
            drop(vmas);
            return found.as_ref().map(act);
        }
        vmas.iter().find(|vma| vma.page_at(at).is_some()).map(act)
    }

    /// Calls `act` with the mapping at an address, unless another page is shown there by now, or none.
    pub(super) fn with_page<R>(
        &self,
        at: VirtAddr,
        page: PageIndex,
        act: impl FnOnce(&FileVma) -> R,
    ) -> Option<R> {
        let shown = |vma: &FileVma| vma.page_at(at) == Some(page.0);
        #[cfg(shuttle)]
        let shown = |vma: &FileVma| shown(vma) || seeded_bug::has(SeededBug::FaultTrustsTheAddress);
        self.with(at, |vma| shown(vma).then(|| act(vma))).flatten()
    }

    /// Calls `act` with the address and the number of the pages of a range that each mapping shows, until it says no.
    /// Answers whether it never did.
    pub(super) fn each(
        &self,
        pages: &Range<u32>,
        mut act: impl FnMut(VirtAddr, usize) -> bool,
    ) -> bool {
        let vmas = self.0.lock();
        #[cfg(shuttle)]
        let vmas: Vec<_> = if seeded_bug::has(SeededBug::WalkSkipsReaders) {
            let writers = vmas.iter().filter(|vma| vma.access == VmaAccess::ReadWrite);
            writers.copied().collect()
        } else {
            vmas.clone()
        };
        vmas.iter().all(|vma| {
            let shown = vma.file_pages();
            let (start, end) = (pages.start.max(shown.start), pages.end.min(shown.end));
            start >= end || act(vma.address_of(start), (end - start) as usize)
        })
    }
}

impl PageCache {
    /// Notes a mapping, before its first fault.
    pub fn add_vma(&self, vma: FileVma) {
        self.vmas.0.lock().push(vma);
    }

    /// Forgets a mapping: when this returns, nobody makes or changes any mapping of a page there. What it still shows is the
    /// caller's to remove.
    pub fn remove_vma(&self, vma: &FileVma) {
        self.vmas.0.lock().retain(|other| other != vma);
    }

    /// Removes every mapping of these pages: they are shown nowhere (`try_to_unmap`).
    pub(super) fn unmap_pages(&self, pages: &Range<u32>) {
        self.vmas.each(pages, |at, count| {
            self.mmu.unmap(at, count);
            true
        });
    }

    /// Write-protects every mapping of these pages (`page_mkclean`). False if one could not be protected: then the pages have
    /// to count as dirty (WB-3). Protected or not, all of them report their writes, or are already known to be written.
    pub(super) fn mkclean(&self, pages: &Range<u32>) -> bool {
        #[cfg(shuttle)]
        if seeded_bug::has(SeededBug::MkcleanStopsAtTheFirst) {
            self.vmas
                .each(pages, |at, count| self.mmu.protect(at, count).done > count);
            return true;
        }
        self.vmas.each(pages, |at, count| {
            self.mmu.protect(at, count).stop.is_none()
        })
    }
}
