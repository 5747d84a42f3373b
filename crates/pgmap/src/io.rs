//! Pinned pages as the buffers of transfers: what a device, a socket or `O_DIRECT` reads and writes by DMA.
//!
//! ```no_run
//! use pgmap::io::Ring;
//! use pgmap::{Device, Memory, Pin, Prot};
//! # let socket = std::net::TcpStream::connect("127.0.0.1:9000")?;
//!
//! let memory = Memory::builder().ram(64 << 20).device(Device::compressed(1 << 30)).build()?;
//! let file = memory.open("data.bin")?;
//! let map = memory.space().map_file(&file, 0..1 << 20, Prot::ReadWrite)?;
//! let pins = memory.space().pin_user_pages(map.range(), &Pin::WRITE.label("rx ring"))?;
//! let mut ring = Ring::new(8);
//! let buffer = ring.register(pins)?;
//! let received = ring.read_fixed(&buffer, 0..1 << 20, &socket, None)?; // into the file's pages
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A buffer holds its pins: while it is registered, its pages stay in RAM, background writeback leaves them dirty, and a
//! truncation of them waits or is refused. So buffers over a file's pages are for one transfer or one batch of them: register,
//! run, drop. Buffers of anonymous memory may stay as long as one likes. What must never happen here: a transfer into pages
//! that are pinned for reading only, as nobody would know that they are dirty (GUP-4).

use core::ops::Range;
use core::ptr::NonNull;
use std::os::fd::AsFd;
use std::sync::Arc;

use pgmap_host::registered::{BufferRing, Registered, Way};
use pgmap_mm::gup::{Pin, PinAccess, PinError, PinnedPages, Whose};
use rustix::io::Errno;

use crate::memory::Mapping;

pub use pgmap_host::registered::Transfer;

/// Why pages could not become a buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RegisterError {
    /// The pages are anonymous memory, to whose bytes somebody may have references while a device writes them.
    #[error("the pages are anonymous memory: give the mapping itself to `register_mapping`")]
    Anonymous,
    /// The pages could not be pinned.
    #[error(transparent)]
    Pin(#[from] PinError),
}

/// Why a transfer was not made.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TransferError {
    /// The buffer is not so long.
    #[error("bytes {bytes:?} are not in the buffer, which has {len_bytes}")]
    OutOfRange {
        /// What was asked for.
        bytes: Range<usize>,
        /// The buffer's length.
        len_bytes: usize,
    },
    /// Bytes were to come into pages that are pinned to be read only.
    #[error("the buffer is pinned for reading; pin it with Pin::WRITE")]
    ReadOnly,
    /// The machine's answer.
    #[error("the transfer failed: {0}")]
    Failed(#[from] Errno),
}

/// A queue of transfers to and from pinned pages: `io_uring`, or one system call each where that is forbidden.
#[derive(Debug)]
pub struct Ring {
    ring: Arc<BufferRing>,
}

/// Pinned pages that a ring may use. They are unpinned when this is dropped, which waits for the transfers that the ring is
/// making.
///
/// # Invariants
///
/// All bytes of `registered` are pinned by `pins`. If they are anonymous, `mapping` has them.
#[derive(Debug)]
pub struct Buffer<'m> {
    // Dropped in this order.
    registered: Registered,
    pins: PinnedPages,
    mapping: Option<Mapping<'m>>,
}

impl Ring {
    /// A ring that keeps up to `depth` transfers in flight.
    #[must_use]
    pub fn new(depth: u32) -> Self {
        let ring = BufferRing::new(depth);
        Self { ring }
    }

    /// Makes pinned pages of files a buffer.
    ///
    /// What is pinned with [`Pin::WRITE`] is registered with the kernel, so that no transfer has to look pages up. What is pinned
    /// for reading is used by address, because the kernel registers every buffer to be written, which would make clean pages dirty.
    ///
    /// # Errors
    ///
    /// [`RegisterError::Anonymous`].
    pub fn register(&self, pins: PinnedPages) -> Result<Buffer<'static>, RegisterError> {
        match pins.whose() {
            Whose::File | Whose::Device => Ok(self.buffer(pins, None)),
            Whose::Anonymous => Err(RegisterError::Anonymous),
        }
    }

    /// Pins all of a mapping of anonymous memory, and makes it a buffer, which owns it.
    ///
    /// # Errors
    ///
    /// [`RegisterError::Pin`]: the mapping is gone then.
    #[track_caller]
    pub fn register_mapping<'m>(
        &self,
        mapping: Mapping<'m>,
        pin: &Pin,
    ) -> Result<Buffer<'m>, RegisterError> {
        let pins = mapping.pin(pin)?;
        Ok(self.buffer(pins, Some(mapping)))
    }

    fn buffer<'m>(&self, pins: PinnedPages, mapping: Option<Mapping<'m>>) -> Buffer<'m> {
        let (start, len) = (pins.start().get() as *mut u8, pins.len_bytes());
        let start = NonNull::new(start).unwrap_or(NonNull::dangling());
        let registered = match pins.access() {
            // SAFETY: the addresses are mapped for as long as the pins live, which is longer than the buffer is registered. Nobody
            // has references to the bytes of files' pages, nor to those of the mapping: it is ours, and `as_mut_slice` borrows the
            // buffer, which every transfer does, too.
            PinAccess::Write => unsafe { self.ring.register(start, len) },
            // SAFETY: as above.
            PinAccess::Read => unsafe { self.ring.register_by_address(start, len) },
        };
        // INVARIANT: just registered.
        Buffer {
            registered,
            pins,
            mapping,
        }
    }

    /// Reads from a file, socket or device into some bytes of a buffer, and answers how many came: fewer than there is room for as
    /// with `read`. The offset is a place in the file; without one it is read where the descriptor stands, as sockets need it.
    ///
    /// # Errors
    ///
    /// [`TransferError`].
    ///
    /// # Panics
    ///
    /// As [`run`](Self::run).
    pub fn read_fixed(
        &mut self,
        buffer: &Buffer<'_>,
        bytes: Range<usize>,
        from: impl AsFd,
        offset_bytes: Option<u64>,
    ) -> Result<usize, TransferError> {
        self.run_one(buffer.read(bytes, &from, offset_bytes)?)
    }

    /// Writes some bytes of a buffer to a file, socket or device, and answers how many went: fewer than there are as with `write`.
    /// The offset is as for [`read_fixed`](Self::read_fixed).
    ///
    /// # Errors
    ///
    /// [`TransferError`].
    ///
    /// # Panics
    ///
    /// As [`run`](Self::run).
    pub fn write_fixed(
        &mut self,
        buffer: &Buffer<'_>,
        bytes: Range<usize>,
        to: impl AsFd,
        offset_bytes: Option<u64>,
    ) -> Result<usize, TransferError> {
        self.run_one(buffer.write(bytes, &to, offset_bytes)?)
    }

    fn run_one(&mut self, mut transfer: Transfer<'_>) -> Result<usize, TransferError> {
        self.run(core::slice::from_mut(&mut transfer));
        Ok(transfer.outcome()?)
    }

    /// Makes transfers, several at a time, and returns when all are done: [`Transfer::outcome`] says what became of each.
    ///
    /// # Panics
    ///
    /// If a buffer is registered with another ring.
    pub fn run(&mut self, transfers: &mut [Transfer<'_>]) {
        self.ring.run(transfers);
    }
}

impl Buffer<'_> {
    /// A transfer into some bytes of the buffer: see [`Ring::read_fixed`].
    ///
    /// # Errors
    ///
    /// [`TransferError::OutOfRange`], [`TransferError::ReadOnly`].
    pub fn read<'a>(
        &'a self,
        bytes: Range<usize>,
        from: &'a impl AsFd,
        offset_bytes: Option<u64>,
    ) -> Result<Transfer<'a>, TransferError> {
        match self.pins.access() {
            PinAccess::Write => self.transfer(bytes, Way::Read, from, offset_bytes),
            PinAccess::Read => Err(TransferError::ReadOnly),
        }
    }

    /// A transfer of some bytes of the buffer to somewhere: see [`Ring::write_fixed`].
    ///
    /// # Errors
    ///
    /// [`TransferError::OutOfRange`].
    pub fn write<'a>(
        &'a self,
        bytes: Range<usize>,
        to: &'a impl AsFd,
        offset_bytes: Option<u64>,
    ) -> Result<Transfer<'a>, TransferError> {
        self.transfer(bytes, Way::Write, to, offset_bytes)
    }

    fn transfer<'a>(
        &'a self,
        bytes: Range<usize>,
        way: Way,
        fd: &'a impl AsFd,
        offset_bytes: Option<u64>,
    ) -> Result<Transfer<'a>, TransferError> {
        let len_bytes = self.registered.len_bytes();
        if bytes.start > bytes.end || bytes.end > len_bytes {
            return Err(TransferError::OutOfRange { bytes, len_bytes });
        }
        let fd = fd.as_fd();
        Ok(Transfer::new(
            &self.registered,
            bytes,
            way,
            fd,
            offset_bytes,
        ))
    }

    /// How many bytes it has.
    #[must_use]
    pub const fn len_bytes(&self) -> usize {
        self.registered.len_bytes()
    }

    /// Whether the kernel has the buffer registered, or looks its pages up for each transfer.
    #[must_use]
    pub const fn is_registered(&self) -> bool {
        self.registered.is_registered()
    }

    /// The bytes, if they are anonymous memory. Those of a file are read and written through its mapping.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> Option<&mut [u8]> {
        self.mapping.as_mut().map(Mapping::as_mut_slice)
    }
}
