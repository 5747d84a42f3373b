//! Tables that are as long as memory is, and cost RAM only where they are used.

#[cfg(any(loom, shuttle))]
use alloc::vec::Vec;
#[cfg(any(loom, shuttle))]
use core::ops::{Index, Range};

use pgmap_sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

#[cfg(any(loom, shuttle))]
use crate::platform::{BackError, DevicePages};
use crate::platform::{OutOfAddressSpace, Platform};

/// Types of which zeroed memory is a value that many threads may share.
///
/// # Safety
///
/// All-zero bytes are a valid value, the value may be shared between threads, and it needs no drop.
pub unsafe trait Zeroable: Sync {
    /// Makes the value zero again. A value that is zero is not written to, so that memory is not used for it.
    fn zero(&self);
}

macro_rules! zeroable {
    ($($atomic:ty),+) => {$(
        // SAFETY: an atomic integer has the layout of its integer, is shareable, and needs no drop. (The models' atomics
        // are more than that: there a slice is an ordinary vector.)
        unsafe impl Zeroable for $atomic {
            fn zero(&self) {
                // Relaxed: who takes the value away from its users, and gives it to others, orders this.
                if self.load(Ordering::Relaxed) != 0 {
                    self.store(0, Ordering::Relaxed);
                }
            }
        }
    )+};
}

zeroable!(AtomicU64, AtomicU32, AtomicU8);

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
impl<T: Zeroable> ZeroedSlice<T> {
    /// Makes values zero again.
    pub(crate) fn clear(&self, range: Range<usize>) {
        self.0[range].iter().for_each(T::zero);
    }

    /// Pretends that values live on a device.
    pub(crate) unsafe fn back(&self, _: Range<usize>, _: DevicePages) -> Result<(), BackError> {
        Ok(())
    }

    /// Ends the pretence.
    pub(crate) unsafe fn unback(&self, _: Range<usize>) -> Result<(), BackError> {
        Ok(())
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
    use core::ops::{Index, Range};
    use core::ptr::NonNull;

    use super::{OutOfAddressSpace, Platform, Zeroable};
    use crate::platform::{BackError, DevicePages};

    /// What the platform discards and replaces: whole pages of this many bytes, a multiple of every machine's page.
    const GRAIN_BYTES: usize = 16 << 10;

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

    impl<T: Zeroable> ZeroedSlice<T> {
        /// Makes values zero again, giving back the memory that they took.
        pub(crate) fn clear(&self, range: Range<usize>) {
            let (memory, bytes) = self.bytes(&range);
            // SAFETY: `bytes` answers whole pages of our one reservation, and the caller wants zeros there.
            let discarded = bytes > 0 && unsafe { self.platform.discard(memory, bytes) };
            if !discarded {
                range.for_each(|index| self[index].zero());
            }
        }

        /// Lets values live on a device (MAP-8).
        ///
        /// # Safety
        ///
        /// Nobody uses the values, or needs what is in them. The device's pages are all zeros, and nobody else uses them
        /// until [`unback`](Self::unback).
        pub(crate) unsafe fn back(
            &self,
            range: Range<usize>,
            pages: DevicePages,
        ) -> Result<(), BackError> {
            let (memory, bytes) = self.bytes(&range);
            // SAFETY: `bytes` answers whole pages of our one reservation; the rest is this function's contract. Zeros are
            // valid values of `T`, so the type invariant holds afterwards.
            unsafe { self.platform.back(memory, bytes, pages) }
        }

        /// Lets values live in the platform's memory again, where they are zero.
        ///
        /// # Safety
        ///
        /// One call of [`back`](Self::back) had this range, and nobody needs what is in it.
        pub(crate) unsafe fn unback(&self, range: Range<usize>) -> Result<(), BackError> {
            let (memory, bytes) = self.bytes(&range);
            // SAFETY: by this function's contract. Zeros are valid values of `T`.
            unsafe { self.platform.unback(memory, bytes) }
        }

        /// Where values are, and how many bytes they take: whole grains, or no bytes.
        fn bytes(&self, range: &Range<usize>) -> (NonNull<u8>, usize) {
            assert!(
                range.start <= range.end && range.end <= self.len,
                "{range:?} of {}",
                self.len
            );
            // SAFETY: just checked: the sum stays inside the one reservation, or at its end.
            let memory = unsafe { self.start.add(range.start) };
            let bytes = (range.end - range.start) * size_of::<T>();
            let offset = range.start * size_of::<T>();
            let whole = offset.is_multiple_of(GRAIN_BYTES) && bytes.is_multiple_of(GRAIN_BYTES);
            (memory.cast(), if whole { bytes } else { 0 })
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
