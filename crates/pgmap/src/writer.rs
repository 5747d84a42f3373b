//! Writing back much at once: by two threads, so that the device works for one while the other protects mappings.
//!
//! Called for `sync`, and by the flusher.

use core::ops::Range;
use std::sync::Arc;

use pgmap_host::thread;
use pgmap_mm::page_cache::{OnPinned, PageCache, Written};

/// Writes the dirty pages of a range, as [`PageCache::write_back`] does. Pins are the caller's business: the other thread
/// leaves pinned pages alone.
pub(crate) fn write_back(
    cache: &Arc<PageCache>,
    range: Range<u32>,
    on_pinned: OnPinned<'_>,
) -> Written {
    let help = cache.dirty_middle(&range).and_then(|middle| {
        let (cache, rest) = (Arc::clone(cache), middle..range.end);
        let run = move || cache.write_back(rest, OnPinned::Skip);
        // Without help it takes longer.
        thread::spawn("pgmap-write", run).ok()
    });
    let mut written = cache.write_back(range, on_pinned);
    if let Some(helped) = help.and_then(|help| help.join().ok()) {
        // What it could not write, or left alone, is dirty still, and was this thread's business.
        written.pages += helped.pages;
    }
    written
}
