//! Scrubbing: reading everything, to find what is lost before somebody needs it (PMEM-3).
//!
//! A pass runs on a thread of its own, on demand and after a read that failed. Each has a number, which can be waited for.

use core::time::Duration;
use std::sync::Arc;
use std::thread;

use pgmap_sync::atomic::{AtomicU64, Ordering};
use pgmap_sync::{Mutex, WaitQueue};
use rustix::io::Errno;

use super::badblocks::{SECTOR_BYTES, sectors_around};
use super::device::Pmem;

/// Bytes that are read at once.
const CHUNK_BYTES: u64 = 1 << 20;

/// The number of a pass over everything.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Generation(pub u64);

/// What is known about scrubbing.
#[derive(Debug, Default)]
pub(super) struct Scrub {
    passes: Mutex<Passes>,
    changed: WaitQueue,
    done_bytes: AtomicU64, // A: stored by the pass that runs, read by anybody
}

#[derive(Clone, Copy, Debug, Default)]
struct Passes {
    wanted: u64,
    begun: u64,
    /// All passes up to this one have ended, and this one saw everything.
    whole: u64,
    worker: Worker,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Worker {
    #[default]
    Idle,
    Runs,
}

/// How far scrubbing has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    /// The last pass that saw everything; 0 if none has.
    pub whole: Generation,
    /// The pass that runs, and the bytes that it has seen.
    pub running: Option<(Generation, u64)>,
}

/// Why a pass did not see everything.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ScrubError {
    /// It is not done yet.
    #[error("the scrub is not done yet")]
    Patience,
    /// The device was taken away, or the image was truncated, or no thread could be had.
    #[error(
        "the scrub was interrupted: the device is being taken away, or its image was truncated"
    )]
    Interrupted,
}

impl Pmem {
    /// Wants everything to be read once more. Says which pass will have read all that is there now.
    #[doc(alias = "ars_start")]
    pub fn scrub(&self) -> Generation {
        let mut passes = self.scrub.passes.lock();
        passes.wanted = passes.begun + 1;
        let wanted = Generation(passes.wanted);
        if passes.worker == Worker::Idle
            && let Some(own) = self.own.upgrade()
        {
            let thread = thread::Builder::new().name("pgmap-scrub".to_owned());
            if thread.spawn(move || own.scrub_all()).is_ok() {
                passes.worker = Worker::Runs;
            }
        }
        wanted
    }

    /// Waits until a pass is done, at most `patience`.
    ///
    /// # Errors
    ///
    /// [`ScrubError`].
    pub fn wait_for_scrub(
        &self,
        generation: Generation,
        patience: Option<Duration>,
    ) -> Result<(), ScrubError> {
        let over = |passes: &Passes| passes.whole >= generation.0 || passes.worker == Worker::Idle;
        let waited = self
            .scrub
            .changed
            .wait_until(patience, || over(&self.scrub.passes.lock()));
        if !waited {
            return Err(ScrubError::Patience);
        }
        let whole = self.scrub.passes.lock().whole >= generation.0;
        whole.then_some(()).ok_or(ScrubError::Interrupted)
    }

    /// How far scrubbing has come.
    #[must_use]
    pub fn scrub_progress(&self) -> Progress {
        let passes = *self.scrub.passes.lock();
        // Relaxed: a figure for people.
        let done = self.scrub.done_bytes.load(Ordering::Relaxed);
        let running = (passes.worker == Worker::Runs).then_some((Generation(passes.begun), done));
        let whole = Generation(passes.whole);
        Progress { whole, running }
    }

    /// The thread: passes until none is wanted.
    fn scrub_all(self: Arc<Self>) {
        while let Some(pass) = self.next_pass() {
            let seen = self.scrub_once();
            let mut passes = self.scrub.passes.lock();
            if seen.is_err() {
                passes.worker = Worker::Idle;
                break;
            }
            passes.whole = pass;
            drop(passes);
            self.scrub.changed.wake_all();
        }
        self.scrub.changed.wake_all();
    }

    /// The pass that is wanted next; if none is, the thread is to end.
    fn next_pass(&self) -> Option<u64> {
        let mut passes = self.scrub.passes.lock();
        if passes.begun == passes.wanted {
            passes.worker = Worker::Idle;
            return None;
        }
        passes.begun += 1;
        Some(passes.begun)
    }

    fn scrub_once(&self) -> Result<(), ScrubError> {
        let size = self.namespace.size_bytes();
        let mut bytes = vec![0; usize::try_from(CHUNK_BYTES).unwrap_or(0)];
        let mut at = 0;
        while at < size {
            // Relaxed: a figure for people.
            self.scrub.done_bytes.store(at, Ordering::Relaxed);
            // Each chunk is a request of its own, so that nobody waits long for the queue to be empty.
            let _in_flight = self.queue.enter().map_err(|_| ScrubError::Interrupted)?;
            let len = CHUNK_BYTES.min(size - at);
            self.scrub_part(at, len, &mut bytes)?;
            at += len;
        }
        Ok(())
    }

    /// Reads a part, and in smaller parts if it fails; what fails as a sector is lost.
    fn scrub_part(&self, at: u64, len: u64, bytes: &mut [u8]) -> Result<(), ScrubError> {
        let part = &mut bytes[..usize::try_from(len).unwrap_or(0)];
        match self.medium.read(self.start + at, part) {
            Ok(()) => return Ok(()),
            Err(Errno::IO) => {}
            Err(_) => return Err(ScrubError::Interrupted),
        }
        let needed = self.start + self.namespace.size_bytes();
        if self
            .medium
            .present_bytes()
            .is_ok_and(|present| present < needed)
        {
            // Not lost, but not there: the whole rest would be noted as bad.
            return Err(ScrubError::Interrupted);
        }
        if len <= SECTOR_BYTES {
            let noted = self.lose(&sectors_around(&(at..at + len)));
            return noted.map_err(|_| ScrubError::Interrupted);
        }
        let half = (len / 2).next_multiple_of(SECTOR_BYTES);
        self.scrub_part(at, half, bytes)?;
        self.scrub_part(at + half, len - half, bytes)
    }
}
