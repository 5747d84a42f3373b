//! A lock without poisoning: std's where there is one, a spin lock where there is no operating system.
//!
//! A panic while a lock is held ends the process (the release profile aborts), so a poisoned lock only ever
//! means a failing test; its data is handed out all the same.

use core::fmt;
use core::ops::{Deref, DerefMut};

#[cfg(loom)]
use loom::sync as imp;
#[cfg(all(shuttle, not(loom)))]
use shuttle::sync as imp;
#[cfg(all(feature = "std", not(any(loom, shuttle))))]
use std::sync as imp;

#[cfg(any(feature = "std", loom, shuttle))]
use std::sync::{PoisonError, TryLockError};

#[cfg(not(any(feature = "std", loom, shuttle)))]
use spin as imp;

/// Mutual exclusion around a value.
#[derive(Default)]
pub struct Mutex<T> {
    inner: imp::Mutex<T>,
}

/// The lock, held. Dropping it unlocks.
#[must_use]
pub struct MutexGuard<'a, T> {
    inner: imp::MutexGuard<'a, T>,
}

impl<T> Mutex<T> {
    /// An unlocked value.
    #[cfg(not(loom))]
    pub const fn new(value: T) -> Self {
        Self {
            inner: imp::Mutex::new(value),
        }
    }

    /// An unlocked value.
    #[cfg(loom)]
    pub fn new(value: T) -> Self {
        Self {
            inner: imp::Mutex::new(value),
        }
    }

    /// Waits for the lock.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        #[cfg(any(feature = "std", loom, shuttle))]
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        #[cfg(not(any(feature = "std", loom, shuttle)))]
        let inner = self.inner.lock();
        MutexGuard { inner }
    }

    /// The lock, if nobody has it: for a fork's child, in which nobody will ever give up what another thread had then.
    #[must_use]
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        #[cfg(any(feature = "std", loom, shuttle))]
        let inner = match self.inner.try_lock() {
            Ok(inner) => inner,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        #[cfg(not(any(feature = "std", loom, shuttle)))]
        let inner = self.inner.try_lock()?;
        Some(MutexGuard { inner })
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

impl<T> fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mutex").finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for MutexGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MutexGuard").finish_non_exhaustive()
    }
}

#[cfg(not(any(feature = "std", loom, shuttle)))]
mod spin {
    use core::cell::UnsafeCell;
    use core::ops::{Deref, DerefMut};

    use crate::atomic::{AtomicBool, Ordering, spin_loop};

    /// # Invariants
    ///
    /// `value` is touched only by who has set `locked`.
    #[derive(Default)]
    pub(super) struct Mutex<T> {
        locked: AtomicBool,
        value: UnsafeCell<T>,
    }

    pub(super) struct MutexGuard<'a, T> {
        mutex: &'a Mutex<T>,
    }

    // SAFETY: the lock hands the value to one thread at a time, which only needs the value to be `Send`.
    unsafe impl<T: Send> Sync for Mutex<T> {}

    impl<T> Mutex<T> {
        pub(super) const fn new(value: T) -> Self {
            Self {
                locked: AtomicBool::new(false),
                value: UnsafeCell::new(value),
            }
        }

        pub(super) fn lock(&self) -> MutexGuard<'_, T> {
            // Acquire: pairs with the release in `drop`. Relaxed on failure: nothing is read then.
            while self
                .locked
                .compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed)
                .is_err()
            {
                spin_loop();
            }
            MutexGuard { mutex: self }
        }

        pub(super) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
            // As in `lock`.
            let taken =
                self.locked
                    .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed);
            taken.is_ok().then_some(MutexGuard { mutex: self })
        }
    }

    impl<T> Deref for MutexGuard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            // SAFETY: the guard exists, so this thread holds the lock, and `&self` keeps `deref_mut` away.
            unsafe { &*self.mutex.value.get() }
        }
    }

    impl<T> DerefMut for MutexGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            // SAFETY: the guard exists, so this thread holds the lock, and `&mut self` is the only access.
            unsafe { &mut *self.mutex.value.get() }
        }
    }

    impl<T> Drop for MutexGuard<'_, T> {
        fn drop(&mut self) {
            // Release: pairs with the acquire in `lock`.
            self.mutex.locked.store(false, Ordering::Release);
        }
    }
}
