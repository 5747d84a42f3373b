//! The fault path: an access found no page, or a page that it may not write.
//!
//! Called by the thread that serves the machine's faults, and by whoever pins. It allocates nothing, logs
//! nothing, and holds one lock that others wait for: the cursor of the page's block. What must never
//! happen here: bytes installed that were read under another cursor than the one that installs them (FLT-2).

use core::ops::Range;
use core::slice;

use pgmap_core::addr::{Pfn, VirtAddr};
use pgmap_core::driver::{DeviceData, DeviceError, Load};
use pgmap_core::memremap::PagePgmap;

use crate::mmu::{Progress, Protect, Slot, Stop};
use crate::page_table::{Cursor, PageIndex};
use crate::policy::Class;
use crate::private_file::{NotNow, Touch};
use crate::pte::{Copy, Heat, Pte};
use crate::readahead::Plan;
use crate::reclaim::Caller;
#[cfg(shuttle)]
use crate::seeded_bug::{self, SeededBug};
use crate::space::{AddressSpace, BATCH, Worker};
use crate::stats::Stats;

/// What the access wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// To read a page that is missing.
    Read,
    /// To write a page that is missing.
    Write,
    /// To write a page that is there, but protected.
    WriteProtected,
}

/// What became of a fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Outcome {
    /// The access is awake: it succeeds, or faults again, or gets SIGBUS because the bytes are lost.
    Resolved,
    /// RAM and devices are full, or the machine cannot read a file now. The access still waits; try again when memory may have
    /// become free.
    NoMemory,
    /// No area holds the address. The access still waits.
    BadAddress,
}

impl AddressSpace {
    /// Serves one fault: what the access at `at` needs is mapped when this returns, and neighbours with it
    /// when that pays (FLT-1).
    pub fn fault(&self, worker: &mut Worker, at: VirtAddr, access: Access) -> Outcome {
        let Some(page) = self.page_at(at) else {
            return self.file_fault(worker, at, access);
        };
        let outcome = self.serve(worker, page, access);
        // Seldom any: a frame at hand would keep its block on line for as long as nobody faults.
        worker.frames.give_all(&self.ram);
        outcome
    }

    fn serve(&self, worker: &mut Worker, page: PageIndex, access: Access) -> Outcome {
        loop {
            let cursor = self.table.lock(page.block());
            match cursor.get(page) {
                Pte::Present { frame, heat, copy } => {
                    return self.present_fault(cursor, worker, page, (frame, heat, copy), access);
                }
                Pte::Staged { frame, copy } => return self.give_back(cursor, page, frame, copy),
                Pte::Poisoned => {
                    // A stale fault: the machine answers this page's accesses itself.
                    self.mmu.wake(self.table.address(page), 1);
                    return Outcome::Resolved;
                }
                Pte::None | Pte::Device { .. } => {}
            }
            if worker.frames.prepare(&self.ram, 1) == 1 {
                return self.missing_fault(cursor, worker, page, access);
            }
            drop(cursor);
            // Direct reclaim: nobody else was quick enough.
            Stats::add(&self.stats.direct_reclaims, 1);
            if self.make_room(Caller::FaultHandler, BATCH) == 0
                && worker.frames.prepare(&self.ram, 1) == 0
            {
                return Outcome::NoMemory;
            }
        }
    }

    /// A page that is nowhere, or on a device. The worker has a frame.
    fn missing_fault(
        &self,
        cursor: Cursor<'_>,
        worker: &mut Worker,
        page: PageIndex,
        access: Access,
    ) -> Outcome {
        let plan = worker.readahead.plan(page);
        let outcome = match cursor.get(page) {
            Pte::Device { .. } => self.bring_back(cursor, worker, page, &plan, access),
            Pte::None | Pte::Present { .. } | Pte::Staged { .. } | Pte::Poisoned => {
                return self.first_touch(cursor, worker, page, &plan, access);
            }
        };
        if outcome == Outcome::Resolved {
            for ahead in plan.strided() {
                self.bring_ahead(worker, ahead, access);
            }
        }
        outcome
    }

    /// A fault on a page that is mapped: the first write to a clean page, or an event that is out of date.
    fn present_fault(
        &self,
        mut cursor: Cursor<'_>,
        worker: &mut Worker,
        page: PageIndex,
        (frame, heat, copy): (Pfn, Heat, Copy),
        access: Access,
    ) -> Outcome {
        let at = self.table.address(page);
        if access == Access::WriteProtected {
            Stats::add(&self.stats.faults_write_protect, 1);
            match copy {
                Copy::Kept => {
                    worker.write_back.note_write_fault();
                    // Where writes are the rule the neighbours are spared theirs.
                    let block = (!worker.write_back.pays()).then(|| cursor.pages());
                    self.forget_kept(&mut cursor, block.unwrap_or(page.0..page.0 + 1));
                }
                #[cfg(shuttle)]
                Copy::File if seeded_bug::has(SeededBug::WriteKeepsTheFile) => {
                    self.mmu.unprotect(at, 1);
                }
                Copy::File => {
                    self.forget_kept(&mut cursor, page.0..page.0 + 1);
                }
                Copy::None => self.mmu.unprotect(at, 1),
            }
            return Outcome::Resolved;
        }
        Stats::add(&self.stats.faults_spurious, 1);
        // Somebody was faster, or the program dropped the page with a system call that we do not see:
        // then it is as it was before its first touch, and the device's copy is out of date.
        let renewed = match self.file_behind(page) {
            Some(file) => match self.install_from(worker, page, &file) {
                Ok(Some(renewed)) => renewed,
                Ok(None) => return self.beyond_the_end(cursor, page),
                Err(NotNow) => return Outcome::NoMemory,
            },
            None => self.mmu.install_zero(at, 1),
        };
        if renewed.done == 1 {
            cursor.set(
                page,
                Pte::Present {
                    frame,
                    heat,
                    copy: Copy::None,
                },
            );
            self.drop_copy(frame, copy);
        } else {
            self.mmu.wake(at, 1);
        }
        Outcome::Resolved
    }

    /// Second chance: a page that was touched before it went to a device.
    fn give_back(
        &self,
        mut cursor: Cursor<'_>,
        page: PageIndex,
        frame: Pfn,
        copy: Copy,
    ) -> Outcome {
        let at = self.table.address(page);
        let slot = Slot(self.map.frame(frame).link());
        let claimed = self.staging.claim(slot);
        let mut progress = Progress {
            done: 0,
            stop: None,
        };
        if claimed && copy == Copy::None {
            progress = self.mmu.give_back(slot, 1, at);
        }
        if progress.done == 0 && !matches!(progress.stop, Some(Stop::NoMemory | Stop::Gone)) {
            // A clean page must come back protected, a slot that somebody reads must keep its page, and the machine
            // moves nothing to where the program may not write now.
            let protect = protection(copy);
            // SAFETY: the entry says that the slot is filled, and whoever claimed it empties it only
            // after changing the entry, under the cursor that we hold.
            let bytes = unsafe { self.mmu.staged(slot) };
            progress = self.mmu.install(at, slice::from_ref(bytes), protect);
            if claimed && progress.done == 1 {
                self.mmu.empty(slot, 1);
            }
        }
        if progress.done == 1 {
            if claimed {
                self.staging.release(slot);
            }
            cursor.set(
                page,
                Pte::Present {
                    frame,
                    heat: Heat::Hot,
                    copy,
                },
            );
            self.queues.push(page.block(), Class::Main);
            Stats::add(&self.stats.faults_give_back, 1);
        } else if claimed {
            self.staging.fill(slot, page);
        }
        self.settle(progress.stop, at)
    }

    /// A page that is nowhere.
    fn first_touch(
        &self,
        cursor: Cursor<'_>,
        worker: &mut Worker,
        page: PageIndex,
        plan: &Plan,
        access: Access,
    ) -> Outcome {
        // Before a look at whose the addresses are: who takes them away looks for used blocks after that, and waits for us.
        cursor.mark_used();
        let Some(file) = self.file_behind(page) else {
            return self.zero_fill(cursor, worker, page, plan);
        };
        let touch = match access {
            Access::Read => Touch::ToRead(plan),
            Access::Write | Access::WriteProtected => Touch::ToWrite,
        };
        self.file_fill(cursor, worker, page, &file, touch)
    }

    /// The first touch of a page, and of those that will probably be touched next.
    fn zero_fill(
        &self,
        mut cursor: Cursor<'_>,
        worker: &mut Worker,
        page: PageIndex,
        plan: &Plan,
    ) -> Outcome {
        let area = self.areas.lock().live.find(page.0);
        #[cfg(shuttle)]
        let area =
            area.or(seeded_bug::has(SeededBug::FaultIgnoresTheArea).then_some(page.0..page.0 + 1));
        let Some(area) = area else {
            return Outcome::BadAddress;
        };
        let wanted = plan.run();
        let wanted = wanted.start.max(area.start)..wanted.end.min(area.end);
        let run = cursor.run(page.0, &wanted, |pte| pte == Pte::None);
        let run = around(page.0, &run, worker.frames.prepare(&self.ram, run.len()));
        let at = self.table.address(PageIndex(run.start));
        let mut progress = self.mmu.install_zero(at, run.len());
        if progress.done == 0 && progress.stop == Some(Stop::Exists) {
            // The machine has a page that we did not know of; from now on it is accounted for.
            progress.done = 1;
        }
        for page in (run.start..run.end).take(progress.done) {
            let frame = worker.frames.take();
            self.enter(&mut cursor, PageIndex(page), frame, Copy::None);
        }
        self.queues.push(page.block(), Class::Main);
        Stats::add(&self.stats.faults_zero_fill, 1);
        Stats::add(
            &self.stats.readahead_pages,
            progress.done.saturating_sub(1) as u64,
        );
        self.settle(progress.stop, self.table.address(page))
    }

    /// `migrate_to_ram`: a page that is on a device, and the neighbours that the plan wants.
    fn bring_back(
        &self,
        mut cursor: Cursor<'_>,
        worker: &mut Worker,
        page: PageIndex,
        plan: &Plan,
        access: Access,
    ) -> Outcome {
        let Pte::Device {
            page: device_page,
            stamp,
        } = cursor.get(page)
        else {
            return Outcome::Resolved;
        };
        let Some(device) = self.device_of(&cursor, page) else {
            return Outcome::BadAddress;
        };
        let same = |pte| matches!(pte, Pte::Device { page, .. } if device.contains(page));
        let run = cursor.run(page.0, &plan.run(), same);
        let run = around(page.0, &run, worker.frames.prepare(&self.ram, run.len()));
        let run = match self.load(&cursor, worker, &device, page, &run) {
            Ok(good) => good,
            Err(error) => return self.lose(cursor, page, device_page, error),
        };
        let short = self.queues.age(stamp).is_short(self.ram.limit());
        let class = if plan.is_sequential() && !short {
            Class::Stream
        } else {
            Class::Main
        };
        let progress = self.install_loaded(&mut cursor, worker, &run, access);
        self.queues.push(page.block(), class);
        Stats::add(&self.stats.faults_bring_back, 1);
        Stats::add(
            &self.stats.readahead_pages,
            progress.done.saturating_sub(1) as u64,
        );
        self.settle(progress.stop, self.table.address(page))
    }

    /// Brings back one page that nobody waits for, if it is on a device and there is a frame to spare.
    fn bring_ahead(&self, worker: &mut Worker, page: PageIndex, access: Access) {
        if page.0 >= self.table.pages() || worker.frames.prepare(&self.ram, 1) == 0 {
            return;
        }
        let mut cursor = self.table.lock(page.block());
        let Some(device) = self.device_of(&cursor, page) else {
            return;
        };
        let Ok(run) = self.load(&cursor, worker, &device, page, &(page.0..page.0 + 1)) else {
            // Who touches it will hear of the error.
            return;
        };
        let progress = self.install_loaded(&mut cursor, worker, &run, access);
        self.queues.push(page.block(), Class::Main);
        Stats::add(&self.stats.readahead_pages, progress.done as u64);
    }

    /// Loads a run of one device's pages into the worker's buffers, the first into the first. Answers the pages
    /// around `page` that could be loaded, moved to the front of the buffers.
    fn load(
        &self,
        cursor: &Cursor<'_>,
        worker: &mut Worker,
        device: &PagePgmap<'_>,
        page: PageIndex,
        run: &Range<u32>,
    ) -> Result<Range<u32>, DeviceError> {
        let count = run.len();
        let mut loads = worker
            .pages
            .each_mut()
            .map(|page| Load::new(DeviceData::default(), page));
        for (load, page) in loads.iter_mut().zip(run.clone()) {
            if let Pte::Device { page, .. } = cursor.get(PageIndex(page)) {
                load.data = self.map.frame(page).data();
            }
        }
        device
            .ops()
            .ok_or(DeviceError::Gone)?
            .migrate_to_ram(&mut loads[..count]);
        let target = (page.0 - run.start) as usize;
        loads[target].outcome?;
        let good = |load: &Load<'_>| load.outcome.is_ok();
        let after = loads[target..count]
            .iter()
            .take_while(|load| good(load))
            .count();
        let before = loads[..target]
            .iter()
            .rev()
            .take_while(|load| good(load))
            .count();
        let first = target - before;
        if first > 0 {
            worker.pages.rotate_left(first);
        }
        #[allow(clippy::cast_possible_truncation, reason = "at most a window of pages")]
        Ok(page.0 - before as u32..page.0 + after as u32)
    }

    /// Maps pages that `load` has put into the worker's buffers.
    fn install_loaded(
        &self,
        cursor: &mut Cursor<'_>,
        worker: &mut Worker,
        run: &Range<u32>,
        access: Access,
    ) -> Progress {
        let copy = match access {
            Access::Read => {
                if worker.write_back.keeps_next() {
                    Copy::Kept
                } else {
                    Copy::None
                }
            }
            Access::Write | Access::WriteProtected => Copy::None,
        };
        let at = self.table.address(PageIndex(run.start));
        let progress = self
            .mmu
            .install(at, &worker.pages[..run.len()], protection(copy));
        for page in (run.start..run.end).take(progress.done).map(PageIndex) {
            let Pte::Device {
                page: device_page, ..
            } = cursor.get(page)
            else {
                continue;
            };
            let frame = worker.frames.take();
            self.enter(cursor, page, frame, copy);
            match copy {
                Copy::Kept => self.keep_copy(frame, device_page),
                Copy::None | Copy::File => self.map.put_dev_page(device_page),
            }
        }
        Stats::add(&self.stats.pages_brought_back, progress.done as u64);
        progress
    }

    /// The device cannot give a page's bytes: its accesses get SIGBUS, and everything else goes on (FLT-1).
    fn lose(
        &self,
        mut cursor: Cursor<'_>,
        page: PageIndex,
        device_page: Pfn,
        error: DeviceError,
    ) -> Outcome {
        let at = self.table.address(page);
        self.stats.note_read_error(error);
        let progress = self.mmu.poison(at, 1);
        if progress.done == 1 {
            cursor.set(page, Pte::Poisoned);
            self.map.put_dev_page(device_page);
            Stats::add(&self.stats.poisoned, 1);
        }
        self.settle(progress.stop, at)
    }

    /// Notes that a page is mapped and accounted for by a frame.
    pub(crate) fn enter(&self, cursor: &mut Cursor<'_>, page: PageIndex, frame: Pfn, copy: Copy) {
        self.map.frame(frame).set_mapping(u64::from(page.0) + 1);
        cursor.set(
            page,
            Pte::Present {
                frame,
                heat: Heat::Cold,
                copy,
            },
        );
    }

    /// Wakes who waits for a page if the machine has not done so.
    pub(crate) fn settle(&self, stop: Option<Stop>, at: VirtAddr) -> Outcome {
        match stop {
            None => Outcome::Resolved,
            Some(Stop::NoMemory) => Outcome::NoMemory,
            Some(
                Stop::Busy
                | Stop::Unevictable
                | Stop::Hole
                | Stop::Exists
                | Stop::Gone
                | Stop::Other(_),
            ) => {
                self.mmu.wake(at, 1);
                Outcome::Resolved
            }
        }
    }
}

/// How a page is mapped of which somebody else has the bytes, or nobody.
pub(crate) const fn protection(copy: Copy) -> Protect {
    match copy {
        Copy::Kept | Copy::File => Protect::ReadOnly,
        Copy::None => Protect::ReadWrite,
    }
}

/// At most `most` pages of `run`, with `page` among them.
pub(crate) fn around(page: u32, run: &Range<u32>, most: usize) -> Range<u32> {
    let most = u32::try_from(most).unwrap_or(u32::MAX).max(1);
    let start = run.start.max((page + 1).saturating_sub(most));
    start..run.end.min(start + most)
}
