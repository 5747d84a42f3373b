//! Memory of a device that programs map and pin directly: what `mm` asks of the device's driver.
//!
//! `mm` knows at which addresses such memory is mapped, and the driver which of its frames may be used just now: a hole may be
//! on the point of being punched in it, bytes of it may be lost. What must never happen here: frames pinned behind the
//! driver's back (WB-5).

use alloc::borrow::Cow;
use core::fmt;
use core::ops::Range;

use crate::holders::Who;
use crate::memremap::{DevPagemap, HeldPages};

/// Why bytes of a device could not be pinned.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DaxError {
    /// Give up what you have of it.
    #[error("the device is being taken away, or was")]
    Leaving,
    /// They are not all on the device, or not whole pages.
    #[error("the range is not one of whole pages of the device")]
    OutOfRange,
    /// Write them anew.
    #[error("the bytes from {offset} on are lost")]
    Lost {
        /// The first of them, counted from the device's first.
        offset: u64,
    },
    /// Somebody leaks pins (REF-5).
    #[error("a page has as many references or pins as can be counted")]
    TooMany,
    /// Try again.
    #[error("somebody is letting go of a page just now")]
    Busy,
}

/// A device whose memory is mapped directly.
#[doc(alias = "struct dax_device")]
pub trait DaxDevice: Send + Sync + fmt::Debug {
    /// Its frames; none if it has none that can be mapped.
    fn pagemap(&self) -> Option<&DevPagemap>;

    /// Pins whole pages: one operation for each page of the device, be it of 4 KiB, 2 MiB or 1 GiB (GUP-1). The caller keeps the
    /// device for as long as they are pinned.
    ///
    /// # Errors
    ///
    /// [`DaxError`]; nothing is pinned then.
    fn pin_bytes(
        &self,
        bytes: &Range<u64>,
        label: Cow<'static, str>,
        who: Who,
    ) -> Result<HeldPages, DaxError>;
}
