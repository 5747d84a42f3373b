//! Writing back much at once: by three threads, so that the device works for one while others protect mappings and copy.
//!
//! Called for `sync`, and by the flusher.

use core::ops::Range;
use std::sync::Arc;

use pgmap_host::thread;
use pgmap_mm::page_cache::{OnPinned, PageCache, Written};

/// Writes the dirty pages of a range, as [`PageCache::write_back`] does. Pins are the caller's business: the other threads
/// leave pinned pages alone.
pub(crate) fn write_back(
    cache: &Arc<PageCache>,
    range: Range<u32>,
    on_pinned: OnPinned<'_>,
) -> Written {
    let thirds = cache.dirty_thirds(&range);
    let parts = thirds.map(|[second, last]| [second..last, last..range.end]);
    let helpers = parts.into_iter().flatten().filter_map(|part| {
        let cache = Arc::clone(cache);
        let run = move || cache.write_back(part, OnPinned::Skip);
        // Without help it takes longer.
        thread::spawn("pgmap-write", run).ok()
    });
    let helpers: Vec<_> = helpers.collect();
    let mut written = cache.write_back(range, on_pinned);
    for helped in helpers.into_iter().filter_map(|helper| helper.join().ok()) {
        // What they could not write, or left alone, is dirty still, and was this thread's business.
        written.pages += helped.pages;
    }
    written
}
