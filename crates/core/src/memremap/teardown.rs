//! How a mapping is taken away: kill, drain, remove, each a type of its own, so that nothing is removed while somebody uses it
//! (MAP-6).

use alloc::vec::Vec;
use core::time::Duration;

use pgmap_sync::atomic::Ordering;

use crate::holders::FrameHolder;

use super::pgmap::{DevPagemap, Pgmap};

impl DevPagemap {
    /// Ends the mapping's life: lookups and allocations fail from here on. Who has pages of it keeps them.
    ///
    /// # Panics
    ///
    /// If another handle is taking the mapping away, or has: there is one teardown, and one who does it.
    #[must_use = "a killed mapping has to be drained and removed"]
    pub fn kill(self) -> Killed {
        // Acquire: pairs with the release in `resurrect`, so that the count is killed after it was resurrected.
        // Release: pairs with the acquire in `stage`. Relaxed on failure: nothing is read then.
        let first = self.pgmap.stage.compare_exchange(
            Pgmap::LIVE,
            Pgmap::KILLED,
            Ordering::AcqRel,
            Ordering::Relaxed,
        );
        assert!(
            first.is_ok(),
            "a device mapping is taken away by one handle, once"
        );
        self.users().kill();
        Killed { device: self }
    }
}

/// A mapping that nobody can get any more, but that some still use.
#[derive(Debug)]
pub struct Killed {
    device: DevPagemap,
}

/// Somebody still uses a mapping; everything is still usable by them.
#[derive(Debug)]
pub struct StillHeld {
    /// The mapping, to try again.
    pub killed: Killed,
    /// How many pages and guards are left.
    pub users: u64,
    /// Those of them who have said who they are, oldest first (REF-7).
    pub holders: Vec<FrameHolder>,
}

impl Killed {
    /// The mapping.
    #[must_use]
    pub const fn device(&self) -> &DevPagemap {
        &self.device
    }

    /// Waits until nobody uses the mapping, at most `patience`. Says whether nobody does; then [`drain`](Self::drain) does not wait.
    #[must_use]
    pub fn wait_until_unused(&self, patience: Option<Duration>) -> bool {
        self.device.users().wait_for_zero(patience)
    }

    /// Waits until nobody uses the mapping, at most `patience`.
    ///
    /// # Errors
    ///
    /// [`StillHeld`] when the patience ends.
    pub fn drain(self, patience: Option<Duration>) -> Result<Drained, StillHeld> {
        #[cfg(shuttle)]
        if crate::seeded_bug::has(crate::seeded_bug::SeededBug::DrainDoesNotWait) {
            return Ok(Drained {
                device: self.device,
            });
        }
        if self.wait_until_unused(patience) {
            // INVARIANT: dead and at zero, so it stays at zero.
            return Ok(Drained {
                device: self.device,
            });
        }
        Err(StillHeld {
            users: self.device.users_now(),
            holders: self.device.holders(),
            killed: self,
        })
    }

    /// Gives the mapping its life back.
    #[must_use]
    pub fn resurrect(self) -> DevPagemap {
        self.device.users().resurrect();
        // Release: pairs with the acquires in `kill` and `stage`.
        self.device
            .pgmap
            .stage
            .store(Pgmap::LIVE, Ordering::Release);
        self.device
    }
}

/// A mapping that nobody uses.
///
/// # Invariants
///
/// Its count of users is dead and at zero.
#[derive(Debug)]
pub struct Drained {
    device: DevPagemap,
}

impl Drained {
    /// The mapping.
    #[must_use]
    pub const fn device(&self) -> &DevPagemap {
        &self.device
    }

    /// Gives the mapping its life back.
    #[must_use]
    pub fn resurrect(self) -> DevPagemap {
        let Self { device } = self;
        Killed { device }.resurrect()
    }

    /// Takes the frames away from the device: their metadata first, while the device can still be found by it (MAP-8), then
    /// what finds them, then the reservation.
    ///
    /// If the machine does not take the device's pages out of the map, the frames stay reserved for ever, so that nobody gets
    /// frames whose metadata is on a device that is gone; [`Altmap::allocated`](crate::altmap::Altmap::allocated) stays as it is.
    pub fn remove(self) {
        let DevPagemap { map, pgmap } = self.device;
        // SAFETY: by the type invariant nobody uses the frames, nor can anybody begin to.
        if unsafe { map.depopulate(&pgmap) }.is_err() {
            return;
        }
        let _hotplug = map.mem_hotplug_begin();
        let mut resources = map.resources.lock();
        // SAFETY: we hold the lock of `resources`; by the type invariant the count is dead and at zero.
        unsafe { map.lookup.unpublish(&pgmap) };
        // Release: pairs with the acquire in `stage`.
        pgmap.stage.store(Pgmap::REMOVED, Ordering::Release);
        resources.remove(pgmap.entry);
    }
}
