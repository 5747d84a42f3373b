//! What a region's bytes are kept on.
//!
//! The label area and the namespaces are written against this: the machine's shared frames are one such medium, a
//! test's medium that forgets what was not flushed is another.

use core::fmt;
use core::ops::Range;
use std::sync::Arc;

use pgmap_host::shared::{Extent, SharedFrames};
use pgmap_sync::Mutex;
use rustix::io::Errno;

/// Bytes that outlive the program, as far as they were flushed. Any number of threads may call at once.
pub trait Medium: Send + Sync + fmt::Debug {
    /// Reads bytes.
    ///
    /// # Errors
    ///
    /// [`Errno::IO`] if they are lost, or not there any more.
    fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), Errno>;

    /// Writes bytes; they may be lost until [`flush`](Self::flush).
    ///
    /// # Errors
    ///
    /// [`Errno::NOSPC`] if there is no room for them; what else the medium answers. Some may have been written.
    fn write(&self, offset: u64, from: &[u8]) -> Result<(), Errno>;

    /// Makes durable whatever was written before.
    ///
    /// # Errors
    ///
    /// What the medium answers: then some of it is not.
    fn flush(&self) -> Result<(), Errno>;

    /// How many bytes there are now: fewer than there were, if somebody truncated the medium.
    ///
    /// # Errors
    ///
    /// What the medium answers.
    fn present_bytes(&self) -> Result<u64, Errno>;

    /// The frames that can be mapped and moved through sockets, if the medium has them.
    fn frames(&self) -> Option<&SharedFrames>;
}

impl Medium for SharedFrames {
    fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), Errno> {
        self.read(offset, to)
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), Errno> {
        self.write(offset, from)
    }

    fn flush(&self) -> Result<(), Errno> {
        self.flush()
    }

    fn present_bytes(&self) -> Result<u64, Errno> {
        self.present_bytes()
    }

    fn frames(&self) -> Option<&SharedFrames> {
        Some(self)
    }
}

/// A medium that does not forget that something could not be made durable.
///
/// The kernel says once that it could not write a page, and takes the page for clean then: a later flush, of another client,
/// would promise what is lost (PMEM-4). So every flush fails from the first failure on, until the medium is opened again.
#[derive(Debug)]
pub(super) struct Unforgetting {
    medium: Arc<dyn Medium>,
    /// Held during a flush: who flushes at the same time would not hear of the failure.
    failed: Mutex<Option<Errno>>,
}

impl Unforgetting {
    pub(super) fn new(medium: Arc<dyn Medium>) -> Self {
        Self {
            medium,
            failed: Mutex::new(None),
        }
    }
}

impl Medium for Unforgetting {
    fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), Errno> {
        self.medium.read(offset, to)
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), Errno> {
        self.medium.write(offset, from)
    }

    fn flush(&self) -> Result<(), Errno> {
        let mut failed = self.failed.lock();
        // Tried all the same: what can be saved is.
        let flushed = self.medium.flush();
        *failed = failed.or(flushed.err());
        failed.map_or(Ok(()), Err)
    }

    fn present_bytes(&self) -> Result<u64, Errno> {
        self.medium.present_bytes()
    }

    fn frames(&self) -> Option<&SharedFrames> {
        self.medium.frames()
    }
}

/// Zeros to write.
static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// Makes bytes zeros, and keeps their room.
pub(crate) fn write_zeros(medium: &dyn Medium, range: Range<u64>) -> Result<(), Errno> {
    let mut at = range.start;
    while at < range.end {
        let len = (range.end - at).min(ZEROS.len() as u64);
        medium.write(at, &ZEROS[..usize::try_from(len).unwrap_or(ZEROS.len())])?;
        at += len;
    }
    Ok(())
}

/// Whether all bytes of a range are zeros.
pub(crate) fn is_zero(medium: &dyn Medium, range: Range<u64>) -> Result<bool, Errno> {
    let extents = match medium.frames() {
        Some(frames) => frames.extents(range)?,
        None => vec![Extent::Data(range)],
    };
    let mut bytes = vec![0; 1 << 20];
    for extent in extents {
        let Extent::Data(data) = extent else { continue };
        let mut at = data.start;
        while at < data.end {
            let len = (data.end - at).min(bytes.len() as u64);
            let part = &mut bytes[..usize::try_from(len).unwrap_or(0)];
            medium.read(at, part)?;
            if part.iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            at += len;
        }
    }
    Ok(true)
}
