//! Image files, and devices of device-dax: how they are found, made, locked and refused.
//!
//! Regions are opened through this. An image that is refused is left exactly as it was, and there is none if there was none.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use pgmap_host::device_dax::DeviceDax;
use pgmap_host::shared::SharedFrames;
use rustix::fs::{self, FileType, FlockOperation, Mode as Bits, OFlags};
use rustix::io::{Errno, fcntl_dupfd_cloexec, pread};

use super::made::{Made, What};
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
    /// It has bytes, and is shorter than any image.
    #[error("{} has {has} bytes that are no image (one has at least 4M): name another file, or add mode=raw to serve it as it is", .path.display())]
    NoImage {
        /// The file.
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

/// An image that is ours alone as long as its frames exist.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) frames: SharedFrames,
    /// What was not there before.
    pub(super) made: Option<Made>,
}

/// Opens an image, or makes one of `size_bytes`.
pub(super) fn open(
    path: &Path,
    size_bytes: Option<u64>,
    least_bytes: u64,
) -> Result<Image, ImageError> {
    if let Some(has) = size_bytes.filter(|asked| *asked < least_bytes) {
        let path = path.to_owned();
        return Err(ImageError::TooSmall { path, has });
    }
    let create = size_bytes.map_or(Create::Never, |_| Create::IfMissing);
    let (fd, made) = open_or_create(path, create)?;
    let stat = fs::fstat(&fd).map_err(failed(path, "looked at"))?;
    let device = DeviceDax::of(stat.st_rdev);
    match (FileType::from_raw_mode(stat.st_mode), device) {
        (FileType::CharacterDevice, Some(_)) => {}
        (kind, _) => regular(path, kind)?,
    }
    match fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::AGAIN) => return Err(ImageError::Locked(path.to_owned())),
        Err(errno) => return Err(failed(path, "locked")(errno)),
    }
    let mut opening = Opening {
        path,
        device,
        // INVARIANT: just locked, and `fd` lives until the frames have it.
        made: made.map(|what| Made {
            path: path.to_owned(),
            what,
        }),
        fd,
    };
    match opening.frames(size_bytes, least_bytes) {
        Ok(frames) => {
            let made = opening.made;
            Ok(Image { frames, made })
        }
        Err(error) => {
            if let Some(made) = opening.made {
                made.take_back(opening.fd.as_fd());
            }
            Err(error)
        }
    }
}

/// An image that is ours, and may still be refused.
struct Opening<'a> {
    path: &'a Path,
    device: Option<DeviceDax>,
    fd: OwnedFd,
    made: Option<Made>,
}

impl Opening<'_> {
    fn frames(
        &mut self,
        size_bytes: Option<u64>,
        least_bytes: u64,
    ) -> Result<SharedFrames, ImageError> {
        let failed = |what| failed(self.path, what);
        if self.made.is_some() {
            sync_directory(self.path).map_err(failed("kept in its directory"))?;
        }
        // Looked at again: somebody may have made it longer until it was locked.
        let stat = fs::fstat(&self.fd).map_err(failed("looked at"))?;
        let length = stat.st_size.cast_unsigned();
        let mut has = self.device.map_or(length, |device| device.bytes);
        let path = self.path.to_owned();
        match size_bytes {
            Some(asked) if has == 0 => {
                let what = What::Length;
                self.made.get_or_insert(Made { path, what });
                fs::ftruncate(&self.fd, asked).map_err(failed("made so large"))?;
                has = asked;
            }
            Some(asked) if asked != has => {
                return Err(ImageError::SizeDiffers { path, has, asked });
            }
            Some(_) | None => {}
        }
        if has < least_bytes {
            let blank = is_blank(&self.fd, has).map_err(failed("read"))?;
            let path = self.path.to_owned();
            return Err(if blank {
                ImageError::TooSmall { path, has }
            } else {
                ImageError::NoImage { path, has }
            });
        }
        // The lock is the open file's, and so of this and of that descriptor.
        let theirs = fcntl_dupfd_cloexec(&self.fd, 0).map_err(failed("opened again"))?;
        SharedFrames::of_file(theirs, has).map_err(|errno| match errno {
            Errno::OPNOTSUPP if self.device.is_some() => ImageError::NoWriteBack(self.path.into()),
            Errno::NOSYS if self.device.is_some() => ImageError::NoCopies(self.path.into()),
            errno => failed("mapped")(errno),
        })
    }
}

fn failed(path: &Path, what: &'static str) -> impl Fn(Errno) -> ImageError {
    move |errno| ImageError::Io {
        path: path.to_owned(),
        what,
        errno,
    }
}

/// Whether a small file has nothing but zeros.
fn is_blank(fd: &OwnedFd, has: u64) -> Result<bool, Errno> {
    let mut bytes = vec![0; usize::try_from(has).unwrap_or(0)];
    let read = pread(fd, &mut bytes, 0)?;
    Ok(bytes[..read].iter().all(|byte| *byte == 0))
}

/// Whether a file is made where there is none.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Create {
    IfMissing,
    Never,
}

/// Says, too, whether it made the file.
fn open_or_create(path: &Path, create: Create) -> Result<(OwnedFd, Option<What>), ImageError> {
    // Not to wait for the other end of a pipe; files do not care.
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let failed = failed(path, "opened for reading and writing");
    match fs::open(path, flags, Bits::empty()) {
        Err(Errno::NOENT) if create == Create::IfMissing => {}
        Err(Errno::NOENT) => return Err(ImageError::Missing(path.to_owned())),
        Err(Errno::ISDIR) => {
            regular(path, FileType::Directory)?;
            return Err(failed(Errno::ISDIR));
        }
        opened => return opened.map(|fd| (fd, None)).map_err(failed),
    }
    let bits = Bits::RUSR | Bits::WUSR;
    match fs::open(path, flags | OFlags::CREATE | OFlags::EXCL, bits) {
        // Somebody else made it meanwhile; or it is a link to where nothing is.
        Err(Errno::EXIST) => fs::open(path, flags | OFlags::CREATE, bits).map(|fd| (fd, None)),
        made => made.map(|fd| (fd, Some(What::File))),
    }
    .map_err(failed)
}

/// The name of a new file is to outlive a cut, like the bytes.
fn sync_directory(path: &Path) -> Result<(), Errno> {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let directory = fs::open(
        parent.unwrap_or(Path::new(".")),
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Bits::empty(),
    );
    directory.and_then(fs::fsync)
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
