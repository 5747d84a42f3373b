//! What a block device can do. `server` serves it to the network; `pmem` is one.

use core::fmt;
use core::ops::Range;
use std::os::fd::BorrowedFd;

use pgmap_core::queue::{Frozen, InFlight};
use pgmap_host::shared::SharedFrames;
use rustix::io::Errno;

/// Why a request failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BlockError {
    /// The device is being taken away: ask again when it is back.
    #[error(transparent)]
    Frozen(#[from] Frozen),
    /// Bytes in the range are lost; a write of whole blocks mends them (PMEM-3).
    #[error("the bytes from {offset} on are lost: write the whole block to mend it")]
    Bad {
        /// The first of them.
        offset: u64,
    },
    /// The range is not all on the device.
    #[error("the range is not on the device")]
    OutOfRange,
    /// The device may not be written to.
    #[error("the device is read-only")]
    ReadOnly,
    /// The medium refused: the errno that it gave.
    #[error("the medium failed: {0}")]
    Io(#[from] Errno),
}

/// Whether zeros may be holes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Zeros {
    /// The room may be given back.
    MayPunch,
    /// Room stays taken, so that a later write does not fail for want of it.
    KeepRoom,
}

/// What is known about the bytes of a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Contents {
    /// Somebody may have written them, or they are lost.
    Data,
    /// They read as zeros, and take no room.
    Hole,
}

/// Whether bytes are about to be read or written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// They are read.
    Read,
    /// All of them are written.
    Write,
}

/// A device of bytes. Any number of threads may call at once; requests that overlap take effect in any order.
pub trait BlockDevice: Send + Sync + fmt::Debug {
    /// The name that people know it by, such as `pmem0`.
    fn name(&self) -> &str;

    /// How many bytes. It does not change.
    fn size_bytes(&self) -> u64;

    /// Reads bytes.
    ///
    /// # Errors
    ///
    /// See [`BlockError`].
    fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), BlockError>;

    /// Writes bytes; they are on the medium after the next [`flush`](Self::flush).
    ///
    /// # Errors
    ///
    /// See [`BlockError`]; some bytes may have been written.
    fn write(&self, offset: u64, from: &[u8]) -> Result<(), BlockError>;

    /// Makes everything durable that was written before (PMEM-4).
    ///
    /// # Errors
    ///
    /// See [`BlockError`].
    fn flush(&self) -> Result<(), BlockError>;

    /// The bytes are not needed: they may read as zeros from now on, and their room be given back.
    ///
    /// # Errors
    ///
    /// See [`BlockError`].
    fn discard(&self, range: Range<u64>) -> Result<(), BlockError>;

    /// Makes the bytes zeros.
    ///
    /// # Errors
    ///
    /// See [`BlockError`].
    fn write_zeroes(&self, range: Range<u64>, zeros: Zeros) -> Result<(), BlockError>;

    /// What is where in a range that is not empty, in order and without gaps.
    ///
    /// # Errors
    ///
    /// See [`BlockError`].
    fn extents(&self, range: Range<u64>) -> Result<Vec<(Range<u64>, Contents)>, BlockError>;

    /// Whether to receive straight into the bytes ([`direct`](Self::direct)) is quicker than [`write`](Self::write): it is for
    /// memory, and it is not where a store makes the machine note that a page is to be written back.
    fn likes_direct_writes(&self) -> bool;

    /// The bytes themselves, to be moved between them and a socket. The request is under way until this is dropped: a
    /// slow peer must not keep it.
    ///
    /// # Errors
    ///
    /// See [`BlockError`].
    fn direct(&self, range: Range<u64>, access: Access) -> Result<Direct<'_>, BlockError>;
}

/// Bytes of a device, held for one request.
#[derive(Debug)]
pub struct Direct<'a> {
    frames: &'a SharedFrames,
    /// What is left of them, in bytes of `frames`.
    left: Range<u64>,
    _in_flight: InFlight<'a>,
}

impl<'a> Direct<'a> {
    /// A range of bytes of `frames`, held by a request.
    #[must_use]
    pub const fn new(frames: &'a SharedFrames, range: Range<u64>, in_flight: InFlight<'a>) -> Self {
        Self {
            frames,
            left: range,
            _in_flight: in_flight,
        }
    }

    /// How many bytes are still to be moved.
    #[must_use]
    pub const fn left(&self) -> u64 {
        self.left.end - self.left.start
    }

    /// Sends what the socket takes without waiting. Says how many bytes.
    ///
    /// # Errors
    ///
    /// See [`SharedFrames::send`].
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> Result<usize, Errno> {
        let sent = self.frames.send(self.left.clone(), socket)?;
        self.left.start += sent as u64;
        Ok(sent)
    }

    /// Receives what the socket has. Says how many bytes; 0 at the end of the stream.
    ///
    /// # Errors
    ///
    /// See [`SharedFrames::receive`].
    pub fn receive(&mut self, socket: BorrowedFd<'_>) -> Result<usize, Errno> {
        let received = self.frames.receive(self.left.clone(), socket)?;
        self.left.start += received as u64;
        Ok(received)
    }

    /// The bytes that are still to be sent, for a peer that is too slow to be waited for.
    ///
    /// # Errors
    ///
    /// What the machine answers.
    pub fn copy_left(self) -> Result<Vec<u8>, Errno> {
        let mut bytes = vec![0; usize::try_from(self.left()).unwrap_or(0)];
        self.frames.read(self.left.start, &mut bytes)?;
        Ok(bytes)
    }
}
