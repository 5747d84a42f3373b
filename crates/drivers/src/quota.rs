//! How much memory may be held, counted over all processes that share the limit: by a device, or in RAM.
//!
//! Called when memory is taken from the allocator or given back: never per page. The
//! counters may lie in memory that several processes map.

use pgmap_sync::atomic::{AtomicU64, Ordering};

/// A limit in bytes, shared by everyone who counts in `used`.
///
/// # Invariants
///
/// What a process holds is in `used` before it is in `mine`, and out of `mine` before it is out of
/// `used`. So a supervisor that subtracts a dead process's `mine` from `used` never subtracts what was
/// not added; a process that dies between the two leaves one superblock's bytes in `used`.
#[derive(Clone, Copy, Debug)]
pub struct Quota {
    /// Bytes that all holders together may hold.
    pub limit: u64,
    /// Bytes that all holders together hold.
    pub used: &'static AtomicU64,
    /// Bytes of `used` that this process holds.
    pub mine: &'static AtomicU64,
}

impl Quota {
    /// A limit that no other process shares. It costs 16 bytes that are never given back.
    #[must_use]
    pub fn private(limit: u64) -> Self {
        let counter = || &*Box::leak(Box::new(AtomicU64::new(0)));
        Self {
            limit,
            used: counter(),
            mine: counter(),
        }
    }

    /// Counts `bytes` more, unless that would pass the limit. Says whether it did.
    #[must_use]
    pub fn take(&self, bytes: u64) -> bool {
        // Relaxed: the counters guard no other memory; the compare-exchange alone keeps the limit.
        let taken = self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(bytes).filter(|sum| *sum <= self.limit)
            });
        if taken.is_ok() {
            self.add_mine(bytes);
        }
        taken.is_ok()
    }

    /// Counts `bytes` more, even past the limit: they are held already.
    pub fn charge(&self, bytes: u64) {
        // Relaxed: as in `take`.
        self.used.fetch_add(bytes, Ordering::Relaxed);
        self.add_mine(bytes);
    }

    /// Counts `bytes` less.
    pub fn give(&self, bytes: u64) {
        // Relaxed: only this process subtracts from its own counter.
        self.mine.fetch_sub(bytes, Ordering::Relaxed);
        // Release: pairs with the acquire of a supervisor that reads `used`, then `mine`.
        self.used.fetch_sub(bytes, Ordering::Release);
    }

    fn add_mine(&self, bytes: u64) {
        // Release: whoever acquires this value of `mine` sees the bytes in `used` (the invariant).
        self.mine.fetch_add(bytes, Ordering::Release);
    }
}
