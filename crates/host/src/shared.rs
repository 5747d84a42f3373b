//! Shared frames: memory that the CPU addresses, and that others may map, too: a memory file, or a file.
//!
//! The pmem driver keeps its bytes here; frame `n` is the bytes from `n * 4096` on. They are read and written by system
//! calls only, also where they are mapped: a file that somebody else truncates or a full file system is an error
//! then, and not a SIGBUS.

use core::ops::Range;
use core::ptr::{self, NonNull};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use pgmap_sync::Mutex;
use rustix::fs::{self, FallocateFlags, MemfdFlags, OFlags, SeekFrom};
use rustix::io::{Errno, pread, pwrite};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// What the kernel calls tmpfs and memory files.
const TMPFS_MAGIC: fs::FsWord = 0x0102_1994;

/// The bytes of a file, mapped as a whole.
///
/// # Invariants
///
/// `start` is a mapping of `bytes` bytes of `fd`, from its beginning on, which is ours until `drop`. No reference to these
/// bytes is ever made: other processes change them.
#[derive(Debug)]
pub struct SharedFrames {
    fd: OwnedFd,
    start: NonNull<u8>,
    bytes: usize,
    /// A part that had no hole when it was last looked at: the kernel looks at every page of it to find its end.
    dense: Mutex<Range<u64>>,
    is_memory: bool,
}

// SAFETY: the mapping is touched by system calls only, which any thread may make.
unsafe impl Send for SharedFrames {}
// SAFETY: as above; who writes where at the same time is the callers' business, as it is with a file.
unsafe impl Sync for SharedFrames {}

/// What a part of a file is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Extent {
    /// Bytes that somebody wrote.
    Data(Range<u64>),
    /// Nothing: it takes no room, and reads as zeros.
    Hole(Range<u64>),
}

impl SharedFrames {
    /// Memory of `bytes` bytes that read as zeros, which is gone with the last that has it.
    ///
    /// # Errors
    ///
    /// What the machine answers.
    pub fn memory(name: &str, bytes: u64) -> Result<Self, Errno> {
        // Nobody may seal it: it could not be revoked then.
        let fd = fs::memfd_create(name, MemfdFlags::CLOEXEC)?;
        fs::ftruncate(&fd, bytes)?;
        Self::of_file(fd, bytes)
    }

    /// The first `bytes` bytes of a file that is open for reading and writing, and is that long.
    ///
    /// # Errors
    ///
    /// What the machine answers.
    pub fn of_file(fd: OwnedFd, bytes: u64) -> Result<Self, Errno> {
        let bytes = usize::try_from(bytes).map_err(|_| Errno::FBIG)?;
        let is_memory = fs::fstatfs(&fd).is_ok_and(|system| system.f_type == TMPFS_MAGIC);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
        let at = unsafe { mmap(ptr::null_mut(), bytes, protection, MapFlags::SHARED, &fd, 0)? };
        let start = NonNull::new(at.cast()).ok_or(Errno::NOMEM)?;
        // INVARIANT: just mapped.
        Ok(Self {
            fd,
            start,
            bytes,
            dense: Mutex::new(0..0),
            is_memory,
        })
    }

    /// How many bytes.
    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// The file, for others to map.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether the bytes are memory and nothing else: a store through the mapping costs a store, and no page is written back.
    #[must_use]
    pub const fn is_memory(&self) -> bool {
        self.is_memory
    }

    /// Reads the bytes from `offset` on.
    ///
    /// # Errors
    ///
    /// What the machine answers; [`Errno::IO`] if the file has become shorter.
    pub fn read(&self, mut offset: u64, mut to: &mut [u8]) -> Result<(), Errno> {
        while !to.is_empty() {
            match pread(&self.fd, &mut *to, offset) {
                Ok(0) => return Err(Errno::IO),
                Ok(count) => {
                    to = &mut to[count..];
                    offset += count as u64;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Writes bytes at `offset`.
    ///
    /// # Errors
    ///
    /// What the machine answers; some bytes may have been written. [`Errno::INVAL`] for bytes beyond the end.
    pub fn write(&self, mut offset: u64, mut from: &[u8]) -> Result<(), Errno> {
        self.check(&(offset..offset.saturating_add(from.len() as u64)))?;
        while !from.is_empty() {
            match pwrite(&self.fd, from, offset) {
                Ok(0) => return Err(Errno::NOSPC),
                Ok(count) => {
                    from = &from[count..];
                    offset += count as u64;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Sends bytes to a socket straight from where they are, without a copy: as many as it takes without waiting. Until the
    /// peer has them, they are the bytes of that moment or of a later one. One thread at a time uses the socket.
    ///
    /// # Errors
    ///
    /// [`Errno::AGAIN`] if it takes none now; [`Errno::FAULT`] if the bytes cannot be had; what the socket answers.
    pub fn send(&self, range: Range<u64>, socket: BorrowedFd<'_>) -> Result<usize, Errno> {
        let (_, len) = self.check(&range)?;
        let flags = fs::fcntl_getfl(socket)?;
        // The call itself has no way to say that it is not to wait.
        fs::fcntl_setfl(socket, flags | OFlags::NONBLOCK)?;
        let mut offset = range.start;
        let sent = fs::sendfile(socket, &self.fd, Some(&mut offset), len);
        fs::fcntl_setfl(socket, flags)?;
        match sent {
            Ok(0) | Err(Errno::IO) if len > 0 => Err(Errno::FAULT),
            sent => sent,
        }
    }

    /// Receives bytes from a socket straight to where they belong: as many as there are without waiting. 0 at the end
    /// of the stream.
    ///
    /// # Errors
    ///
    /// [`Errno::AGAIN`] if there are none now; [`Errno::FAULT`] if the bytes cannot be put there, as on a full file system:
    /// they are still to be received then; what the socket answers.
    pub fn receive(&self, range: Range<u64>, socket: BorrowedFd<'_>) -> Result<usize, Errno> {
        let (at, len) = self.place(&range)?;
        let flags = libc::MSG_DONTWAIT;
        // SAFETY: by the type invariant these bytes stay mapped during the call, and nobody has a reference to them.
        let received = unsafe { libc::recv(socket.as_raw_fd(), at.as_ptr().cast(), len, flags) };
        usize::try_from(received).map_err(|_| last_errno())
    }

    /// Makes what was written durable, by whomever, through the mapping or past it.
    ///
    /// # Errors
    ///
    /// What the machine answers: then some of it is not.
    pub fn flush(&self) -> Result<(), Errno> {
        fs::fdatasync(&self.fd)
    }

    /// Gives back the room of these bytes: they read as zeros, also for those who map them. Nobody's mapping ends.
    ///
    /// # Errors
    ///
    /// [`Errno::OPNOTSUPP`] if the file system cannot; what else the machine answers.
    pub fn punch(&self, range: &Range<u64>) -> Result<(), Errno> {
        let (start, len) = self.check(range)?;
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fs::fallocate(&self.fd, how, start as u64, len as u64)?;
        *self.dense.lock() = 0..0;
        Ok(())
    }

    /// Makes these bytes zeros without giving back their room.
    ///
    /// # Errors
    ///
    /// [`Errno::OPNOTSUPP`] if the file system cannot, as tmpfs: write zeros then; what else the machine answers.
    pub fn zero(&self, range: &Range<u64>) -> Result<(), Errno> {
        let (start, len) = self.check(range)?;
        let how = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        fs::fallocate(&self.fd, how, start as u64, len as u64)
    }

    /// Takes room for these bytes, so that writing to them does not fail for want of it.
    ///
    /// # Errors
    ///
    /// [`Errno::OPNOTSUPP`] if the file system cannot; what else the machine answers.
    pub fn allocate(&self, range: &Range<u64>) -> Result<(), Errno> {
        let (start, len) = self.check(range)?;
        fs::fallocate(
            &self.fd,
            FallocateFlags::KEEP_SIZE,
            start as u64,
            len as u64,
        )
    }

    /// The parts of a range, in order, without gaps. A hole that is punched meanwhile may still be told as data.
    ///
    /// # Errors
    ///
    /// What the machine answers.
    pub fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>, Errno> {
        self.check(&range)?;
        let (mut extents, mut at) = (Vec::new(), range.start);
        while at < range.end {
            let dense = self.dense.lock().clone();
            if dense.contains(&at) {
                let end = dense.end.min(range.end);
                extents.push(Extent::Data(at..end));
                at = end;
                continue;
            }
            let data = match fs::seek(&self.fd, SeekFrom::Data(at)) {
                Ok(data) => data.min(range.end),
                Err(Errno::NXIO) => range.end,
                Err(errno) => return Err(errno),
            };
            if data > at {
                extents.push(Extent::Hole(at..data));
            }
            if data < range.end {
                let end = fs::seek(&self.fd, SeekFrom::Hole(data))?;
                *self.dense.lock() = data..end;
                at = end.min(range.end);
                extents.push(Extent::Data(data..at));
            } else {
                at = data;
            }
        }
        Ok(extents)
    }

    /// Takes the bytes from `start` on away from everybody, for ever: who touches a mapping of them gets SIGBUS.
    ///
    /// # Errors
    ///
    /// What the machine answers.
    pub fn revoke_from(&self, start: u64) -> Result<(), Errno> {
        fs::ftruncate(&self.fd, start)
    }

    /// Takes all bytes away from everybody, for ever: who touches a mapping of them gets SIGBUS.
    ///
    /// # Errors
    ///
    /// What the machine answers.
    pub fn revoke(&self) -> Result<(), Errno> {
        self.revoke_from(0)
    }

    /// How long the file is now: shorter than [`size_bytes`](Self::size_bytes) after a revocation, or if somebody else
    /// truncated it.
    ///
    /// # Errors
    ///
    /// What the machine answers.
    pub fn present_bytes(&self) -> Result<u64, Errno> {
        Ok(fs::fstat(&self.fd)?.st_size.cast_unsigned())
    }

    /// How much room the file takes; less than its length if it has holes.
    ///
    /// # Errors
    ///
    /// What the machine answers.
    pub fn room_bytes(&self) -> Result<u64, Errno> {
        // By definition in units of 512 bytes, whatever the file system's blocks are.
        Ok(fs::fstat(&self.fd)?.st_blocks.cast_unsigned() * 512)
    }

    fn place(&self, range: &Range<u64>) -> Result<(NonNull<u8>, usize), Errno> {
        let (start, len) = self.check(range)?;
        // SAFETY: by the type invariant the mapping has `bytes` bytes, and `start` is not more.
        Ok((unsafe { self.start.add(start) }, len))
    }

    /// The range as offset and length, if we have all of it.
    fn check(&self, range: &Range<u64>) -> Result<(usize, usize), Errno> {
        let within = range.start <= range.end && range.end <= self.size_bytes();
        let start = usize::try_from(range.start).map_err(|_| Errno::INVAL)?;
        let end = usize::try_from(range.end).map_err(|_| Errno::INVAL)?;
        within.then(|| (start, end - start)).ok_or(Errno::INVAL)
    }
}

impl Drop for SharedFrames {
    fn drop(&mut self) {
        // SAFETY: by the type invariant the mapping is ours, and nobody has a reference to its bytes.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
        debug_assert_eq!(unmapped, Ok(()), "a mapping of ours");
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
