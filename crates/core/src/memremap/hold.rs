//! Pages of a device that somebody holds, by name.

use alloc::borrow::Cow;

use crate::addr::PfnRange;
use crate::holders::{FrameHolder, FrameTicket, Who};

use super::frames::PageError;
use super::pgmap::DevPagemap;

/// How pages are held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hold {
    /// They stay in use.
    Reference,
    /// They stay in use, and where they are (GUP-3).
    Pin,
}

/// Pages that stay in use until this is dropped, on whatever thread; who holds them can be listed (REF-7).
///
/// # Invariants
///
/// One reference of each page that the range touches belongs to this value, and one pin if `how` says so.
#[derive(Debug)]
pub struct HeldPages {
    device: DevPagemap,
    range: PfnRange,
    how: Hold,
    ticket: FrameTicket,
}

impl DevPagemap {
    /// Holds every page that the range touches, under a name that [`holders`](Self::holders) tells.
    ///
    /// # Errors
    ///
    /// See [`PageError`]. Nothing is held then.
    pub fn hold(
        &self,
        range: PfnRange,
        how: Hold,
        label: impl Into<Cow<'static, str>>,
        who: Who,
    ) -> Result<HeldPages, PageError> {
        self.get_pages(range)?;
        if how == Hold::Pin
            && let Err(error) = self.pin_pages(range)
        {
            self.put_pages(range);
            return Err(error);
        }
        let ticket = self.map.holders().add_frames(FrameHolder {
            label: label.into(),
            who,
            how,
            since_ns: self.map.now_ns(),
            frames: range,
        });
        // INVARIANT: taken above.
        Ok(HeldPages {
            device: self.clone(),
            range,
            how,
            ticket,
        })
    }
}

impl HeldPages {
    /// The frames.
    #[must_use]
    pub const fn range(&self) -> PfnRange {
        self.range
    }
}

impl Drop for HeldPages {
    fn drop(&mut self) {
        self.device.map.holders().remove_frames(&self.ticket);
        match self.how {
            Hold::Reference => {}
            Hold::Pin => self.device.unpin_pages(self.range),
        }
        self.device.put_pages(self.range);
    }
}
