//! What is made ready while a count is dead is there for who gets a user of it afterwards.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p pgmap-sync --release --test resurrect
//! ```
#![allow(
    clippy::excessive_nesting,
    clippy::unwrap_used,
    reason = "a thread's code reads best where it is started; a test fails by panicking"
)]
#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;
use pgmap_sync::PercpuRef;

/// `wake` makes the count live, `get` gets a user; what they do to `dead` is what is on trial.
fn use_what_was_made_ready<T: Send + Sync + 'static>(
    new: fn() -> T,
    wake: fn(&T),
    get: fn(&T) -> bool,
) {
    loom::model(move || {
        let shared = Arc::new((new(), UnsafeCell::new(0u64)));
        let user = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                if get(&shared.0) {
                    // loom panics if this is not ordered after the write.
                    shared.1.with(|_| ());
                }
            })
        };
        shared.1.with_mut(|_| ());
        wake(&shared.0);
        user.join().unwrap();
    });
}

/// MAP-5: a lookup through an old table entry finds the new mapping whole, or none.
#[test]
fn a_get_sees_what_came_before_the_resurrection() {
    use_what_was_made_ready(
        PercpuRef::new_dead,
        PercpuRef::resurrect,
        PercpuRef::try_get_live,
    );
}

/// The seeded bug: a get that reads `dead` without acquiring is found to read what is still being written.
#[test]
#[should_panic = "Causality violation"]
fn a_get_that_does_not_acquire_is_found() {
    use_what_was_made_ready(
        || AtomicBool::new(true),
        |dead| dead.store(false, Ordering::Release),
        |dead| !dead.load(Ordering::Relaxed),
    );
}
