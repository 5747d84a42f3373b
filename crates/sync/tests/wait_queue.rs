//! Nobody sleeps through a wake-up.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p pgmap-sync --release --test wait_queue
//! ```
#![allow(
    clippy::excessive_nesting,
    clippy::unwrap_used,
    reason = "a thread's code reads best where it is started; a test fails by panicking"
)]
#![cfg(loom)]

use loom::sync::atomic::{AtomicBool, Ordering};
use loom::sync::{Arc, Mutex, MutexGuard};
use loom::thread;
use pgmap_sync::WaitQueue;

/// Who waits wakes up, whenever the condition becomes true: loom reports a thread that sleeps for ever as a deadlock.
#[test]
fn no_wake_up_is_lost() {
    loom::model(|| {
        let shared = Arc::new((AtomicBool::new(false), WaitQueue::new()));
        let waker = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                shared.0.store(true, Ordering::Release);
                shared.1.wake_all();
            })
        };
        assert!(
            shared
                .1
                .wait_until(None, || shared.0.load(Ordering::Acquire))
        );
        waker.join().unwrap();
    });
}

/// One wake-up is for everybody who waits.
#[test]
fn everybody_wakes_up() {
    loom::model(|| {
        let shared = Arc::new((AtomicBool::new(false), WaitQueue::new()));
        let wait = |shared: &(AtomicBool, WaitQueue)| {
            shared
                .1
                .wait_until(None, || shared.0.load(Ordering::Acquire))
        };
        let other = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || wait(&shared))
        };
        let waker = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                shared.0.store(true, Ordering::Release);
                shared.1.wake_all();
            })
        };
        assert!(wait(&shared) && other.join().unwrap());
        waker.join().unwrap();
    });
}

/// Locks `lock`, or does not.
type Enter = for<'a> fn(&'a Mutex<()>) -> Option<MutexGuard<'a, ()>>;

/// The algorithm of `WaitQueue`, with a note of who sleeps in place of the sleep: loom cannot unwind out of a deadlock.
fn sleep_against_wake(enter: Enter) {
    loom::model(move || {
        let shared = Arc::new((Mutex::new(()), AtomicBool::new(false)));
        let sleeps = Arc::new(AtomicBool::new(false));
        let waker = {
            let (shared, sleeps) = (Arc::clone(&shared), Arc::clone(&sleeps));
            thread::spawn(move || {
                shared.1.store(true, Ordering::Release);
                drop(enter(&shared.0));
                sleeps.store(false, Ordering::Release);
            })
        };
        let guard = shared.0.lock().unwrap();
        if !shared.1.load(Ordering::Acquire) {
            sleeps.store(true, Ordering::Release);
        }
        drop(guard);
        waker.join().unwrap();
        assert!(!sleeps.load(Ordering::Acquire), "a wake-up was lost");
    });
}

/// The copy is sound with its lock.
#[test]
fn a_waker_that_takes_the_lock_wakes_everybody() {
    sleep_against_wake(|lock| lock.lock().ok());
}

/// The seeded bug: a waker that does not pass through the lock is found to wake nobody.
#[test]
#[should_panic = "a wake-up was lost"]
fn a_waker_without_the_lock_is_found() {
    sleep_against_wake(|_| None);
}
