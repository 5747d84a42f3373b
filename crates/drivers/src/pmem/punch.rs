//! Giving back the room of bytes that nobody holds (WB-5).
//!
//! Who punches a hole says how long to wait for those who map or pin any byte of it, and is told who they are: those, and nobody
//! who holds other bytes. What must never happen here: a hole under somebody's DMA, or a frozen device kept from going by a wait.

use core::ops::{Bound, Range, RangeBounds};
use core::time::Duration;
use std::thread;
use std::time::Instant;

use rustix::io::Errno;

use super::device::Pmem;
use super::hold::Hold;
use super::patience::Patience;
use crate::block::{BlockDevice, BlockError};

/// Between two looks at the holds that somebody waits for.
const POLL: Duration = Duration::from_micros(500);

/// Why no hole was punched.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PunchError {
    /// Somebody still maps or pins some of the bytes.
    #[error("the bytes are in use: {}", list(.0))]
    Held(Vec<Hold>),
    /// The device refuses.
    #[error(transparent)]
    Device(#[from] BlockError),
}

fn list(holds: &[Hold]) -> String {
    let holds: Vec<_> = holds.iter().map(Hold::to_string).collect();
    holds.join("; ")
}

impl Pmem {
    /// Makes bytes zeros and gives their room back, after waiting for those who map or pin any of them. `4096..` is to the end of
    /// the device; `0..0` is nothing. Lost bytes are mended where whole sectors go.
    ///
    /// # Errors
    ///
    /// [`PunchError::Held`] with those who hold bytes of the range when patience ends; nothing has changed then.
    #[doc(alias = "dax_layout_busy_page")]
    #[doc(alias = "dax_break_layout")]
    pub fn punch(
        &self,
        bytes: impl RangeBounds<u64>,
        patience: &Patience<'_>,
    ) -> Result<(), PunchError> {
        let range = self.whole_range(&bytes);
        let mut result = Ok(None);
        patience.wait_for(|left| {
            result = self.try_punch_until(&range, left);
            !matches!(result, Ok(None))
        });
        match result? {
            Some(()) => Ok(()),
            None => Err(PunchError::Held(self.holds_of(&range))),
        }
    }

    fn whole_range(&self, bytes: &impl RangeBounds<u64>) -> Range<u64> {
        let start = match bytes.start_bound() {
            Bound::Included(start) => *start,
            Bound::Excluded(before) => before.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match bytes.end_bound() {
            Bound::Included(last) => last.saturating_add(1),
            Bound::Excluded(end) => *end,
            Bound::Unbounded => self.size_bytes(),
        };
        start..end
    }

    /// Tries again and again, at most for so long.
    fn try_punch_until(
        &self,
        range: &Range<u64>,
        left: Option<Duration>,
    ) -> Result<Option<()>, BlockError> {
        let began = Instant::now();
        loop {
            let punched = self.try_punch(range)?;
            if punched.is_some() || left.is_some_and(|left| began.elapsed() >= left) {
                return Ok(punched);
            }
            thread::sleep(POLL);
        }
    }

    /// Punches a hole, unless somebody holds any of its bytes.
    fn try_punch(&self, range: &Range<u64>) -> Result<Option<()>, BlockError> {
        let _in_flight = self.queue.enter()?;
        self.check(range)?;
        if range.is_empty() {
            return Ok(Some(()));
        }
        let mut held = false;
        let punched = self.overwrite(range, || {
            let punched = self.try_zero(range);
            held = punched.is_none();
            punched.unwrap_or(Err(Errno::BUSY))
        });
        if held {
            return Ok(None);
        }
        punched.map(Some)
    }

    /// Who holds any of these bytes, oldest first.
    fn holds_of(&self, range: &Range<u64>) -> Vec<Hold> {
        let mut holds = self.holds();
        holds.retain(|hold| hold.bytes.start < range.end && range.start < hold.bytes.end);
        holds
    }
}
