//! The files of an address space: which are open, where they are mapped, and how much of the RAM they give back.
//!
//! Mapped files have addresses of their own, outside those of anonymous memory. A look at the list is a lock that is taken
//! once for a fault, or once for a range that is pinned.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::mem;
use core::time::Duration;

use pgmap_core::addr::{PAGE_SIZE, VirtAddr};
use pgmap_core::memcg::Memcg;
use pgmap_sync::atomic::{AtomicU32, Ordering};
use pgmap_sync::{Mutex, WaitQueue};

use crate::discard::Pinned;
use crate::fault::{Access, Outcome};
use crate::mapped::{Handles, MappedFile, MappedFiles};
use crate::page_cache::{FileNumber, FileVma, PageCache, ReadAhead};
use crate::reclaim::Caller;
#[cfg(shuttle)]
use crate::seeded_bug::{self, SeededBug};
use crate::space::{AddressSpace, BATCH, Worker};

/// One frame of so many may have bytes that only RAM has, before they are written in the background.
const MANY: u64 = 10;
/// One frame of so many may have bytes that only RAM has, before who writes has to wait.
const DIRTY: u64 = 3;
/// Blocks of pages that who writes has to write back then.
const DIRTY_BLOCKS: u32 = 4;

/// The files of one address space.
#[derive(Debug, Default)]
pub struct Files {
    open: Mutex<Vec<(Arc<PageCache>, Handles)>>,
    ahead: ReadAhead,
    /// Who writes in the background waits here.
    dirtied: WaitQueue,
    /// The number that the next file gets.
    next: AtomicU32,
    mapped: MappedFiles,
}

impl Files {
    /// A number for a file that is about to be opened: after 2^31 files they are given again.
    #[must_use]
    pub fn next_number(&self) -> FileNumber {
        // Relaxed: a number that stands alone.
        FileNumber(self.next.fetch_add(1, Ordering::Relaxed) & (u32::MAX >> 1))
    }

    /// What is to be read ahead.
    #[must_use]
    pub const fn ahead(&self) -> &ReadAhead {
        &self.ahead
    }

    /// The open file with this number.
    #[must_use]
    pub fn of(&self, number: FileNumber) -> Option<Arc<PageCache>> {
        let open = self.open.lock();
        let mut files = open.iter().map(|(cache, _)| cache);
        files.find(|cache| cache.number() == number).cloned()
    }

    /// The file with this number, though only pins may keep it and its mappings.
    pub(crate) fn of_any(&self, number: FileNumber) -> Option<Arc<PageCache>> {
        self.of(number).or_else(|| self.mapped.of(number))
    }

    /// Adds a file: from now on its pages are reclaimed with all others.
    pub fn open(&self, cache: Arc<PageCache>) {
        let handles = Handles::new(&cache);
        self.open.lock().push((cache, handles));
    }

    /// Forgets a file that nobody has open or mapped any more, and writes back what is dirty.
    pub fn close(&self, cache: &Arc<PageCache>) {
        cache.release();
        let mut open = self.open.lock();
        let nth = open.iter().position(|(other, _)| Arc::ptr_eq(other, cache));
        let closed = nth.map(|nth| open.swap_remove(nth));
        drop(open);
        // Not under the lock: it may be the last handle.
        drop(closed);
        if Arc::strong_count(cache) > 1 {
            // Pins keep it: nobody else asks it for its other pages any more.
            cache.shrink_all();
        }
    }

    /// How many files are open.
    #[must_use]
    pub fn count(&self) -> usize {
        self.open.lock().len()
    }

    /// The open file that is `nth`. They stay in order, but for the last one, which takes the place of one that is closed.
    #[must_use]
    pub fn get(&self, nth: usize) -> Option<Arc<PageCache>> {
        let open = self.open.lock();
        open.get(nth).map(|(cache, _)| Arc::clone(cache))
    }

    /// All open files.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<PageCache>> {
        // The room is not made under the lock, which the fault path takes: see `Pause::NoRoom` of writeback.
        let mut all = Vec::new();
        loop {
            let open = self.open.lock();
            if open.len() <= all.capacity() {
                all.extend(open.iter().map(|(cache, _)| Arc::clone(cache)));
                return all;
            }
            let len = open.len();
            drop(open);
            all.reserve(len);
        }
    }

    /// Enters a mapping, before anybody touches it.
    pub fn map(&self, cache: &Arc<PageCache>, vma: FileVma) {
        cache.add_vma(vma);
        let open = self.open.lock();
        let file = open.iter().find(|(other, _)| Arc::ptr_eq(other, cache));
        let handles = file.map(|(_, handles)| handles.clone());
        drop(open);
        let handles = handles.unwrap_or_else(|| Handles::new(cache));
        self.mapped.insert(vma, handles);
    }

    /// Takes a mapping out: when this returns, nobody changes anything there. Its addresses are still the caller's.
    pub fn unmap(&self, vma: &FileVma) {
        // Nobody is asked, so nobody refuses.
        let _ = self.unmap_unless(vma, || false);
    }

    /// Takes a mapping out as [`unmap`](Self::unmap) does, unless `is_pinned`: who pins registers first and then looks here.
    fn unmap_unless(&self, vma: &FileVma, is_pinned: impl Fn() -> bool) -> Result<(), Pinned> {
        #[cfg(shuttle)]
        let is_pinned = {
            let looked = seeded_bug::has(SeededBug::UnmapLooksForPinsFirst).then(&is_pinned);
            move || looked.unwrap_or_else(&is_pinned)
        };
        if let Some(cache) = self.mapped.remove_unless(vma.at, is_pinned)? {
            cache.remove_vma(vma);
        }
        Ok(())
    }

    /// The mapping at an address, and its file, for as long as a pin keeps it.
    pub(crate) fn mapping_at(&self, at: VirtAddr) -> Option<(FileVma, MappedFile)> {
        self.mapped.at(at)
    }

    /// The file that is mapped at an address.
    #[must_use]
    pub fn at(&self, at: VirtAddr) -> Option<Arc<PageCache>> {
        let (_, file) = self.mapped.at(at)?;
        Some(Arc::clone(&file))
    }

    /// Whether a file is mapped at an address whose group may have no more pages in RAM.
    #[must_use]
    pub fn is_at_limit(&self, at: VirtAddr) -> bool {
        self.at(at).is_some_and(|cache| cache.is_at_limit())
    }

    /// Pages of files that are in RAM.
    #[must_use]
    pub fn cached_pages(&self) -> u64 {
        self.sum(PageCache::cached_pages)
    }

    /// Pages of files in RAM that the files do not have yet.
    #[must_use]
    pub fn dirty_pages(&self) -> u64 {
        self.sum(PageCache::dirty_pages)
    }

    /// Has accesses that got SIGBUS before `before_ns` try again: see [`PageCache::retry_reads`].
    pub fn retry_reads(&self, before_ns: u64) {
        for cache in self.all() {
            cache.retry_reads(before_ns);
        }
    }

    fn sum(&self, of: impl Fn(&PageCache) -> u64) -> u64 {
        let open = self.open.lock();
        open.iter().map(|(cache, _)| of(cache)).sum()
    }

    /// Frees at least `want` frames that a group's pages have, if that is possible; says how many.
    pub fn shrink_group(&self, memcg: &Arc<Memcg>, want: usize) -> usize {
        let (mut freed, mut nth) = (0, 0);
        while freed < want
            && let Some(cache) = self.get(nth)
        {
            let is_member = cache.memcg().is_some_and(|other| Arc::ptr_eq(other, memcg));
            freed += if is_member {
                cache.shrink(want - freed)
            } else {
                0
            };
            nth += 1;
        }
        freed
    }

    /// Frees at least `want` frames that pages of files have, if that is possible; says how many. Each file gives in
    /// proportion to what it has.
    pub fn shrink(&self, want: usize) -> usize {
        let cached = self.cached_pages();
        let (mut freed, mut nth) = (0, 0);
        while freed < want
            && let Some(cache) = self.get(nth)
        {
            freed += cache.shrink(part(want, cache.cached_pages(), cached));
            nth += 1;
        }
        freed
    }
}

impl AddressSpace {
    /// The files.
    #[must_use]
    pub const fn files(&self) -> &Files {
        &self.files
    }

    /// Takes a mapping of a file out: when this returns, nobody changes anything there, and nobody pins pages there.
    ///
    /// # Errors
    ///
    /// [`Pinned`] if somebody has, or is about to: then the mapping is as it was.
    pub fn unmap_file(&self, vma: &FileVma) -> Result<(), Pinned> {
        let start = vma.at.get();
        let range = start..start + vma.pages as usize * PAGE_SIZE;
        self.files
            .unmap_unless(vma, || self.map.holders().has_any_of(&range))
    }

    /// Serves a fault outside anonymous memory.
    pub(crate) fn file_fault(&self, worker: &mut Worker, at: VirtAddr, access: Access) -> Outcome {
        let Some(cache) = self.files.at(at) else {
            return Outcome::BadAddress;
        };
        // Before the page can be written, not after: it would be protected again before the store is made, and again.
        match access {
            Access::Read => {}
            Access::Write | Access::WriteProtected => self.balance_dirty(&cache),
        }
        loop {
            let outcome = cache.fault(worker, at, access);
            let ahead = mem::take(&mut worker.ahead);
            if !ahead.groups.is_empty() {
                self.files.ahead.ask(cache.number(), ahead);
            }
            let wants_more = outcome == Outcome::NoMemory;
            if !wants_more || self.make_room_for(&cache, Caller::FaultHandler) == 0 {
                return outcome;
            }
        }
    }

    /// Waits until so many pages of files are dirty that they should be written, for so long at most. Says whether they are.
    pub fn wait_for_dirty(&self, patience: Duration) -> bool {
        let is_time = || self.files.dirty_pages() > self.ram.limit() / MANY;
        self.files.dirtied.wait_until(Some(patience), is_time)
    }

    /// Who makes many pages dirty calls the flusher; who makes too many dirty writes some back (`balance_dirty_pages`).
    fn balance_dirty(&self, cache: &PageCache) {
        let (dirty, limit) = (self.files.dirty_pages(), self.ram.limit());
        if dirty > limit / MANY {
            self.files.dirtied.wake_all();
        }
        if dirty > limit / DIRTY {
            cache.write_some(DIRTY_BLOCKS);
        }
    }

    /// Makes room for more pages of a file: in its group, if that is at its limit. Says how many frames it freed.
    pub(crate) fn make_room_for(&self, cache: &PageCache, caller: Caller) -> usize {
        match cache.memcg().filter(|_| cache.is_at_limit()) {
            Some(memcg) => self.files.shrink_group(memcg, BATCH),
            None => self.make_room(caller, BATCH),
        }
    }

    /// Frees at least `want` frames if that is possible: files and anonymous memory give in proportion to what they have. Says
    /// how many it freed.
    pub fn make_room(&self, caller: Caller, want: usize) -> usize {
        let cached = self.files.cached_pages();
        if cached == 0 {
            return self.reclaim(caller, want);
        }
        let freed = self.files.shrink(part(want, cached, self.ram.in_use()));
        let freed = freed + self.reclaim(caller, want.saturating_sub(freed));
        if freed > 0 {
            return freed;
        }
        self.files.shrink(want)
    }
}

/// The part of `want` that falls to `some` of `all`, rounded up.
fn part(want: usize, some: u64, all: u64) -> usize {
    let part = (want as u64 * some).div_ceil(all.max(1));
    usize::try_from(part).unwrap_or(want).min(want)
}
