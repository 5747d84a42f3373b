//! From a device's page that is in use to its device: without a lock, and while the device is dying, too.
//!
//! `mm` comes here with pages that its entries name. [`MemoryMap::get_dev_pagemap`] is for everybody else: it answers for any
//! frame, but not for a device that is being taken away.

use core::fmt;

use crate::addr::Pfn;
use crate::driver::PrivateOps;
use crate::page::Put;

use super::MemoryMap;
use super::kind::MemoryType;
use super::lookup::Entry;
use super::pgmap::Pgmap;

/// The device mapping of a page that is in use.
///
/// # Invariants
///
/// For as long as this lives, a page of the mapping is in use: so the entry's count of users is not zero (REF-2), and its
/// `pgmap` does not change.
pub struct PagePgmap<'a> {
    entry: &'a Entry,
}

impl fmt::Debug for PagePgmap<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagePgmap").finish_non_exhaustive()
    }
}

impl PagePgmap<'_> {
    /// Whether the device has this frame, too.
    #[must_use]
    pub fn contains(&self, pfn: Pfn) -> bool {
        self.pgmap().is_some_and(|pgmap| pgmap.has(pfn))
    }

    /// What a private device can do; `None` for memory of another kind.
    #[must_use]
    pub fn ops(&self) -> Option<&dyn PrivateOps> {
        match &self.pgmap()?.kind {
            MemoryType::Private(ops) => Some(&**ops),
            MemoryType::Coherent(_)
            | MemoryType::FsDax(_)
            | MemoryType::Generic
            | MemoryType::P2pDma(_) => None,
        }
    }

    fn pgmap(&self) -> Option<&Pgmap> {
        self.entry.pgmap.with(|pgmap| {
            // SAFETY: by the type invariant the entry has a user, so by its own invariant nobody changes `pgmap`.
            let pgmap = unsafe { &*pgmap };
            pgmap.as_deref()
        })
    }
}

impl MemoryMap {
    /// The device of a page that is in use; `None` if the frame is no device's.
    ///
    /// # Safety
    ///
    /// The caller holds a reference of the page, and keeps it for as long as the answer lives.
    #[doc(alias = "folio_pgmap")]
    #[must_use]
    pub unsafe fn page_pgmap(&self, pfn: Pfn) -> Option<PagePgmap<'_>> {
        let entry = self.lookup.entry_of(pfn)?;
        // INVARIANT: by this function's contract; a page in use is one of its mapping's users.
        Some(PagePgmap { entry })
    }

    /// Drops a reference of a device's page. The last one gives the page back as its kind of memory demands (REF-3).
    ///
    /// # Panics
    ///
    /// If the frame has no reference, or is no device's.
    pub fn put_dev_page(&self, pfn: Pfn) {
        if self.frame(pfn).put() == Put::Held {
            return;
        }
        let Some(entry) = self.lookup.entry_of(pfn) else {
            panic!("{pfn:?} was put as a device's page, and is none");
        };
        // INVARIANT: who drops the last hold has the page's user of its mapping, which is taken away below.
        let page = PagePgmap { entry };
        debug_assert!(page.contains(pfn), "{pfn:?} was not in use");
        if let Some(pgmap) = page.pgmap() {
            pgmap.free_page(self, pfn);
        }
        entry.users.put();
    }
}
