//! Readers and writers keep each other out, and nobody waits for ever.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p pgmap-sync --release --test rw_sem
//! ```
#![allow(
    clippy::unwrap_used,
    reason = "a thread's code reads best where it is started; a test fails by panicking"
)]
#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::model::Builder;
use loom::sync::Arc;
use loom::thread;
use pgmap_sync::RwSem;

/// Each thread is stopped at most so often; more takes too long.
const STOPS: usize = 3;

type Shared = Arc<(RwSem, UnsafeCell<u64>)>;

fn write(shared: &Shared) {
    let _writing = shared.0.write();
    // loom panics if anybody else looks or writes meanwhile.
    // SAFETY: the pointer is the cell's own, and the lock keeps everybody else out.
    shared.1.with_mut(|value| unsafe { *value += 1 });
}

fn read(shared: &Shared) -> u64 {
    let _reading = shared.0.read();
    // SAFETY: the pointer is the cell's own, and the lock keeps writers out.
    shared.1.with(|value| unsafe { *value })
}

fn explore(threads: [fn(&Shared); 2]) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(STOPS);
    builder.check(move || {
        let shared = Arc::new((RwSem::new(), UnsafeCell::new(0)));
        let others = threads.map(|run| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || run(&shared))
        });
        write(&shared);
        for other in others {
            other.join().unwrap();
        }
        assert!(read(&shared) >= 1);
    });
}

/// HOT-3, b5d24fda9c3d: writers are exclusive without another lock, and no wake-up is lost.
#[test]
fn writers_are_exclusive_by_themselves() {
    explore([write, write]);
}

/// HOT-3: a reader sees no half of a write, and a writer waits for it.
#[test]
fn readers_and_writers_keep_each_other_out() {
    explore([write, |shared| {
        read(shared);
    }]);
}
