//! The memory of a file's cached pages and the mappings of it, as a model.
//!
//! `mm` calls it through [`SharedMmu`]; a test's threads call [`load`](ModelSharedMmu::load) and
//! [`store`](ModelSharedMmu::store), which answer with the fault that an access would raise, and [`dma`](ModelSharedMmu::dma),
//! which goes past the page tables. Every page is a step. What must never happen here: a misuse that goes unnoticed. Memory
//! that is given back is junk from then on, and a device that still has it writes to nobody's.

use core::cell::UnsafeCell;
use core::fmt;
use core::ptr::NonNull;
use std::collections::BTreeMap;
use std::sync::Arc;

use pgmap_core::addr::{PAGE_SIZE, Page, VirtAddr};
use pgmap_mm::mmu::{Progress, Protect, Stop};
use pgmap_mm::page_cache::{FileVma, VmaAccess};
use pgmap_mm::shared_mmu::{SharedMmu, SharedPages};
use pgmap_sync::Mutex;

use crate::model::{Fault, JUNK, each, nth_page};

/// What is wrong with a model on purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flaw {
    /// Nothing.
    None,
    /// It says that mappings are protected, and they are not.
    NeverProtects,
    /// It says that mappings are gone, and they are not.
    NeverUnmaps,
}

/// An operation that can be told to fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// [`SharedMmu::map`].
    Map,
    /// [`SharedMmu::protect`].
    Protect,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mapping {
    Page { page: u32, protect: Protect },
    Poison,
}

impl Mapping {
    fn shows(self, page: u32) -> bool {
        matches!(self, Self::Page { page: shown, .. } if shown == page)
    }
}

/// The memory of one page of the file.
#[derive(Clone, Copy, Default, Debug)]
struct Body {
    has_memory: bool,
    /// How often its memory was given back.
    lives: u32,
}

#[derive(Debug, Default)]
struct Tables {
    vmas: Vec<FileVma>,
    /// Those of them that are about to be unmapped.
    leaving: Vec<FileVma>,
    mapped: BTreeMap<VirtAddr, Mapping>,
    bodies: Vec<Body>,
    refusals: Vec<(Operation, Stop)>,
}

impl Tables {
    fn refusal(&mut self, operation: Operation) -> Option<Stop> {
        let nth = self.refusals.iter().position(|(of, _)| *of == operation)?;
        Some(self.refusals.remove(nth).1)
    }

    /// The page of the file at an address.
    fn page_at(&self, at: VirtAddr) -> u32 {
        let page = self.vmas.iter().find_map(|vma| vma.page_at(at));
        page.unwrap_or_else(|| panic!("{at:?} is in no mapping of the file"))
    }

    fn is_mapped(&self, page: u32) -> bool {
        let mut mappings = self.mapped.values();
        mappings.any(|mapping| mapping.shows(page))
    }

    /// Takes a page from the mappings that `mm` may have forgotten, and the program has not let go of yet.
    fn zap(&mut self, page: u32) {
        let leaving = &self.leaving;
        self.mapped.retain(|at, mapping| {
            let stays = leaving.iter().all(|vma| vma.page_at(*at).is_none());
            stays || !mapping.shows(page)
        });
    }

    fn is_read_only(&self, at: VirtAddr) -> bool {
        let mut vmas = self.vmas.iter();
        vmas.any(|vma| vma.access == VmaAccess::Read && vma.page_at(at).is_some())
    }

    fn writable(&self, at: VirtAddr) -> Result<u32, Fault> {
        match self.mapped.get(&at.page_start()) {
            Some(Mapping::Page {
                page,
                protect: Protect::ReadWrite,
            }) if !self.is_read_only(at) => Ok(*page),
            Some(Mapping::Page { .. }) => Err(Fault::WriteProtected),
            Some(Mapping::Poison) => Err(Fault::Poisoned),
            None => Err(Fault::Missing),
        }
    }
}

/// The memory of one file's pages, and a modelled machine's mappings of it.
pub struct ModelSharedMmu {
    tables: Mutex<Tables>,
    pages: Box<[UnsafeCell<Page>]>,
    flaw: Flaw,
}

// SAFETY: the bytes are read and written by whoever likes, which is what `SharedPages` allows; here it is done word by word,
// volatile.
unsafe impl Sync for ModelSharedMmu {}

impl ModelSharedMmu {
    /// Memory for a file of at most `pages` pages, none of which has any yet.
    #[must_use]
    pub fn new(pages: u32, flaw: Flaw) -> Arc<Self> {
        let tables = Tables {
            bodies: vec![Body::default(); pages as usize],
            ..Tables::default()
        };
        Arc::new(Self {
            tables: Mutex::new(tables),
            pages: (0..pages).map(|_| UnsafeCell::new(Page::ZERO)).collect(),
            flaw,
        })
    }

    /// Makes room for a mapping, before `mm` is told of it.
    pub fn add_vma(&self, vma: FileVma) {
        self.tables.lock().vmas.push(vma);
    }

    /// Says that `mm` is about to forget a mapping: from then on it shows what the memory shows, as every mapping of a memory
    /// file does.
    pub fn leave_vma(&self, vma: &FileVma) {
        self.tables.lock().leaving.push(*vma);
    }

    /// Says that `mm` has not forgotten a mapping.
    pub fn keep_vma(&self, vma: &FileVma) {
        self.tables.lock().leaving.retain(|other| other != vma);
    }

    /// Ends a mapping, after `mm` has forgotten it.
    pub fn remove_vma(&self, vma: &FileVma) {
        let mut tables = self.tables.lock();
        tables.leaving.retain(|other| other != vma);
        tables.vmas.retain(|other| other != vma);
        tables.mapped.retain(|at, _| vma.page_at(*at).is_none());
    }

    /// Whether an address may not be written, whatever is mapped there.
    pub fn is_read_only(&self, at: VirtAddr) -> bool {
        self.tables.lock().is_read_only(at)
    }

    /// The program reads the word at an address.
    ///
    /// # Errors
    ///
    /// The fault that the machine would raise.
    pub fn load(&self, at: VirtAddr) -> Result<u64, Fault> {
        let tables = self.tables.lock();
        match tables.mapped.get(&at.page_start()) {
            Some(Mapping::Page { page, .. }) => Ok(self.read(*page, at)),
            Some(Mapping::Poison) => Err(Fault::Poisoned),
            None => Err(Fault::Missing),
        }
    }

    /// The program writes the word at an address.
    ///
    /// # Errors
    ///
    /// The fault that the machine would raise.
    pub fn store(&self, at: VirtAddr, word: u64) -> Result<(), Fault> {
        // Under the lock: as a machine's store, it is done before the page can be taken away, or not at all.
        let tables = self.tables.lock();
        tables.writable(at).map(|page| self.write(page, at, word))
    }

    /// What a device sees of a page of the file, pinned by the caller: it is in RAM, mapped or not.
    ///
    /// # Panics
    ///
    /// If the page is not in RAM.
    pub fn dma(self: &Arc<Self>, page: u32) -> SharedDma {
        let body = self.tables.lock().bodies[page as usize];
        assert!(body.has_memory, "a pinned page stays");
        SharedDma {
            mmu: Arc::clone(self),
            page,
            life: body.lives,
        }
    }

    /// Makes the next page of an operation stop with this reason.
    pub fn refuse(&self, operation: Operation, stop: Stop) {
        self.tables.lock().refusals.push((operation, stop));
    }

    /// Forgets what [`refuse`](Self::refuse) asked for and has not happened.
    pub fn refuse_nothing(&self) {
        self.tables.lock().refusals.clear();
    }

    /// Refusals that were asked for and have not happened.
    pub fn refusals_left(&self) -> usize {
        self.tables.lock().refusals.len()
    }

    /// Pages that use memory.
    pub fn pages_in_use(&self) -> usize {
        let tables = self.tables.lock();
        tables.bodies.iter().filter(|body| body.has_memory).count()
    }

    fn word(&self, page: u32, at: VirtAddr) -> NonNull<u64> {
        let offset = at.get() % PAGE_SIZE;
        assert!(offset.is_multiple_of(8), "{at:?} is not a word's address");
        let start = NonNull::from(&self.pages[page as usize]).cast::<u64>();
        // SAFETY: the offset is less than a page.
        unsafe { start.byte_add(offset) }
    }

    fn read(&self, page: u32, at: VirtAddr) -> u64 {
        // SAFETY: the word is one of a page that lives as long as the model; volatile, as others may write it.
        unsafe { self.word(page, at).read_volatile() }
    }

    fn write(&self, page: u32, at: VirtAddr, word: u64) {
        // SAFETY: as in `read`; in an `UnsafeCell` it may be written.
        unsafe { self.word(page, at).write_volatile(word) };
    }
}

/// Fills a page that `mm` handed out, as a device does that reads a file.
pub(crate) fn fill(pages: SharedPages<'_>, nth: usize, from: &Page) {
    assert!(nth < pages.count(), "page {nth} of {}", pages.count());
    for (offset, byte) in from.0.iter().enumerate() {
        // SAFETY: the page is one of those that the value stands for, as just checked.
        let at = unsafe { pages.as_ptr().add(nth * PAGE_SIZE + offset) };
        // SAFETY: by the invariant of `SharedPages` it may be written; volatile, as others may read it.
        unsafe { at.write_volatile(*byte) };
    }
}

// SAFETY: only `mapped` makes a page reachable for `load` and `store`, and `unmap` takes pages out of it under the same lock,
// unless the model is flawed on purpose. A `SharedDma` is what has the page pinned.
unsafe impl SharedMmu for ModelSharedMmu {
    fn pages(&self, first: u32, count: usize) -> SharedPages<'_> {
        let mut tables = self.tables.lock();
        let (start, end) = (first as usize, first as usize + count);
        for (nth, body) in tables.bodies[start..end].iter_mut().enumerate() {
            if !body.has_memory {
                body.has_memory = true;
                fill(self.view(start + nth, 1), 0, &Page::ZERO);
            }
        }
        self.view(start, count)
    }

    fn map(&self, at: VirtAddr, count: usize, protect: Protect) -> Progress {
        each(count, |nth| {
            let at = nth_page(at, nth);
            let mut tables = self.tables.lock();
            let page = tables.page_at(at);
            if tables.mapped.contains_key(&at) {
                return Err(Stop::Exists);
            }
            assert!(
                tables.bodies[page as usize].has_memory,
                "page {page} was mapped, and has no memory"
            );
            if let Some(stop) = tables.refusal(Operation::Map) {
                return Err(stop);
            }
            tables.mapped.insert(at, Mapping::Page { page, protect });
            Ok(())
        })
    }

    fn protect(&self, at: VirtAddr, count: usize) -> Progress {
        each(count, |nth| {
            let mut tables = self.tables.lock();
            tables.page_at(nth_page(at, nth));
            if let Some(stop) = tables.refusal(Operation::Protect) {
                return Err(stop);
            }
            if let Some(Mapping::Page { protect, .. }) = tables.mapped.get_mut(&nth_page(at, nth))
                && self.flaw != Flaw::NeverProtects
            {
                *protect = Protect::ReadOnly;
            }
            Ok(())
        })
    }

    fn unprotect(&self, at: VirtAddr, count: usize) {
        for at in (0..count).map(|nth| nth_page(at, nth)) {
            let mut tables = self.tables.lock();
            tables.page_at(at);
            if let Some(Mapping::Page { protect, .. }) = tables.mapped.get_mut(&at) {
                *protect = Protect::ReadWrite;
            }
        }
    }

    fn unmap(&self, at: VirtAddr, count: usize) {
        for at in (0..count).map(|nth| nth_page(at, nth)) {
            let mut tables = self.tables.lock();
            tables.page_at(at);
            if self.flaw != Flaw::NeverUnmaps {
                tables.mapped.remove(&at);
            }
        }
    }

    fn poison(&self, at: VirtAddr, count: usize) -> Progress {
        each(count, |nth| {
            let at = nth_page(at, nth);
            let mut tables = self.tables.lock();
            tables.page_at(at);
            if tables.mapped.contains_key(&at) {
                return Err(Stop::Exists);
            }
            tables.mapped.insert(at, Mapping::Poison);
            Ok(())
        })
    }

    fn wake(&self, _at: VirtAddr, _count: usize) {
        // Who faults here asks again of itself. A step all the same.
        drop(self.tables.lock());
    }

    fn free(&self, first: u32, count: usize) {
        for page in (first..).take(count) {
            let mut tables = self.tables.lock();
            tables.zap(page);
            assert!(
                !tables.is_mapped(page) || self.flaw == Flaw::NeverUnmaps,
                "the memory of page {page} was given back while it was mapped"
            );
            let body = &mut tables.bodies[page as usize];
            body.has_memory = false;
            body.lives += 1;
            fill(self.view(page as usize, 1), 0, &Page([JUNK; PAGE_SIZE]));
        }
    }
}

impl ModelSharedMmu {
    fn view(&self, first: usize, count: usize) -> SharedPages<'_> {
        let start = NonNull::from(&self.pages[first..first + count]).cast();
        // SAFETY: pages are aligned, live as long as the model, and may be written in their `UnsafeCell`s.
        unsafe { SharedPages::new(start, count) }
    }
}

impl fmt::Debug for ModelSharedMmu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelSharedMmu")
            .field("flaw", &self.flaw)
            .finish_non_exhaustive()
    }
}

/// A page of a file as a device sees it that was told its physical address: not through the page tables, and whatever becomes
/// of the page meanwhile.
#[derive(Debug)]
pub struct SharedDma {
    mmu: Arc<ModelSharedMmu>,
    page: u32,
    life: u32,
}

impl SharedDma {
    /// The device reads a word of the page; only the offset in the page of `at` counts. Junk if the page has gone.
    #[must_use]
    pub fn load(&self, at: VirtAddr) -> u64 {
        let tables = self.mmu.tables.lock();
        if self.has_the_page(&tables) {
            self.mmu.read(self.page, at)
        } else {
            u64::from_ne_bytes([JUNK; 8])
        }
    }

    /// The device writes a word of the page; only the offset in the page of `at` counts. Nobody sees it if the page has gone.
    pub fn store(&self, at: VirtAddr, word: u64) {
        let tables = self.mmu.tables.lock();
        if self.has_the_page(&tables) {
            self.mmu.write(self.page, at, word);
        }
    }

    fn has_the_page(&self, tables: &Tables) -> bool {
        let body = tables.bodies[self.page as usize];
        body.has_memory && body.lives == self.life
    }
}
