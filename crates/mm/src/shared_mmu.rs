//! What the page cache asks of the machine: memory that several mappings share, and those mappings.
//!
//! The memory of a file's cached pages is one object of the machine (on Linux a memory file), in which page `n` of the file
//! has its fixed place. Mappings of it are made and removed by `mm` alone, under the cursor of the page's block. The machine
//! cannot say who has a shared page pinned, so there is no oracle here: pins are counted on our frames (GUP-3).

use alloc::boxed::Box;
use core::cell::UnsafeCell;
use core::fmt;
use core::marker::PhantomData;
use core::ops::Range;
use core::ptr::NonNull;

use pgmap_core::addr::{PAGE_SIZE, Page, VirtAddr};

use crate::mmu::{Progress, Protect};

/// Words in a page.
const WORDS: usize = PAGE_SIZE / size_of::<u64>();

/// Consecutive pages of shared memory, which others may read and write at any moment: no reference to their bytes is ever
/// made.
///
/// # Invariants
///
/// `start` is aligned to a page, and the bytes of `count` pages from there on may be read and written for as long as `'a`.
#[derive(Clone, Copy, Debug)]
pub struct SharedPages<'a> {
    start: NonNull<u8>,
    count: usize,
    memory: PhantomData<&'a ()>,
}

// SAFETY: every access to the bytes is one that any thread may make at any time.
unsafe impl Send for SharedPages<'_> {}

impl SharedPages<'_> {
    /// The `count` pages from `start` on.
    ///
    /// # Safety
    ///
    /// `start` is aligned to a page, and the bytes of the pages may be read and written, by anybody at any time, for as long
    /// as the value lives.
    #[must_use]
    pub const unsafe fn new(start: NonNull<u8>, count: usize) -> Self {
        // INVARIANT: by this function's contract.
        Self {
            start,
            count,
            memory: PhantomData,
        }
    }

    /// Where the bytes are, for system calls.
    #[must_use]
    pub const fn as_ptr(&self) -> NonNull<u8> {
        self.start
    }

    /// How many pages.
    #[must_use]
    pub const fn count(&self) -> usize {
        self.count
    }

    /// Sees to it that one of the pages has memory.
    ///
    /// # Panics
    ///
    /// If there is no such page.
    pub fn touch(&self, nth: usize) {
        assert!(nth < self.count, "page {nth} of {}", self.count);
        let at = self.word(nth * WORDS);
        // SAFETY: by the type invariant the word may be read; volatile, as others may write it, and nobody wants it.
        let _: u64 = unsafe { at.read_volatile() };
    }

    /// Copies one of the pages. If somebody writes to it meanwhile, each word is an old one or a new one.
    ///
    /// # Panics
    ///
    /// If there is no such page.
    pub fn copy_page(&self, nth: usize, to: &mut Page) {
        assert!(nth < self.count, "page {nth} of {}", self.count);
        for (word, to) in to.0.chunks_exact_mut(size_of::<u64>()).enumerate() {
            let at = self.word(nth * WORDS + word);
            // SAFETY: by the type invariant the word may be read; volatile, as others may write it.
            to.copy_from_slice(&unsafe { at.read_volatile() }.to_ne_bytes());
        }
    }

    /// Makes these bytes zeros.
    ///
    /// # Panics
    ///
    /// If they are not all ours.
    pub fn zero(&self, bytes: Range<usize>) {
        assert!(bytes.end <= self.count * PAGE_SIZE, "{bytes:?}");
        for offset in bytes {
            // SAFETY: by the type invariant and the check above the byte is one of ours.
            let at = unsafe { self.start.add(offset) };
            // SAFETY: by the type invariant it may be written; volatile, as others may read it.
            unsafe { at.write_volatile(0) };
        }
    }

    fn word(&self, nth: usize) -> NonNull<u64> {
        // SAFETY: the callers have checked that the word is in one of the pages.
        unsafe { self.start.cast::<u64>().add(nth) }
    }
}

/// The memory of one file's pages, and the machine's mappings of it.
///
/// Page numbers are those of the file. Addresses are page aligned and inside a mapping of the file, at the place that the
/// page has there; counts are at least 1. An operation that stops early has done the pages before, and nothing to those
/// after. Every method may be called from several threads, and none waits for a fault to be served.
///
/// # Safety
///
/// After `unmap` of a page at every address at which it was mapped, nothing reads or writes its bytes but through
/// [`pages`](Self::pages) and what has it pinned.
pub unsafe trait SharedMmu: Send + Sync + fmt::Debug {
    /// The bytes of pages, through a mapping that never faults and that nobody else knows. Pages that have no memory yet
    /// get some when they are touched, and are zeros. Here `count` may be 0.
    fn pages(&self, first: u32, count: usize) -> SharedPages<'_>;

    /// Maps pages that have memory at consecutive missing addresses from `at`, and wakes who waits there.
    fn map(&self, at: VirtAddr, count: usize, protect: Protect) -> Progress;

    /// Lets no address of the range be written without a fault, whether a page is mapped there or not.
    fn protect(&self, at: VirtAddr, count: usize) -> Progress;

    /// Lets the mapped pages be written, and wakes who waits there.
    fn unprotect(&self, at: VirtAddr, count: usize);

    /// Ends the mapping of the pages at these addresses, poison too. The bytes stay.
    fn unmap(&self, at: VirtAddr, count: usize);

    /// Makes missing pages answer with SIGBUS, and wakes who waits there.
    fn poison(&self, at: VirtAddr, count: usize) -> Progress;

    /// Wakes who waits for these addresses: they look again, and fault again if they must.
    fn wake(&self, at: VirtAddr, count: usize);

    /// Gives back the memory of pages that are mapped nowhere: from now on they are zeros.
    fn free(&self, first: u32, count: usize);
}

/// Consecutive pages of our own, for stable copies of what others may be writing.
#[derive(Debug)]
pub struct Bounce {
    pages: Box<[UnsafeCell<Page>]>,
}

impl Bounce {
    /// Room for `count` copies. None takes no memory.
    #[must_use]
    pub fn new(count: usize) -> Self {
        let pages = (0..count).map(|_| UnsafeCell::new(Page::ZERO)).collect();
        Self { pages }
    }

    /// How many copies there is room for.
    #[must_use]
    pub const fn count(&self) -> usize {
        self.pages.len()
    }

    /// Copies the first of `page`'s pages to a place.
    ///
    /// # Panics
    ///
    /// If there is no such page, or no such place.
    pub fn copy(&mut self, place: usize, page: SharedPages<'_>) {
        page.copy_page(0, self.pages[place].get_mut());
    }

    /// The copies in some places, as they were made last.
    ///
    /// # Panics
    ///
    /// If there are no such places.
    #[must_use]
    pub fn pages(&self, places: Range<usize>) -> SharedPages<'_> {
        let pages = &self.pages[places];
        let start = NonNull::from(pages).cast();
        // SAFETY: pages are aligned, and these live as long as the borrow; in an `UnsafeCell` they may be written.
        unsafe { SharedPages::new(start, pages.len()) }
    }
}
