//! Tables that are as long as memory is, and cost RAM only where they are used.

#[cfg(any(loom, shuttle))]
use alloc::vec::Vec;
#[cfg(any(loom, shuttle))]
use core::ops::Index;

use pgmap_sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

use crate::platform::{OutOfAddressSpace, Platform};

/// Types of which zeroed memory is a value that many threads may share.
///
/// # Safety
///
/// All-zero bytes are a valid value, the value may be shared between threads, and it needs no drop.
pub unsafe trait Zeroable: Sync {}

// SAFETY: an atomic integer has the layout of its integer, is shareable, and needs no drop. (The models' atomics
// are more than that: there a slice is an ordinary vector.)
unsafe impl Zeroable for AtomicU64 {}
// SAFETY: as above.
unsafe impl Zeroable for AtomicU32 {}
// SAFETY: as above.
unsafe impl Zeroable for AtomicU8 {}

/// A slice of zeroed values; in the models, whose atomics are more than their bytes, an ordinary vector.
#[cfg(any(loom, shuttle))]
#[derive(Debug)]
pub struct ZeroedSlice<T: Zeroable>(Vec<T>);

#[cfg(any(loom, shuttle))]
impl<T: Zeroable + Default> ZeroedSlice<T> {
    /// `len` values of zero.
    ///
    /// # Errors
    ///
    /// None: a model that is too large aborts.
    pub fn new(_: &'static dyn Platform, len: usize) -> Result<Self, OutOfAddressSpace> {
        Ok(Self((0..len.max(1)).map(|_| T::default()).collect()))
    }
}

#[cfg(any(loom, shuttle))]
impl<T: Zeroable> Index<usize> for ZeroedSlice<T> {
    type Output = T;

    fn index(&self, index: usize) -> &T {
        &self.0[index]
    }
}

#[cfg(not(any(loom, shuttle)))]
pub use reserved::ZeroedSlice;

#[cfg(not(any(loom, shuttle)))]
mod reserved {
    use core::fmt;
    use core::marker::PhantomData;
    use core::ops::Index;
    use core::ptr::NonNull;

    use super::{OutOfAddressSpace, Platform, Zeroable};

    /// A slice of zeroed values in memory that the platform reserves.
    ///
    /// # Invariants
    ///
    /// `start` is the beginning of `len` valid values that live until `drop`.
    pub struct ZeroedSlice<T: Zeroable> {
        start: NonNull<T>,
        len: usize,
        platform: &'static dyn Platform,
        owned: PhantomData<T>,
    }

    // SAFETY: the slice only hands out shared references, and `T` is `Sync`; dropping it touches no `T`.
    unsafe impl<T: Zeroable> Send for ZeroedSlice<T> {}
    // SAFETY: as above.
    unsafe impl<T: Zeroable> Sync for ZeroedSlice<T> {}

    impl<T: Zeroable> ZeroedSlice<T> {
        /// `len` values of zero.
        ///
        /// # Errors
        ///
        /// [`OutOfAddressSpace`] if the platform has no room, or if there can be no such slice.
        pub fn new(platform: &'static dyn Platform, len: usize) -> Result<Self, OutOfAddressSpace> {
            const { assert!(align_of::<T>() <= 4096) };
            let len = len.max(1);
            let bytes = len
                .checked_mul(size_of::<T>())
                .filter(|bytes| isize::try_from(*bytes).is_ok())
                .ok_or(OutOfAddressSpace { bytes: usize::MAX })?;
            let start = platform.reserve_zeroed(bytes)?.cast();
            // INVARIANT: the platform promises `bytes` zeroed bytes, aligned to a page, that are ours; zeros are valid
            // values of `T`.
            Ok(Self {
                start,
                len,
                platform,
                owned: PhantomData,
            })
        }
    }

    impl<T: Zeroable> Index<usize> for ZeroedSlice<T> {
        type Output = T;

        fn index(&self, index: usize) -> &T {
            assert!(index < self.len, "index {index} of {}", self.len);
            // SAFETY: the index was just checked, so the sum stays inside the one reservation.
            let value = unsafe { self.start.add(index) };
            // SAFETY: by the type invariant a valid value lives there until `drop`, and nobody has it exclusively.
            unsafe { value.as_ref() }
        }
    }

    impl<T: Zeroable> Drop for ZeroedSlice<T> {
        fn drop(&mut self) {
            let bytes = self.len * size_of::<T>();
            // SAFETY: `new` reserved it with the same size, and `&mut self` proves that no reference is left.
            unsafe { self.platform.release(self.start.cast(), bytes) };
        }
    }

    impl<T: Zeroable> fmt::Debug for ZeroedSlice<T> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "[{}; {}]", core::any::type_name::<T>(), self.len)
        }
    }
}
