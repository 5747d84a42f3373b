//! Opening a file to keep pages in.
//!
//! The file device calls this. What is opened is a regular file that no other run uses, and that held
//! nothing but pages before: a file that somebody else's bytes are in is never overwritten.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use pgmap_core::addr::{PAGE_SIZE, Page};
use rustix::fs::{self, FallocateFlags, FileType, FlockOperation, Mode, OFlags};
use rustix::io::{Errno, pread, pwrite};

/// What the first page of a file of pages starts with.
const MAGIC: &[u8] = b"pgmap pages, format 1; safe to delete\n";
/// The offset of the first slot.
pub(crate) const HEADER_BYTES: u64 = PAGE_SIZE as u64;

/// Whether reads and writes pass the page cache by.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Direct {
    /// They do if the file system can.
    #[default]
    Auto,
    /// They do not.
    Off,
}

/// Why a file cannot be a device. Each says what its user can do.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FileError {
    /// The path is a directory.
    #[error("{0} is a directory: name a file in it, such as {0}/cold.pgmap")]
    Directory(PathBuf),
    /// It is a device, a pipe or a socket.
    #[error("{0} is not a regular file: name a file that pgmap may create")]
    NotRegular(PathBuf),
    /// It cannot be opened.
    #[error("cannot open {path}: {errno}; name a file in a directory that you may write to")]
    Open {
        /// The path.
        path: PathBuf,
        /// What the system said.
        errno: Errno,
    },
    /// Another run has it.
    #[error(
        "{0} is in use, by another run or by another device of this one: give each a file of its own"
    )]
    InUse(PathBuf),
    /// It holds something else than pages.
    #[error("{0} exists and holds something else: delete it if you can spare it, or name another")]
    NotOurs(PathBuf),
    /// The file system has no room.
    #[error("no room for {size_bytes} bytes at {path}: give a smaller size, or make room")]
    NoRoom {
        /// The path.
        path: PathBuf,
        /// What was asked for.
        size_bytes: u64,
    },
    /// The size is less than a page, or more than the device can number.
    #[error("a file of {0} bytes is not possible: give a size from 4K to 16T")]
    Size(u64),
    /// There is no memory to keep track of so many pages.
    #[error("no memory for the table of {0} bytes of pages (0.2% of them): give a smaller size")]
    NoTable(u64),
    /// Something else went wrong.
    #[error("cannot prepare {path}: {errno}; name a file on another file system")]
    Prepare {
        /// The path.
        path: PathBuf,
        /// What the system said.
        errno: Errno,
    },
}

/// Opens or creates the file, with room for `size_bytes` bytes of pages after its header. Unless `keep`,
/// its name is gone when this returns.
pub(crate) fn open(
    path: &Path,
    size_bytes: u64,
    direct: Direct,
    keep: Keep,
) -> Result<OwnedFd, FileError> {
    let (fd, found) = open_or_create(path)?;
    let prepared = prepare(path, fd.as_fd(), size_bytes, direct);
    let unwanted = match (&prepared, found) {
        // INVARIANT: `prepare` has found that the file is ours.
        (Ok(()), Found::Old | Found::New) => keep == Keep::Unlink,
        (Err(_), Found::New) => true,
        (Err(_), Found::Old) => false,
    };
    if unwanted {
        let unlinked = fs::unlink(path);
        prepared?;
        unlinked.map_err(|errno| FileError::Prepare {
            path: path.to_owned(),
            errno,
        })?;
    } else {
        prepared?;
    }
    Ok(fd)
}

/// What happens to the file's name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Keep {
    Name,
    Unlink,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Found {
    Old,
    New,
}

fn open_or_create(path: &Path) -> Result<(OwnedFd, Found), FileError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    // The pages are a program's memory: nobody else's business.
    let mode = Mode::RUSR | Mode::WUSR;
    let opened = match fs::open(path, flags | OFlags::CREATE | OFlags::EXCL, mode) {
        Err(Errno::EXIST) => fs::open(path, flags, mode).map(|fd| (fd, Found::Old)),
        created => created.map(|fd| (fd, Found::New)),
    };
    opened.map_err(|errno| match errno {
        Errno::ISDIR => FileError::Directory(path.to_owned()),
        Errno::NXIO => FileError::NotRegular(path.to_owned()),
        errno => FileError::Open {
            path: path.to_owned(),
            errno,
        },
    })
}

fn prepare(
    path: &Path,
    fd: BorrowedFd<'_>,
    size_bytes: u64,
    direct: Direct,
) -> Result<(), FileError> {
    let failed = |errno| FileError::Prepare {
        path: path.to_owned(),
        errno,
    };
    let stat = fs::fstat(fd).map_err(failed)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(FileError::NotRegular(path.to_owned()));
    }
    fs::flock(fd, FlockOperation::NonBlockingLockExclusive).map_err(|errno| match errno {
        Errno::WOULDBLOCK => FileError::InUse(path.to_owned()),
        errno => failed(errno),
    })?;
    if !is_ours(fd).map_err(failed)? {
        return Err(FileError::NotOurs(path.to_owned()));
    }
    let no_room = |errno| match errno {
        Errno::NOSPC | Errno::DQUOT | Errno::FBIG => FileError::NoRoom {
            path: path.to_owned(),
            size_bytes,
        },
        errno => failed(errno),
    };
    allocate(fd, HEADER_BYTES + size_bytes).map_err(no_room)?;
    start(fd, direct).map_err(no_room)
}

/// Whether the file is empty, or holds pages of an earlier run.
fn is_ours(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    let mut start = [0; MAGIC.len()];
    let len = pread(fd, &mut start, 0)?;
    Ok(len == 0 || start == MAGIC)
}

/// Gives the file its length, and its blocks if the file system can do that ahead of time.
fn allocate(fd: BorrowedFd<'_>, len: u64) -> Result<(), Errno> {
    // Asked first: some file systems fill themselves up before they find that it is not enough.
    if available(fd)?.is_some_and(|bytes| bytes < len) {
        return Err(Errno::NOSPC);
    }
    fs::ftruncate(fd, len)?;
    match fs::fallocate(fd, FallocateFlags::empty(), 0, len) {
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        Err(errno) => {
            // What it did get is given back.
            fs::ftruncate(fd, 0)?;
            Err(errno)
        }
    }
}

/// Bytes that the file can have; `None` if the file system does not count them.
fn available(fd: BorrowedFd<'_>) -> Result<Option<u64>, Errno> {
    let system = fs::fstatvfs(fd)?;
    let held = u64::try_from(fs::fstat(fd)?.st_blocks)
        .unwrap_or(0)
        .saturating_mul(512);
    let free = system.f_bavail.saturating_mul(system.f_frsize);
    Ok((system.f_blocks > 0).then(|| free.saturating_add(held)))
}

/// Writes the header, past the page cache if that works here.
fn start(fd: BorrowedFd<'_>, direct: Direct) -> Result<(), Errno> {
    let mut header = Page::ZERO;
    header.0[..MAGIC.len()].copy_from_slice(MAGIC);
    let buffered = fs::fcntl_getfl(fd)? - OFlags::NONBLOCK;
    if direct == Direct::Auto {
        let works = fs::fcntl_setfl(fd, buffered | OFlags::DIRECT)
            .and_then(|()| pwrite(fd, &header.0, 0))
            // A file system may take the flag, and fail at the first read.
            .and_then(|_| pread(fd, &mut header.0, 0));
        if works == Ok(PAGE_SIZE) {
            return Ok(());
        }
    }
    fs::fcntl_setfl(fd, buffered)?;
    match pwrite(fd, &header.0, 0)? {
        PAGE_SIZE => Ok(()),
        _ => Err(Errno::NOSPC),
    }
}
