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

/// Memory for the tables that describe managed memory. `host` implements it with `mmap`.
///
/// # Safety
///
/// `reserve_zeroed` returns memory of at least `bytes` bytes, aligned to a page, that reads as zeros,
/// may be read and written by every thread, and overlaps nothing else until `release`.
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

    /// Nanoseconds since some moment that stays the same.
    fn now_ns(&self) -> u64;
}

/// Tables from the heap, for tests and models.
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

    fn now_ns(&self) -> u64 {
        0
    }
}
