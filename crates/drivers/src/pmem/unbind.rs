//! Taking a namespace out of use while others use it (PMEM-2).
//!
//! The order is MAP-6's: the queue is frozen, the mapping killed, who still holds frames is waited for, who maps volatile
//! memory that nobody wants to keep loses it, and then the frames go. Until nobody has any, everything can be taken back,
//! and is at the deadline.

use core::fmt;

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

/// A namespace that nobody uses any more, on the way out of use. Dropping it brings the namespace back, for everybody.
#[derive(Debug)]
#[must_use]
pub struct Unbinding<'a> {
    pmem: &'a Pmem,
    afterwards: Afterwards,
    /// Its frames; a raw namespace has none.
    drained: Option<Drained>,
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
        self.begin_unbind(patience, afterwards, ask)?.finish()
    }

    /// The first part of [`unbind`](Self::unbind): when it returns, nobody uses the namespace, and nobody can begin to. Dropping what it
    /// returns takes that back.
    ///
    /// # Errors
    ///
    /// [`UnbindError`]; the device works as before, for everybody.
    pub fn begin_unbind(
        &self,
        patience: &Patience<'_>,
        afterwards: Afterwards,
        ask: impl FnOnce(&[Hold]),
    ) -> Result<Unbinding<'_>, UnbindError> {
        self.begin()?;
        // However this ends, from here on it is taken back when this is dropped.
        let mut unbinding = Unbinding {
            pmem: self,
            afterwards,
            drained: None,
        };
        while !patience.wait_for(|left| self.queue.freeze(left)) {
            let holders = self.holders(self.queue.in_flight(), 0);
            // Who is in the way is named; if that has ended meanwhile, nobody is.
            if holders.in_flight > 0 {
                return Err(UnbindError::Held(holders));
            }
        }
        // Who asks again knows what is lost.
        if let Err(errno) = self.medium.flush()
            // Relaxed: only who takes the device away looks at it, and `stage` lets in one at a time.
            && !self.loss_told.swap(true, Ordering::Relaxed)
        {
            return Err(UnbindError::Flush(errno));
        }
        if let Some(dax) = &self.dax {
            let killed = dax.pagemap.clone().kill();
            ask(&self.holds());
            unbinding.drained = Some(self.drain(dax, killed, patience, afterwards)?);
        }
        Ok(unbinding)
    }

    /// Waits for who uses the frames. If time is up before, they are named, and the device lives again.
    fn drain(
        &self,
        dax: &Dax,
        mut killed: Killed,
        patience: &Patience<'_>,
        afterwards: Afterwards,
    ) -> Result<Drained, UnbindError> {
        loop {
            let still = match dax.drain(killed, patience, afterwards) {
                Ok(drained) => return Ok(drained),
                Err(still) => still,
            };
            let holders = self.holders(0, still.users);
            // As above: nobody is in the way who cannot be named.
            if holders.references > 0 || !holders.holds.is_empty() {
                let _alive = still.killed.resurrect();
                return Err(UnbindError::Held(holders));
            }
            killed = still.killed;
        }
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

impl Unbinding<'_> {
    /// Takes the namespace out of use, for good.
    ///
    /// # Errors
    ///
    /// [`UnbindError::Revoke`]: it is out of use all the same.
    pub fn finish(mut self) -> Result<(), UnbindError> {
        let (pmem, afterwards) = (self.pmem, self.afterwards);
        let mut revoked = Ok(());
        if let (Some(drained), Some(dax)) = (self.drained.take(), &pmem.dax) {
            revoked = pmem.revoke(afterwards);
            // Who is left has no frames, only a mapping that was revoked.
            dax.map.holders().revoke_frames(dax.frames);
            drained.remove();
        }
        pmem.leave(afterwards);
        revoked.map_err(UnbindError::Revoke)
    }
}

impl Drop for Unbinding<'_> {
    fn drop(&mut self) {
        let pmem = self.pmem;
        if *pmem.stage.lock() == Stage::Gone {
            return;
        }
        if let Some(drained) = self.drained.take() {
            let _alive = drained.resurrect();
        }
        if let Some(dax) = &pmem.dax {
            dax.mappings.resurrect();
        }
        pmem.queue.thaw();
        *pmem.stage.lock() = Stage::Live;
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
        if unmapped && patience.wait_for(|left| killed.wait_until_unused(left)) {
            // Nobody can begin to use them. Who tries is counted for a moment, which is not to be taken for a user.
            return killed.drain(None);
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
