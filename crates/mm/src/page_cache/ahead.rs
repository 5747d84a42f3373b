//! Reading ahead: blocks of a file that a stream will want are read by other threads while its reader uses those before
//! (the kernel's `page_cache_ra`).
//!
//! The fault path asks, and waits for nobody; whoever serves the [`ReadAhead`] reads a block at a time, under its cursor, as
//! a fault would. What must never happen here: a page read in that is being truncated, which [`read_in`](PageCache::read_in)
//! sees to; a file kept open by what is left in the queue.

use core::ops::Range;
use core::time::Duration;

use pgmap_sync::{Mutex, WaitQueue};

use super::{CachePage, FileNumber, PageCache};
use crate::page_table::{BLOCK_PAGES, BlockIndex, PageIndex};
use crate::readahead::Plan;
use crate::space::Worker;

/// Streams that are read ahead of at the same time.
const STREAMS: usize = 8;
/// Blocks that are read ahead of a stream, at most: 2 MiB.
const BLOCKS: u32 = 8;
/// What is read ahead of one stream is at most one part of so many of the RAM.
const PART: u64 = 8;

/// Blocks of a file that somebody will want.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Wanted {
    file: FileNumber,
    blocks: Range<u32>,
}

/// What is to be read ahead.
#[derive(Debug, Default)]
pub struct ReadAhead {
    wanted: Mutex<[Option<Wanted>; STREAMS]>,
    asked: WaitQueue,
}

impl ReadAhead {
    /// Asks for blocks of a file; they are forgotten if there are too many streams.
    pub(crate) fn ask(&self, file: FileNumber, blocks: Range<u32>) {
        let mut wanted = self.wanted.lock();
        let goes_on = |known: &&mut Wanted| {
            known.file == file
                && known.blocks.start <= blocks.end
                && blocks.start <= known.blocks.end
        };
        if let Some(known) = wanted.iter_mut().flatten().find(goes_on) {
            known.blocks.start = known.blocks.start.max(blocks.start);
            known.blocks.end = known.blocks.end.max(blocks.end);
        } else if let Some(free) = wanted.iter_mut().find(|place| place.is_none()) {
            *free = Some(Wanted { file, blocks });
        }
        drop(wanted);
        self.asked.wake_all();
    }

    /// Waits for a block that is to be read, for so long at most.
    pub fn next(&self, patience: Duration) -> Option<(FileNumber, BlockIndex)> {
        let is_asked = || self.wanted.lock().iter().any(Option::is_some);
        self.asked.wait_until(Some(patience), is_asked);
        self.take()
    }

    fn take(&self) -> Option<(FileNumber, BlockIndex)> {
        let mut wanted = self.wanted.lock();
        let place = wanted.iter_mut().find(|place| place.is_some())?;
        let stream = place.as_mut()?;
        let block = (stream.file, BlockIndex(stream.blocks.start));
        stream.blocks.start += 1;
        if stream.blocks.is_empty() {
            *place = None;
        }
        Some(block)
    }
}

impl PageCache {
    /// The blocks that are worth reading before the stream of this plan wants them.
    pub(super) fn ahead_of(&self, plan: &Plan) -> Range<u32> {
        let Some(block) = plan.forwards().map(|page| page.block().0) else {
            return 0..0;
        };
        let room = self.ram.limit() / PART / u64::from(BLOCK_PAGES);
        let most = BLOCKS.min(u32::try_from(room).unwrap_or(BLOCKS));
        let end = self.size_pages().div_ceil(BLOCK_PAGES);
        block + 1..(block + 1).saturating_add(most).min(end)
    }

    /// Reads what is not in RAM of a block, as far as there are frames. Says whether there were enough.
    pub fn read_block(&self, worker: &mut Worker, block: BlockIndex) -> bool {
        let pages = block.pages().start..block.pages().end.min(self.size_pages());
        let is_absent = |page: &u32| self.peek(*page) == CachePage::Absent;
        let mut enough = true;
        // One look at each run is enough: what is dropped meanwhile nobody wants.
        let mut from = pages.start;
        while enough && let Some(page) = (from..pages.end).find(is_absent) {
            from = page + 1;
            let mut cursor = self.table.lock(block);
            let still = cursor.get(PageIndex(page)) == CachePage::Absent;
            if !still || page >= self.size_pages() || self.barrier.is_closed(page) {
                continue;
            }
            let count = (pages.end - page) as usize;
            enough = worker.frames.prepare(&self.ram, count) == count;
            if enough {
                self.read_in(&mut cursor, worker, PageIndex(page), &pages);
            }
        }
        worker.frames.give_all(&self.ram);
        enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(ahead: &ReadAhead) -> Vec<(u32, u32)> {
        let next = || ahead.take().map(|(file, block)| (file.0, block.0));
        core::iter::from_fn(next).collect()
    }

    /// What a stream asks for again is read once, and what it has passed is not read at all.
    #[test]
    fn a_stream_that_goes_on_is_one_request() {
        let ahead = ReadAhead::default();
        ahead.ask(FileNumber(1), 1..4);
        ahead.ask(FileNumber(1), 2..5);
        ahead.ask(FileNumber(1), 5..6);
        assert_eq!(taken(&ahead), []);
        ahead.ask(FileNumber(1), 2..5);
        ahead.ask(FileNumber(2), 3..4);
        ahead.ask(FileNumber(1), 3..6);
        assert_eq!(taken(&ahead), [(1, 3), (1, 4), (1, 5), (2, 3)]);
    }

    /// Streams that find no place are not read ahead of, and no harm is done.
    #[test]
    fn too_many_streams_are_forgotten() {
        let ahead = ReadAhead::default();
        for file in 0..20 {
            ahead.ask(FileNumber(file), 0..1);
        }
        assert_eq!(taken(&ahead).len(), STREAMS);
    }
}
