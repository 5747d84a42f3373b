//! Reading ahead: what sequential readers of files will want is read while they use what they have.
//!
//! Threads of each [`Memory`](crate::Memory) that ever opened a file: more than one, so that the device works for one while
//! the machine finds memory for another.

use core::time::Duration;
use std::sync::Arc;
use std::thread::JoinHandle;

use pgmap_mm::reclaim::Caller;
use pgmap_mm::space::Worker;

use crate::pager::Pager;

/// How many threads.
pub(crate) const READERS: usize = 3;
/// Pages that are to leave if there is no room to read.
const ROOM: usize = 512;
/// Between two looks whether the pager ends.
const LOOK: Duration = Duration::from_millis(20);

/// Starts one of the threads; it ends with the pager.
pub(crate) fn start(pager: &Arc<Pager>) -> std::io::Result<JoinHandle<()>> {
    let pager = Arc::clone(pager);
    pgmap_host::thread::spawn("pgmap-read", move || read(&pager))
}

fn read(pager: &Pager) {
    let mut worker = Worker::new();
    let space = &pager.space;
    while !pager.stopping() {
        let Some((file, group)) = space.files().ahead().next(LOOK) else {
            continue;
        };
        let Some(cache) = space.files().of(file) else {
            continue;
        };
        // If there is no room for it even then, whoever wants it reads what it needs.
        if !cache.read_group(&mut worker, group) {
            space.make_room(Caller::Reclaimer, ROOM);
            cache.read_group(&mut worker, group);
        }
    }
}
