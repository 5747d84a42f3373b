//! Shared frames: memory that the CPU addresses, and that others may map, too: a memory file, a file, huge pages, or a
//! device-dax.
//!
//! The pmem driver keeps its bytes here; frame `n` is the bytes from `n * 4096` on. They are read and written by system
//! calls only, also where they are mapped: a file that somebody else truncates, a full file system or a pool without huge pages is
//! an error then, and not a SIGBUS.

pub(crate) mod mapped;
#[cfg(test)]
mod tests;
mod write_back;

use core::ops::Range;
use core::ptr::{self, NonNull};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use pgmap_core::addr::PAGE_SIZE;
use pgmap_sync::Mutex;
use rustix::fs::{self, FallocateFlags, FileType, MemfdFlags, OFlags, SeekFrom};
use rustix::io::{Errno, pread, pwrite};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::device_dax::DeviceDax;
use write_back::WriteBack;

/// What the kernel calls tmpfs and memory files.
const TMPFS_MAGIC: fs::FsWord = 0x0102_1994;
/// What the kernel calls hugetlbfs, and memory files of huge pages.
const HUGETLBFS_MAGIC: fs::FsWord = 0x9584_58f6;
/// Where in a memory file's flags the size of its pages is.
const MFD_HUGE_SHIFT: u32 = 26;
/// Bytes that are copied before they are sent, where the file cannot be sent from.
const BOUNCE_BYTES: usize = 64 << 10;

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
    kind: Kind,
}

/// What the file is, and so by which calls its bytes are moved.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// A file of a file system: by its own calls.
    File(MapSync),
    /// A memory file: by its own calls.
    Memory,
    /// Huge pages of so many bytes: they are read by the file's own calls, for which a hole needs no page, and written through
    /// the mapping, for want of calls.
    Huge(u64),
    /// A device-dax, mapped in units of so many bytes: through the mapping. Whatever was stored is written back from the CPU's
    /// caches at once.
    Device(u64, WriteBack),
}

/// Whether stores through a mapping are durable once whoever stored has written back the CPU's caches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MapSync {
    /// They are: the mapping is of persistent memory itself, and the file's metadata is durable before a page can be written.
    Yes,
    /// They are not: `fdatasync` makes them durable.
    No,
}

// SAFETY: the mapping is touched by system calls and write-backs of cache lines only, which any thread may make.
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

    /// The same, of huge pages of `page_bytes` bytes, of which `bytes` is a multiple. Their room is taken at once.
    ///
    /// # Errors
    ///
    /// [`Errno::NOMEM`] if the pool has too few: nobody was kept from one meanwhile. [`Errno::NOSYS`] as for
    /// [`of_file`](Self::of_file); what else the machine answers.
    pub fn huge(name: &str, bytes: u64, page_bytes: u64) -> Result<Self, Errno> {
        let size = MemfdFlags::from_bits_retain(page_bytes.trailing_zeros() << MFD_HUGE_SHIFT);
        let fd = fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | size)?;
        fs::ftruncate(&fd, bytes)?;
        mapped::check()?;
        // To map is to reserve.
        let frames = Self::mapped(fd, bytes, Kind::Huge(page_bytes), MapFlags::SHARED)?;
        frames.allocate(&(0..bytes))?;
        Ok(frames)
    }

    /// The first `bytes` bytes of a file that is open for reading and writing, and is that long.
    ///
    /// # Errors
    ///
    /// What the machine answers; [`Errno::NODEV`] for a character device that is no device-dax, [`Errno::OPNOTSUPP`] for one
    /// whose bytes are not known here to be made durable; [`Errno::NOSYS`] for one, and for huge pages, if `process_vm_readv` and
    /// `process_vm_writev` are forbidden.
    pub fn of_file(fd: OwnedFd, bytes: u64) -> Result<Self, Errno> {
        let stat = fs::fstat(&fd)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice {
            let device = DeviceDax::of(stat.st_rdev).ok_or(Errno::NODEV)?;
            let write_back = write_back::of_this_cpu().ok_or(Errno::OPNOTSUPP)?;
            mapped::check()?;
            let kind = Kind::Device(device.align_bytes, write_back);
            return Self::mapped(fd, bytes, kind, MapFlags::SHARED);
        }
        let system = fs::fstatfs(&fd)?;
        match system.f_type {
            TMPFS_MAGIC => Self::mapped(fd, bytes, Kind::Memory, MapFlags::SHARED),
            HUGETLBFS_MAGIC => {
                mapped::check()?;
                let kind = Kind::Huge(system.f_bsize.cast_unsigned());
                // A reservation would outlive us: what others have punched stays everybody's.
                Self::mapped(fd, bytes, kind, MapFlags::SHARED | MapFlags::NORESERVE)
            }
            _ => {
                let sync = MapFlags::SHARED_VALIDATE | MapFlags::SYNC;
                Self::mapped(fd, bytes, Kind::File(MapSync::Yes), sync)
            }
        }
    }

    /// Whether a file can be mapped with [`MapSync::Yes`] is found out by trying.
    fn mapped(fd: OwnedFd, bytes: u64, kind: Kind, flags: MapFlags) -> Result<Self, Errno> {
        let bytes = usize::try_from(bytes).map_err(|_| Errno::FBIG)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let map = |flags| {
            // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
            unsafe { mmap(ptr::null_mut(), bytes, protection, flags, &fd, 0) }
        };
        let (at, kind) = match (map(flags), kind) {
            (Err(_), Kind::File(MapSync::Yes)) => (map(MapFlags::SHARED)?, Kind::File(MapSync::No)),
            (mapped, kind) => (mapped?, kind),
        };
        let start = NonNull::new(at.cast()).ok_or(Errno::NOMEM)?;
        // INVARIANT: just mapped.
        Ok(Self {
            fd,
            start,
            bytes,
            dense: Mutex::new(0..0),
            kind,
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
        match self.kind {
            Kind::Memory | Kind::Huge(_) | Kind::Device(..) => true,
            Kind::File(_) => false,
        }
    }

    /// The unit in which the bytes can be mapped, in bytes.
    #[must_use]
    pub const fn unit_bytes(&self) -> u64 {
        match self.kind {
            Kind::File(_) | Kind::Memory => PAGE_SIZE as u64,
            Kind::Huge(unit) | Kind::Device(unit, _) => unit,
        }
    }

    /// Whether who maps the bytes makes his stores durable by the CPU; none for memory, which nothing makes durable.
    #[must_use]
    pub const fn map_sync(&self) -> Option<MapSync> {
        match self.kind {
            Kind::File(sync) => Some(sync),
            Kind::Device(..) => Some(MapSync::Yes),
            Kind::Memory | Kind::Huge(_) => None,
        }
    }

    /// Reads the bytes from `offset` on.
    ///
    /// # Errors
    ///
    /// What the machine answers; [`Errno::IO`] if the file has become shorter.
    pub fn read(&self, mut offset: u64, mut to: &mut [u8]) -> Result<(), Errno> {
        while !to.is_empty() {
            let read = match self.kind {
                Kind::File(_) | Kind::Memory | Kind::Huge(_) => pread(&self.fd, &mut *to, offset),
                Kind::Device(..) => self.load(offset, to),
            };
            match read {
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
    /// What the machine answers; some bytes may have been written. [`Errno::INVAL`] for bytes beyond the end;
    /// [`Errno::NOSPC`] for a hole, if there is no huge page left to fill it.
    pub fn write(&self, mut offset: u64, mut from: &[u8]) -> Result<(), Errno> {
        self.check(&(offset..offset.saturating_add(from.len() as u64)))?;
        while !from.is_empty() {
            let written = match self.kind {
                Kind::File(_) | Kind::Memory => pwrite(&self.fd, from, offset),
                Kind::Huge(_) | Kind::Device(..) => self.store(offset, from),
            };
            match written {
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
        match self.kind {
            Kind::File(_) | Kind::Memory => self.send_file(&range, socket),
            Kind::Huge(_) => self.send_copy(&range, socket),
            Kind::Device(..) => {
                let (at, len) = self.place(&range)?;
                // SAFETY: by the type invariant these bytes stay mapped during the call.
                unsafe { mapped::send(at, len, socket) }
            }
        }
    }

    fn send_file(&self, range: &Range<u64>, socket: BorrowedFd<'_>) -> Result<usize, Errno> {
        let (_, len) = self.check(range)?;
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

    /// Through a buffer: to send from the mapping would fill its holes with pages.
    fn send_copy(&self, range: &Range<u64>, socket: BorrowedFd<'_>) -> Result<usize, Errno> {
        let (_, len) = self.check(range)?;
        let mut bytes = vec![0; len.min(BOUNCE_BYTES)];
        self.read(range.start, &mut bytes)
            .map_err(|_| Errno::FAULT)?;
        // SAFETY: our own bytes.
        unsafe { mapped::send(NonNull::from(&mut bytes[..]).cast(), bytes.len(), socket) }
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
        // SAFETY: by the type invariant these bytes stay mapped during the call, and nobody has a reference to them.
        let received = unsafe { mapped::receive(at, len, socket)? };
        self.write_back(at, received);
        Ok(received)
    }

    /// Makes what was written durable, by whomever, through the mapping or past it. Of a device-dax this is what was written here,
    /// and is durable already: who maps it writes back what he stores himself.
    ///
    /// # Errors
    ///
    /// What the machine answers: then some of it is not.
    pub fn flush(&self) -> Result<(), Errno> {
        match self.kind {
            Kind::File(_) | Kind::Memory | Kind::Huge(_) => fs::fdatasync(&self.fd),
            Kind::Device(..) => Ok(()),
        }
    }

    /// Gives back the room of these bytes: they read as zeros, also for those who map them. Nobody's mapping ends.
    ///
    /// # Errors
    ///
    /// [`Errno::OPNOTSUPP`] if the file system cannot, or if no whole page is among them; what else the machine answers.
    pub fn punch(&self, range: &Range<u64>) -> Result<(), Errno> {
        let (start, len) = self.check(range)?;
        match self.kind {
            Kind::File(_) | Kind::Memory => {}
            Kind::Huge(page_bytes) => return self.punch_huge(range, page_bytes),
            Kind::Device(..) => return Err(Errno::OPNOTSUPP),
        }
        self.fallocate(
            FallocateFlags::PUNCH_HOLE,
            start as u64..(start + len) as u64,
        )?;
        *self.dense.lock() = 0..0;
        Ok(())
    }

    /// Whole pages go; of the others, a part becomes zeros. A hole among these stays one: to give back takes no page.
    fn punch_huge(&self, range: &Range<u64>, page_bytes: u64) -> Result<(), Errno> {
        let whole = range.start.next_multiple_of(page_bytes)..range.end / page_bytes * page_bytes;
        if whole.start >= whole.end {
            return Err(Errno::OPNOTSUPP);
        }
        self.fallocate(FallocateFlags::PUNCH_HOLE, whole.clone())?;
        self.clear(range.start..whole.start)?;
        self.clear(whole.end..range.end)
    }

    /// Writes zeros where there are none.
    fn clear(&self, range: Range<u64>) -> Result<(), Errno> {
        let mut bytes = [0; PAGE_SIZE];
        for start in range.clone().step_by(PAGE_SIZE) {
            let len = usize::try_from(range.end - start).unwrap_or(PAGE_SIZE);
            let part = &mut bytes[..len.min(PAGE_SIZE)];
            self.read(start, part)?;
            if part.iter().any(|byte| *byte != 0) {
                part.fill(0);
                self.write(start, part)?;
            }
        }
        Ok(())
    }

    /// Makes these bytes zeros without giving back their room.
    ///
    /// # Errors
    ///
    /// [`Errno::OPNOTSUPP`] if the file system cannot, as tmpfs: write zeros then; what else the machine answers.
    pub fn zero(&self, range: &Range<u64>) -> Result<(), Errno> {
        self.check(range)?;
        match self.kind {
            Kind::File(_) | Kind::Memory => {
                self.fallocate(FallocateFlags::ZERO_RANGE, range.clone())
            }
            Kind::Huge(_) | Kind::Device(..) => Err(Errno::OPNOTSUPP),
        }
    }

    /// Takes room for these bytes, so that writing to them does not fail for want of it.
    ///
    /// # Errors
    ///
    /// [`Errno::OPNOTSUPP`] if the file system cannot; what else the machine answers.
    pub fn allocate(&self, range: &Range<u64>) -> Result<(), Errno> {
        self.check(range)?;
        match self.kind {
            Kind::File(_) | Kind::Memory | Kind::Huge(_) => {
                self.fallocate(FallocateFlags::empty(), range.clone())
            }
            // It has all of its room.
            Kind::Device(..) => Ok(()),
        }
    }

    fn fallocate(&self, how: FallocateFlags, range: Range<u64>) -> Result<(), Errno> {
        let how = how | FallocateFlags::KEEP_SIZE;
        loop {
            match fs::fallocate(&self.fd, how, range.start, range.end - range.start) {
                // Huge pages are cleared one by one, and what was done stays done.
                Err(Errno::INTR) => {}
                done => return done,
            }
        }
    }

    /// The parts of a range, in order, without gaps. A hole that is punched meanwhile may still be told as data.
    ///
    /// # Errors
    ///
    /// What the machine answers.
    pub fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>, Errno> {
        self.check(&range)?;
        match self.kind {
            Kind::File(_) | Kind::Memory => {}
            // Neither can tell.
            Kind::Huge(_) | Kind::Device(..) => return Ok(vec![Extent::Data(range)]),
        }
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
        match self.kind {
            Kind::File(_) | Kind::Memory | Kind::Huge(_) => {
                Ok(fs::fstat(&self.fd)?.st_size.cast_unsigned())
            }
            Kind::Device(..) => Ok(self.size_bytes()),
        }
    }

    /// How much room the file takes; less than its length if it has holes.
    ///
    /// # Errors
    ///
    /// What the machine answers.
    pub fn room_bytes(&self) -> Result<u64, Errno> {
        match self.kind {
            // By definition in units of 512 bytes, whatever the file system's blocks are.
            Kind::File(_) | Kind::Memory | Kind::Huge(_) => {
                Ok(fs::fstat(&self.fd)?.st_blocks.cast_unsigned() * 512)
            }
            Kind::Device(..) => Ok(self.size_bytes()),
        }
    }

    /// Copies bytes from the mapping. Says how many.
    fn load(&self, offset: u64, to: &mut [u8]) -> Result<usize, Errno> {
        let (at, _) = self.place(&(offset..offset.saturating_add(to.len() as u64)))?;
        // SAFETY: by the type invariant these bytes are mapped, and nobody has a reference to them.
        let loaded = unsafe { mapped::load(at, to) };
        loaded.map_err(|errno| {
            if errno == Errno::FAULT {
                Errno::IO
            } else {
                errno
            }
        })
    }

    /// Copies bytes to the mapping, durably if it is a device's. Says how many.
    fn store(&self, offset: u64, from: &[u8]) -> Result<usize, Errno> {
        let (at, _) = self.place(&(offset..offset.saturating_add(from.len() as u64)))?;
        // SAFETY: by the type invariant these bytes are mapped, and nobody has a reference to them.
        let stored = match unsafe { mapped::store(at, from) } {
            // The page is gone, or there is none to be had.
            Err(Errno::FAULT) if self.present_bytes()? > offset => match self.kind {
                Kind::Huge(_) => Err(Errno::NOSPC),
                Kind::File(_) | Kind::Memory | Kind::Device(..) => Err(Errno::IO),
            },
            Err(Errno::FAULT) => Err(Errno::IO),
            stored => stored,
        }?;
        self.write_back(at, stored);
        Ok(stored)
    }

    /// Makes durable what was just stored in a device.
    fn write_back(&self, at: NonNull<u8>, len: usize) {
        match self.kind {
            // SAFETY: these bytes are mapped by the type invariant, and have their pages: the kernel has just stored there.
            Kind::Device(_, write_back) => unsafe { write_back(at, len) },
            Kind::File(_) | Kind::Memory | Kind::Huge(_) => {}
        }
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
