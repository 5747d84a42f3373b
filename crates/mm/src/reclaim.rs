//! Reclaim: cold pages leave the address space, wait in staging, and go to a device.
//!
//! Called by the reclaimer, and by the fault path when there is no frame (direct reclaim). Failure at any
//! step leaves the page where it was. What must never happen here: the last copy of a page dropped before
//! the device has the other (FLT-4); a pinned page moved (GUP-3); two cursors held at once.

use core::iter;
use core::ops::Range;

use pgmap_core::addr::{Page, Pfn};
use pgmap_core::driver::{DeviceData, DeviceError, Store};
use pgmap_core::memremap::DevPagemap;
use pgmap_sync::atomic::Ordering;

use crate::mmu::{Slot, Stop};
use crate::page_table::{Cursor, PageIndex};
use crate::pte::{Copy, Heat, Pte};
#[cfg(shuttle)]
use crate::seeded_bug::{self, SeededBug};
use crate::space::{AddressSpace, BATCH};
use crate::stats::Stats;

/// Who reclaims.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Caller {
    /// A thread whose own faults are served by another.
    Reclaimer,
    /// The thread that serves faults: it may not do anything that faults.
    FaultHandler,
}

/// A staged page on its way to a device.
#[derive(Clone, Copy, Debug)]
struct Leaving {
    slot: Slot,
    page: PageIndex,
}

/// What stands in a batch where there is no page.
static NO_PAGE: Page = Page::ZERO;

/// Slots that are done with, and the frames that become free with them.
#[derive(Debug)]
struct Done {
    slots: [Slot; BATCH],
    slots_len: usize,
    frames: [Pfn; BATCH],
    frames_len: usize,
}

impl Done {
    const fn new() -> Self {
        let frames = [Pfn::from_u32(0); BATCH];
        Self {
            slots: [Slot(0); BATCH],
            slots_len: 0,
            frames,
            frames_len: 0,
        }
    }

    const fn push(&mut self, slot: Slot, frame: Option<Pfn>) {
        self.slots[self.slots_len] = slot;
        self.slots_len += 1;
        if let Some(frame) = frame {
            self.frames[self.frames_len] = frame;
            self.frames_len += 1;
        }
    }
}

impl AddressSpace {
    /// Frees at least `want` frames if that is possible; says how many it freed.
    pub fn reclaim(&self, caller: Caller, want: usize) -> usize {
        let mut freed = 0;
        while freed < want {
            self.deactivate(caller, usize::MAX);
            let stored = self.store(1);
            if stored == 0 {
                break;
            }
            freed += stored;
        }
        freed
    }

    /// Takes cold pages out of the address space until enough of them wait to be stored, but not many more than `most`.
    ///
    /// Best called on the CPU on which the program runs: taking a page out of the address space interrupts every
    /// other CPU that uses it.
    pub fn deactivate(&self, caller: Caller, most: usize) {
        // Blocks that may give up nothing before we believe that no block will.
        let patience = self.queues.len();
        let (mut fruitless, mut taken) = (0, 0);
        while fruitless <= patience
            && taken < most
            && self.staging.waiting() <= self.inactive_target()
        {
            let Some(pages) = self.take_out_block(caller, fruitless) else {
                break;
            };
            fruitless += u32::from(pages == 0);
            taken += pages;
        }
    }

    /// Sends pages that wait to the devices until `want` frames are free, or nothing waits. Says how many it freed.
    pub fn store(&self, want: usize) -> usize {
        let mut freed = 0;
        while freed < want {
            let stored = self.store_oldest();
            if stored == 0 {
                break;
            }
            freed += stored;
        }
        freed
    }

    /// Pages that wait in staging, so that a touch can show that they are used.
    fn inactive_target(&self) -> u32 {
        u32::try_from(self.ram.limit() / 16)
            .unwrap_or(u32::MAX)
            .min(self.inactive_most)
    }

    /// Takes the next block's cold pages out of the address space. Says how many; `None` if no block is left.
    fn take_out_block(&self, caller: Caller, fruitless: u32) -> Option<usize> {
        let forking = self.forking.lock();
        if Self::must_stay(*forking) {
            return None;
        }
        let (block, class) = self.queues.pop(fruitless)?;
        let mut cursor = self.table.lock(block);
        let pages = cursor.pages();
        let (mut next, mut taken, mut stays) = (pages.start, 0, false);
        let mut unshared = 0;
        while next < pages.end {
            let page = PageIndex(next);
            let run = cursor.run(next, &(next..pages.end), |pte| self.is_cold(pte));
            if run.is_empty() {
                stays |= Self::cool(&mut cursor, page);
                next += 1;
                continue;
            }
            let claimed = self.claim(&cursor, run.clone());
            if claimed == 0 {
                // Somebody was quicker, and pins it.
                stays = true;
                next += 1;
                continue;
            }
            let (done, stop) = self.take_out_run(&mut cursor, run.start, claimed);
            self.end_claim(&cursor, run.start..run.start + claimed);
            taken += done as usize;
            next += done;
            stays |= next < run.end;
            match stop {
                Some(Stop::Busy) => {
                    Stats::add(&self.stats.busy_skipped, 1);
                    let page = PageIndex(next);
                    unshared += u32::from(self.unshare(caller, &mut cursor, page, unshared));
                    next += 1;
                }
                Some(Stop::NoMemory) => break,
                Some(_) => {
                    Stats::add(&self.stats.unevictable_skipped, 1);
                    next += 1;
                }
                None => {}
            }
        }
        if stays {
            self.queues.push(block, class);
        }
        Some(taken)
    }

    /// Whether every page has to stay, as a fork's child is to inherit them.
    fn must_stay(forking: u32) -> bool {
        #[cfg(shuttle)]
        if seeded_bug::has(SeededBug::TakeOutIgnoresForks) {
            return false;
        }
        forking > 0
    }

    /// Claims the frames of pages that are mapped, up to the first that is pinned: whoever wants to pin one from here on waits
    /// for the cursor, and finds the entry changed (RMAP-1). Says how many.
    fn claim(&self, cursor: &Cursor<'_>, pages: Range<u32>) -> u32 {
        #[cfg(shuttle)]
        if Self::claims_nothing() {
            return pages.end - pages.start;
        }
        let end = pages.clone().find(|page| {
            let frame = cursor.get(PageIndex(*page)).frame();
            !frame.is_some_and(|frame| self.map.frame(frame).freeze(1))
        });
        end.unwrap_or(pages.end) - pages.start
    }

    /// Ends the claim on pages that are in RAM, after their entries say what became of them.
    fn end_claim(&self, cursor: &Cursor<'_>, pages: Range<u32>) {
        #[cfg(shuttle)]
        if Self::claims_nothing() {
            return;
        }
        for frame in pages.filter_map(|page| cursor.get(PageIndex(page)).frame()) {
            self.map.frame(frame).unfreeze(1);
        }
    }

    #[cfg(shuttle)]
    fn claims_nothing() -> bool {
        seeded_bug::has(SeededBug::TakeOutIgnoresPins)
            || seeded_bug::has(SeededBug::TakeOutClaimsNothing)
    }

    /// Moves up to `count` pages, whose frames are claimed, into staging. Says how many, and why not all: [`Stop::NoMemory`] if staging is full.
    fn take_out_run(&self, cursor: &mut Cursor<'_>, start: u32, count: u32) -> (u32, Option<Stop>) {
        let Some((first, slots)) = self.staging.reserve(count) else {
            return (0, Some(Stop::NoMemory));
        };
        let at = self.table.address(PageIndex(start));
        let mut progress = self.mmu.take_out(at, slots as usize, first);
        if progress.done == 0
            && slots > 1
            && matches!(progress.stop, Some(Stop::Unevictable | Stop::Hole))
        {
            // A run that crosses the edge of locked memory is refused as a whole: its first page may leave alone.
            progress = self.mmu.take_out(at, 1, first);
        }
        #[allow(clippy::cast_possible_truncation, reason = "at most `slots`")]
        let done = progress.done as u32;
        for nth in 0..slots {
            let (slot, page) = (Slot(first.0 + nth), PageIndex(start + nth));
            match cursor.get(page) {
                Pte::Present { frame, copy, .. } if nth < done => {
                    self.map.frame(frame).set_link(slot.0);
                    cursor.set(page, Pte::Staged { frame, copy });
                    self.staging.fill(slot, page);
                }
                Pte::None
                | Pte::Present { .. }
                | Pte::Staged { .. }
                | Pte::Device { .. }
                | Pte::Poisoned => self.staging.release(slot),
            }
        }
        Stats::add(&self.stats.pages_taken_out, u64::from(done));
        (done, progress.stop)
    }

    fn is_cold(&self, pte: Pte) -> bool {
        match pte {
            Pte::Present {
                frame,
                heat: Heat::Cold,
                ..
            } => !self.is_pinned(frame),
            Pte::None
            | Pte::Present { .. }
            | Pte::Staged { .. }
            | Pte::Device { .. }
            | Pte::Poisoned => false,
        }
    }

    fn is_pinned(&self, frame: Pfn) -> bool {
        #[cfg(shuttle)]
        if seeded_bug::has(SeededBug::TakeOutIgnoresPins) {
            return false;
        }
        self.map.frame(frame).is_pinned()
    }

    /// Takes a page's second chance away. Whether the page is one that may leave later.
    fn cool(cursor: &mut Cursor<'_>, page: PageIndex) -> bool {
        let Pte::Present { frame, copy, .. } = cursor.get(page) else {
            return false;
        };
        cursor.set(
            page,
            Pte::Present {
                frame,
                heat: Heat::Cold,
                copy,
            },
        );
        true
    }

    /// After a fork the machine moves no page that is still shared with the child, until it has been made private. That takes
    /// RAM, and most children end soon: so it is done for one page of a block at a time, unless the limit is passed, and all
    /// have to go. Says whether it was done to this page, which the machine has just called busy.
    ///
    /// Under the cursor, and unprotected, the page is mapped and may be written, so making it private is no fault that the
    /// fault thread would have to serve: that one may be waiting for the very memory that we free, or for the cursor.
    fn unshare(
        &self,
        caller: Caller,
        cursor: &mut Cursor<'_>,
        page: PageIndex,
        unshared: u32,
    ) -> bool {
        // Relaxed: a hint; a page that is shared unseen only stays where it is.
        let shared = caller == Caller::Reclaimer && self.forked.load(Ordering::Relaxed);
        if !shared || (unshared > 0 && self.ram.deficit() == 0) {
            return false;
        }
        let at = self.table.address(page);
        self.forget_kept(cursor, page.0..page.0 + 1);
        // A page may be protected that has no copy: one that could not leave by a detour, and came back.
        self.mmu.unprotect(at, 1);
        self.mmu.unshare(at);
        true
    }

    /// Sends the pages that have waited longest to the devices. Says how many frames became free.
    fn store_oldest(&self) -> usize {
        let mut oldest = [(Slot(0), PageIndex(0)); BATCH];
        let count = self.staging.take_oldest(&mut oldest);
        let mut done = Done::new();
        let mut leaving = [None; BATCH];
        let mut left = 0;
        for (slot, page) in oldest[..count].iter().copied() {
            if let Some(item) = self.choose(slot, page, &mut done) {
                leaving[left] = Some(item);
                left += 1;
            }
        }
        let mut nth = 0;
        while left > 0
            && let Some(device) = self.devices.get(nth)
        {
            left = self.store_on(&device, &mut leaving, left, &mut done);
            nth += 1;
        }
        for item in leaving[..left].iter().flatten() {
            self.staging.fill(item.slot, item.page);
        }
        self.finish(&mut done);
        if left > 0 {
            // Every device is full or failing: copies that only save work have to go.
            self.shed_copies(left);
        }
        done.frames_len
    }

    /// Looks at a page that is to be stored: one whose copy is on the device already is done with, and so is the slot
    /// of a page that has been touched or discarded.
    fn choose(&self, slot: Slot, page: PageIndex, done: &mut Done) -> Option<Leaving> {
        let mut cursor = self.table.lock(page.block());
        match cursor.get(page) {
            Pte::Staged { frame, copy } if self.map.frame(frame).link() == slot.0 => match copy {
                Copy::None => return Some(Leaving { slot, page }),
                Copy::Kept => {
                    let page_there = self.kept_copy(frame);
                    cursor.set(
                        page,
                        Pte::Device {
                            page: page_there,
                            stamp: self.queues.stamp(),
                        },
                    );
                    Stats::add(&self.stats.pages_stored_clean, 1);
                    done.push(slot, Some(frame));
                }
                Copy::File => {
                    cursor.set(page, Pte::None);
                    Stats::add(&self.stats.pages_stored_clean, 1);
                    done.push(slot, Some(frame));
                }
            },
            Pte::None
            | Pte::Present { .. }
            | Pte::Staged { .. }
            | Pte::Device { .. }
            | Pte::Poisoned => done.push(slot, None),
        }
        None
    }

    /// Stores pages on one device. Those that it did not take are moved to the front; says how many.
    fn store_on(
        &self,
        device: &DevPagemap,
        leaving: &mut [Option<Leaving>; BATCH],
        count: usize,
        done: &mut Done,
    ) -> usize {
        // Held to the end: the device is not gone while bytes are on their way to it.
        let Some((_live, ops)) = device.try_get().zip(device.ops()) else {
            return count;
        };
        let mut stores = leaving.map(|item| {
            Store::new(item.map_or(&NO_PAGE, |item| {
                // SAFETY: the page's entry said that the slot is filled, and `take_oldest` claimed it, so
                // nobody gives it back or empties it before `finish` or `fill`.
                unsafe { self.mmu.staged(item.slot) }
            }))
        });
        let stores = &mut stores[..count];
        ops.migrate_to_device(stores);
        let mut left = 0;
        for nth in 0..count {
            let Some(item) = leaving[nth] else { continue };
            let moved = match stores[nth].outcome {
                Ok(data) => self.commit(device, item, data, done),
                Err(DeviceError::Full) => false,
                Err(DeviceError::Io(_) | DeviceError::Corrupt | DeviceError::Gone) => {
                    Stats::add(&self.stats.device_errors_write, 1);
                    false
                }
            };
            if !moved {
                leaving[left] = Some(item);
                left += 1;
            }
        }
        left
    }

    /// A device has a page's bytes: if the page was not touched meanwhile, the device's copy is now the page. False if the
    /// device has no frame for it.
    fn commit(
        &self,
        device: &DevPagemap,
        item: Leaving,
        data: DeviceData,
        done: &mut Done,
    ) -> bool {
        let Some(device_page) = device.alloc() else {
            // It is being taken away, or out of frames.
            if let Some(ops) = device.ops() {
                ops.page_free(data);
            }
            return false;
        };
        device.set_data(device_page, data);
        let mut cursor = self.table.lock(item.page.block());
        if Self::must_not_go(device) {
            // Whoever takes the device away has perhaps looked at this block already.
            drop(cursor);
            device.put_page(device_page);
            return false;
        }
        match cursor.get(item.page) {
            // The slot is the generation: it was ours all the time, so an entry that names it has not changed (FLT-2).
            Pte::Staged { frame, .. } if self.is_still(item, frame) => {
                let stamp = self.queues.stamp();
                cursor.set(
                    item.page,
                    Pte::Device {
                        page: device_page,
                        stamp,
                    },
                );
                Stats::add(&self.stats.pages_stored, 1);
                done.push(item.slot, Some(frame));
            }
            Pte::None
            | Pte::Present { .. }
            | Pte::Staged { .. }
            | Pte::Device { .. }
            | Pte::Poisoned => {
                drop(cursor);
                self.map.put_dev_page(device_page);
                done.push(item.slot, None);
            }
        }
        true
    }

    /// Whether a device is being taken away; under the cursor of a page, that is exact for this page.
    fn must_not_go(device: &DevPagemap) -> bool {
        #[cfg(shuttle)]
        if seeded_bug::has(SeededBug::CommitIgnoresTheKill) {
            return false;
        }
        device.is_dying()
    }

    /// Whether a page whose entry names `frame` is still where it was when it began to leave. The frame may be another: the
    /// old one's block was going off line.
    fn is_still(&self, item: Leaving, frame: Pfn) -> bool {
        #[cfg(shuttle)]
        if seeded_bug::has(SeededBug::CommitIgnoresTheSlot) {
            return true;
        }
        self.map.frame(frame).link() == item.slot.0
    }

    /// Empties slots, in runs, and only then gives them and their frames back.
    fn finish(&self, done: &mut Done) {
        let slots = &mut done.slots[..done.slots_len];
        slots.sort_unstable();
        for run in slots.chunk_by(|a, b| a.0 + 1 == b.0) {
            self.mmu.empty(run[0], run.len());
        }
        for slot in slots {
            self.staging.release(*slot);
        }
        self.ram.free(&done.frames[..done.frames_len]);
    }

    /// Gives up copies that devices keep of pages that are in RAM, to make room there; `want` of them, if there are so many.
    fn shed_copies(&self, want: usize) {
        // Relaxed: where somebody else looks at the same time does not matter.
        let start = self.shed_from.load(Ordering::Relaxed);
        let mut shed = 0;
        let behind = self.touched_frames(start..u64::MAX);
        for frame in behind.chain(self.touched_frames(0..start)) {
            shed += self.shed_copy(frame);
            if shed == want {
                self.shed_from.store(frame.get(), Ordering::Relaxed);
                return;
            }
        }
    }

    /// The frames of RAM with these numbers that have ever been in use.
    fn touched_frames(&self, numbers: Range<u64>) -> impl Iterator<Item = Pfn> {
        let next = move |from| {
            let run = self.ram.touched(from)?;
            (run.start < numbers.end).then(|| run.start..run.end.min(numbers.end))
        };
        let runs = iter::successors(next(numbers.start), move |run| next(run.end));
        runs.flatten().filter_map(Pfn::new)
    }

    /// Gives up the copy of the page in a frame. Says how many there were.
    fn shed_copy(&self, frame: Pfn) -> usize {
        let mapping = self.map.frame(frame).mapping().checked_sub(1);
        let Some(page) = mapping.and_then(|page| u32::try_from(page).ok()) else {
            return 0;
        };
        // The frame may be another page's by now: then that one's copy goes.
        let mut cursor = self.table.lock(PageIndex(page).block());
        let Pte::Present {
            copy: Copy::Kept, ..
        } = cursor.get(PageIndex(page))
        else {
            return 0;
        };
        self.forget_kept(&mut cursor, page..page + 1)
    }

    /// Gives up the copies that devices and files have of pages that are in RAM, and lets these be written. Says how many there were.
    pub(crate) fn forget_kept(&self, cursor: &mut Cursor<'_>, pages: Range<u32>) -> usize {
        let mut forgotten = 0;
        for page in pages.clone().map(PageIndex) {
            forgotten += usize::from(self.forget_copy(cursor, page));
        }
        if forgotten > 0 {
            let first = self.table.address(PageIndex(pages.start));
            self.mmu.unprotect(first, pages.len());
        }
        forgotten
    }

    fn forget_copy(&self, cursor: &mut Cursor<'_>, page: PageIndex) -> bool {
        let Pte::Present {
            frame,
            heat,
            copy: copy @ (Copy::Kept | Copy::File),
        } = cursor.get(page)
        else {
            return false;
        };
        self.drop_copy(frame, copy);
        let copy = Copy::None;
        cursor.set(page, Pte::Present { frame, heat, copy });
        true
    }
}
