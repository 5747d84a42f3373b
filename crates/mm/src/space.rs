//! One address space: its page table, its queues, its devices, and what a thread needs to work on it.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

use pgmap_core::addr::{Page, Pfn, VirtAddr};
use pgmap_core::memremap::{DevPagemap, MemoryMap};
use pgmap_core::platform::{OutOfAddressSpace, Platform};
use pgmap_core::ram::Ram;
use pgmap_sync::Mutex;
use pgmap_sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::dax::DaxVmas;
use crate::devices::Devices;
use crate::files::Files;
use crate::mmu::Mmu;
use crate::page_cache::{Ahead, GROUP_PAGES};
use crate::page_table::{PageIndex, PageTable};
use crate::policy::Queues;
use crate::private_file::{FilePages, PrivateFiles};
use crate::pte::{Copy, Pte};
use crate::readahead::{MAX_WINDOW, Readahead};
use crate::staging::Staging;
use crate::stats::Stats;
use crate::vma::Vmas;

/// Pages that move to a device, or out of the address space, in one go.
pub(crate) const BATCH: usize = 32;

/// What an address space is made of.
#[derive(Debug)]
pub struct Parts {
    /// Memory for tables.
    pub platform: &'static dyn Platform,
    /// All frames.
    pub map: Arc<MemoryMap>,
    /// The RAM budget.
    pub ram: Ram,
    /// Where pages go, tried in this order.
    pub devices: Vec<DevPagemap>,
    /// The machine's page tables.
    pub mmu: Arc<dyn Mmu>,
    /// The addresses that `mmu` manages.
    pub base: VirtAddr,
    /// How many pages of them.
    pub pages: u32,
    /// How many staging slots `mmu` has.
    pub slots: u32,
    /// Where events are counted.
    pub stats: &'static Stats,
}

/// Memory that a program uses, of which only a part is in RAM.
///
/// # Invariants
///
/// The machine maps a page only if its entry is `Present`. A frame of RAM belongs to exactly one entry that is
/// `Present` or `Staged`, or to a [`Worker`] that serves a fault; a device page to exactly one entry that is `Device`, or
/// that keeps it as a copy.
pub struct AddressSpace {
    pub(crate) map: Arc<MemoryMap>,
    pub(crate) ram: Arc<Ram>,
    pub(crate) devices: Devices,
    pub(crate) mmu: Arc<dyn Mmu>,
    pub(crate) table: PageTable,
    pub(crate) queues: Queues,
    pub(crate) staging: Staging,
    pub(crate) areas: Mutex<Areas>,
    pub(crate) files: Files,
    pub(crate) dax: DaxVmas,
    pub(crate) stats: &'static Stats,
    /// The most pages that wait in staging by choice; the rest of the slots is for those being stored.
    pub(crate) inactive_most: u32,
    /// Whether a child may share pages with us, which the machine then does not move.
    pub(crate) forked: AtomicBool,
    /// Forks that have been announced and not done. While there are any, no page leaves the address space; the lock is held
    /// while one does.
    pub(crate) forking: Mutex<u32>,
    /// The frame at which the next search for copies that can be given up begins.
    pub(crate) shed_from: AtomicU64,
    /// Whether an address outside all areas has been poisoned.
    strays: AtomicBool,
}

/// Short: each pin and each file has the address space, and may be printed.
impl fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AddressSpace")
            .field("table", &self.table)
            .field("ram", &self.ram)
            .finish_non_exhaustive()
    }
}

impl AddressSpace {
    /// An address space without areas.
    ///
    /// # Errors
    ///
    /// [`OutOfAddressSpace`] if the machine has no room for the tables.
    pub fn new(parts: Parts) -> Result<Self, OutOfAddressSpace> {
        let table = PageTable::new(parts.platform, parts.base, parts.pages)?;
        let queues = Queues::new(parts.platform, parts.pages)?;
        Ok(Self {
            map: parts.map,
            ram: Arc::new(parts.ram),
            devices: Devices::new(parts.devices),
            mmu: parts.mmu,
            table,
            queues,
            staging: Staging::new(parts.slots),
            areas: Mutex::new(Areas {
                live: Vmas::new(parts.pages),
                taken: Vmas::new(parts.pages),
                files: PrivateFiles::default(),
            }),
            files: Files::default(),
            dax: DaxVmas::default(),
            stats: parts.stats,
            inactive_most: parts.slots / 2,
            forked: AtomicBool::new(false),
            forking: Mutex::new(0),
            shed_from: AtomicU64::new(0),
            strays: AtomicBool::new(false),
        })
    }

    /// The RAM budget.
    #[must_use]
    pub const fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// All frames, those of devices included.
    #[must_use]
    pub const fn map_of_frames(&self) -> &Arc<MemoryMap> {
        &self.map
    }

    /// The devices, in the order in which they are tried.
    #[must_use]
    pub const fn devices(&self) -> &Devices {
        &self.devices
    }

    /// The machine's page tables.
    #[must_use]
    pub fn mmu(&self) -> &dyn Mmu {
        &*self.mmu
    }

    /// What happened so far.
    #[must_use]
    pub const fn stats(&self) -> &'static Stats {
        self.stats
    }

    /// Takes fresh addresses for `pages` pages, aligned to `align` pages. They read as zeros.
    pub fn map(&self, pages: u32, align: u32) -> Option<VirtAddr> {
        self.map_with(pages, align, None)
    }

    /// As [`map`](Self::map), with a file behind the pages if one is given.
    pub(crate) fn map_with(
        &self,
        pages: u32,
        align: u32,
        file: Option<Arc<dyn FilePages>>,
    ) -> Option<VirtAddr> {
        let mut areas = self.areas.lock();
        let range = areas.taken.allocate(pages, align)?;
        if let Some(file) = file {
            areas.files.insert(range.clone(), file);
        }
        areas.live.insert(range.clone());
        drop(areas);
        self.clear_strays(&range);
        Some(self.table.address(PageIndex(range.start)))
    }

    /// Adds the `more` pages behind a mapping to it, if they are free.
    #[must_use]
    pub fn extend(&self, at: VirtAddr, pages: u32, more: u32) -> bool {
        let Some(page) = self.page_at(at) else {
            return false;
        };
        let Some(start) = page.0.checked_add(pages) else {
            return false;
        };
        let Some(end) = start
            .checked_add(more)
            .filter(|end| *end <= self.table.pages())
        else {
            return false;
        };
        let mut areas = self.areas.lock();
        let free = !areas.taken.overlaps(&(start..end));
        if free {
            areas.taken.insert(start..end);
            areas.live.insert(start..end);
        }
        drop(areas);
        if free {
            self.clear_strays(&(start..end));
        }
        free
    }

    /// Makes an address outside all areas answer with SIGBUS. Nothing if it is inside one now.
    pub fn poison_stray(&self, at: VirtAddr) {
        let Some(page) = self.page_at(at) else { return };
        let mut cursor = self.table.lock(page.block());
        let areas = self.areas.lock();
        let at = self.table.address(page);
        if areas.live.contains(page.0) || cursor.get(page) != Pte::None {
            self.mmu.wake(at, 1);
            return;
        }
        if self.mmu.poison(at, 1).done == 1 {
            // Release: pairs with the acquire in `clear_strays`.
            self.strays.store(true, Ordering::Release);
            cursor.set(page, Pte::Poisoned);
        }
    }

    /// Makes fresh addresses fresh, whatever was poisoned there before they were handed out.
    fn clear_strays(&self, range: &Range<u32>) {
        // Acquire: pairs with the release in `poison_stray`.
        if self.strays.load(Ordering::Acquire) {
            // Nobody can have pinned what nobody was given yet.
            let _ = self.discard(
                self.table.address(PageIndex(range.start)),
                range.end - range.start,
            );
        }
    }

    /// The page that holds an address, if it is one of this address space's.
    #[must_use]
    pub fn page_at(&self, at: VirtAddr) -> Option<PageIndex> {
        self.table.page_at(at)
    }

    /// The area around an address, in pages.
    #[must_use]
    pub fn area_at(&self, at: VirtAddr) -> Option<Range<u32>> {
        self.areas.lock().live.find(self.page_at(at)?.0)
    }

    /// Forgets the device's copy of the bytes in a RAM frame, if it keeps one.
    pub(crate) fn drop_copy(&self, frame: Pfn, copy: Copy) {
        if copy == Copy::Kept {
            self.map.put_dev_page(self.kept_copy(frame));
        }
    }

    /// The device page that holds the same bytes as a RAM frame whose entry says that there is one.
    pub(crate) fn kept_copy(&self, frame: Pfn) -> Pfn {
        #[allow(
            clippy::cast_possible_truncation,
            reason = "`keep_copy` stored a frame number"
        )]
        Pfn::from_u32(self.map.frame(frame).private() as u32)
    }

    /// Notes that a device page holds the same bytes as a RAM frame.
    pub(crate) fn keep_copy(&self, frame: Pfn, page: Pfn) {
        self.map.frame(frame).set_private(page.get());
    }
}

/// Who owns which addresses.
#[derive(Debug)]
pub(crate) struct Areas {
    /// Addresses that may be touched.
    pub(crate) live: Vmas,
    /// Addresses that are not to be handed out: the live ones, and those whose pages are being dropped.
    pub(crate) taken: Vmas,
    /// Live addresses that a file is behind.
    pub(crate) files: PrivateFiles,
}

/// What one thread needs to serve faults or to reclaim: buffers, frames at hand, and its view of streams.
///
/// Everything is allocated when it is made: the fault path allocates nothing.
pub struct Worker {
    pub(crate) readahead: Readahead,
    pub(crate) file_readahead: Readahead,
    /// Groups of the file's pages that the reader who has just faulted will want.
    pub(crate) ahead: Ahead,
    pub(crate) pages: Box<[Page; MAX_WINDOW as usize]>,
    pub(crate) frames: FrameCache,
    pub(crate) write_back: WriteBack,
}

impl Worker {
    /// A worker with empty hands.
    #[must_use]
    pub fn new() -> Self {
        // Made on the heap: this is as large as some stacks.
        let pages = alloc::vec![Page::ZERO; MAX_WINDOW as usize].into_boxed_slice();
        let pages = pages
            .try_into()
            .unwrap_or_else(|_| unreachable!("a window of pages was made"));
        Self {
            readahead: Readahead::default(),
            file_readahead: Readahead::default(),
            ahead: Ahead::default(),
            pages,
            frames: FrameCache::new(),
            write_back: WriteBack::default(),
        }
    }
}

impl Default for Worker {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("frames", &self.frames.len())
            .finish_non_exhaustive()
    }
}

/// Frames of RAM at hand while a fault is served, so that it seldom takes the allocator's lock twice.
#[derive(Debug)]
pub(crate) struct FrameCache {
    frames: [Pfn; Self::SIZE],
    len: usize,
}

impl FrameCache {
    const SIZE: usize = GROUP_PAGES as usize;

    const fn new() -> Self {
        Self {
            frames: [Pfn::from_u32(0); Self::SIZE],
            len: 0,
        }
    }

    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    /// Has at least `count` frames at hand if there are so many; says how many there are, up to `count`.
    pub(crate) fn prepare(&mut self, ram: &Ram, count: usize) -> usize {
        let count = count.min(Self::SIZE);
        if self.len < count {
            self.len += ram.alloc(&mut self.frames[self.len..count]);
        }
        self.len.min(count)
    }

    /// One of the frames at hand.
    ///
    /// # Panics
    ///
    /// If there is none; `prepare` says how many there are.
    pub(crate) fn take(&mut self) -> Pfn {
        assert!(self.len > 0, "took more frames than were prepared");
        self.len -= 1;
        self.frames[self.len]
    }

    pub(crate) fn give_all(&mut self, ram: &Ram) {
        ram.free(&self.frames[..self.len]);
        self.len = 0;
    }
}

/// Whether pages that are read are worth keeping clean: a write fault is the price for each that is written after all.
#[derive(Debug, Default)]
pub(crate) struct WriteBack {
    /// Pages that were kept clean, and those of them that were written; the older, the less they count.
    kept: u32,
    written: u32,
    /// Pages that were not kept clean.
    skipped: u32,
}

impl WriteBack {
    /// When so many have been counted, both counts are halved.
    const WINDOW: u32 = 256;
    /// A write fault costs as much as storing a page so many times.
    const PRICE: u32 = 3;
    /// Where it does not pay, one page of so many is kept all the same, to see whether that is still so.
    const PROBE: u32 = 32;

    /// Whether the next page that is read should keep its device copy.
    pub(crate) const fn keeps_next(&mut self) -> bool {
        if !self.pays() {
            self.skipped += 1;
            if !self.skipped.is_multiple_of(Self::PROBE) {
                return false;
            }
        }
        self.kept += 1;
        self.forget_old();
        true
    }

    /// Whether keeping pages clean has saved more than it has cost of late.
    pub(crate) const fn pays(&self) -> bool {
        self.written * Self::PRICE <= self.kept + Self::WINDOW / 8
    }

    /// A page that had been kept clean is written.
    pub(crate) const fn note_write_fault(&mut self) {
        self.written += 1;
        self.forget_old();
    }

    const fn forget_old(&mut self) {
        if self.kept >= Self::WINDOW || self.written >= Self::WINDOW {
            self.kept /= 2;
            self.written /= 2;
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    /// What part of `count` pages is kept clean, in percent, if every `nth` of those is written.
    fn kept(write_back: &mut WriteBack, count: u32, nth: u32) -> u32 {
        let mut kept = 0;
        for _ in 0..count {
            let before = kept;
            kept += u32::from(write_back.keeps_next());
            if kept > before && kept % nth == 0 {
                write_back.note_write_fault();
            }
        }
        kept * 100 / count
    }

    #[test]
    fn pages_are_kept_clean_where_few_are_written() {
        let mut write_back = WriteBack::default();
        assert_eq!(kept(&mut write_back, 10_000, 100), 100);
        assert!(kept(&mut write_back, 10_000, 1) < 10);
        assert!(kept(&mut write_back, 30_000, 100) > 50);
    }
}
