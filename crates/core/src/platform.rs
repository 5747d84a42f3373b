//! What core asks of the machine that it runs on.

use core::fmt;
use core::ptr::NonNull;

/// The machine asked for memory that it does not have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the machine has no address space for a table of {bytes} bytes")]
pub struct OutOfAddressSpace {
    /// What was asked for.
    pub bytes: usize,
}

/// What the platform knows a device's file by: on Linux a descriptor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceFile(pub i32);

/// Pages of a device, from a place in its file on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DevicePages {
    /// The device's file.
    pub file: DeviceFile,
    /// Where in it the first page begins, in bytes.
    pub offset_bytes: u64,
}

/// The machine does not put a device's pages in the place of its own, or does not take them out again.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BackError {
    /// This platform never does.
    #[error("this machine cannot keep its tables on a device")]
    Unsupported,
    /// The machine refused: the errno that it gave.
    #[error("the machine refused with errno {0}")]
    Refused(i32),
}

/// Memory for the tables that describe managed memory. `host` implements it with `mmap`.
///
/// # Safety
///
/// `reserve_zeroed` returns memory of at least `bytes` bytes, aligned to a page, that reads as zeros,
/// may be read and written by every thread, and overlaps nothing else until `release`. It stays readable and writable
/// while its pages are discarded, or replaced by a device's.
pub unsafe trait Platform: Send + Sync + fmt::Debug {
    /// Reserves zeroed memory that costs RAM only where it is touched.
    ///
    /// # Errors
    ///
    /// [`OutOfAddressSpace`] if the machine refuses.
    fn reserve_zeroed(&self, bytes: usize) -> Result<NonNull<u8>, OutOfAddressSpace>;

    /// Gives the memory back.
    ///
    /// # Safety
    ///
    /// `memory` came from `reserve_zeroed` with the same `bytes`, and nobody uses it any more.
    unsafe fn release(&self, memory: NonNull<u8>, bytes: usize);

    /// Gives whole pages of a reservation back, so that they cost nothing and read as zeros. False if the platform cannot:
    /// then they are as they were.
    ///
    /// # Safety
    ///
    /// The bytes are whole pages of one reservation, and nobody needs what is in them.
    unsafe fn discard(&self, memory: NonNull<u8>, bytes: usize) -> bool {
        let _ = (memory, bytes);
        false
    }

    /// Puts a device's pages in the place of whole pages of a reservation, shared with the device (MAP-8).
    ///
    /// # Errors
    ///
    /// [`BackError`]; then nothing has changed.
    ///
    /// # Safety
    ///
    /// The bytes are whole pages of one reservation, and nobody needs what is in them. The device's pages exist and
    /// nobody else uses them, until [`unback`](Self::unback) or `release`.
    unsafe fn back(
        &self,
        memory: NonNull<u8>,
        bytes: usize,
        pages: DevicePages,
    ) -> Result<(), BackError> {
        let _ = (memory, bytes, pages);
        Err(BackError::Unsupported)
    }

    /// Puts the platform's own pages, which read as zeros, in the place of a device's.
    ///
    /// # Errors
    ///
    /// [`BackError`]; then nothing has changed.
    ///
    /// # Safety
    ///
    /// The bytes are what one call of [`back`](Self::back) replaced, and nobody needs what is in them.
    unsafe fn unback(&self, memory: NonNull<u8>, bytes: usize) -> Result<(), BackError> {
        let _ = (memory, bytes);
        Err(BackError::Unsupported)
    }

    /// Nanoseconds since some moment that stays the same; it may stand still for some milliseconds.
    fn now_ns(&self) -> u64;
}

/// Tables from the heap, for tests and models. A device's pages are pretended: the tables stay on the heap.
#[cfg(feature = "std")]
#[derive(Clone, Copy, Debug)]
pub struct HeapPlatform;

#[cfg(feature = "std")]
impl HeapPlatform {
    fn layout(bytes: usize) -> Option<core::alloc::Layout> {
        core::alloc::Layout::from_size_align(bytes.max(1), 4096).ok()
    }
}

// SAFETY: `alloc_zeroed` returns zeroed memory of the layout's size and alignment, which is nobody else's until it
// is deallocated.
#[cfg(feature = "std")]
unsafe impl Platform for HeapPlatform {
    fn reserve_zeroed(&self, bytes: usize) -> Result<NonNull<u8>, OutOfAddressSpace> {
        let layout = Self::layout(bytes).ok_or(OutOfAddressSpace { bytes })?;
        // SAFETY: the layout's size is not zero.
        let memory = unsafe { alloc::alloc::alloc_zeroed(layout) };
        NonNull::new(memory).ok_or(OutOfAddressSpace { bytes })
    }

    unsafe fn release(&self, memory: NonNull<u8>, bytes: usize) {
        if let Some(layout) = Self::layout(bytes) {
            // SAFETY: by this function's contract the memory came from `reserve_zeroed` with the same size.
            unsafe { alloc::alloc::dealloc(memory.as_ptr(), layout) };
        }
    }

    unsafe fn back(&self, _: NonNull<u8>, _: usize, _: DevicePages) -> Result<(), BackError> {
        Ok(())
    }

    unsafe fn unback(&self, _: NonNull<u8>, _: usize) -> Result<(), BackError> {
        Ok(())
    }

    fn now_ns(&self) -> u64 {
        0
    }
}
