//! Waiting for a condition that another thread makes true.

use core::time::Duration;
#[cfg(any(feature = "std", loom, shuttle))]
use std::sync::PoisonError;

#[cfg(loom)]
use loom::sync::{Condvar, Mutex};
#[cfg(all(shuttle, not(loom)))]
use shuttle::sync::{Condvar, Mutex};
#[cfg(all(feature = "std", not(any(loom, shuttle))))]
use std::sync::{Condvar, Mutex};

#[cfg(any(feature = "std", loom, shuttle))]
use crate::atomic::{AtomicU32, Ordering, fence};

/// Threads that wait. A wake-up is never lost: the condition is looked at under the queue's lock, and who makes it
/// true takes the lock before waking. Where nobody waits, waking is a fence and a load.
#[derive(Debug, Default)]
pub struct WaitQueue {
    #[cfg(any(feature = "std", loom, shuttle))]
    lock: Mutex<()>,
    #[cfg(any(feature = "std", loom, shuttle))]
    changed: Condvar,
    /// Threads that look at their condition or sleep.
    #[cfg(any(feature = "std", loom, shuttle))]
    waiting: AtomicU32, // A
}

/// A thread that waits, for as long as this lives.
#[cfg(any(feature = "std", loom, shuttle))]
struct Waiting<'a>(&'a AtomicU32);

#[cfg(any(feature = "std", loom, shuttle))]
impl<'a> Waiting<'a> {
    fn enter(waiting: &'a AtomicU32) -> Self {
        // Relaxed: the fence orders it. Pairs with the fence in `wake_all`: either the waker sees that we wait, or we see
        // what it made true.
        waiting.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        Self(waiting)
    }
}

#[cfg(any(feature = "std", loom, shuttle))]
impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        // Relaxed: who still sees it wakes nobody, which does no harm.
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl WaitQueue {
    /// A queue in which nobody waits.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Waits until `condition` holds, at most `patience` if that is given. Says whether it holds.
    #[cfg(all(feature = "std", not(any(loom, shuttle))))]
    pub fn wait_until(&self, patience: Option<Duration>, condition: impl Fn() -> bool) -> bool {
        let start = std::time::Instant::now();
        let _waiting = Waiting::enter(&self.waiting);
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while !condition() {
            guard = match patience.map(|patience| patience.checked_sub(start.elapsed())) {
                None => self
                    .changed
                    .wait(guard)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(None) => return false,
                Some(Some(left)) => {
                    let woken = self.changed.wait_timeout(guard, left);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        true
    }

    /// Waits until `condition` holds. The models have no clock, and `patience` is not looked at.
    #[cfg(any(loom, shuttle))]
    pub fn wait_until(&self, _patience: Option<Duration>, condition: impl Fn() -> bool) -> bool {
        let _waiting = Waiting::enter(&self.waiting);
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while !condition() {
            guard = self
                .changed
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
        true
    }

    /// Waits until `condition` holds. Without an operating system there is no clock, and `patience` is not looked at.
    #[cfg(not(any(feature = "std", loom, shuttle)))]
    pub fn wait_until(&self, _patience: Option<Duration>, condition: impl Fn() -> bool) -> bool {
        while !condition() {
            crate::atomic::spin_loop();
        }
        true
    }

    /// Wakes everybody who waits; to be called after the condition was made true.
    pub fn wake_all(&self) {
        #[cfg(any(feature = "std", loom, shuttle))]
        {
            // Pairs with the fence in `Waiting::enter`.
            fence(Ordering::SeqCst);
            // Relaxed: the fence orders it after what the caller made true.
            if self.waiting.load(Ordering::Relaxed) != 0 {
                drop(self.lock.lock());
                self.changed.notify_all();
            }
        }
    }
}
