//! Memory failure: a frame of RAM has lost its bytes (WB-6).

use pgmap_sync::atomic::Ordering;

use super::{CachePage, PageCache};
use crate::backing::BackingError;
use crate::mmu::Progress;
use crate::page_table::PageIndex;
#[cfg(shuttle)]
use crate::seeded_bug::{self, SeededBug};
use crate::stats::Stats;

/// What a memory failure has cost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lost {
    /// Nothing: the page was not in RAM, or the file has the same bytes.
    Nothing,
    /// Bytes that the file does not have. Who maps the page gets SIGBUS, and who syncs the file an error.
    Page,
}

/// The machine's word for lost bytes (`EIO`).
const EIO: i32 = 5;

impl PageCache {
    /// Says that the RAM of a page has lost its bytes: its frame is never used again. A clean page is read anew when it is
    /// touched; of a dirty one every access gets SIGBUS, until it is truncated or punched. Everything else goes on.
    pub fn memory_failure(&self, page: u32) -> Lost {
        if page >= self.table.pages() {
            return Lost::Nothing;
        }
        let (page, run) = (PageIndex(page), page..page + 1);
        let mut was_written = false;
        let (mut cursor, cached) = loop {
            let cursor = self.table.lock(page.block());
            let Some(cached) = cursor.get(page).cached() else {
                return Lost::Nothing;
            };
            // From here on nobody can claim it: it is neither cleaned nor evicted.
            self.map.frame(cached.frame).poison();
            if !cached.is_under_writeback() {
                break (cursor, cached);
            }
            #[cfg(shuttle)]
            if seeded_bug::has(SeededBug::FailureIgnoresWriteback) {
                break (cursor, cached);
            }
            // What is on its way to the file may be no better, and is not to land there after the page was punched.
            was_written = true;
            drop(cursor);
            self.wait_for_writeback(run.clone());
        };
        self.unmap_run(&mut cursor, &run);
        self.mmu.free(page.0, 1);
        // Relaxed: a number that stands alone.
        self.cached.fetch_sub(1, Ordering::Relaxed);
        self.uncharge(1);
        let lost = if cached.is_dirty() || was_written {
            self.forget_dirty(&mut cursor, page, cached);
            self.errors.set(BackingError::Io(EIO));
            Stats::add(&self.stats.poisoned, 1);
            cursor.set(page, CachePage::Poisoned);
            self.vmas.each(&run, |at, count| {
                let _: Progress = self.mmu.poison(at, count);
                true
            });
            Lost::Page
        } else {
            cursor.set(page, CachePage::Absent);
            Lost::Nothing
        };
        drop(cursor);
        self.ram.free(&[cached.frame]);
        lost
    }
}
