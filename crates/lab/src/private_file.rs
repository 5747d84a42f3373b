//! A file that a program has mapped privately, as a model: what it has follows from the page's number, and it may end.

use pgmap_core::addr::{PAGE_SIZE, Page};
use pgmap_mm::private_file::{FilePages, NotNow};
use pgmap_sync::atomic::{AtomicU32, Ordering, spin_loop};

/// A file of so many pages; behind them there is nothing.
#[derive(Debug)]
pub struct ModelPrivateFile {
    pages: AtomicU32,
    refusals: AtomicU32,
}

impl ModelPrivateFile {
    /// A file of `pages` pages.
    #[must_use]
    pub fn new(pages: u32) -> Self {
        let (pages, refusals) = (AtomicU32::new(pages), AtomicU32::new(0));
        Self { pages, refusals }
    }

    /// The next `times` reads are not possible when they are tried.
    pub fn refuse(&self, times: u32) {
        // Relaxed: as in `cut`.
        self.refusals.store(times, Ordering::Relaxed);
    }

    /// From now on the file has `pages` pages.
    pub fn cut(&self, pages: u32) {
        // Relaxed: a number that nothing else depends on.
        self.pages.store(pages, Ordering::Relaxed);
    }

    /// Every word of a page.
    #[must_use]
    pub const fn word(page: u32) -> u64 {
        0x0f11_e000 + page as u64
    }
}

impl FilePages for ModelPrivateFile {
    fn read(&self, first: u32, pages: &mut [Page]) -> Result<usize, NotNow> {
        // Relaxed: as in `cut`.
        let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
        let one_less = |refusals: u32| refusals.checked_sub(1);
        if self.refusals.fetch_update(set, fetch, one_less).is_ok() {
            return Err(NotNow);
        }
        // Relaxed: see `cut`.
        let end = self.pages.load(Ordering::Relaxed);
        let there = end.saturating_sub(first) as usize;
        let numbers = first..end;
        for (page, number) in pages.iter_mut().zip(numbers) {
            // A place at which another thread may go on: the disk takes its time.
            spin_loop();
            let word = Self::word(number).to_le_bytes();
            for at in (0..PAGE_SIZE).step_by(word.len()) {
                page.0[at..at + word.len()].copy_from_slice(&word);
            }
        }
        Ok(there.min(pages.len()))
    }
}
