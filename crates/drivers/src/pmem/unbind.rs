//! Taking a namespace out of use while others use it (PMEM-2).
//!
//! The order is MAP-6's: the queue is frozen, the mapping killed, who still holds frames is waited for, who maps volatile
//! memory that nobody wants to keep loses it, and then the frames go. Until nobody has any, everything can be taken back,
//! and is at the deadline.

use core::fmt;
use core::time::Duration;
use pgmap_core::memremap::{Drained, Killed, StillHeld};
use pgmap_host::shared::SharedFrames;
use pgmap_sync::atomic::Ordering;
use rustix::io::Errno;

use super::dax::Dax;
use super::device::Pmem;
use super::hold::Hold;
use super::patience::Patience;
use super::storage::Storage;

/// How far a namespace has been taken out of use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    /// In use.
    Live,
    /// Somebody is taking it out of use.
    Leaving,
    /// Out of use, for ever: it is bound again as another.
    Gone,
}

/// What becomes of the bytes of volatile memory; those of an image stay in any case.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Afterwards {
    /// They are there when the namespace is bound again.
    Keep,
    /// They are not needed.
    Forget,
}

/// Who kept a namespace from being taken out of use.
#[derive(Clone, Debug)]
pub struct Holders {
    /// Requests under way.
    pub in_flight: u64,
    /// Pages in use and accesses under way.
    pub references: u64,
    /// Who maps and who pins what, oldest first.
    pub holds: Vec<Hold>,
    /// The platform's clock now, to which the holds' ages are counted.
    pub now_ns: u64,
}

/// Why a namespace was not taken out of use.
#[derive(Clone, Debug, thiserror::Error)]
pub enum UnbindError {
    /// Somebody holds it; everything is as it was.
    #[error("the device is in use: {0}")]
    Held(Holders),
    /// Somebody else is taking it out of use, or has.
    #[error("the device is being taken out of use already")]
    Already,
    /// What was written cannot be made durable; everything is as it was. Said once: the next time it is given up.
    #[error(
        "what was written cannot be made durable ({0}): save what you can read, or ask again to give it up"
    )]
    Flush(Errno),
    /// The device is out of use, but who maps it keeps what he maps.
    #[error("the device is out of use, but its memory cannot be taken away from who maps it: {0}")]
    Revoke(Errno),
}

impl fmt::Display for Holders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} requests under way, {} references",
            self.in_flight, self.references
        )?;
        for hold in &self.holds {
            let age = hold.age(self.now_ns).as_secs_f64();
            write!(f, "; {hold} for {age:.1} s")?;
        }
        Ok(())
    }
}

impl Pmem {
    /// Takes the namespace out of use, waiting for those who use it as long as `patience` says. Requests that began end, later
    /// ones are refused. `ask` is called once nobody new can come, to ask those who hold it to let go. All are waited for, but for
    /// who maps volatile memory that is to be forgotten: they get SIGBUS.
    ///
    /// # Errors
    ///
    /// [`UnbindError`]; unless it says otherwise, the device works as before, for everybody.
    #[doc(alias = "nvdimm_bus_remove")]
    pub fn unbind(
        &self,
        patience: &Patience<'_>,
        afterwards: Afterwards,
        ask: impl FnOnce(&[Hold]),
    ) -> Result<(), UnbindError> {
        self.begin()?;
        if !patience.wait_for(|left| self.queue.freeze(left)) {
            let holders = self.holders(self.queue.in_flight(), 0);
            return Err(self.back_to_life(UnbindError::Held(holders)));
        }
        // Who asks again knows what is lost.
        if let Err(errno) = self.medium.flush()
            // Relaxed: only who takes the device away looks at it, and `stage` lets in one at a time.
            && !self.loss_told.swap(true, Ordering::Relaxed)
        {
            return Err(self.back_to_life(UnbindError::Flush(errno)));
        }
        let Some(dax) = &self.dax else {
            self.leave(afterwards);
            return Ok(());
        };
        let killed = dax.pagemap.clone().kill();
        ask(&self.holds());
        let drained = match dax.drain(killed, patience, afterwards) {
            Ok(drained) => drained,
            Err(still) => {
                let holders = self.holders(0, still.users);
                let _alive = still.killed.resurrect();
                dax.mappings.resurrect();
                return Err(self.back_to_life(UnbindError::Held(holders)));
            }
        };
        let revoked = self.revoke(afterwards);
        // Who is left has no frames, only a mapping that was revoked.
        dax.map.holders().revoke_frames(dax.frames);
        drained.remove();
        self.leave(afterwards);
        revoked.map_err(UnbindError::Revoke)
    }

    fn begin(&self) -> Result<(), UnbindError> {
        let mut stage = self.stage.lock();
        match *stage {
            Stage::Live => {
                *stage = Stage::Leaving;
                Ok(())
            }
            Stage::Leaving | Stage::Gone => Err(UnbindError::Already),
        }
    }

    fn back_to_life(&self, why: UnbindError) -> UnbindError {
        self.queue.thaw();
        *self.stage.lock() = Stage::Live;
        why
    }

    fn holders(&self, in_flight: u64, references: u64) -> Holders {
        Holders {
            in_flight,
            references,
            holds: self.holds(),
            now_ns: self.dax.as_ref().map_or(0, |dax| dax.map.now_ns()),
        }
    }

    /// Takes volatile memory that is not needed away from whoever maps it still.
    fn revoke(&self, afterwards: Afterwards) -> Result<(), Errno> {
        match (self.region.storage(), afterwards) {
            (Storage::MemoryFiles(_), Afterwards::Forget) => {
                self.medium.frames().map_or(Ok(()), SharedFrames::revoke)
            }
            (Storage::MemoryFiles(_), Afterwards::Keep)
            | (Storage::Medium, Afterwards::Keep | Afterwards::Forget) => Ok(()),
        }
    }

    /// Forgets the device: its namespace can be bound again.
    fn leave(&self, afterwards: Afterwards) {
        *self.stage.lock() = Stage::Gone;
        let mut state = self.region.lock();
        let index = self.namespace.index;
        if afterwards == Afterwards::Forget {
            state.files.remove(&index);
        }
        state.bound.remove(&index);
    }
}

impl Dax {
    /// Waits for who maps bytes that are to be kept, and then for all who have frames.
    fn drain(
        &self,
        killed: Killed,
        patience: &Patience<'_>,
        afterwards: Afterwards,
    ) -> Result<Drained, StillHeld> {
        let unmapped = match afterwards {
            Afterwards::Keep => {
                self.mappings.kill();
                patience.wait_for(|left| self.mappings.wait_for_zero(left))
            }
            Afterwards::Forget => true,
        };
        if unmapped {
            patience.wait_for(|left| killed.wait_until_unused(left));
            return killed.drain(Some(Duration::ZERO));
        }
        Err(StillHeld {
            users: self.pagemap.users_now(),
            holders: self.pagemap.holders(),
            killed,
        })
    }
}

impl Drop for Pmem {
    fn drop(&mut self) {
        // Nobody has it any more, so nobody holds its frames either.
        if *self.stage.lock() == Stage::Live
            && let Some(dax) = &self.dax
        {
            super::bind::give_back(dax.pagemap.clone());
        }
    }
}
