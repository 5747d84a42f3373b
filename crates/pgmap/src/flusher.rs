//! Background writeback: dirty pages of files go to their files before anybody has to wait for that.
//!
//! One thread for each [`Memory`] that ever opened a file, or that is to report old pins: it looks for those, too, for
//! mappings that only waited for their pins, and for accesses that may read a page again which could not be read. It never waits for a pin (WB-1).

use core::time::Duration;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use pgmap_mm::page_cache::OnPinned;

use crate::old_pins::OldPins;
use crate::pager::Pager;
use crate::space::AddressSpace;

/// Pages are written after this long, however few they are.
const PERIOD: Duration = Duration::from_secs(1);
/// How often the flusher looks whether there are many.
const LOOK: Duration = Duration::from_millis(20);
/// Who touches a page that could not be read gets SIGBUS for so long; then it is read again. Long enough for who waits to run.
const SIGBUS_FOR: Duration = Duration::from_millis(100);
/// One page of so many that may be in RAM is dirty: then writing begins at once.
const MANY: u64 = 10;

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
    let mut idle = Duration::ZERO;
    while !pager.stopping() {
        thread::park_timeout(LOOK);
        idle += LOOK;
        space.end_lingering();
        if let Some(old_pins) = &mut old_pins {
            old_pins.look(space);
        }
        let space = space.inner();
        let now = Duration::from_nanos(space.map_of_frames().now_ns());
        let before_ns = u64::try_from(now.saturating_sub(SIGBUS_FOR).as_nanos());
        space.files().retry_reads(before_ns.unwrap_or(u64::MAX));
        let dirty = space.files().dirty_pages();
        if dirty == 0 || (dirty < space.ram().limit() / MANY && idle < PERIOD) {
            continue;
        }
        idle = Duration::ZERO;
        write_all(space);
    }
}

/// Writes what is dirty in each file, pinned pages excepted.
fn write_all(space: &pgmap_mm::space::AddressSpace) {
    for cache in space.files().all() {
        cache.write_back(0..u32::MAX, OnPinned::Skip);
    }
}
