//! Taking a namespace out of use while others use it (PMEM-2).
//!
//! The order is MAP-6's: the queue is frozen, the mapping killed, who still holds frames is waited for, who maps volatile
//! memory loses it, and then the frames go. Until all are gone, everything can be taken back, and is at the deadline.

use core::fmt;
use core::time::Duration;
use std::sync::Arc;

use pgmap_host::shared::{Extent, SharedFrames};
use rustix::io::Errno;

use super::device::Pmem;
use super::ledger::{Hold, Mapped};
use super::patience::Patience;
use super::region::Storage;

/// Bytes that are moved at once from memory that is taken away.
const CHUNK_BYTES: u64 = 2 << 20;

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
    /// What was written cannot be made durable; everything is as it was.
    #[error("what was written cannot be made durable: {0}")]
    Flush(Errno),
    /// There is no memory for the bytes to be kept; everything is as it was.
    #[error("there is no memory to keep the bytes in: {0}")]
    NoMemory(Errno),
    /// The device is out of use, and some of its bytes are lost.
    #[error("the device is out of use, and bytes of it are lost: {0}")]
    Lost(Errno),
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
    /// ones are refused. `ask` is called once nobody new can come, to ask those who hold it to let go: who maps
    /// volatile memory gets SIGBUS afterwards, all others are waited for.
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
        if let Err(errno) = self.medium.flush() {
            return Err(self.back_to_life(UnbindError::Flush(errno)));
        }
        let fresh = match self.room_for(afterwards) {
            Ok(fresh) => fresh,
            Err(errno) => return Err(self.back_to_life(UnbindError::NoMemory(errno))),
        };
        let Some(dax) = &self.dax else {
            self.leave(afterwards, None);
            return Ok(());
        };
        let killed = dax.pagemap.clone().kill();
        ask(&dax.ledger.all());
        patience.wait_for(|left| killed.wait_until_unused(left));
        let drained = match killed.drain(Some(Duration::ZERO)) {
            Ok(drained) => drained,
            Err(still) => {
                let holders = self.holders(0, still.users);
                let _alive = still.killed.resurrect();
                return Err(self.back_to_life(UnbindError::Held(holders)));
            }
        };
        // Nobody new can have mapped it since `drain`, so what is known about that stays true.
        let moved = self.take_away(afterwards, fresh);
        drained.remove();
        let (moved, error) = moved;
        self.leave(afterwards, moved);
        error.map_or(Ok(()), |errno| Err(UnbindError::Lost(errno)))
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

    /// Memory to which the bytes can be moved, if they will have to be.
    fn room_for(&self, afterwards: Afterwards) -> Result<Option<SharedFrames>, Errno> {
        match (self.region.storage(), afterwards) {
            (Storage::MemoryFiles, Afterwards::Keep) => {
                SharedFrames::memory("pgmap-pmem", self.namespace.size_bytes()).map(Some)
            }
            (Storage::MemoryFiles, Afterwards::Forget)
            | (Storage::Medium, Afterwards::Keep | Afterwards::Forget) => Ok(None),
        }
    }

    /// Takes volatile memory away from whoever maps it. Says where the bytes are then, and what went wrong on the way.
    fn take_away(
        &self,
        afterwards: Afterwards,
        fresh: Option<SharedFrames>,
    ) -> (Option<SharedFrames>, Option<Errno>) {
        let Some(old) = self.medium.frames() else {
            return (None, None);
        };
        let mapped = self.dax.as_ref().map(|dax| dax.ledger.mapped_ever());
        match (self.region.storage(), afterwards, mapped, fresh) {
            (Storage::MemoryFiles, Afterwards::Forget, ..) => (None, old.revoke().err()),
            (Storage::MemoryFiles, Afterwards::Keep, Some(Mapped::Once), Some(fresh)) => {
                let error = move_bytes(old, &fresh).err();
                (Some(fresh), error)
            }
            (Storage::MemoryFiles | Storage::Medium, ..) => (None, None),
        }
    }

    /// Forgets the device: its namespace can be bound again.
    fn leave(&self, afterwards: Afterwards, moved: Option<SharedFrames>) {
        *self.stage.lock() = Stage::Gone;
        let mut state = self.region.lock();
        let index = self.namespace.index;
        if let Some(file) = moved {
            state.files.insert(index, Arc::new(file));
        }
        if afterwards == Afterwards::Forget {
            state.files.remove(&index);
        }
        state.bound.remove(&index);
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

/// Moves all bytes to a file that is as long, from the end on; what was moved is taken away from whoever maps it, so that at
/// no time more than one chunk takes room twice, and nobody sees zeros.
fn move_bytes(from: &SharedFrames, to: &SharedFrames) -> Result<(), Errno> {
    let mut bytes = vec![0; usize::try_from(CHUNK_BYTES).unwrap_or(0)];
    let mut end = from.size_bytes();
    while end > 0 {
        let start = (end - 1) / CHUNK_BYTES * CHUNK_BYTES;
        for extent in from.extents(start..end)? {
            let Extent::Data(data) = extent else { continue };
            let len = usize::try_from(data.end - data.start).unwrap_or(0);
            from.read(data.start, &mut bytes[..len])?;
            to.write(data.start, &bytes[..len])?;
        }
        from.revoke_from(start)?;
        end = start;
    }
    Ok(())
}
