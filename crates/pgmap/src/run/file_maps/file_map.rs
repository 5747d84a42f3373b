//! One file mapping of the program: what of it is in RAM, and which of its chunks go next.
//!
//! Called by `file_maps`, which keeps the budget. What must never happen here: a mapping that is given up for good. Pages that
//! cannot be dropped today, as somebody has pinned them or another process has them mapped, can be tomorrow.

use core::ops::Range;
use core::time::Duration;
use std::time::Instant;

use pgmap_core::addr::PAGE_SIZE;
use pgmap_host::file_maps::{Pagemap, page_out};

/// Pages that are dropped together: as many as the kernel keeps together at most, as it is slow at splitting what it does.
const CHUNK_PAGES: usize = 512;
const CHUNK: usize = CHUNK_PAGES * PAGE_SIZE;
/// How often a chunk is spared that came back, at most.
pub(super) const HOT: u8 = 3;
/// So often all pages of a mapping are dropped in vain before it is left to the kernel: more often than chunks that do go can be
/// spared meanwhile.
const MOST_FUTILE: usize = 8;
/// Between two tries at a mapping that is left to the kernel.
const RETRY: Duration = Duration::from_secs(1);
/// Chunks that are tried then, about.
const TRIED: usize = 16;

/// What is known of one chunk.
#[derive(Clone, Copy, Debug, Default)]
struct Chunk {
    /// Its pages that are in RAM.
    resident: u16,
    /// Its pages that were dropped since the last look.
    asked: u16,
    /// How often it is to be spared.
    heat: u8,
    /// Dropped, and not seen in RAM since.
    dropped: bool,
}

/// One mapping.
#[derive(Debug)]
pub(super) struct FileMap {
    pub(super) range: Range<usize>,
    chunks: Vec<Chunk>,
    /// Pages in RAM at the last look; 0 while they are the kernel's business.
    pub(super) resident: usize,
    /// Pages that were dropped in vain since the last that went.
    futile: usize,
    /// Since when its pages are the kernel's business, as none of them could be dropped: this user may not write their file, or
    /// others hold them.
    left: Option<Instant>,
    /// The first chunk that was tried last, since then.
    tried: usize,
}

impl FileMap {
    pub(super) fn new(range: Range<usize>) -> Self {
        let chunks = vec![Chunk::default(); range.len().div_ceil(CHUNK)];
        Self {
            range,
            chunks,
            resident: 0,
            futile: 0,
            left: None,
            tried: 0,
        }
    }

    pub(super) const fn chunks(&self) -> usize {
        self.chunks.len()
    }

    /// Looks what is in RAM.
    pub(super) fn look(&mut self, pagemap: &mut Pagemap) {
        match self.left {
            Some(left) if left.elapsed() < RETRY => {}
            Some(_) => self.try_again(pagemap),
            None => self.scan(pagemap),
        }
        let chunks = self.chunks.iter().filter(|_| self.left.is_none());
        self.resident = chunks.map(|chunk| usize::from(chunk.resident)).sum();
    }

    /// Drops a few chunks of a mapping that was left to the kernel, to see whether they go by now: each time others, from all of it.
    fn try_again(&mut self, pagemap: &mut Pagemap) {
        self.scan(pagemap);
        let step = self.chunks.len().div_ceil(TRIED);
        self.tried = (self.tried + 1) % step;
        for nth in (self.tried..self.chunks.len()).step_by(step) {
            page_out(&self.drop_chunk(nth).0);
        }
        self.scan(pagemap);
        self.left = (self.note_drop() == 0).then(Instant::now);
    }

    fn scan(&mut self, pagemap: &mut Pagemap) {
        for chunk in &mut self.chunks {
            chunk.resident = 0;
        }
        let (start, chunks) = (self.range.start, &mut self.chunks);
        // What cannot be seen counts as nothing: it is the kernel's then, as it is without us.
        let _ = pagemap.each_resident(&self.range, |run| count(chunks, start, run));
        for chunk in chunks
            .iter_mut()
            .filter(|chunk| chunk.dropped && chunk.resident > 0)
        {
            chunk.dropped = false;
            chunk.heat = (chunk.heat + 1).min(HOT);
        }
    }

    /// Answers which addresses of a chunk are to be dropped, and how many pages are there. A chunk that keeps coming back is spared
    /// as often.
    pub(super) fn drop_chunk(&mut self, nth: usize) -> (Range<usize>, usize) {
        let Some(chunk) = self.chunks.get_mut(nth).filter(|chunk| chunk.resident > 0) else {
            return (0..0, 0);
        };
        if chunk.heat > 0 && self.left.is_none() {
            chunk.heat -= 1;
            return (0..0, 0);
        }
        chunk.dropped = true;
        chunk.asked = core::mem::take(&mut chunk.resident);
        let pages = usize::from(chunk.asked);
        let start = self.range.start + nth * CHUNK;
        (start..(start + CHUNK).min(self.range.end), pages)
    }

    /// After the look that follows drops: answers how many of those pages went. What else came meanwhile does not matter, as the
    /// program reads on.
    pub(super) fn note_drop(&mut self) -> usize {
        let (mut asked, mut gone) = (0, 0);
        for chunk in &mut self.chunks {
            let pages = core::mem::take(&mut chunk.asked);
            asked += usize::from(pages);
            gone += usize::from(pages.saturating_sub(chunk.resident));
        }
        if gone > 0 {
            self.futile = 0;
        } else if asked > 0 {
            self.futile += asked;
            if self.futile >= MOST_FUTILE * self.resident {
                self.left = Some(Instant::now());
                self.resident = 0;
            }
        }
        gone
    }
}

/// Counts the pages of a run in the chunks that have them.
fn count(chunks: &mut [Chunk], start: usize, run: Range<usize>) {
    let mut at = run.start;
    while at < run.end {
        let nth = (at - start) / CHUNK;
        let end = run.end.min(start + (nth + 1) * CHUNK);
        if let Some(chunk) = chunks.get_mut(nth) {
            chunk.resident += u16::try_from((end - at) / PAGE_SIZE).unwrap_or(0);
        }
        at = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mapping of three chunks, of which so many pages are in RAM.
    fn map(resident: [u16; 3]) -> FileMap {
        let mut map = FileMap::new(0..3 * CHUNK);
        show(&mut map, resident);
        map
    }

    /// As a look that finds so many pages.
    fn show(map: &mut FileMap, resident: [u16; 3]) {
        for (chunk, resident) in map.chunks.iter_mut().zip(resident) {
            chunk.resident = resident;
        }
        map.resident = resident.map(usize::from).iter().sum();
    }

    /// A program that reads more than we drop does not make its mapping the kernel's.
    #[test]
    fn what_comes_meanwhile_does_not_hide_what_went() {
        let mut map = map([512, 0, 0]);
        for _ in 0..100 {
            assert_eq!(map.drop_chunk(0), (0..CHUNK, 512));
            show(&mut map, [12, 512, 512]);
            assert_eq!(map.note_drop(), 500);
            assert!(map.left.is_none());
            show(&mut map, [512, 0, 0]);
        }
    }

    /// A mapping of which no page goes is left to the kernel, but not before all of them were tried, several times.
    #[test]
    fn pages_that_cannot_be_dropped_are_the_kernels() {
        let mut map = map([512, 512, 0]);
        for nth in 0..2 * MOST_FUTILE {
            assert!(map.left.is_none());
            assert_eq!(map.drop_chunk(nth % 2).1, 512);
            show(&mut map, [512, 512, 0]);
            assert_eq!(map.note_drop(), 0);
        }
        assert!(map.left.is_some());
        assert_eq!(map.resident, 0);
    }
}
