//! The software page table: one flat, lazily populated array of entries, locked by the block.
//!
//! A [`Cursor`] is the lock of one block of [`BLOCK_PAGES`] pages: who has it may look at and change the
//! block's entries, and nobody else can. That is also the generation check of FLT-2: bytes are read,
//! checked against the entry and installed under one cursor, so what was removed never comes back.
//!
//! An address space has one of [`Pte`]s; the pages of a file have one of their own kind of entry.

use alloc::boxed::Box;
use core::fmt;
use core::marker::PhantomData;
use core::ops::Range;

use pgmap_core::addr::{PAGE_SHIFT, VirtAddr};
use pgmap_core::platform::{OutOfAddressSpace, Platform};
use pgmap_core::vmemmap::ZeroedSlice;
use pgmap_sync::atomic::{AtomicU64, Ordering};
use pgmap_sync::{Mutex, MutexGuard};

use crate::pte::Pte;

/// Pages that share one lock: 64, which is 256 KiB of addresses. The models have smaller blocks, and so more of them in few steps.
pub const BLOCK_PAGES: u32 = if cfg!(any(loom, shuttle)) { 4 } else { 64 };
/// Locks, shared by blocks whose numbers are equal modulo this.
const LOCKS: usize = if cfg!(any(loom, shuttle)) { 8 } else { 1024 };

/// A page of the address space, counted from its base.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PageIndex(pub u32);

impl PageIndex {
    /// The block that holds the page.
    #[must_use]
    pub const fn block(self) -> BlockIndex {
        BlockIndex(self.0 / BLOCK_PAGES)
    }
}

/// A block of pages, counted from the base of the address space.
#[derive(Default, Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockIndex(pub u32);

impl BlockIndex {
    /// The block's pages.
    #[must_use]
    pub const fn pages(self) -> Range<u32> {
        self.0 * BLOCK_PAGES..self.0 * BLOCK_PAGES + BLOCK_PAGES
    }
}

/// What a table says of a page, as a word. Zero is a page of which there is nothing to say.
pub trait Entry: Copy + PartialEq + fmt::Debug {
    /// The entry of a page that was never used.
    const EMPTY: Self;

    /// The entry as the table stores it: 0 for [`EMPTY`](Self::EMPTY).
    fn to_word(self) -> u64;

    /// The entry in a word that [`to_word`](Self::to_word) made.
    fn from_word(word: u64) -> Self;
}

/// The page table of one address space, or of one file.
pub struct PageTable<E = Pte> {
    entries: ZeroedSlice<AtomicU64>, // B: the lock of the entry's block
    /// One bit for each block: whether it has ever had an entry that was not empty.
    used: ZeroedSlice<AtomicU64>, // A
    locks: Box<[Mutex<()>]>,
    base: VirtAddr,
    pages: u32,
    entry: PhantomData<fn() -> E>,
}

/// Without the locks, of which there are many.
impl<E> fmt::Debug for PageTable<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageTable")
            .field("base", &self.base)
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}

impl<E: Entry> PageTable<E> {
    /// The table for `pages` pages from `base` on; it costs memory only where it is used.
    ///
    /// # Errors
    ///
    /// [`OutOfAddressSpace`] if the machine has no room for 8 bytes a page.
    pub fn new(
        platform: &'static dyn Platform,
        base: VirtAddr,
        pages: u32,
    ) -> Result<Self, OutOfAddressSpace> {
        let pages = pages.next_multiple_of(BLOCK_PAGES);
        let entries = ZeroedSlice::new(platform, pages as usize)?;
        let used = ZeroedSlice::new(platform, pages.div_ceil(BLOCK_PAGES * u64::BITS) as usize)?;
        let locks = (0..LOCKS).map(|_| Mutex::new(())).collect();
        Ok(Self {
            entries,
            used,
            locks,
            base,
            pages,
            entry: PhantomData,
        })
    }

    /// How many pages the table describes.
    #[must_use]
    pub const fn pages(&self) -> u32 {
        self.pages
    }

    /// The page that holds an address, if the table describes it.
    #[must_use]
    pub fn page_at(&self, at: VirtAddr) -> Option<PageIndex> {
        let page = at.checked_offset_from(self.base)? >> PAGE_SHIFT;
        u32::try_from(page)
            .ok()
            .filter(|page| *page < self.pages)
            .map(PageIndex)
    }

    /// The address of a page.
    ///
    /// # Panics
    ///
    /// If the table does not describe the page.
    #[must_use]
    pub fn address(&self, page: PageIndex) -> VirtAddr {
        assert!(page.0 < self.pages, "{page:?} is outside the page table");
        let offset = (page.0 as usize) << PAGE_SHIFT;
        self.base.checked_add(offset).unwrap_or(self.base)
    }

    /// The first block at or after `from` that has ever been used. Address spaces are large and empty: what looks for
    /// pages looks here first.
    #[must_use]
    pub fn next_used(&self, from: BlockIndex) -> Option<BlockIndex> {
        let blocks = self.pages / BLOCK_PAGES;
        let mut block = from.0;
        while block < blocks {
            // Acquire: pairs with the release in `Cursor::mark_used`; a block that is used later is later.
            let word = self.used[(block / u64::BITS) as usize].load(Ordering::Acquire);
            let rest = word >> (block % u64::BITS);
            if rest != 0 {
                return Some(BlockIndex(block + rest.trailing_zeros()));
            }
            block = (block / u64::BITS + 1) * u64::BITS;
        }
        None
    }

    /// Waits for the lock of a block.
    #[must_use]
    pub fn lock(&self, block: BlockIndex) -> Cursor<'_, E> {
        let guard = self.locks[block.0 as usize % LOCKS].lock();
        Cursor {
            table: self,
            block,
            _guard: guard,
        }
    }

    /// Waits until everybody who has a cursor now has let go of it: whoever takes one later sees what the caller did before.
    pub fn synchronize(&self) {
        for lock in &self.locks {
            drop(lock.lock());
        }
    }

    /// The entry of a page at this moment, without its lock: it may be another at once. `EMPTY` outside the table.
    #[must_use]
    pub fn peek(&self, page: PageIndex) -> E {
        if page.0 >= self.pages {
            return E::EMPTY;
        }
        // Acquire: pairs with the release in `Cursor::set`, so that what an entry names is ready.
        E::from_word(self.entries[page.0 as usize].load(Ordering::Acquire))
    }
}

/// The lock of one block, and the only way to change its entries.
#[derive(Debug)]
pub struct Cursor<'a, E = Pte> {
    table: &'a PageTable<E>,
    block: BlockIndex,
    _guard: MutexGuard<'a, ()>,
}

impl<E: Entry> Cursor<'_, E> {
    /// The block's pages.
    #[must_use]
    pub const fn pages(&self) -> Range<u32> {
        self.block.pages()
    }

    /// The entry of a page of this block.
    #[must_use]
    pub fn get(&self, page: PageIndex) -> E {
        // Relaxed: the block's lock orders every change of the entry.
        E::from_word(self.word(page).load(Ordering::Relaxed))
    }

    /// Replaces the entry of a page of this block.
    pub fn set(&mut self, page: PageIndex, entry: E) {
        if entry != E::EMPTY {
            self.mark_used();
        }
        // Release: pairs with the acquire in `PageTable::peek`.
        self.word(page).store(entry.to_word(), Ordering::Release);
    }

    /// Notes that the block is used, though it has no entry yet: who looks for used blocks finds it, and waits for this cursor.
    pub fn mark_used(&self) {
        let (word, bit) = (self.block.0 / u64::BITS, 1 << (self.block.0 % u64::BITS));
        let used = &self.table.used[word as usize];
        // Relaxed: a bit that is seen stays; one that is not is set again.
        if used.load(Ordering::Relaxed) & bit == 0 {
            // Release: pairs with the acquire in `next_used`.
            used.fetch_or(bit, Ordering::Release);
        }
    }

    /// The longest run of pages around `page`, inside `limit` and this block, whose entries `wanted` accepts;
    /// empty if it does not accept `page`.
    #[must_use]
    pub fn run(&self, page: u32, limit: &Range<u32>, wanted: impl Fn(E) -> bool) -> Range<u32> {
        let block = self.pages();
        let (low, high) = (limit.start.max(block.start), limit.end.min(block.end));
        let wanted = |page: u32| wanted(self.get(PageIndex(page)));
        if page < low || page >= high || !wanted(page) {
            return page..page;
        }
        let end = (page + 1..high).find(|page| !wanted(*page)).unwrap_or(high);
        let start = (low..page)
            .rev()
            .take_while(|page| wanted(*page))
            .last()
            .unwrap_or(page);
        start..end
    }

    fn word(&self, page: PageIndex) -> &AtomicU64 {
        assert!(
            page.block() == self.block,
            "{page:?} is not in the locked {:?}",
            self.block
        );
        &self.table.entries[page.0 as usize]
    }
}

#[cfg(test)]
#[cfg(not(any(loom, shuttle)))]
mod tests {
    use super::*;
    use pgmap_core::addr::Pfn;
    use pgmap_core::platform::HeapPlatform;
    use proptest::prelude::*;
    use std::collections::HashMap;

    use crate::pte::Stamp;

    fn table(pages: u32) -> PageTable {
        PageTable::new(&HeapPlatform, VirtAddr::new(1 << 30), pages).unwrap()
    }

    proptest! {
        /// The page table holds what was set last, and nothing else.
        #[test]
        fn the_table_agrees_with_a_map(sets in prop::collection::vec((0u32..4096, any::<u32>()), 0..200)) {
            let table = table(4096);
            let mut model = HashMap::new();
            for (page, pfn) in sets {
                let pte = Pte::Device { page: Pfn::from_u32(pfn), stamp: Stamp::new(pfn) };
                table.lock(PageIndex(page).block()).set(PageIndex(page), pte);
                model.insert(page, pte);
            }
            for page in 0..4096 {
                let expected = model.get(&page).copied().unwrap_or(Pte::None);
                prop_assert_eq!(table.lock(PageIndex(page).block()).get(PageIndex(page)), expected);
            }
        }
    }

    /// Blocks that were never used are skipped, those that were are found.
    #[test]
    fn used_blocks_are_found() {
        let table = table(64 * 300);
        for block in [3, 64, 299] {
            assert_eq!(
                table.lock(BlockIndex(block)).get(PageIndex(block * 64)),
                Pte::None
            );
            table
                .lock(BlockIndex(block))
                .set(PageIndex(block * 64 + 1), Pte::Poisoned);
        }
        let mut found = Vec::new();
        let mut next = BlockIndex(0);
        while let Some(block) = table.next_used(next) {
            found.push(block.0);
            next = BlockIndex(block.0 + 1);
        }
        assert_eq!(found, [3, 64, 299]);
    }

    /// A run stops at its limit, at the block's edges, and at the first entry that is not wanted.
    #[test]
    fn a_run_ends_at_limits_blocks_and_other_entries() {
        let table = table(256);
        let mut cursor = table.lock(BlockIndex(1));
        cursor.set(PageIndex(70), Pte::Poisoned);
        let none = |pte| pte == Pte::None;
        assert_eq!(cursor.run(80, &(0..256), none), 71..128);
        assert_eq!(cursor.run(80, &(75..90), none), 75..90);
        assert_eq!(cursor.run(70, &(0..256), none), 70..70);
        assert_eq!(cursor.run(64, &(0..256), none), 64..70);
    }

    /// Addresses outside the table belong to no page.
    #[test]
    fn addresses_outside_have_no_page() {
        let table = table(64);
        assert_eq!(table.page_at(VirtAddr::new((1 << 30) - 1)), None);
        assert_eq!(table.page_at(VirtAddr::new((1 << 30) + 64 * 4096)), None);
        assert_eq!(
            table.page_at(VirtAddr::new((1 << 30) + 4097)),
            Some(PageIndex(1))
        );
    }
}
