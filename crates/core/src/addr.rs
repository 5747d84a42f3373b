//! Numbers of frames and addresses, as types that cannot be mixed up.
//!
//! Nothing here adds or subtracts silently: arithmetic is checked, and a value that exists is in range.

use core::fmt;

/// Log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in one page: 4096.
pub const PAGE_SIZE: usize = 1 << PAGE_SHIFT;
/// One more than the largest frame number (2^32 frames, 16 TiB).
pub const MAX_PFN: u64 = 1 << 32;

/// The bytes of one page, aligned as the machine wants them for DMA.
#[repr(C, align(4096))]
#[derive(Clone)]
pub struct Page(pub [u8; PAGE_SIZE]);

impl Page {
    /// A page of zeros.
    pub const ZERO: Self = Self([0; PAGE_SIZE]);
}

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Page({:02x?}..)", &self.0[..8])
    }
}

/// The number of a page frame.
///
/// # Invariants
///
/// Less than [`MAX_PFN`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Pfn(u32);

impl Pfn {
    /// The frame with this number, if there can be one.
    #[must_use]
    pub const fn new(number: u64) -> Option<Self> {
        if number < MAX_PFN {
            // INVARIANT: just compared; the cast loses nothing below 2^32.
            #[allow(
                clippy::cast_possible_truncation,
                reason = "compared with MAX_PFN above"
            )]
            Some(Self(number as u32))
        } else {
            None
        }
    }

    /// The frame with this 32-bit number.
    #[must_use]
    pub const fn from_u32(number: u32) -> Self {
        // INVARIANT: every u32 is below MAX_PFN.
        Self(number)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0 as u64
    }

    /// The number in 32 bits, as page table entries hold it.
    #[must_use]
    pub const fn as_u32(self) -> u32 {
        self.0
    }

    /// The frame `count` frames further on, if there can be one.
    #[must_use]
    pub const fn checked_add(self, count: u64) -> Option<Self> {
        match self.get().checked_add(count) {
            Some(number) => Self::new(number),
            None => None,
        }
    }
}

impl fmt::Debug for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pfn {:#x}", self.0)
    }
}

/// Frames `start..start+count`.
///
/// # Invariants
///
/// Not empty, and its last frame exists.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PfnRange {
    start: Pfn,
    count: u64,
}

impl PfnRange {
    /// `count` frames from `start` on; `None` if that is no frame, or more than there can be.
    #[must_use]
    pub const fn new(start: Pfn, count: u64) -> Option<Self> {
        if count == 0 || start.checked_add(count - 1).is_none() {
            return None;
        }
        // INVARIANT: both were just checked.
        Some(Self { start, count })
    }

    /// The first frame.
    #[must_use]
    pub const fn start(self) -> Pfn {
        self.start
    }

    /// How many frames.
    #[must_use]
    pub const fn count(self) -> u64 {
        self.count
    }

    /// The number after the last frame; it may be [`MAX_PFN`], which is no frame.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.start.get() + self.count
    }

    /// Whether `pfn` is one of these frames.
    #[must_use]
    pub const fn contains(self, pfn: Pfn) -> bool {
        pfn.get() >= self.start.get() && pfn.get() < self.end()
    }

    /// Whether the two ranges share a frame.
    #[must_use]
    pub const fn intersects(self, other: Self) -> bool {
        self.start.get() < other.end() && other.start.get() < self.end()
    }
}

/// An address in a managed address space, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct VirtAddr(usize);

impl VirtAddr {
    /// The address with this value.
    #[must_use]
    pub const fn new(bytes: usize) -> Self {
        Self(bytes)
    }

    /// The value.
    #[must_use]
    pub const fn get(self) -> usize {
        self.0
    }

    /// The first byte of the page that holds this address.
    #[must_use]
    pub const fn page_start(self) -> Self {
        Self(self.0 & !(PAGE_SIZE - 1))
    }

    /// Whether the address is the first byte of a page.
    #[must_use]
    pub const fn is_page_aligned(self) -> bool {
        self.0.is_multiple_of(PAGE_SIZE)
    }

    /// The address `bytes` further on, if there is one.
    #[must_use]
    pub const fn checked_add(self, bytes: usize) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }

    /// Bytes from `base` to this address, if it is not before `base`.
    #[must_use]
    pub const fn checked_offset_from(self, base: Self) -> Option<usize> {
        self.0.checked_sub(base.0)
    }
}

impl fmt::Debug for VirtAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "va {:#x}", self.0)
    }
}
