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

/// Threads that wait. A wake-up is never lost: the condition is looked at under the queue's lock, and who makes it
/// true takes the lock before waking.
#[derive(Debug, Default)]
pub struct WaitQueue {
    #[cfg(any(feature = "std", loom, shuttle))]
    lock: Mutex<()>,
    #[cfg(any(feature = "std", loom, shuttle))]
    changed: Condvar,
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
            drop(self.lock.lock());
            self.changed.notify_all();
        }
    }
}
