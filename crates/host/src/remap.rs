//! `memremap` of a device's file.
//!
//! A mapping of a file has the caches of the file's memory, whatever is asked for: the mode is what the driver promises to do for its
//! stores to last, flush each (write-through), or stream and fence (write-combining).

use core::fmt;
use core::ptr::{self, NonNull};
use std::os::fd::OwnedFd;

use pgmap_core::addr::{PAGE_SIZE, Pfn, PfnRange};
use pgmap_core::iomem::Remapper;
use pgmap_core::memtype::CacheMode;
use pgmap_core::platform::BackError;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A device's file, whose first byte is the first of some frame.
pub struct FileRemapper {
    file: OwnedFd,
    first: Pfn,
}

impl FileRemapper {
    /// A file, and the frame at its beginning.
    #[must_use]
    pub const fn new(file: OwnedFd, first: Pfn) -> Self {
        Self { file, first }
    }
}

impl fmt::Debug for FileRemapper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileRemapper")
            .field("first", &self.first)
            .finish_non_exhaustive()
    }
}

fn bytes(range: PfnRange) -> Option<usize> {
    usize::try_from(range.count()).ok()?.checked_mul(PAGE_SIZE)
}

// SAFETY: a fresh shared mapping may be read and written by every thread until it is unmapped.
unsafe impl Remapper for FileRemapper {
    fn map(&self, range: PfnRange, _: CacheMode) -> Result<NonNull<u8>, BackError> {
        let page = range.start().get().checked_sub(self.first.get());
        let (Some(page), Some(bytes)) = (page, bytes(range)) else {
            return Err(BackError::Unsupported);
        };
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let offset = page * PAGE_SIZE as u64;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe {
            mmap(
                ptr::null_mut(),
                bytes,
                protection,
                MapFlags::SHARED,
                &self.file,
                offset,
            )
        };
        let start = start.map_err(|errno| BackError::Refused(errno.raw_os_error()))?;
        NonNull::new(start.cast()).ok_or(BackError::Unsupported)
    }

    unsafe fn unmap(&self, address: NonNull<u8>, range: PfnRange, _: CacheMode) {
        if let Some(bytes) = bytes(range) {
            // SAFETY: by this function's contract `map` made it, for the same range, and nobody uses it.
            let _ = unsafe { munmap(address.as_ptr().cast(), bytes) };
        }
    }

    fn direct(&self, _: PfnRange) -> Option<NonNull<u8>> {
        // RAM of the map is where `Mmu` puts it, which is no business of a device's file.
        None
    }
}
