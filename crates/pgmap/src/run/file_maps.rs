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

use pgmap_host::file_maps::{Pagemap, file_maps, page_out};

use file_map::{FileMap, HOT};

mod file_map;

/// Between two looks at which files are mapped.
const MAPS: Duration = Duration::from_millis(100);
/// Between two looks at what is in RAM: where there is room, and where there is not.
const CALM: Duration = Duration::from_millis(50);
const PRESSED: Duration = Duration::from_millis(4);
/// Looking may take one part of so many of the time, unless there are too many pages.
const SHARE: u32 = 8;

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
            due: None,
        }
    }

    /// The program has mapped a file: the next look is due at once.
    pub(super) const fn look_again(&mut self) {
        self.looked_for = None;
        self.due = None;
    }

    /// Pages in RAM at the last look.
    pub(super) fn resident_frames(&self) -> u64 {
        self.resident() as u64
    }

    fn resident(&self) -> usize {
        self.maps.iter().map(|map| map.resident).sum()
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
        let resident = self.resident();
        let (budget, others) = budget(resident as u64);
        let budget = usize::try_from(budget).unwrap_or(usize::MAX);
        let others = usize::try_from(others).unwrap_or(usize::MAX);
        let all = resident.saturating_add(others);
        let over = all.saturating_sub(budget);
        // A little below: until the next look there will be more.
        let goal = budget - budget / 16;
        let mut gone = 0;
        if all > goal && resident > 0 {
            let excess = (all - goal).min(resident);
            let part = (excess as u128 * resident as u128).div_ceil(all as u128);
            let floor = over.min(resident);
            gone = self.drop_pages(usize::try_from(part).unwrap_or(excess).max(floor));
        }
        let wait = if self.maps.is_empty() {
            MAPS
        } else if over > 0 && others < budget && gone * 2 >= over {
            // A program reads on while we drop.
            Duration::ZERO
        } else if over > 0 && gone == 0 {
            // These pages cannot be dropped, or others have too much.
            PRESSED.max(began.elapsed() * SHARE)
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
        if let Some(pagemap) = &mut self.pagemap {
            self.maps.iter_mut().for_each(|map| map.look(pagemap));
        }
    }

    /// Drops at least `want` pages, if so many may go: at most in as many rounds as a chunk can be spared. Answers how many went.
    fn drop_pages(&mut self, want: usize) -> usize {
        let chunks: usize = self.maps.iter().map(FileMap::chunks).sum();
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
        self.look();
        self.maps.iter_mut().map(FileMap::note_drop).sum()
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
        self.hand = if at + 1 < map.chunks() {
            (nth, at + 1)
        } else {
            (nth + 1, 0)
        };
        map.drop_chunk(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where others alone have more than there may be, or nothing that is too much can be dropped, files are not looked at all the
    /// time.
    #[test]
    fn what_does_not_help_is_not_hurried() {
        let mut files = FileMaps::new(1 << 40);
        // Nothing is ever mapped here.
        files.maps.push(FileMap::new(0..4096));
        files.looked_for = Some(Instant::now());
        let wait = files.follow(|_| (10, 20));
        assert!(wait >= PRESSED, "{wait:?}");
    }
}
