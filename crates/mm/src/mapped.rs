//! Where files are mapped: what a fault, and a pin, look up first.
//!
//! The list has as many copies as threads may look at side by side; each copy has handles of its own on the files, so that
//! threads which pin pages of one file do not meet at the count of its handles either. Mappings come and go seldom, and pins do
//! not. What must never happen here: a mapping that is gone from some copies only, when somebody is told that it is gone.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use core::array;
use core::ops::Deref;

use pgmap_core::addr::VirtAddr;
use pgmap_sync::{Mutex, MutexGuard};

use crate::discard::Pinned;
use crate::page_cache::{FileNumber, FileVma, PageCache};

/// Copies of the list; threads beyond this many share.
const COPIES: usize = if cfg!(any(loom, shuttle)) { 2 } else { 16 };

/// A handle on a file, with a count that only its copy of the list has.
#[derive(Clone, Debug)]
pub(crate) struct MappedFile(Arc<Counted>);

/// With a cache line of its own, and so is the count.
#[derive(Debug)]
#[repr(align(128))]
struct Counted(Arc<PageCache>);

impl Deref for MappedFile {
    type Target = Arc<PageCache>;

    fn deref(&self) -> &Arc<PageCache> {
        &self.0.0
    }
}

/// The handles of all copies on one file.
#[derive(Clone, Debug)]
pub(crate) struct Handles([MappedFile; COPIES]);

impl Handles {
    pub(crate) fn new(file: &Arc<PageCache>) -> Self {
        Self(array::from_fn(|_| {
            MappedFile(Arc::new(Counted(Arc::clone(file))))
        }))
    }
}

type List = BTreeMap<VirtAddr, (FileVma, MappedFile)>;

#[derive(Debug, Default)]
#[repr(align(128))]
struct ListCopy(Mutex<List>);

/// The mappings of files in one address space, by first address.
#[derive(Debug, Default)]
pub(crate) struct MappedFiles([ListCopy; COPIES]);

impl MappedFiles {
    /// Enters a mapping, before anybody touches it.
    pub(crate) fn insert(&self, vma: FileVma, file: Handles) {
        for (copy, file) in self.0.iter().zip(file.0) {
            copy.0.lock().insert(vma.at, (vma, file));
        }
    }

    /// Takes the mapping that begins at an address out of all copies, unless `is_pinned`: who pins registers first and then looks
    /// here. Answers its file, if there was one.
    ///
    /// # Errors
    ///
    /// [`Pinned`]: it stays.
    pub(crate) fn remove_unless(
        &self,
        at: VirtAddr,
        is_pinned: impl Fn() -> bool,
    ) -> Result<Option<Arc<PageCache>>, Pinned> {
        let mut copies = self.lock();
        if is_pinned() {
            return Err(Pinned { at });
        }
        let gone = copies.each_mut().map(|copy| copy.remove(&at));
        drop(copies);
        // Its handles go now, without the locks.
        Ok(gone[0].as_ref().map(|(_, file)| Arc::clone(file)))
    }

    fn lock(&self) -> [MutexGuard<'_, List>; COPIES] {
        // In this order, everywhere.
        array::from_fn(|nth| self.0[nth].0.lock())
    }

    /// The mapping at an address, and its file.
    pub(crate) fn at(&self, at: VirtAddr) -> Option<(FileVma, MappedFile)> {
        let list = self.mine();
        let (_, (vma, file)) = list.range(..=at).next_back()?;
        vma.page_at(at)?;
        Some((*vma, file.clone()))
    }

    /// The file with this number, if it is mapped.
    pub(crate) fn of(&self, number: FileNumber) -> Option<Arc<PageCache>> {
        let list = self.mine();
        let mut files = list.values().map(|(_, file)| file);
        let file = files.find(|file| file.number() == number)?;
        Some(Arc::clone(file))
    }

    fn mine(&self) -> MutexGuard<'_, List> {
        self.0[pgmap_sync::thread_number() % COPIES].0.lock()
    }
}
