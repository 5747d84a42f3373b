//! The frames' own metadata: made ready when a device's frames are mapped, and given back when they are removed.
//!
//! In RAM it needs nothing: zero is a free frame, and memory is used where frames are touched (MAP-7). On the device it is cleared,
//! piece by piece, and put in its place (MAP-8).

use core::ops::Range;

use pgmap_sync::atomic::{AtomicBool, Ordering};

use crate::addr::PfnRange;
use crate::altmap::Altmap;
use crate::devres::Devres;
use crate::platform::BackError;

use super::pgmap::Pgmap;
use super::request::{MapError, PROGRESS_FRAMES, Progress};
use super::{MemoryMap, aligned};

impl MemoryMap {
    /// Makes a new mapping's frames ready; `undo` learns how to take that back, and says `stuck` if it cannot.
    ///
    /// # Safety
    ///
    /// Nobody uses the frames: they are reserved for this mapping, and not to be found yet.
    pub(super) unsafe fn populate<'a>(
        &'a self,
        pgmap: &'a Pgmap,
        progress: &dyn Fn(Progress),
        stuck: &'a AtomicBool,
        undo: &mut Devres<'a>,
    ) -> Result<(), MapError> {
        let Some(altmap) = &pgmap.altmap else {
            return Ok(());
        };
        clear(altmap, &pgmap.ranges, progress)?;
        for range in &pgmap.ranges {
            let pages = Altmap::pages_for(*range);
            let first = altmap.take(pages).ok_or(MapError::NoRoom)?;
            undo.push(move || altmap.give(pages));
            // SAFETY: nobody uses the frames. The pages were cleared, and are set aside for this.
            unsafe {
                self.frames
                    .back(indices(*range), altmap.device().pages(first))
            }
            .map_err(MapError::AltmapNotUsed)?;
            let frames = &self.frames;
            undo.push(move || {
                // SAFETY: backed just now, and nobody uses the frames until `undo` is forgotten.
                let back = unsafe { frames.unback(indices(*range)) };
                stuck.fetch_or(back.is_err(), Ordering::Relaxed);
            });
        }
        Ok(())
    }

    /// Takes back what `populate` did, and what became of the frames.
    ///
    /// # Safety
    ///
    /// Nobody uses the mapping, nor can anybody begin to.
    pub(super) unsafe fn depopulate(&self, pgmap: &Pgmap) -> Result<(), BackError> {
        for range in &pgmap.ranges {
            if let Some(altmap) = &pgmap.altmap {
                // SAFETY: `populate` backed this range; nobody uses its frames.
                unsafe { self.frames.unback(indices(*range)) }?;
                altmap.give(Altmap::pages_for(*range));
            }
            self.frames.clear(indices(*range));
        }
        Ok(())
    }
}

/// The frames of a range's whole sub-sections. They are inside the map, whose length is a `usize`.
fn indices(range: PfnRange) -> Range<usize> {
    let (start, end) = aligned(range);
    let index = |frame| usize::try_from(frame).unwrap_or(usize::MAX);
    index(start)..index(end)
}

/// Clears the pages that the metadata of these ranges will take, and says so now and then.
fn clear(
    altmap: &Altmap,
    ranges: &[PfnRange],
    progress: &dyn Fn(Progress),
) -> Result<(), MapError> {
    let total: u64 = ranges.iter().map(|range| Altmap::pages_for(*range)).sum();
    let mut done = 0;
    while done < total {
        let pages = (total - done).min(PROGRESS_FRAMES / Altmap::FRAMES_PER_PAGE);
        let first = altmap.page(done).ok_or(MapError::NoRoom)?;
        let cleared = altmap.device().clear(first, pages);
        cleared.map_err(MapError::AltmapNotCleared)?;
        done += pages;
        progress(Progress {
            done_frames: done * Altmap::FRAMES_PER_PAGE,
            total_frames: total * Altmap::FRAMES_PER_PAGE,
        });
    }
    Ok(())
}
