//! Image files, and devices of device-dax: how they are found, made, locked and refused.
//!
//! Regions are opened through this. An image that is refused is left exactly as it was.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use pgmap_host::device_dax::DeviceDax;
use pgmap_host::shared::SharedFrames;
use rustix::fs::{self, FileType, FlockOperation, Mode as Bits, OFlags};
use rustix::io::Errno;

use super::namespace::LABEL_AREA_BYTES;

/// The least that a labelled image has: the label area, and a namespace of one granule.
pub(crate) const LEAST_BYTES: u64 = 2 * LABEL_AREA_BYTES;

/// Why a file cannot be used. The file is as it was.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ImageError {
    /// There is none, and nobody said how large one should be.
    #[error("there is no image {}: write {},size=1G to make one", .0.display(), .0.display())]
    Missing(PathBuf),
    /// It is no regular file, nor a device-dax.
    #[error("{} is {what}: name a regular file, or a device like /dev/dax0.0", .path.display())]
    NotAFile {
        /// What was named.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Another server has it, or a client of one that still maps it.
    #[error("{} is in use by another pgmap, or by a client that still maps it: end that first", .0.display())]
    Locked(PathBuf),
    /// Another size was asked for.
    #[error("{} has {has} bytes, not {asked}: leave size out, or name another file", .path.display())]
    SizeDiffers {
        /// The image.
        path: PathBuf,
        /// How long it is.
        has: u64,
        /// What was asked for.
        asked: u64,
    },
    /// It has no room for a label and a namespace.
    #[error("{} has {has} bytes, and an image needs at least {LEAST_BYTES} (4M): make it larger", .path.display())]
    TooSmall {
        /// The image.
        path: PathBuf,
        /// How long it is.
        has: u64,
    },
    /// Nobody knows here how to make a device's bytes durable.
    #[error("{} cannot be served: a device-dax is made durable by the CPU, and this pgmap knows that of x86-64 only", .0.display())]
    NoWriteBack(PathBuf),
    /// Such a device has no calls to read and write, and what stands in for them is forbidden.
    #[error("{} cannot be served: process_vm_readv and process_vm_writev are forbidden here: allow them (seccomp)", .0.display())]
    NoCopies(PathBuf),
    /// The machine refused.
    #[error("{} cannot be {what}: {errno}", .path.display())]
    Io {
        /// The image.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the machine answered.
        errno: Errno,
    },
}

/// Opens an image, or makes one of `size_bytes`; and keeps it for us alone as long as its frames exist.
pub(crate) fn open(
    path: &Path,
    size_bytes: Option<u64>,
    least_bytes: u64,
) -> Result<SharedFrames, ImageError> {
    let failed = |what| {
        move |errno| ImageError::Io {
            path: path.to_owned(),
            what,
            errno,
        }
    };
    if let Some(has) = size_bytes.filter(|asked| *asked < least_bytes) {
        let path = path.to_owned();
        return Err(ImageError::TooSmall { path, has });
    }
    let fd = open_or_create(
        path,
        size_bytes.map_or(Create::Never, |_| Create::IfMissing),
    )?;
    let stat = fs::fstat(&fd).map_err(failed("looked at"))?;
    let device = DeviceDax::of(stat.st_rdev);
    match (FileType::from_raw_mode(stat.st_mode), device) {
        (FileType::CharacterDevice, Some(_)) => {}
        (kind, _) => regular(path, kind)?,
    }
    match fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::AGAIN) => return Err(ImageError::Locked(path.to_owned())),
        Err(errno) => return Err(failed("locked")(errno)),
    }
    // Looked at again: somebody may have made it longer until it was locked.
    let stat = fs::fstat(&fd).map_err(failed("looked at"))?;
    let length = stat.st_size.cast_unsigned();
    let mut has = device.map_or(length, |device| device.bytes);
    match size_bytes {
        Some(asked) if has == 0 => {
            fs::ftruncate(&fd, asked).map_err(failed("made so large"))?;
            has = asked;
        }
        Some(asked) if asked != has => {
            let path = path.to_owned();
            return Err(ImageError::SizeDiffers { path, has, asked });
        }
        Some(_) | None => {}
    }
    if has < least_bytes {
        let path = path.to_owned();
        return Err(ImageError::TooSmall { path, has });
    }
    SharedFrames::of_file(fd, has).map_err(|errno| match errno {
        Errno::OPNOTSUPP if device.is_some() => ImageError::NoWriteBack(path.to_owned()),
        Errno::NOSYS if device.is_some() => ImageError::NoCopies(path.to_owned()),
        errno => failed("mapped")(errno),
    })
}

/// Whether a file is made where there is none.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Create {
    IfMissing,
    Never,
}

fn open_or_create(path: &Path, create: Create) -> Result<OwnedFd, ImageError> {
    // Not to wait for the other end of a pipe; files do not care.
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let failed = |errno| ImageError::Io {
        path: path.to_owned(),
        what: "opened for reading and writing",
        errno,
    };
    match fs::open(path, flags, Bits::empty()) {
        Err(Errno::NOENT) if create == Create::IfMissing => {}
        Err(Errno::NOENT) => return Err(ImageError::Missing(path.to_owned())),
        Err(Errno::ISDIR) => {
            regular(path, FileType::Directory)?;
            return Err(failed(Errno::ISDIR));
        }
        opened => return opened.map_err(failed),
    }
    let made = fs::open(path, flags | OFlags::CREATE, Bits::RUSR | Bits::WUSR).map_err(failed)?;
    // The name is to outlive a cut, like the bytes.
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let directory = fs::open(
        parent.unwrap_or(Path::new(".")),
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Bits::empty(),
    );
    directory.and_then(fs::fsync).map_err(failed)?;
    Ok(made)
}

fn regular(path: &Path, kind: FileType) -> Result<(), ImageError> {
    let what = match kind {
        FileType::RegularFile => return Ok(()),
        FileType::Directory => "a directory",
        FileType::BlockDevice => "a block device",
        FileType::CharacterDevice => "a character device",
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        FileType::Symlink | FileType::Unknown => "no file",
    };
    let path = path.to_owned();
    Err(ImageError::NotAFile { path, what })
}
