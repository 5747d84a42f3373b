//! Reading ahead: blocks of a file that a stream will want are read by other threads while its reader uses those before
//! (the kernel's `page_cache_ra`).
//!
//! The fault path asks, and waits for nobody; whoever serves the [`ReadAhead`] reads a group of blocks at once, under the
//! cursors of all of them. What must never happen here: a page read in that is being truncated (FLT-2); a file kept open by
//! what is left in the queue.

use core::ops::Range;
use core::time::Duration;

use pgmap_sync::{Mutex, WaitQueue};

use super::{CachePage, FileNumber, PageCache};
use crate::backing::Transfer;
use crate::page_table::{BLOCK_PAGES, BlockIndex, Cursor, PageIndex};
use crate::readahead::Plan;
#[cfg(shuttle)]
use crate::seeded_bug::{self, SeededBug};
use crate::space::Worker;

/// Streams that are read ahead of at the same time.
const STREAMS: usize = 8;
/// Blocks that are read at once: 1 MiB. A divisor of the number of locks.
const GROUP_BLOCKS: u32 = 4;
/// The same in pages.
pub(crate) const GROUP_PAGES: u32 = GROUP_BLOCKS * BLOCK_PAGES;
/// Groups that are read ahead of a stream, at most.
const GROUPS: u32 = 6;
/// What is read ahead of one stream is at most one part of so many of the RAM.
const PART: u64 = 8;

/// Blocks of a file that are read at once: those of so many pages, at a multiple of that.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Group(u32);

impl Group {
    /// The group that a page is in.
    #[must_use]
    pub const fn of(page: PageIndex) -> Self {
        Self(page.0 / GROUP_PAGES)
    }

    fn blocks(self) -> [BlockIndex; GROUP_BLOCKS as usize] {
        let first = self.0 * GROUP_BLOCKS;
        [0, 1, 2, 3].map(|nth| BlockIndex(first + nth))
    }
}

/// What a stream's fault found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Found {
    /// Its page, which others had read ahead, or were about to.
    #[default]
    Cached,
    /// Nothing: it read the page itself.
    Absent,
}

/// What a fault asks to be read ahead.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Ahead {
    pub(crate) groups: Range<u32>,
    pub(crate) found: Found,
}

/// Groups of a file that somebody will want. Where there are none it says how far a stream has been read ahead of.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Wanted {
    file: FileNumber,
    groups: Range<u32>,
}

impl Wanted {
    fn goes_on_with(&self, file: FileNumber, groups: &Range<u32>) -> bool {
        self.file == file && self.groups.start <= groups.end && groups.start <= self.groups.end
    }
}

/// What is to be read ahead.
#[derive(Debug, Default)]
pub struct ReadAhead {
    /// That of the last request comes first.
    wanted: Mutex<[Wanted; STREAMS]>,
    asked: WaitQueue,
}

impl ReadAhead {
    /// Asks for groups of a file; they are forgotten if there are too many streams. Those that were asked for before, for the same
    /// stream, are read once, unless the stream has come to a page that is not there.
    pub(crate) fn ask(&self, file: FileNumber, ahead: Ahead) {
        let mut wanted = self.wanted.lock();
        let groups = ahead.groups;
        let known = wanted
            .iter()
            .position(|known| known.goes_on_with(file, &groups));
        let free = || wanted.iter().rposition(|place| place.groups.is_empty());
        let Some(place) = known.or_else(free) else {
            return;
        };
        let stream = &mut wanted[place];
        if known.is_none() {
            *stream = Wanted { file, groups };
        } else {
            stream.groups.start = match ahead.found {
                Found::Cached => stream.groups.start.max(groups.start),
                Found::Absent => groups.start,
            };
            stream.groups.end = stream.groups.end.max(groups.end);
        }
        wanted[..=place].rotate_right(1);
        let asked = is_asked(&*wanted);
        drop(wanted);
        if asked {
            self.asked.wake_all();
        }
    }

    /// Waits for a group that is to be read, for so long at most.
    pub fn next(&self, patience: Duration) -> Option<(FileNumber, Group)> {
        self.asked
            .wait_until(Some(patience), || is_asked(&*self.wanted.lock()));
        self.take()
    }

    fn take(&self) -> Option<(FileNumber, Group)> {
        let mut wanted = self.wanted.lock();
        let mut streams = wanted.iter_mut();
        let stream = streams.rfind(|stream| !stream.groups.is_empty())?;
        let group = (stream.file, Group(stream.groups.start));
        stream.groups.start += 1;
        Some(group)
    }
}

fn is_asked(wanted: &[Wanted]) -> bool {
    wanted.iter().any(|wanted| !wanted.groups.is_empty())
}

impl PageCache {
    /// The groups that are worth reading before the stream of this plan wants them.
    pub(super) fn ahead_of(&self, plan: &Plan) -> Range<u32> {
        let Some(page) = plan.forwards() else {
            return 0..0;
        };
        let next = Group::of(page).0 + 1;
        let room = self.ram.limit() / PART / u64::from(GROUP_PAGES);
        let most = GROUPS.min(u32::try_from(room).unwrap_or(GROUPS));
        next..next
            .saturating_add(most)
            .min(self.size_pages().div_ceil(GROUP_PAGES))
    }

    /// Reads what is not in RAM of a group, at once, if there are frames for it. Says whether there were. What cannot be read is
    /// left to whoever wants it.
    pub fn read_group(&self, worker: &mut Worker, group: Group) -> bool {
        let blocks = group.blocks();
        let mut pages = blocks.iter().flat_map(|block| block.pages());
        if !pages.any(|page| self.peek(page) == CachePage::Absent) {
            return true;
        }
        #[cfg(shuttle)]
        let looked = seeded_bug::has(SeededBug::ReadAheadLooksFirst)
            .then(|| blocks.map(|block| self.absent_run(&self.table.lock(block))));
        let mut cursors = self.lock_group(group);
        let runs = cursors.each_ref().map(|cursor| self.absent_run(cursor));
        #[cfg(shuttle)]
        let runs = looked.unwrap_or(runs);
        let count = runs.iter().map(ExactSizeIterator::len).sum();
        let enough = worker.frames.prepare(&self.ram, count) == count;
        let charged = self.charge(count);
        // A group that is at its limit reads what it needs, and nothing ahead.
        if enough && charged == count {
            self.read_runs(&mut cursors, worker, &runs);
        } else {
            #[cfg(shuttle)]
            let charged = if seeded_bug::has(SeededBug::ReadAheadKeepsTheCharge) {
                0
            } else {
                charged
            };
            self.uncharge(charged);
        }
        drop(cursors);
        worker.frames.give_all(&self.ram);
        enough
    }

    /// The cursors of a group. The locks of its blocks are neighbours, and nobody else has more than one: this order cannot
    /// deadlock.
    fn lock_group(&self, group: Group) -> [Cursor<'_, CachePage>; GROUP_BLOCKS as usize] {
        #[cfg(shuttle)]
        if seeded_bug::has(SeededBug::ReadersLockBackwards) && group.0 > 0 {
            let [a, b, c, d] = group.blocks();
            let [d, c, b, a] = [d, c, b, a].map(|block| self.table.lock(block));
            return [a, b, c, d];
        }
        group.blocks().map(|block| self.table.lock(block))
    }

    /// Reads a run of pages of each block. The worker has frames for them, and they are charged.
    fn read_runs(
        &self,
        cursors: &mut [Cursor<'_, CachePage>; GROUP_BLOCKS as usize],
        worker: &mut Worker,
        runs: &[Range<u32>; GROUP_BLOCKS as usize],
    ) {
        let size_bytes = self.size_bytes();
        let mut transfers = runs.each_ref().map(|run| {
            // There may be no such page where nothing is to be read.
            let first = if run.is_empty() { 0 } else { run.start };
            let pages = self.mmu.pages(first, run.len());
            Transfer::new(run.start, pages, size_bytes)
        });
        self.backing.read(&mut transfers);
        let read = cursors.iter_mut().zip(runs).zip(transfers);
        for ((cursor, run), transfer) in read.filter(|((_, run), _)| !run.is_empty()) {
            let good = transfer.outcome.is_ok();
            #[cfg(shuttle)]
            let good = good || seeded_bug::has(SeededBug::ReadAheadTrustsTheFile);
            if good {
                self.enter(cursor, worker, run);
            } else {
                self.mmu.free(run.start, run.len());
                self.uncharge(run.len());
            }
        }
    }

    /// The first pages of a block that are not in RAM, and may be read in.
    fn absent_run(&self, cursor: &Cursor<'_, CachePage>) -> Range<u32> {
        let pages = cursor.pages();
        let readable = |page: &u32| {
            let absent = cursor.get(PageIndex(*page)) == CachePage::Absent;
            absent && *page < self.size_pages() && !self.is_closed_to_reads(*page)
        };
        let start = pages.clone().find(readable).unwrap_or(pages.end);
        let end = (start..pages.end).find(|page| !readable(page));
        start..end.unwrap_or(pages.end)
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    fn taken(ahead: &ReadAhead) -> Vec<(u32, u32)> {
        let next = || ahead.take().map(|(file, group)| (file.0, group.0));
        core::iter::from_fn(next).collect()
    }

    fn ask(ahead: &ReadAhead, file: u32, groups: Range<u32>) {
        let found = Found::Cached;
        ahead.ask(FileNumber(file), Ahead { groups, found });
    }

    /// What a stream asks for again is read once, and what it has passed is not read at all.
    #[test]
    fn a_stream_that_goes_on_is_one_request() {
        let ahead = ReadAhead::default();
        ask(&ahead, 1, 1..4);
        ask(&ahead, 1, 2..5);
        ask(&ahead, 1, 5..6);
        assert_eq!(taken(&ahead), [(1, 5)]);
        ask(&ahead, 1, 2..6);
        ask(&ahead, 2, 3..4);
        ask(&ahead, 1, 3..8);
        assert_eq!(taken(&ahead), [(2, 3), (1, 6), (1, 7)]);
    }

    /// A stream that comes to a page which is not there, as it has left again, is read ahead of anew.
    #[test]
    fn what_has_left_again_is_read_again() {
        let ahead = ReadAhead::default();
        ask(&ahead, 1, 1..3);
        assert_eq!(taken(&ahead), [(1, 1), (1, 2)]);
        let (groups, found) = (1..3, Found::Absent);
        ahead.ask(FileNumber(1), Ahead { groups, found });
        assert_eq!(taken(&ahead), [(1, 1), (1, 2)]);
    }

    /// Streams that find no place are not read ahead of, and no harm is done; one that is served makes room.
    #[test]
    fn too_many_streams_are_forgotten() {
        let ahead = ReadAhead::default();
        (0..20).for_each(|file| ask(&ahead, file, 0..1));
        assert_eq!(taken(&ahead).len(), STREAMS);
        (20..40).for_each(|file| ask(&ahead, file, 0..1));
        assert_eq!(taken(&ahead).len(), STREAMS);
    }
}
