//! The files that a program maps itself, within the run's budget.
//!
//! The kernel serves their faults, and keeps them as they are to everybody else: so what the program writes to a file by other
//! ways, what other processes do with it, pins, and forks, all work as without us. What is ours is how much of them is in RAM:
//! it counts in the process's part of the budget, and the pages that have been there longest are dropped, a chunk at a time.
//! A chunk that comes back soon is spared for a while.
//!
//! Called by the reclaimer, between its other work.

use core::ops::Range;
use core::time::Duration;
use std::time::Instant;

use pgmap_core::addr::PAGE_SIZE;
use pgmap_host::file_maps::{Pagemap, file_maps, page_out};

/// Pages that are dropped together: as many as the kernel keeps together at most, as it is slow at splitting what it does.
const CHUNK_PAGES: usize = 512;
const CHUNK: usize = CHUNK_PAGES * PAGE_SIZE;
/// How often a chunk is spared that came back, at most.
const HOT: u8 = 3;
/// Between two looks at which files are mapped.
const MAPS: Duration = Duration::from_millis(100);
/// Between two looks at what is in RAM: where there is room, and where there is not.
const CALM: Duration = Duration::from_millis(50);
const PRESSED: Duration = Duration::from_millis(4);
/// Looking may take one part of so many of the time, unless there are too many pages.
const SHARE: u32 = 8;

/// So often in a row pages of a mapping do not become fewer when they are dropped, before it is left to the kernel.
const MOST_FUTILE: u32 = 16;

/// What is known of one chunk.
#[derive(Clone, Copy, Debug, Default)]
struct Chunk {
    /// Its pages that are in RAM.
    resident: u16,
    /// How often it is to be spared.
    heat: u8,
    /// Dropped, and not seen in RAM since.
    dropped: bool,
}

/// One mapping.
#[derive(Debug)]
struct FileMap {
    range: Range<usize>,
    chunks: Vec<Chunk>,
    /// Pages in RAM at the last look.
    resident: usize,
    /// How often in a row there were no fewer after some were dropped.
    futile: u32,
}

impl FileMap {
    fn new(range: Range<usize>) -> Self {
        let chunks = vec![Chunk::default(); range.len().div_ceil(CHUNK)];
        Self {
            range,
            chunks,
            resident: 0,
            futile: 0,
        }
    }

    /// Whether its pages can be dropped: those of files that this user may not write cannot, and are the kernel's business.
    const fn is_ours(&self) -> bool {
        self.futile < MOST_FUTILE
    }

    /// After a look: of `before` pages in RAM all but `left` were dropped.
    const fn note_drop(&mut self, before: usize, left: usize) {
        if self.resident < before {
            self.futile = 0;
        } else if left < before {
            self.futile += 1;
        }
    }

    /// Pages in RAM that were not dropped since the last look.
    fn undropped(&self) -> usize {
        let chunks = self.chunks.iter();
        chunks.map(|chunk| usize::from(chunk.resident)).sum()
    }

    fn addresses(&self, chunk: usize) -> Range<usize> {
        let start = self.range.start + chunk * CHUNK;
        start..(start + CHUNK).min(self.range.end)
    }

    /// Looks what is in RAM.
    fn look(&mut self, pagemap: &mut Pagemap) {
        self.resident = 0;
        if !self.is_ours() {
            return;
        }
        for chunk in &mut self.chunks {
            chunk.resident = 0;
        }
        let (start, chunks) = (self.range.start, &mut self.chunks);
        let found = pagemap.each_resident(&self.range, |run| count(chunks, start, run));
        // What cannot be seen counts as nothing: it is the kernel's then, as it is without us.
        if found.is_err() {
            return;
        }
        for chunk in chunks
            .iter_mut()
            .filter(|chunk| chunk.dropped && chunk.resident > 0)
        {
            chunk.dropped = false;
            chunk.heat = (chunk.heat + 1).min(HOT);
        }
        self.resident = self.undropped();
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

/// The mapped files of this process.
#[derive(Debug)]
pub(super) struct FileMaps {
    /// Smaller mappings are left to the kernel; 0 if all are.
    least_bytes: usize,
    pagemap: Option<Pagemap>,
    maps: Vec<FileMap>,
    looked_for: Option<Instant>,
    /// The mapping and the chunk from which pages are dropped next.
    hand: (usize, usize),
    /// Pages in RAM at the last look.
    resident: usize,
    /// When the next look is due.
    due: Option<Instant>,
}

impl FileMaps {
    /// Mappings of at least so many bytes; none of them if that is 0.
    pub(super) fn new(least_bytes: u64) -> Self {
        let least_bytes = usize::try_from(least_bytes).unwrap_or(usize::MAX);
        let pagemap = (least_bytes > 0).then(Pagemap::open).and_then(Result::ok);
        Self {
            least_bytes,
            pagemap,
            maps: Vec::new(),
            looked_for: None,
            hand: (0, 0),
            resident: 0,
            due: None,
        }
    }

    /// The program has mapped a file: the next look is due at once.
    pub(super) const fn look_again(&mut self) {
        self.looked_for = None;
        self.due = None;
    }

    /// Pages in RAM at the last look.
    pub(super) const fn resident_frames(&self) -> u64 {
        self.resident as u64
    }

    /// Looks, if it is time, and drops pages as far as they and others are more than there may be: in proportion. `budget` is told
    /// how many frames they have, and answers how many there may be in all, and how many others have. Answers when to call
    /// again.
    pub(super) fn follow(&mut self, budget: impl FnOnce(u64) -> (u64, u64)) -> Duration {
        if self.pagemap.is_none() {
            return Duration::MAX;
        }
        let began = Instant::now();
        if let Some(due) = self.due
            && let Some(left) = due.checked_duration_since(began)
            && !left.is_zero()
        {
            return left;
        }
        self.find();
        self.look();
        let (budget, others) = budget(self.resident_frames());
        let budget = usize::try_from(budget).unwrap_or(usize::MAX);
        let others = usize::try_from(others).unwrap_or(usize::MAX);
        let all = self.resident.saturating_add(others);
        // A little below: until the next look there will be more.
        let goal = budget - budget / 16;
        if all > goal && self.resident > 0 {
            let excess = (all - goal).min(self.resident);
            let part = (excess as u128 * self.resident as u128).div_ceil(all as u128);
            let floor = all.saturating_sub(budget).min(self.resident);
            self.drop_pages(usize::try_from(part).unwrap_or(excess).max(floor));
        }
        let wait = if self.maps.is_empty() {
            MAPS
        } else if all > budget {
            // A program reads on while we drop.
            Duration::ZERO
        } else if all > goal - goal / 4 {
            PRESSED.max(began.elapsed())
        } else {
            CALM.max(began.elapsed() * SHARE)
        };
        self.due = Some(Instant::now() + wait);
        wait
    }

    /// Looks which files are mapped, now and then.
    fn find(&mut self) {
        if self.looked_for.is_some_and(|then| then.elapsed() < MAPS) {
            return;
        }
        self.looked_for = Some(Instant::now());
        // What was there is there still, as far as anybody knows.
        let Ok(found) = file_maps(self.least_bytes) else {
            return;
        };
        self.maps.retain(|map| found.contains(&map.range));
        for range in found {
            if !self.maps.iter().any(|map| map.range == range) {
                self.maps.push(FileMap::new(range));
            }
        }
    }

    fn look(&mut self) {
        let Some(pagemap) = &mut self.pagemap else {
            return;
        };
        self.maps.iter_mut().for_each(|map| map.look(pagemap));
        self.resident = self.maps.iter().map(|map| map.resident).sum();
    }

    /// Drops at least `want` pages, if so many may go: at most in as many rounds as a chunk can be spared.
    fn drop_pages(&mut self, want: usize) {
        let chunks: usize = self.maps.iter().map(|map| map.chunks.len()).sum();
        let mut dropped = 0;
        // Neighbours go in one call.
        let mut run = 0..0;
        for _ in 0..chunks * (usize::from(HOT) + 1) {
            if dropped >= want {
                break;
            }
            let (addresses, pages) = self.drop_next();
            dropped += pages;
            if addresses.start != run.end {
                page_out(&run);
                run.start = addresses.start;
            }
            run.end = addresses.end;
        }
        page_out(&run);
        let before: Vec<_> = self.maps.iter().map(|map| map.resident).collect();
        let wanted: Vec<_> = self.maps.iter().map(FileMap::undropped).collect();
        self.look();
        for ((map, before), left) in self.maps.iter_mut().zip(before).zip(wanted) {
            map.note_drop(before, left);
        }
    }

    /// Moves the hand by one chunk. Answers which addresses are to be dropped, and how many pages are there.
    fn drop_next(&mut self) -> (Range<usize>, usize) {
        if self.hand.0 >= self.maps.len() {
            self.hand = (0, 0);
        }
        let (nth, at) = self.hand;
        let Some(map) = self.maps.get_mut(nth) else {
            return (0..0, 0);
        };
        self.hand = if at + 1 < map.chunks.len() {
            (nth, at + 1)
        } else {
            (nth + 1, 0)
        };
        let addresses = map.addresses(at);
        let Some(chunk) = map.chunks.get_mut(at).filter(|chunk| chunk.resident > 0) else {
            return (0..0, 0);
        };
        if chunk.heat > 0 {
            chunk.heat -= 1;
            return (0..0, 0);
        }
        chunk.dropped = true;
        (addresses, usize::from(core::mem::take(&mut chunk.resident)))
    }
}
