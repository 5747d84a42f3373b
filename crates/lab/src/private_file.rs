//! A file that a program has mapped privately, as a model: what it has follows from the page's number, and it may end.

use pgmap_core::addr::{PAGE_SIZE, Page};
use pgmap_mm::private_file::FilePages;

/// A file of so many pages.
#[derive(Clone, Copy, Debug)]
pub struct ModelPrivateFile {
    /// Behind them there is nothing.
    pub pages: u32,
}

impl ModelPrivateFile {
    /// Every word of a page.
    #[must_use]
    pub const fn word(page: u32) -> u64 {
        0x0f11_e000 + page as u64
    }
}

impl FilePages for ModelPrivateFile {
    fn read(&self, first: u32, pages: &mut [Page]) -> usize {
        let there = self.pages.saturating_sub(first) as usize;
        let numbers = first..self.pages;
        for (page, number) in pages.iter_mut().zip(numbers) {
            // A place at which another thread may go on: the disk takes its time.
            pgmap_sync::atomic::spin_loop();
            let word = Self::word(number).to_le_bytes();
            for at in (0..PAGE_SIZE).step_by(word.len()) {
                page.0[at..at + word.len()].copy_from_slice(&word);
            }
        }
        there.min(pages.len())
    }
}
