//! Pages of which the program has said that it does not read and write them (`mprotect`): what it may do there, and how
//! they leave the arena all the same.
//!
//! The lock is taken by the program's threads while they change protections, and by whoever takes such pages out, who
//! has the cursor of their block: so nobody takes a cursor while holding it. What must never happen here: memory of the arena
//! that for a moment allows something else than the program asked for.

use core::ops::Range;

use pgmap_core::addr::{PAGE_SIZE, VirtAddr};
use pgmap_mm::mmu::{Progress, Protect, Stop};
use rustix::io::Errno;
use rustix::mm::{MprotectFlags, ProtFlags, mprotect};

use crate::area::{Area, OnFork};
use crate::mmu::HostMmu;
use crate::protection::{KEYED, Protections, READ_WRITE};
use crate::transit::{Transit, last_error};
use crate::uffd::{Done, Uffd};

/// Pages that leave at once.
const TRANSIT: usize = 64;

/// What is only used under its lock.
#[derive(Debug)]
pub(crate) struct Restricted {
    protections: Protections,
    /// Room for the bytes of pages that come back from transit.
    spare: Area,
    /// Where pages that may be written and executed are for a moment, alone; it has the protection of those that were there
    /// last.
    depot: Area,
}

impl Restricted {
    /// `staging` brings pages to staging, and is told of what is missing there.
    pub(crate) fn new(staging: &Uffd) -> Result<Self, Errno> {
        let reserve = || {
            let protection = ProtFlags::READ | ProtFlags::WRITE;
            Area::reserve(TRANSIT * PAGE_SIZE, protection, OnFork::Wipe)
        };
        let depot = reserve()?;
        staging.register_missing(depot.address(), depot.len())?;
        Ok(Self {
            protections: Protections::default(),
            spare: reserve()?,
            depot,
        })
    }
}

impl HostMmu {
    /// Allows or forbids access to pages, for the program. Those that have a protection key keep it.
    ///
    /// # Errors
    ///
    /// What the machine answers.
    ///
    /// # Safety
    ///
    /// The caller owns the pages: nobody relies on what may be done there.
    pub unsafe fn protect(
        &self,
        at: VirtAddr,
        count: u32,
        protection: MprotectFlags,
    ) -> Result<(), Errno> {
        let mut rest = self.numbers(at, count as usize);
        let mut restricted = self.restricted.lock();
        // SAFETY: by this function's contract; `numbers` has checked that the pages are in the arena.
        unsafe { mprotect(at.get() as *mut _, count as usize * PAGE_SIZE, protection) }?;
        while !rest.is_empty() {
            let (before, run) = restricted.protections.run(&rest);
            if before != KEYED {
                let pages = rest.start..rest.start + run;
                restricted.protections.set(pages, protection);
            }
            rest.start += run;
        }
        Ok(())
    }

    /// As [`protect`](Self::protect), with a protection key; 0 takes a key away.
    ///
    /// # Errors
    ///
    /// What the machine answers.
    ///
    /// # Safety
    ///
    /// As for `protect`.
    pub unsafe fn protect_with_key(
        &self,
        at: VirtAddr,
        count: u32,
        protection: MprotectFlags,
        key: i32,
    ) -> Result<(), Errno> {
        let pages = self.numbers(at, count as usize);
        let mut restricted = self.restricted.lock();
        let (start, len) = (at.get(), count as usize * PAGE_SIZE);
        // SAFETY: by the function's contract; `numbers` has checked that the pages are in the arena.
        let answer =
            unsafe { libc::syscall(libc::SYS_pkey_mprotect, start, len, protection.bits(), key) };
        if answer != 0 {
            return Err(last_error());
        }
        let noted = if key == 0 { protection } else { KEYED };
        restricted.protections.set(pages, noted);
        Ok(())
    }

    /// Allows reading and writing where the program has asked for anything else, and takes keys away.
    ///
    /// # Errors
    ///
    /// What the machine answers.
    ///
    /// # Safety
    ///
    /// As for `protect`.
    pub unsafe fn unrestrict(&self, at: VirtAddr, count: u32) -> Result<(), Errno> {
        let mut rest = self.numbers(at, count as usize);
        while !rest.is_empty() {
            let (before, run) = self.restricted.lock().protections.run(&rest);
            let start = VirtAddr::new(self.arena.address() + rest.start as usize * PAGE_SIZE);
            if before == KEYED {
                // SAFETY: by this function's contract.
                unsafe { self.protect_with_key(start, run, READ_WRITE, 0) }?;
            } else if before != READ_WRITE {
                // SAFETY: by this function's contract.
                unsafe { self.protect(start, run, READ_WRITE) }?;
            }
            rest.start += run;
        }
        Ok(())
    }

    /// The slow way out, after the machine has refused the quick one: not in a fork's child, where that is
    /// not even tried.
    pub(crate) fn take_out_restricted(
        &self,
        at: VirtAddr,
        count: usize,
        target: usize,
    ) -> Progress {
        let mut done = 0;
        while done < count {
            let (at, target) = (at.get() + done * PAGE_SIZE, target + done * PAGE_SIZE);
            let pages = self.numbers(VirtAddr::new(at), (count - done).min(TRANSIT));
            // Held until all is as it was: the program's next `mprotect` waits.
            let restricted = self.restricted.lock();
            let (protection, run) = restricted.protections.run(&pages);
            let len = run as usize * PAGE_SIZE;
            let progress = if protection == READ_WRITE {
                drop(restricted);
                self.move_out(at, len, target)
            } else if protection == KEYED {
                Self::refused(Stop::Unevictable)
            } else if protection.contains(MprotectFlags::WRITE) {
                self.take_through_depot(&restricted, at..at + len, target, protection)
            } else {
                self.take_through_transit(&restricted, at..at + len, target, protection)
            };
            done += progress.done;
            if progress.stop.is_some() {
                return Progress { done, ..progress };
            }
        }
        Progress::complete(count)
    }

    /// Takes out pages that may be written, but not only that: the machine moves them to where the same is allowed, if nobody has
    /// pinned them. (In transit a page on its way back could be written before it is protected from that again.)
    fn take_through_depot(
        &self,
        restricted: &Restricted,
        range: Range<usize>,
        target: usize,
        protection: MprotectFlags,
    ) -> Progress {
        let depot = &restricted.depot;
        // SAFETY: nobody else uses the depot while we have the lock.
        let allowed = unsafe { mprotect(depot.address() as *mut _, depot.len(), protection) };
        if allowed.is_err() {
            return Self::refused(Stop::Unevictable);
        }
        let moved = self.move_out(range.start, range.len(), depot.address());
        let source = depot.as_ptr();
        let copied = self.repeat(moved.done * PAGE_SIZE, |offset, len| {
            let source = source.wrapping_add(offset);
            // SAFETY: these are the last of the bytes that were just moved there.
            unsafe {
                self.staging_uffd
                    .copy(target + offset, source, len, Protect::ReadWrite)
            }
        });
        let stays = copied.done * PAGE_SIZE;
        let (at, source) = (range.start + stays, source.wrapping_add(stays));
        let rest = moved.done * PAGE_SIZE - stays;
        // SAFETY: these bytes were moved there, too, and have not been copied.
        unsafe { self.copy_back(at, source, rest) };
        if moved.done > 0 {
            // SAFETY: all bytes are elsewhere now.
            unsafe { depot.drop_pages(0, moved.done) };
        }
        Progress {
            done: copied.done,
            stop: copied.stop.or(moved.stop),
        }
    }

    const fn refused(stop: Stop) -> Progress {
        Progress {
            done: 0,
            stop: Some(stop),
        }
    }

    /// Takes out pages that may not be written.
    fn take_through_transit(
        &self,
        restricted: &Restricted,
        range: Range<usize>,
        target: usize,
        protection: MprotectFlags,
    ) -> Progress {
        // Children that are forked from here on may lack what is in transit.
        let next_child = self.forks.next_id();
        // SAFETY: the range is in the arena; what is not moved on is put back below.
        let taken = unsafe { Transit::take(range.start, range.len(), protection) };
        let Ok(transit) = taken else {
            return Self::refused(Stop::Unevictable);
        };
        if !transit.is_open() {
            self.put_back(restricted, transit, 0, next_child);
            return Self::refused(Stop::Unevictable);
        }
        let mut may_be_shared = true;
        let progress = self.repeat(range.len(), |offset, len| {
            let source = transit.address(offset) as usize;
            let done = self.staging_uffd.move_pages(target + offset, source, len);
            if done.bytes > 0 || done.error != Some(Errno::BUSY) || !may_be_shared {
                return done;
            }
            // `unshare` cannot do this where the program may not write.
            may_be_shared = false;
            transit.unshare(offset);
            self.staging_uffd.move_pages(target + offset, source, len)
        });
        if progress.stop.is_some() {
            self.put_back(restricted, transit, progress.done * PAGE_SIZE, next_child);
        }
        progress
    }

    /// Returns the pages in transit from `offset` on as they were: the same pages, since whoever has pinned them relies on
    /// that; protected from writes, as some may have been; and to the children that were forked meanwhile, too.
    fn put_back(&self, restricted: &Restricted, transit: Transit, offset: usize, next_child: u64) {
        let (spare, len) = (restricted.spare.as_mut_ptr(), transit.len() - offset);
        let at = transit.home(offset);
        // SAFETY: `spare` is as long as the longest transit, and ours by the lock; what somebody who has pinned a page
        // writes there now is as good as what was there.
        unsafe { transit.address(offset).copy_to_nonoverlapping(spare, len) };
        // SAFETY: whoever calls `take_out` keeps others from bringing these pages in.
        if unsafe { transit.put_back(offset) }.is_err() {
            // The process has too many mappings. Better another page than none.
            // SAFETY: `spare` has the bytes.
            return unsafe { self.copy_back(at, spare, len) };
        }
        let registered = self.uffd.register(at, len);
        assert!(
            registered.is_ok(),
            "nobody would be told of faults at {at:#x}: {registered:?}"
        );
        // The kernel refuses this while the message of a fork is unread: afterwards all children are known that lack the pages.
        while let Err(errno) = self.uffd.protect(at, len) {
            assert!(errno == Errno::AGAIN, "{at:#x} stays unprotected: {errno}");
            self.drain();
        }
        let given = self.repeat(len, |_, len| {
            // SAFETY: `spare` has the bytes.
            let given = unsafe { self.forks.hold().give_since(next_child, at, spare, len) };
            Done {
                bytes: given.map_or(0, |()| len),
                error: given.err(),
            }
        });
        assert!(given.stop.is_none(), "children lack pages: {given:?}");
    }

    /// Brings in bytes of pages that cannot come themselves, protected from writes, as some may have been.
    ///
    /// # Safety
    ///
    /// `source` is valid for reads of `len` bytes.
    unsafe fn copy_back(&self, at: usize, source: *const u8, len: usize) {
        let copy = |offset, len| {
            let source = source.wrapping_add(offset);
            // SAFETY: these are the last of the bytes that the caller vouches for.
            unsafe { self.uffd.copy(at + offset, source, len, Protect::ReadOnly) }
        };
        // SAFETY: by this function's contract.
        let copied = unsafe { self.bring(VirtAddr::new(at), source, len, copy) };
        assert!(
            copied.stop.is_none(),
            "pages could not be put back: {copied:?}"
        );
    }

    fn numbers(&self, at: VirtAddr, count: usize) -> Range<u32> {
        self.check(at, count);
        let first = (at.get() - self.arena.address()) / PAGE_SIZE;
        #[allow(
            clippy::cast_possible_truncation,
            reason = "the arena has fewer than 2^32 pages"
        )]
        let (first, end) = (first as u32, (first + count) as u32);
        first..end
    }
}
