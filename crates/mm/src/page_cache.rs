//! The page cache of one file (the kernel's `struct address_space`): which of its pages are in RAM, who maps them, and what
//! the file does not have yet.
//!
//! Pages are shared frames: a page of the file has one place in the machine's memory, however many mappings show it, and a
//! frame of the RAM budget accounts for it. The cursor of a block is the lock of its pages, as in an address space; who wants
//! to change what a pin relies on *claims* the frame under it ([`Frame::freeze`](pgmap_core::page::Frame::freeze)), which
//! fails while anybody has it pinned, so that pins need no lock. What must never happen here: a dirty page dropped (FLT-4),
//! a pinned page evicted, taken for clean (GUP-4) or truncated; bytes shown that were read before a truncation (FLT-2).

use alloc::sync::Arc;
use core::ops::Range;

use pgmap_core::addr::{PAGE_SIZE, VirtAddr};
use pgmap_core::memcg::Memcg;
use pgmap_core::memremap::MemoryMap;
use pgmap_core::platform::{OutOfAddressSpace, Platform};
use pgmap_core::ram::Ram;
use pgmap_sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use pgmap_sync::{Mutex, WaitQueue};

use crate::backing::Backing;
use crate::errseq::ErrSeq;
use crate::page_table::{BlockIndex, Cursor, PageIndex, PageTable};
use crate::policy::{Class, Queues};
#[cfg(shuttle)]
use crate::seeded_bug::{self, SeededBug};
use crate::shared_mmu::SharedMmu;
use crate::stats::Stats;

mod ahead;
mod barrier;
mod dirty;
mod entry;
mod failure;
mod fault;
#[cfg(all(test, loom))]
mod model;
mod owner;
mod pin;
mod rmap;
mod shrink;
mod truncate;
mod unread;
mod writeback;

pub(crate) use ahead::{Ahead, GROUP_PAGES};
pub use ahead::{Group, ReadAhead};
pub use entry::{CachePage, Cached};
pub use failure::Lost;
pub use owner::FileNumber;
pub(crate) use owner::FilePage;
pub(crate) use pin::NotPinned;
pub use rmap::{FileVma, VmaAccess};
pub use truncate::TruncateError;
pub use writeback::{OnPinned, Written};

use barrier::Barrier;
use dirty::DirtyBlocks;
use entry::{Mapping, State};
use rmap::FileVmas;
use unread::Unread;

/// What a page cache is made of.
#[derive(Debug)]
pub struct CacheParts {
    /// Memory for tables.
    pub platform: &'static dyn Platform,
    /// The number by which its frames name it: see [`Files::next_number`](crate::files::Files::next_number).
    pub number: FileNumber,
    /// All frames.
    pub map: Arc<MemoryMap>,
    /// The RAM budget.
    pub ram: Arc<Ram>,
    /// The memory of the pages.
    pub mmu: Arc<dyn SharedMmu>,
    /// The file.
    pub backing: Arc<dyn Backing>,
    /// What its pages in RAM are charged to, if they are not to have all of the budget.
    pub memcg: Option<Arc<Memcg>>,
    /// How long the file is, in bytes.
    pub size_bytes: u64,
    /// How many pages it may ever have.
    pub most_pages: u32,
    /// Where events are counted.
    pub stats: &'static Stats,
}

/// The pages of one file that are in RAM.
///
/// # Invariants
///
/// The machine maps a page only if its entry is `Cached` and `Mapped`, and writable only if it is `Dirty`. A pinned page
/// that somebody may write through is `Dirty`. A frame of RAM with an entry has one reference that belongs to it.
#[derive(Debug)]
pub struct PageCache {
    table: PageTable<CachePage>,
    /// How many pages the file may ever have; the table has entries for a few more.
    most_pages: u32,
    mmu: Arc<dyn SharedMmu>,
    backing: Arc<dyn Backing>,
    number: FileNumber,
    map: Arc<MemoryMap>,
    ram: Arc<Ram>,
    memcg: Option<Arc<Memcg>>,
    vmas: FileVmas,
    size_bytes: AtomicU64, // changed under `resizing`
    resizing: Mutex<()>,
    barrier: Barrier,
    /// Blocks with mapped pages, and blocks with others.
    active: Queues,
    inactive: Queues,
    dirty_blocks: DirtyBlocks,
    /// The block at which the next bounded writeback begins.
    flush_from: AtomicU32,
    /// Pages in RAM, and those of them that are dirty.
    cached: AtomicU64,
    dirty: AtomicU64,
    /// Who waits for pages that are under writeback.
    written: WaitQueue,
    errors: ErrSeq,
    /// Where accesses get SIGBUS for a read that failed.
    unread: Unread,
    /// Nobody has the file open or mapped any more, but perhaps pinned.
    released: AtomicBool,
    stats: &'static Stats,
}

impl PageCache {
    /// The cache of a file of which nothing is in RAM yet.
    ///
    /// # Errors
    ///
    /// [`OutOfAddressSpace`] if the machine has no room for the tables.
    pub fn new(parts: CacheParts) -> Result<Self, OutOfAddressSpace> {
        // Whole groups, so that those who read ahead find an entry for every page of the last one.
        let pages = parts.most_pages.next_multiple_of(GROUP_PAGES);
        Ok(Self {
            table: PageTable::new(parts.platform, VirtAddr::new(0), pages)?,
            most_pages: parts.most_pages,
            mmu: parts.mmu,
            backing: parts.backing,
            number: parts.number,
            map: parts.map,
            ram: parts.ram,
            memcg: parts.memcg,
            vmas: FileVmas::default(),
            size_bytes: AtomicU64::new(parts.size_bytes),
            resizing: Mutex::new(()),
            barrier: Barrier::default(),
            active: Queues::new(parts.platform, pages)?,
            inactive: Queues::new(parts.platform, pages)?,
            dirty_blocks: DirtyBlocks::new(parts.platform, pages)?,
            flush_from: AtomicU32::new(0),
            cached: AtomicU64::new(0),
            dirty: AtomicU64::new(0),
            written: WaitQueue::new(),
            errors: ErrSeq::default(),
            unread: Unread::default(),
            released: AtomicBool::new(false),
            stats: parts.stats,
        })
    }

    /// How long the file is, in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        // Acquire: pairs with the release of who changed it, so that what was removed before is gone.
        self.size_bytes.load(Ordering::Acquire)
    }

    /// Pages of the file that hold any byte of it.
    #[must_use]
    pub fn size_pages(&self) -> u32 {
        u32::try_from(self.size_bytes().div_ceil(PAGE_SIZE as u64)).unwrap_or(u32::MAX)
    }

    /// The longest that the file may become, in bytes.
    #[must_use]
    pub fn most_bytes(&self) -> u64 {
        u64::from(self.most_pages) * PAGE_SIZE as u64
    }

    /// Pages in RAM.
    #[must_use]
    pub fn cached_pages(&self) -> u64 {
        // Relaxed, here and below: numbers that stand alone.
        self.cached.load(Ordering::Relaxed)
    }

    /// Pages in RAM that the file does not have yet.
    #[must_use]
    pub fn dirty_pages(&self) -> u64 {
        self.dirty.load(Ordering::Relaxed)
    }

    /// What its pages are charged to.
    #[must_use]
    pub const fn memcg(&self) -> Option<&Arc<Memcg>> {
        self.memcg.as_ref()
    }

    /// Whether its group may have no more pages in RAM: some of the group's have to leave first.
    #[must_use]
    pub fn is_at_limit(&self) -> bool {
        let memcg = self.memcg.as_ref();
        memcg.is_some_and(|memcg| memcg.charged_pages() >= memcg.limit_pages())
    }

    /// Charges up to `want` pages that are about to come into RAM. Says how many.
    fn charge(&self, want: usize) -> usize {
        let Some(memcg) = &self.memcg else {
            return want;
        };
        usize::try_from(memcg.charge(want as u64)).unwrap_or(want)
    }

    /// Gives back the charge of pages that have left RAM, or did not come.
    fn uncharge(&self, pages: usize) {
        if let Some(memcg) = &self.memcg {
            memcg.uncharge(pages as u64);
        }
    }

    /// The errors of writeback.
    #[must_use]
    pub const fn errors(&self) -> &ErrSeq {
        &self.errors
    }

    /// The file.
    #[must_use]
    pub fn backing(&self) -> &dyn Backing {
        &*self.backing
    }

    /// Writes back what is dirty, as nobody has the file open or mapped any more. Nobody can be told of a failure. Pins may
    /// still be there: the last of them writes back again.
    pub(crate) fn release(&self) {
        #[cfg(shuttle)]
        if seeded_bug::has(SeededBug::ReleaseWritesFirst) {
            self.write_back(0..u32::MAX, OnPinned::Bounce);
            return self.released.store(true, Ordering::Relaxed);
        }
        // Relaxed: the fence orders it.
        self.released.store(true, Ordering::Relaxed);
        // Pairs with the fence in `after_unpin`.
        fence(Ordering::SeqCst);
        self.write_back(0..u32::MAX, OnPinned::Bounce);
    }

    /// Pages have been unpinned: if nobody else has the file any more, what was written through the pins goes to it now, and
    /// leaves RAM.
    pub(crate) fn after_unpin(&self) {
        // Pairs with the fence in `release`: either we see that the file is released, or who releases it sees our pins gone.
        fence(Ordering::SeqCst);
        // Relaxed: the fence orders it.
        if self.released.load(Ordering::Relaxed) {
            self.write_back(0..u32::MAX, OnPinned::Bounce);
            self.shrink_all();
        }
    }

    /// What is known of a page at this moment.
    #[must_use]
    pub fn peek(&self, page: u32) -> CachePage {
        self.table.peek(PageIndex(page))
    }

    /// Notes that RAM has bytes of a page that the file has not.
    fn set_dirty(&self, cursor: &mut Cursor<'_, CachePage>, page: PageIndex) {
        if let CachePage::Cached(cached) = cursor.get(page)
            && !cached.is_dirty()
        {
            // First: who finds the page dirty without the cursor, and writes to it through a pin, is to find the block, too.
            self.dirty_blocks.set(page.block());
            let state = State::Dirty;
            cursor.set(page, CachePage::Cached(Cached { state, ..cached }));
            self.dirty.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The parts of a range of pages in blocks that were ever used, in order.
    fn used_parts(&self, range: &Range<u32>) -> impl Iterator<Item = Range<u32>> {
        let (start, end) = (range.start, range.end);
        let first = self.table.next_used(PageIndex(start).block());
        let next = |block: &BlockIndex| self.table.next_used(BlockIndex(block.0 + 1));
        let blocks = core::iter::successors(first, next).map(BlockIndex::pages);
        let inside = blocks.take_while(move |pages| pages.start < end);
        inside.map(move |pages| pages.start.max(start)..pages.end.min(end))
    }

    /// Puts the pages of a block up for reclaim, if it has any.
    fn queue(&self, page: PageIndex, mapping: Mapping) {
        match mapping {
            Mapping::Mapped => self.active.push(page.block(), Class::Main),
            Mapping::Unmapped => self.inactive.push(page.block(), Class::Main),
        }
    }
}

impl Drop for PageCache {
    fn drop(&mut self) {
        let mut from = BlockIndex(0);
        while let Some(block) = self.table.next_used(from) {
            let frames = block.pages().filter_map(|page| self.peek(page).cached());
            for page in frames {
                self.ram.free(&[page.frame]);
                self.uncharge(1);
            }
            from = BlockIndex(block.0 + 1);
        }
    }
}

/// The pages that hold any of these bytes.
fn pages_of(bytes: &Range<u64>) -> Range<u32> {
    let page = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
    page(bytes.start / PAGE_SIZE as u64)..page(bytes.end.div_ceil(PAGE_SIZE as u64))
}
