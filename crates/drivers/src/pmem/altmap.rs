//! The metadata of a namespace's frames, kept on the image behind the namespace's bytes (MAP-8).
//!
//! Core maps these pages and counts in them. They have their room beforehand, so that a full file system is an error at the start and
//! no SIGBUS; whoever truncates an image that is in use takes away the server's memory.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use pgmap_core::addr::{PAGE_SIZE, Pfn};
use pgmap_core::driver::{AltmapOps, DeviceError};
use pgmap_core::platform::{DeviceFile, DevicePages};
use rustix::io::Errno;

use super::medium::{Medium, write_zeros};

const PAGE: u64 = PAGE_SIZE as u64;

/// The pages of an image.
#[derive(Debug)]
pub(super) struct ImagePages {
    pub(super) medium: Arc<dyn Medium>,
    /// The device's first frame.
    pub(super) first: Pfn,
    /// Where on the medium that is.
    pub(super) start: u64,
}

impl ImagePages {
    fn offset(&self, page: Pfn) -> u64 {
        self.start + (page.get() - self.first.get()) * PAGE
    }
}

impl AltmapOps for ImagePages {
    fn pages(&self, first: Pfn) -> DevicePages {
        // A medium without frames has no file: the machine refuses that number.
        let file = self
            .medium
            .frames()
            .map_or(-1, |frames| frames.fd().as_raw_fd());
        DevicePages {
            file: DeviceFile(file),
            offset_bytes: self.offset(first),
        }
    }

    fn clear(&self, first: Pfn, count: u64) -> Result<(), DeviceError> {
        let range = self.offset(first)..self.offset(first) + count * PAGE;
        let room = match self.medium.frames().map(|frames| frames.allocate(&range)) {
            // Written zeros take room, too.
            None | Some(Ok(()) | Err(Errno::OPNOTSUPP)) => Ok(()),
            Some(Err(errno)) => Err(errno),
        };
        room.and_then(|()| write_zeros(&*self.medium, range))
            .map_err(|errno| DeviceError::Io(errno.raw_os_error()))
    }
}
