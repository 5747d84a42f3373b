//! `memremap`: addresses for a device's memory, without frames.
//!
//! A driver asks for a range and says which cache modes will do; the first that can be had is used. RAM has addresses already, and is
//! served from them. What must never happen here: an error that looks like an address (devm-null), or a mapping that is released
//! twice or not at all (devm-slot).

use alloc::sync::Arc;
use core::fmt;
use core::ops::{BitOr, Range};
use core::ptr::NonNull;

use crate::addr::{PAGE_SIZE, PfnRange};
use crate::memremap::MemoryMap;
use crate::memtype::{CacheMode, Conflict};
use crate::platform::BackError;

/// Cache modes that will do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CacheModes(u8);

impl CacheModes {
    const fn bit(mode: CacheMode) -> u8 {
        match mode {
            CacheMode::WriteBack => 1,
            CacheMode::WriteThrough => 2,
            CacheMode::WriteCombining => 4,
        }
    }

    /// Whether this mode will do.
    #[must_use]
    pub const fn contains(self, mode: CacheMode) -> bool {
        self.0 & Self::bit(mode) != 0
    }
}

impl From<CacheMode> for CacheModes {
    fn from(mode: CacheMode) -> Self {
        Self(Self::bit(mode))
    }
}

impl BitOr<CacheMode> for CacheModes {
    type Output = Self;

    fn bitor(self, mode: CacheMode) -> Self {
        Self(self.0 | Self::bit(mode))
    }
}

impl BitOr for CacheMode {
    type Output = CacheModes;

    fn bitor(self, mode: Self) -> CacheModes {
        CacheModes::from(self) | mode
    }
}

/// Who gives addresses to a device's memory: a driver with a file, a platform.
///
/// # Safety
///
/// `map` returns the first of `range`'s bytes, which may be read and written by every thread until `unmap`.
pub unsafe trait Remapper: Send + Sync + fmt::Debug {
    /// Maps a range, whole pages, in one mode.
    ///
    /// # Errors
    ///
    /// [`BackError::Unsupported`] for a mode that this memory has not: then the next is tried. [`BackError::Refused`] if it
    /// has, but the machine refused.
    fn map(&self, range: PfnRange, mode: CacheMode) -> Result<NonNull<u8>, BackError>;

    /// Ends a mapping.
    ///
    /// # Safety
    ///
    /// `map` returned the address for this range and mode, it is unmapped once, and nobody uses it any more.
    unsafe fn unmap(&self, address: NonNull<u8>, range: PfnRange, mode: CacheMode);

    /// Where System RAM has its addresses; `None` if this RAM has none, or must not be used by them: its bytes are encrypted there.
    fn direct(&self, range: PfnRange) -> Option<NonNull<u8>>;
}

/// Why a range got no addresses.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RemapError {
    /// The caller's mistake: System RAM is mapped write-back, or not at all.
    #[error("the range is System RAM, which is mapped write-back only")]
    RamIsWriteBack,
    /// The caller's mistake: a part of the range is System RAM.
    #[error("a part of the range is System RAM, and a part is not")]
    Mixed,
    /// The RAM has no addresses, or they must not be used.
    #[error("the range is System RAM without addresses that may be used")]
    NotDirect,
    /// The caller's mistake: there are no such frames.
    #[error("the range is not inside the map")]
    Outside,
    /// A part of the range is mapped in another mode.
    #[error(transparent)]
    Conflict(#[from] Conflict),
    /// None of the modes can be had here.
    #[error("the memory has none of the cache modes that were asked for")]
    NoMode,
    /// The machine refused.
    #[error("the range cannot be mapped: {0}")]
    Refused(BackError),
}

/// A mapped range. Dropping it releases exactly that, once (REMAP-2).
///
/// # Invariants
///
/// `address` is what `remapper` gave for `range` and `mode`, which is reserved in the map; unless `direct`, where it is RAM's own.
#[derive(Debug)]
pub struct Remapped {
    map: Arc<MemoryMap>,
    remapper: Arc<dyn Remapper>,
    address: NonNull<u8>,
    range: PfnRange,
    mode: CacheMode,
    direct: bool,
}

// SAFETY: by the contract of `Remapper` every thread may use the address, and `unmap` may be called by any.
unsafe impl Send for Remapped {}
// SAFETY: shared, it only tells what it is.
unsafe impl Sync for Remapped {}

impl MemoryMap {
    /// Gives addresses to a range, in the first of the modes write-back, write-through and write-combining that is among `modes` and can
    /// be had (REMAP-1).
    ///
    /// # Errors
    ///
    /// See [`RemapError`]. Nothing is mapped or reserved then.
    pub fn memremap(
        self: &Arc<Self>,
        range: PfnRange,
        modes: impl Into<CacheModes>,
        remapper: &Arc<dyn Remapper>,
    ) -> Result<Remapped, RemapError> {
        let modes = modes.into();
        let whole = match self.ram_frames(range) {
            None => return Err(RemapError::Outside),
            Some(0) => false,
            Some(ram) if ram == range.count() => true,
            Some(_) => return Err(RemapError::Mixed),
        };
        let (address, mode) = if whole {
            if !modes.contains(CacheMode::WriteBack) {
                return Err(RemapError::RamIsWriteBack);
            }
            let address = remapper.direct(range).ok_or(RemapError::NotDirect)?;
            (address, CacheMode::WriteBack)
        } else {
            self.map_in_order(range, modes, remapper)?
        };
        // INVARIANT: just mapped, or RAM's own.
        Ok(Remapped {
            map: Arc::clone(self),
            remapper: Arc::clone(remapper),
            address,
            range,
            mode,
            direct: whole,
        })
    }

    fn map_in_order(
        &self,
        range: PfnRange,
        modes: CacheModes,
        remapper: &Arc<dyn Remapper>,
    ) -> Result<(NonNull<u8>, CacheMode), RemapError> {
        let mut failed = RemapError::NoMode;
        let wanted = CacheMode::IN_ORDER.into_iter();
        for mode in wanted.filter(|mode| modes.contains(*mode)) {
            match self.map_in(range, mode, remapper) {
                Ok(address) => return Ok((address, mode)),
                // What stands in the way says more than a mode that there is not.
                Err(RemapError::Refused(BackError::Unsupported)) => {}
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    fn map_in(
        &self,
        range: PfnRange,
        mode: CacheMode,
        remapper: &Arc<dyn Remapper>,
    ) -> Result<NonNull<u8>, RemapError> {
        self.memtypes().reserve(&bytes(range), mode)?;
        remapper.map(range, mode).map_err(|error| {
            self.memtypes().free(&bytes(range), mode);
            RemapError::Refused(error)
        })
    }
}

impl Remapped {
    /// The first byte. The range's bytes may be read and written from here until this is dropped.
    #[must_use]
    pub const fn address(&self) -> NonNull<u8> {
        self.address
    }

    /// The frames.
    #[must_use]
    pub const fn range(&self) -> PfnRange {
        self.range
    }

    /// How it is mapped: what its user has to do for its stores to last.
    #[must_use]
    pub const fn mode(&self) -> CacheMode {
        self.mode
    }
}

impl Drop for Remapped {
    fn drop(&mut self) {
        if self.direct {
            return;
        }
        // SAFETY: by the type invariant `map` returned it for this range and mode; whoever used the address had to stop before
        // this is dropped, which happens once.
        unsafe { self.remapper.unmap(self.address, self.range, self.mode) };
        self.map.memtypes().free(&bytes(self.range), self.mode);
    }
}

fn bytes(range: PfnRange) -> Range<u64> {
    let page = PAGE_SIZE as u64;
    range.start().get() * page..range.end() * page
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
