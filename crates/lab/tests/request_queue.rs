//! Requests of a block device against the freeze of its queue, with their threads interleaved in random orders; and the bug that must
//! be found.
//!
//! ```text
//! RUSTFLAGS="--cfg shuttle" cargo test -p pgmap-lab --release --test request_queue
//! ```
#![cfg(shuttle)]

mod explore;

use std::sync::Arc;

use explore::explore;
use pgmap_core::queue::RequestQueue;
use pgmap_core::seeded_bug::{SeededBug, seed};
use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use shuttle::thread;

/// Requests of each client.
const REQUESTS: u64 = 4;

#[derive(Default)]
struct Device {
    queue: RequestQueue,
    /// The frames have been taken away: nobody may touch them.
    gone: AtomicBool,
    done: AtomicU64,
    refused: AtomicU64,
}

impl Device {
    fn request(&self) {
        if let Ok(_in_flight) = self.queue.enter() {
            assert!(!self.gone.load(SeqCst), "touched after it was taken away");
            thread::yield_now();
            assert!(
                !self.gone.load(SeqCst),
                "taken away while a request is under way"
            );
            self.done.fetch_add(1, SeqCst);
        } else {
            self.refused.fetch_add(1, SeqCst);
        }
    }

    /// Takes the frames away and brings them back.
    fn take_away(&self) {
        assert!(self.queue.freeze(None));
        self.gone.store(true, SeqCst);
        thread::yield_now();
        self.gone.store(false, SeqCst);
        self.queue.thaw();
    }
}

fn requests_against_freezes() {
    let device = Arc::new(Device::default());
    let clients = [(); 2].map(|()| {
        let device = Arc::clone(&device);
        thread::spawn(move || (0..REQUESTS).for_each(|_| device.request()))
    });
    device.take_away();
    device.take_away();
    for client in clients {
        client.join().expect("a client");
    }
    let answered = device.done.load(SeqCst) + device.refused.load(SeqCst);
    assert_eq!(answered, 2 * REQUESTS);
    assert_eq!(device.queue.in_flight(), 0);
    // It works again.
    assert!(device.queue.enter().is_ok());
}

/// PMEM-2: a frozen queue has no request under way, each request is answered once, and a thawed queue takes them again.
#[test]
fn a_frozen_queue_is_empty() {
    explore(requests_against_freezes);
}

/// A freeze that does not wait is found.
#[test]
#[should_panic(expected = "taken away")]
fn a_freeze_that_does_not_wait_is_found() {
    seed(SeededBug::FreezeDoesNotWait);
    explore(requests_against_freezes);
}
