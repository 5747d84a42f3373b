//! What is served: devices under names, and how often they were asked.

use core::fmt;
use std::sync::Arc;

use pgmap_drivers::block::BlockDevice;
use pgmap_sync::atomic::{AtomicU64, Ordering};

/// The devices that clients may have at this moment. It may answer otherwise at any time: a device that was taken away is
/// refused to new clients, and answers those who have it with [`Frozen`](pgmap_core::queue::Frozen).
pub trait Exports: Send + Sync + fmt::Debug {
    /// The export of a name; an empty name means the one for clients that do not choose.
    ///
    /// # Errors
    ///
    /// [`Refused`], with what the client is told.
    fn find(&self, name: &str) -> Result<Arc<Export>, Refused>;

    /// All that can be found.
    fn list(&self) -> Vec<Arc<Export>>;
}

/// A client cannot have an export: there is none of this name, or it is not to be had now.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

/// Whether clients may change an export.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Writable {
    /// They may.
    Yes,
    /// Their attempts get EPERM.
    No,
}

/// A device under a name.
#[derive(Debug)]
pub struct Export {
    /// What clients ask for: at most 4096 bytes.
    pub name: String,
    /// What people are shown beside it: at most 4096 bytes; may be empty.
    pub description: String,
    /// What is behind it.
    pub device: Arc<dyn BlockDevice>,
    /// Whether clients may change it.
    pub writable: Writable,
    /// What was asked so far, by all clients.
    pub counters: Counters,
}

impl Export {
    /// A device that may be written to, under its own name.
    #[must_use]
    pub fn new(device: Arc<dyn BlockDevice>) -> Self {
        Self {
            name: device.name().to_owned(),
            description: String::new(),
            device,
            writable: Writable::Yes,
            counters: Counters::default(),
        }
    }
}

/// What is counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Count {
    /// Requests to read that were answered with bytes.
    Reads,
    /// The bytes of those.
    BytesRead,
    /// Requests to write that were done.
    Writes,
    /// The bytes of those.
    BytesWritten,
    /// Requests to flush that were done. Those that are part of a write are not counted.
    Flushes,
    /// Requests to trim that were done.
    Trims,
    /// Requests to write zeros that were done.
    Zeroes,
    /// Questions about holes that were answered.
    Statuses,
    /// Requests that were answered with an error, whatever they wanted.
    Errors,
}

impl Count {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Reads,
        Self::BytesRead,
        Self::Writes,
        Self::BytesWritten,
        Self::Flushes,
        Self::Trims,
        Self::Zeroes,
        Self::Statuses,
        Self::Errors,
    ];
}

/// How often something happened, for each [`Count`].
#[derive(Debug, Default)]
pub struct Counters([AtomicU64; Count::ALL.len()]);

impl Counters {
    pub(super) fn add(&self, count: Count, more: u64) {
        // Relaxed: a count orders nothing.
        self.0[count as usize].fetch_add(more, Ordering::Relaxed);
    }

    /// The count so far.
    #[must_use]
    pub fn get(&self, count: Count) -> u64 {
        // Relaxed: as above.
        self.0[count as usize].load(Ordering::Relaxed)
    }
}
