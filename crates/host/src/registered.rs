//! Transfers to and from memory that stays where it is: `io_uring` with registered buffers, where the kernel translates the
//! addresses once and not for each transfer, or one system call a transfer where that is forbidden.
//!
//! Called by who has pinned the memory. To register a buffer the kernel touches its pages: those that are not mapped fault,
//! and the pager serves that as any other fault, so nobody registers while he holds a lock of the pager's. What must never
//! happen here: a return while the kernel may still use a buffer; a ring that a fork's child and its parent both use.

use core::fmt;
use core::ops::Range;
use core::ptr::{self, NonNull};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use io_uring::{opcode, squeue, types};
use pgmap_sync::Mutex;
use rustix::io::Errno;

use crate::area::ForkMark;
use crate::uring::{Broken, MarkedRing, run_queued};

/// Buffers that one ring can have registered; further ones are used by address.
const SLOTS: u32 = 64;
/// The kernel's word for "where the descriptor stands".
const CURRENT: u64 = u64::MAX;

/// Which way bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// From the file into the buffer.
    Read,
    /// From the buffer into the file.
    Write,
}

/// A transfer that is to be made, or has been.
#[derive(Debug)]
pub struct Transfer<'a> {
    buffer: &'a Registered,
    bytes: Range<usize>,
    way: Way,
    fd: BorrowedFd<'a>,
    offset_bytes: Option<u64>,
    outcome: Result<usize, Errno>,
}

impl<'a> Transfer<'a> {
    /// A transfer between some bytes of a buffer and a file, socket or device: at a place in the file, or, as sockets need it,
    /// where the descriptor stands.
    ///
    /// # Panics
    ///
    /// If the bytes are outside the buffer.
    #[must_use]
    pub fn new(
        buffer: &'a Registered,
        bytes: Range<usize>,
        way: Way,
        fd: BorrowedFd<'a>,
        offset_bytes: Option<u64>,
    ) -> Self {
        let inside = bytes.start <= bytes.end && bytes.end <= buffer.len;
        assert!(inside, "{bytes:?} of {}", buffer.len);
        Self {
            buffer,
            bytes,
            way,
            fd,
            offset_bytes,
            outcome: Err(Errno::INPROGRESS),
        }
    }

    /// How many bytes were moved: fewer than asked for as with `read` and `write`.
    ///
    /// # Errors
    ///
    /// What the machine answers; [`Errno::INPROGRESS`] until a ring has made it.
    pub const fn outcome(&self) -> Result<usize, Errno> {
        self.outcome
    }
}

impl Transfer<'_> {
    fn start(&self) -> *mut u8 {
        self.buffer.start.as_ptr().wrapping_add(self.bytes.start)
    }

    fn entry(&self) -> squeue::Entry {
        let (at, fd) = (self.start(), types::Fd(self.fd.as_raw_fd()));
        let offset = self.offset_bytes.unwrap_or(CURRENT);
        // What is longer is moved in part, as with `read` and `write`.
        let len = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        match (self.way, self.buffer.slot) {
            (Way::Read, Some(slot)) => opcode::ReadFixed::new(fd, at, len, slot)
                .offset(offset)
                .build(),
            (Way::Read, None) => opcode::Read::new(fd, at, len).offset(offset).build(),
            (Way::Write, Some(slot)) => opcode::WriteFixed::new(fd, at, len, slot)
                .offset(offset)
                .build(),
            (Way::Write, None) => opcode::Write::new(fd, at, len).offset(offset).build(),
        }
    }

    fn end(&mut self, result: i32) {
        self.outcome = match usize::try_from(result) {
            Ok(moved) => Ok(moved),
            Err(_) if result == -Errno::INTR.raw_os_error() => self.call(),
            Err(_) => Err(Errno::from_raw_os_error(-result)),
        };
    }

    /// Makes the transfer without a queue.
    fn call(&self) -> Result<usize, Errno> {
        let (at, len, fd) = (self.start(), self.bytes.len(), self.fd.as_raw_fd());
        let offset = self.offset_bytes.map(libc::off_t::try_from).transpose();
        let offset = offset.map_err(|_| Errno::INVAL)?;
        loop {
            let moved = match (self.way, offset) {
                // SAFETY: by the buffer's invariant the bytes may be written by anybody.
                (Way::Read, Some(offset)) => unsafe { libc::pread(fd, at.cast(), len, offset) },
                // SAFETY: as above.
                (Way::Read, None) => unsafe { libc::read(fd, at.cast(), len) },
                // SAFETY: and read.
                (Way::Write, Some(offset)) => unsafe { libc::pwrite(fd, at.cast(), len, offset) },
                // SAFETY: and read.
                (Way::Write, None) => unsafe { libc::write(fd, at.cast(), len) },
            };
            match usize::try_from(moved) {
                Ok(moved) => return Ok(moved),
                Err(_) => match Errno::from_io_error(&std::io::Error::last_os_error()) {
                    Some(Errno::INTR) => {}
                    errno => return Err(errno.unwrap_or(Errno::IO)),
                },
            }
        }
    }
}

/// A queue of transfers, and the buffers that it has registered.
pub struct BufferRing {
    queue: Mutex<Option<Queue>>,
    /// Where there is no queue there is none to be shared.
    made_here: Option<ForkMark>,
}

struct Queue {
    ring: MarkedRing,
    /// A bit for each slot that has a buffer.
    taken: u64,
}

impl fmt::Debug for BufferRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BufferRing").finish_non_exhaustive()
    }
}

/// Memory that a ring may use until this is dropped, which waits for the ring's transfers.
///
/// # Invariants
///
/// The bytes from `start` on may be read and written by anybody at any time. The slot, if it has one, is nobody else's.
#[derive(Debug)]
pub struct Registered {
    ring: Arc<BufferRing>,
    start: NonNull<u8>,
    len: usize,
    slot: Option<u16>,
}

// SAFETY: it is a range of bytes that anybody may use at any time.
unsafe impl Send for Registered {}
// SAFETY: as above.
unsafe impl Sync for Registered {}

impl BufferRing {
    /// A ring that keeps up to `depth` transfers in flight. If that is 0, or the machine forbids `io_uring`, they are made one
    /// by one.
    #[must_use]
    pub fn new(depth: u32) -> Arc<Self> {
        let made_here = ForkMark::new().ok();
        let ring = made_here.as_ref().and_then(|_| MarkedRing::new(depth).ok());
        let taken = |ring: &MarkedRing| {
            let sparse = ring.ring.submitter().register_buffers_sparse(SLOTS);
            if sparse.is_ok() { 0 } else { u64::MAX }
        };
        let queue = ring.map(|ring| Queue {
            taken: taken(&ring),
            ring,
        });
        Arc::new(Self {
            queue: Mutex::new(queue),
            made_here,
        })
    }

    /// Whether this is a fork's child, and the ring its parent's.
    pub fn is_forked(&self) -> bool {
        self.made_here.as_ref().is_some_and(ForkMark::is_forked)
    }

    /// Lets the ring use a buffer: by a slot in which the kernel has it pinned, or, where it refuses, by its addresses.
    ///
    /// # Safety
    ///
    /// The bytes stay mapped, and may be read and written by anybody at any time, until the value is dropped.
    pub unsafe fn register(self: &Arc<Self>, start: NonNull<u8>, len: usize) -> Registered {
        // SAFETY: by this function's contract.
        let slot = unsafe { self.take_slot(start, len) };
        // INVARIANT: by this function's contract, and the slot was just taken.
        Registered {
            ring: Arc::clone(self),
            start,
            len,
            slot,
        }
    }

    /// Lets the ring use a buffer by its addresses only.
    ///
    /// # Safety
    ///
    /// As for [`register`](Self::register).
    pub unsafe fn register_by_address(
        self: &Arc<Self>,
        start: NonNull<u8>,
        len: usize,
    ) -> Registered {
        // INVARIANT: by this function's contract.
        Registered {
            ring: Arc::clone(self),
            start,
            len,
            slot: None,
        }
    }

    /// # Safety
    ///
    /// As for [`register`](Self::register).
    unsafe fn take_slot(&self, start: NonNull<u8>, len: usize) -> Option<u16> {
        if self.is_forked() {
            return None;
        }
        let mut queue = self.queue.lock();
        let queue = queue.as_mut()?;
        let slot = queue.taken.trailing_ones();
        if slot >= SLOTS {
            return None;
        }
        let buffer = libc::iovec {
            iov_base: start.as_ptr().cast(),
            iov_len: len,
        };
        let submitter = queue.ring.ring.submitter();
        // SAFETY: by this function's contract the bytes are there until the slot is given back.
        unsafe { submitter.register_buffers_update(slot, &[buffer], None) }.ok()?;
        queue.taken |= 1 << slot;
        u16::try_from(slot).ok()
    }

    /// Makes transfers, and fills in the outcome of each when all are done.
    ///
    /// # Panics
    ///
    /// If a buffer is another ring's.
    pub fn run(self: &Arc<Self>, transfers: &mut [Transfer<'_>]) {
        for transfer in &mut *transfers {
            let ours = Arc::ptr_eq(self, &transfer.buffer.ring);
            assert!(ours, "a buffer is registered with another ring");
            transfer.outcome = Err(Errno::INPROGRESS);
        }
        let mut queue = self.queue.lock();
        if !self.is_forked()
            && let Some(Queue { ring, .. }) = &mut *queue
        {
            let entry = |transfer: &mut Transfer<'_>| transfer.entry();
            // SAFETY: by the invariant of the buffers, which are borrowed for as long as the transfers.
            let ran = unsafe { run_queued(&mut ring.ring, transfers, &entry, &Transfer::end) };
            if let Err(Broken) = ran {
                // What it never took is still in the queue, so nobody may enter it again. Its buffers end with it.
                *queue = None;
            }
        }
        for transfer in transfers {
            if transfer.outcome == Err(Errno::INPROGRESS) {
                transfer.outcome = transfer.call();
            }
        }
    }
}

impl Registered {
    /// How many bytes.
    #[must_use]
    pub const fn len_bytes(&self) -> usize {
        self.len
    }

    /// Whether the kernel has it pinned, or looks its pages up for each transfer.
    #[must_use]
    pub const fn is_registered(&self) -> bool {
        self.slot.is_some()
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let Some(slot) = self.slot.filter(|_| !self.ring.is_forked()) else {
            return;
        };
        let mut queue = self.ring.queue.lock();
        let Some(queue) = &mut *queue else { return };
        let nothing = libc::iovec {
            iov_base: ptr::null_mut(),
            iov_len: 0,
        };
        let submitter = queue.ring.ring.submitter();
        // SAFETY: an empty buffer needs no memory. The ring has no transfer under way, as it is not in use.
        let emptied =
            unsafe { submitter.register_buffers_update(u32::from(slot), &[nothing], None) };
        // A slot that the kernel did not empty is not used again.
        if emptied.is_ok() {
            queue.taken &= !(1 << slot);
        }
    }
}
