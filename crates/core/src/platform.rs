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
}
