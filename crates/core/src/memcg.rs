//! Groups of pages with a limit of their own (the kernel's `mem_cgroup`).
//!
//! Whoever brings a page into RAM charges it to a group first, once, and uncharges it when it leaves (HMM-8). A group that is at its
//! limit has to give a page up before it gets another: whose pages, is the business of who charges.

use pgmap_sync::atomic::{AtomicU64, Ordering};

#[cfg(shuttle)]
use crate::seeded_bug::{self, SeededBug};

/// A group, and what is charged to it.
#[derive(Debug)]
pub struct Memcg {
    limit: AtomicU64,
    charged: AtomicU64,
    peak: AtomicU64,
}

impl Memcg {
    /// A group that may have so many pages in RAM at once.
    #[must_use]
    pub fn new(limit_pages: u64) -> Self {
        Self {
            limit: AtomicU64::new(limit_pages),
            charged: AtomicU64::new(0),
            peak: AtomicU64::new(0),
        }
    }

    /// How many pages it may have in RAM.
    #[must_use]
    pub fn limit_pages(&self) -> u64 {
        // Relaxed, here and below: numbers that stand alone. A page's own lock orders what is done with the page.
        self.limit.load(Ordering::Relaxed)
    }

    /// Changes the limit. What is charged above a lower one stays until it is given up: see [`excess`](Self::excess).
    pub fn set_limit(&self, pages: u64) {
        self.limit.store(pages, Ordering::Relaxed);
    }

    /// Pages that are charged to it.
    #[must_use]
    pub fn charged_pages(&self) -> u64 {
        self.charged.load(Ordering::Relaxed)
    }

    /// The most pages that were charged to it at once.
    #[must_use]
    pub fn peak_pages(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }

    /// Pages above the limit, which was lowered.
    #[must_use]
    pub fn excess(&self) -> u64 {
        self.charged_pages().saturating_sub(self.limit_pages())
    }

    /// Charges up to `want` pages, as many as the limit allows. Says how many.
    #[must_use = "what was charged has to be uncharged some day"]
    pub fn charge(&self, want: u64) -> u64 {
        let mut charged = self.charged_pages();
        loop {
            let granted = want.min(self.limit_pages().saturating_sub(charged));
            let new = charged + granted;
            #[cfg(shuttle)]
            if seeded_bug::has(SeededBug::ChargeLooksFirst) {
                let before = self.charged.fetch_add(granted, Ordering::Relaxed);
                self.peak.fetch_max(before + granted, Ordering::Relaxed);
                return granted;
            }
            // Relaxed, both: see above.
            match self.charged.compare_exchange_weak(
                charged,
                new,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => {
                    self.peak.fetch_max(new, Ordering::Relaxed);
                    return granted;
                }
                Err(seen) => charged = seen,
            }
        }
    }

    /// Uncharges pages, each once.
    ///
    /// # Panics
    ///
    /// If they were not charged.
    pub fn uncharge(&self, pages: u64) {
        let charged = self.charged.fetch_sub(pages, Ordering::Relaxed);
        assert!(
            charged >= pages,
            "{pages} pages were uncharged, of {charged} that were charged"
        );
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    /// HMM-8: no more is charged than the limit allows, and all of it can be had again.
    #[test]
    fn charges_keep_the_limit() {
        let group = Memcg::new(10);
        assert_eq!(
            (group.charge(6), group.charge(6), group.charge(1)),
            (6, 4, 0)
        );
        group.uncharge(3);
        assert_eq!(
            (group.charge(5), group.charged_pages(), group.peak_pages()),
            (3, 10, 10)
        );
        group.set_limit(4);
        assert_eq!((group.excess(), group.charge(1)), (6, 0));
        group.uncharge(10);
        assert_eq!((group.charge(9), group.excess()), (4, 0));
    }

    /// HMM-8: what was not charged cannot be uncharged.
    #[test]
    #[should_panic(expected = "uncharged")]
    fn a_page_is_uncharged_once() {
        let group = Memcg::new(10);
        assert_eq!(group.charge(2), 2);
        group.uncharge(2);
        group.uncharge(1);
    }
}
