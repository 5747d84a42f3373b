//! Pages that the file could not give: who touches one gets SIGBUS now, and a later access reads it again, as in the kernel.
//!
//! Poison at an address answers all accesses without us, so it is lifted after a while; who got it and has not run since reads
//! again, which is as good. What must never happen here: somebody's page unmapped at an address that is another file's by now.

use alloc::vec::Vec;

use pgmap_core::addr::VirtAddr;
use pgmap_sync::Mutex;

use super::{CachePage, FileVma, PageCache};
use crate::fault::Outcome;
use crate::page_table::{Cursor, PageIndex};

/// Addresses that are poisoned since a read failed, and since when, in nanoseconds of the platform's clock.
#[derive(Debug, Default)]
pub(super) struct Unread(Mutex<Vec<(VirtAddr, u64)>>);

impl Unread {
    /// Takes those that are older out.
    fn take_older(&self, before_ns: u64) -> Vec<VirtAddr> {
        let mut all = self.0.lock();
        let older = all.extract_if(.., |(_, since_ns)| *since_ns < before_ns);
        older.map(|(at, _)| at).collect()
    }
}

impl PageCache {
    /// Answers an access to a page that could not be read with SIGBUS, until the next [`retry_reads`](Self::retry_reads).
    pub(super) fn unread(
        &self,
        cursor: &Cursor<'_, CachePage>,
        page: PageIndex,
        at: VirtAddr,
    ) -> Outcome {
        self.unread.0.lock().push((at, self.map.now_ns()));
        self.sigbus(cursor, page, at)
    }

    /// Has accesses that got SIGBUS before `before_ns`, on the platform's clock, since their page could not be read, try again from
    /// here on.
    pub fn retry_reads(&self, before_ns: u64) {
        for at in self.unread.take_older(before_ns) {
            let page = self.vmas.with(at, |vma| vma.page_at(at)).flatten();
            let Some(page) = page else { continue };
            let _cursor = self.table.lock(PageIndex(page).block());
            // A page that was mapped there meanwhile, or is poisoned by a memory failure, is so again when it is touched.
            let still_there = |vma: &FileVma| vma.page_at(at) == Some(page);
            let lift = |vma: &FileVma| still_there(vma).then(|| self.mmu.unmap(at, 1));
            self.vmas.with(at, lift);
        }
    }
}
