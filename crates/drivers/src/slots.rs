//! Which places of a file are in use, and by which processes.
//!
//! The file device calls this. The table can lie in memory that several processes share: each place has
//! a word with one bit for each process that holds it. A place is free when its word is 0.

use core::ops::Range;
use std::collections::TryReserveError;

use pgmap_sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// A process among those that share a table: 0 to 63.
///
/// # Invariants
///
/// Below 64.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Owner(u8);

impl Owner {
    /// The process with this number, if there can be one.
    #[must_use]
    pub const fn new(number: u8) -> Option<Self> {
        // INVARIANT: just compared.
        if number < 64 {
            Some(Self(number))
        } else {
            None
        }
    }

    const fn bit(self) -> u64 {
        // By the type invariant the shift is in range.
        1 << self.0
    }
}

/// The places of one file, as one process uses them.
///
/// # Invariants
///
/// A word gets its first bit by a compare-exchange from 0, so that no two processes are given the same
/// place; after that only a process that holds the place gives it to another (a fork's child).
#[derive(Debug)]
pub struct Slots {
    table: &'static [AtomicU64],
    /// The bit of this process.
    own: AtomicU64,
    /// Where the next search starts.
    next: AtomicUsize,
    /// How many places this process holds.
    held: AtomicU64,
}

impl Slots {
    /// The places in `table` (at most 2^32), used by `owner`, who holds none of them yet.
    ///
    /// # Panics
    ///
    /// If the table has more than 2^32 words.
    #[must_use]
    pub fn shared(table: &'static [AtomicU64], owner: Owner) -> Self {
        assert!(
            u32::try_from(table.len().saturating_sub(1)).is_ok(),
            "a slot has 32 bits"
        );
        let own = AtomicU64::new(owner.bit());
        Self {
            table,
            own,
            next: AtomicUsize::new(0),
            held: AtomicU64::new(0),
        }
    }

    /// `count` places that no other process uses. The table is never given back.
    ///
    /// # Errors
    ///
    /// There is no memory for the table: 8 bytes a place.
    ///
    /// # Panics
    ///
    /// If `count` is more than 2^32.
    pub fn private(count: usize) -> Result<Self, TryReserveError> {
        let mut table = Vec::new();
        table.try_reserve_exact(count)?;
        table.resize_with(count, || AtomicU64::new(0));
        Ok(Self::shared(table.leak(), Owner(0)))
    }

    /// How many places there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether there are no places at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// How many places this process holds.
    #[must_use]
    pub fn held(&self) -> u64 {
        // Relaxed: a figure for people.
        self.held.load(Ordering::Relaxed)
    }

    /// Takes 1 to `want` free places that follow one another; `None` if there is none (or `want` is 0).
    #[must_use]
    pub fn alloc(&self, want: usize) -> Option<Range<usize>> {
        // Relaxed: a hint, where any value is right.
        let hint = self.next.load(Ordering::Relaxed).min(self.table.len());
        let run = self
            .search(hint..self.table.len(), want)
            .or_else(|| self.search(0..hint, want))?;
        // Relaxed: as above, and a figure for people.
        self.next.store(run.end, Ordering::Relaxed);
        self.held.fetch_add(run.len() as u64, Ordering::Relaxed);
        Some(run)
    }

    /// Gives back a place of this process; false if it held no such place.
    pub fn free(&self, slot: usize) -> bool {
        let freed = self
            .table
            .get(slot)
            .is_some_and(|word| clear(word, self.own()));
        if freed {
            // Relaxed: a figure for people.
            self.held.fetch_sub(1, Ordering::Relaxed);
        }
        freed
    }

    /// Whether this process holds the place.
    #[must_use]
    pub fn holds(&self, slot: usize) -> bool {
        // Relaxed: only this process sets and clears its bit.
        let word = self
            .table
            .get(slot)
            .map_or(0, |word| word.load(Ordering::Relaxed));
        word & self.own() != 0
    }

    /// Makes this the table of `child`, who then holds every place that this process held: for a fork's
    /// child, while its parent waits, so that the parent frees nothing in between.
    pub fn adopt(&self, child: Owner) {
        for word in self.table {
            // Relaxed: the parent waits, so its bits stand still; who reads pages synchronises elsewhere.
            if word.load(Ordering::Relaxed) & self.own() != 0 {
                word.fetch_or(child.bit(), Ordering::Relaxed);
            }
        }
        // Relaxed: the child has one thread yet.
        self.own.store(child.bit(), Ordering::Relaxed);
    }

    fn own(&self) -> u64 {
        // Relaxed: changes only in a process that has one thread.
        self.own.load(Ordering::Relaxed)
    }

    fn search(&self, within: Range<usize>, want: usize) -> Option<Range<usize>> {
        let end = within.end;
        let more = want.checked_sub(1)?;
        let start = within.into_iter().find(|slot| self.claim(*slot))?;
        let more = (start + 1..end)
            .take(more)
            .take_while(|slot| self.claim(*slot))
            .count();
        Some(start..start + 1 + more)
    }

    fn claim(&self, slot: usize) -> bool {
        let word = &self.table[slot];
        // Relaxed: a first look; the compare-exchange decides.
        word.load(Ordering::Relaxed) == 0
            // Acquire: pairs with the release in `clear`: the last holder's reads of the place are over.
            && word
                .compare_exchange(0, self.own(), Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
    }
}

/// Frees every place that a process held that has died.
pub fn release_owner(table: &[AtomicU64], dead: Owner) {
    for word in table {
        clear(word, dead.bit());
    }
}

/// Takes an owner's bit away; whether it was there.
fn clear(word: &AtomicU64, bit: u64) -> bool {
    // Release: pairs with the acquire in `claim`: reads of the place come before its next use.
    word.fetch_and(!bit, Ordering::Release) & bit != 0
}

#[cfg(test)]
mod tests;
