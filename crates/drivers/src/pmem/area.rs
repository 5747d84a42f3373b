//! The label area: two labels of which one is always whole.
//!
//! Whoever changes the label writes the other slot and flushes; so a cut leaves the old label or the new one (PMEM-4). A
//! label that could not be written is tried again in the same slot: the whole one is never written over.

use super::label::{Label, LabelError, SLOT_BYTES, TooLong};
use super::medium::Medium;
use rustix::io::Errno;

/// The label of a medium, and where it is.
#[derive(Debug)]
pub struct LabelArea {
    label: Label,
    sequence: u64,
    slot: Slot,
}

/// One of the two places for a label.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Slot {
    First,
    Second,
}

impl Slot {
    const fn offset(self) -> u64 {
        match self {
            Self::First => 0,
            Self::Second => SLOT_BYTES as u64,
        }
    }

    const fn other(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
        }
    }
}

/// Why a medium's label cannot be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AreaError {
    /// There is none, nor the remains of one.
    #[error("there is no label")]
    None,
    /// There are remains of labels, and none is whole.
    #[error("the label area is damaged: {0}")]
    Damaged(LabelError),
    /// It was written by another version.
    #[error("the label has version {0}, which this pgmap does not know")]
    Version(u32),
    /// The medium failed.
    #[error("the label cannot be read: {0}")]
    Io(#[from] Errno),
}

/// Why a change of the label failed. The label is as it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CommitError {
    /// There is too much to write down.
    #[error(transparent)]
    TooLong(#[from] TooLong),
    /// The medium failed.
    #[error("the label cannot be written: {0}")]
    Io(#[from] Errno),
}

impl LabelArea {
    /// Reads the label of a medium.
    ///
    /// # Errors
    ///
    /// [`AreaError`]; the medium is as it was.
    pub fn open(medium: &dyn Medium) -> Result<Self, AreaError> {
        let mut bytes = vec![0; SLOT_BYTES];
        let mut best: Option<Self> = None;
        let mut problem = LabelError::None;
        for slot in [Slot::First, Slot::Second] {
            let present = medium.present_bytes()?.saturating_sub(slot.offset());
            let len = usize::try_from(present).map_or(SLOT_BYTES, |len| len.min(SLOT_BYTES));
            medium.read(slot.offset(), &mut bytes[..len])?;
            let newest = best.as_ref().map_or(0, |best| best.sequence);
            match Label::decode(&bytes[..len]) {
                Ok((_, sequence)) if best.is_some() && sequence <= newest => {}
                Ok((label, sequence)) => {
                    best = Some(Self {
                        label,
                        sequence,
                        slot,
                    });
                }
                Err(LabelError::None) => {}
                Err(LabelError::Version(version)) => return Err(AreaError::Version(version)),
                // Whole, and wrong: what the other slot says is out of date.
                Err(wrong @ LabelError::Invalid(_)) => return Err(AreaError::Damaged(wrong)),
                Err(torn @ LabelError::Checksum) => problem = torn,
            }
        }
        match (best, problem) {
            (Some(best), _) => Ok(best),
            (None, LabelError::None) => Err(AreaError::None),
            (None, problem) => Err(AreaError::Damaged(problem)),
        }
    }

    /// Writes the first label of a medium that has none.
    ///
    /// # Errors
    ///
    /// [`CommitError`].
    pub fn create(medium: &dyn Medium, label: Label) -> Result<Self, CommitError> {
        // Remains of another label must not win.
        for slot in [Slot::Second, Slot::First] {
            super::medium::write_zeros(medium, slot.offset()..slot.offset() + 512)?;
        }
        medium.flush()?;
        let (slot, sequence) = (Slot::First, 1);
        write(medium, slot, &label, sequence)?;
        Ok(Self {
            label,
            sequence,
            slot,
        })
    }

    /// The label.
    #[must_use]
    pub const fn label(&self) -> &Label {
        &self.label
    }

    /// Changes the label, durably: it is the new one when this returns, and the old one if it fails.
    ///
    /// # Errors
    ///
    /// [`CommitError`]; the label on the medium may be the new one all the same after a later cut.
    pub fn commit(&mut self, medium: &dyn Medium, label: Label) -> Result<(), CommitError> {
        // Counted even if it fails: what was half written must not be taken for what comes after it.
        self.sequence += 1;
        write(medium, self.slot.other(), &label, self.sequence)?;
        self.slot = self.slot.other();
        self.label = label;
        Ok(())
    }
}

fn write(medium: &dyn Medium, slot: Slot, label: &Label, sequence: u64) -> Result<(), CommitError> {
    let bytes = label.encode(sequence)?;
    medium.write(slot.offset(), &bytes)?;
    Ok(medium.flush()?)
}
