//! Background writeback: dirty pages of files go to their files before anybody has to wait for that.
//!
//! One thread for each [`Memory`] that ever opened a file, or that is to report old pins: it looks for those, too, for
//! mappings that only waited for their pins, and for accesses that may read a page again which could not be read. It never waits for a pin (WB-1).

use core::time::Duration;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use pgmap_mm::page_cache::OnPinned;

use crate::old_pins::OldPins;
use crate::pager::Pager;
use crate::space::AddressSpace;
use crate::writer::write_back;

/// Pages are written after this long, however few they are.
const PERIOD: Duration = Duration::from_secs(1);
/// How often the flusher looks at pins and mappings. There may be so many dirty pages that it is called at once.
const LOOK: Duration = Duration::from_millis(20);
/// Pages that are too few to go on at once when there is much to write.
const FEW: u64 = 256;
/// Who touches a page that could not be read gets SIGBUS for so long; then it is read again. Long enough for who waits to run.
const SIGBUS_FOR: Duration = Duration::from_millis(100);

/// Starts the thread; it ends with the pager.
pub(crate) fn start(
    pager: &Arc<Pager>,
    space: &Arc<AddressSpace>,
    old_pins: Option<OldPins>,
) -> std::io::Result<JoinHandle<()>> {
    let (pager, space) = (Arc::clone(pager), Arc::clone(space));
    pgmap_host::thread::spawn("pgmap-flush", move || flush(&pager, &space, old_pins))
}

fn flush(pager: &Pager, space: &AddressSpace, mut old_pins: Option<OldPins>) {
    let mut written = Instant::now();
    while !pager.stopping() {
        let is_called = space.inner().wait_for_dirty(LOOK);
        space.end_lingering();
        if let Some(old_pins) = &mut old_pins {
            old_pins.look(space);
        }
        let now = Duration::from_nanos(space.inner().map_of_frames().now_ns());
        let before_ns = u64::try_from(now.saturating_sub(SIGBUS_FOR).as_nanos());
        space
            .inner()
            .files()
            .retry_reads(before_ns.unwrap_or(u64::MAX));
        if !is_called && written.elapsed() < PERIOD {
            continue;
        }
        written = Instant::now();
        if write_all(space.inner()) < FEW {
            // What is dirty is pinned, or cannot be written: trying again at once is not worth a CPU.
            thread::park_timeout(LOOK);
        }
    }
}

/// Writes what is dirty in each file, pinned pages excepted. Says how many pages it wrote.
fn write_all(space: &pgmap_mm::space::AddressSpace) -> u64 {
    // One at a time: a file that is closed while another is written is not kept open by us. From the last one on: one that takes the
    // place of a closed one has had its turn.
    let files = (0..space.files().count())
        .rev()
        .filter_map(|nth| space.files().get(nth));
    let written = files.map(|cache| write_back(&cache, 0..u32::MAX, OnPinned::Skip).pages);
    written.sum()
}
