//! Many readers or one writer, without a value: what a reader looks at must only stay as it is meanwhile.
//!
//! Writers are exclusive by this lock alone, whatever other locks their callers hold. Both sides are rare, so the count
//! is kept under a mutex.

use crate::{Mutex, WaitQueue};

#[derive(Debug, Default)]
struct State {
    readers: usize,
    writer: bool,
}

/// Readers and writers that keep each other out.
///
/// A writer that waits keeps new readers out. So a thread that reads must not read again, nor write, before it is done.
#[derive(Debug, Default)]
#[doc(alias = "rw_semaphore")]
pub struct RwSem {
    state: Mutex<State>,
    changed: WaitQueue,
}

/// Keeps writers out until it is dropped.
#[derive(Debug)]
#[must_use]
pub struct Reading<'a> {
    sem: &'a RwSem,
}

/// Keeps everybody else out until it is dropped.
#[derive(Debug)]
#[must_use]
pub struct Writing<'a> {
    sem: &'a RwSem,
}

impl RwSem {
    /// A lock that nobody holds.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Waits until no writer is there or waits, and keeps writers out.
    pub fn read(&self) -> Reading<'_> {
        self.changed.wait_until(None, || {
            let state = &mut *self.state.lock();
            state.readers += usize::from(!state.writer);
            !state.writer
        });
        Reading { sem: self }
    }

    /// Waits for the other writers, then for the readers, and keeps all of them out.
    pub fn write(&self) -> Writing<'_> {
        self.changed.wait_until(None, || {
            let state = &mut *self.state.lock();
            !core::mem::replace(&mut state.writer, true)
        });
        self.changed
            .wait_until(None, || self.state.lock().readers == 0);
        Writing { sem: self }
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.sem.state.lock().readers -= 1;
        self.sem.changed.wake_all();
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.sem.state.lock().writer = false;
        self.sem.changed.wake_all();
    }
}
