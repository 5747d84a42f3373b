//! The request queue of a block device, as far as taking the device away needs it: who is under way, and the freeze.
//!
//! A driver enters the queue for each request; who takes the device away freezes it first (MAP-6, PMEM-2), so that
//! every request that began ends, and every later one is refused.

use core::time::Duration;

use pgmap_sync::PercpuRef;

/// Requests that are under way, and whether new ones may begin.
#[derive(Debug, Default)]
pub struct RequestQueue {
    under_way: PercpuRef,
}

/// A request that is under way; it ends when this is dropped.
#[derive(Debug)]
pub struct InFlight<'a> {
    queue: &'a RequestQueue,
}

/// The queue is frozen: the device is being taken away.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the device is being taken away")]
pub struct Frozen;

impl RequestQueue {
    /// A queue that takes requests.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Begins a request.
    ///
    /// # Errors
    ///
    /// [`Frozen`].
    pub fn enter(&self) -> Result<InFlight<'_>, Frozen> {
        let live = self.under_way.try_get_live();
        live.then(|| InFlight { queue: self }).ok_or(Frozen)
    }

    /// Refuses new requests, and waits until none is under way, at most `patience`. Says whether none is; the queue stays
    /// frozen either way, until [`thaw`](Self::thaw).
    #[doc(alias = "blk_freeze_queue")]
    pub fn freeze(&self, patience: Option<Duration>) -> bool {
        self.under_way.kill();
        #[cfg(shuttle)]
        if crate::seeded_bug::has(crate::seeded_bug::SeededBug::FreezeDoesNotWait) {
            return true;
        }
        self.under_way.wait_for_zero(patience)
    }

    /// Takes requests again.
    #[doc(alias = "blk_mq_unfreeze_queue")]
    pub fn thaw(&self) {
        self.under_way.resurrect();
    }

    /// Whether new requests are refused.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.under_way.is_dying()
    }

    /// Requests under way: exact while the queue is frozen, a guess otherwise.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.under_way.count()
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.queue.under_way.put();
    }
}
