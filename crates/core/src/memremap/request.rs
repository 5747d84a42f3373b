//! What is asked of `memremap_pages`, and why it is refused.

use alloc::borrow::Cow;
use core::fmt;

use crate::addr::{Pfn, PfnRange};
use crate::altmap::Altmap;
use crate::driver::DeviceError;
use crate::platform::BackError;

use super::aligned;
use super::kind::{MemoryType, Supply};

/// How many frames one head stands for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Order {
    /// One: every frame is its own head.
    #[default]
    Base,
    /// 512 frames: 2 MiB.
    Pmd,
    /// 262,144 frames: 1 GiB.
    Pud,
}

impl Order {
    /// Frames of one page of this order.
    #[must_use]
    pub const fn frames(self) -> u64 {
        match self {
            Self::Base => 1,
            Self::Pmd => 512,
            Self::Pud => 512 * 512,
        }
    }

    /// The frame that stands for the page which `pfn` is in. A page is aligned to its size, so no frame has to be looked at.
    #[must_use]
    pub const fn head(self, pfn: Pfn) -> Pfn {
        // The mask is 2^18 - 1 at most.
        #[allow(clippy::cast_possible_truncation, reason = "at most 262,144")]
        let mask = self.frames() as u32 - 1;
        Pfn::from_u32(pfn.as_u32() & !mask)
    }
}

/// Whose private pages are whose (MAP-9): a value that a driver chooses for all its devices.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Owner(pub u64);

/// Which frame numbers are wanted.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// These: the device is there.
    At(&'a [PfnRange]),
    /// So many, from an offset space of their own: the CPU cannot address the device (MAP-10).
    Anywhere {
        /// How many.
        frames: u64,
    },
}

/// How far the work is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    /// Frames that are ready.
    pub done_frames: u64,
    /// Frames that there are to make ready.
    pub total_frames: u64,
}

/// What is asked of [`MemoryMap::memremap_request`](super::MemoryMap::memremap_request).
///
/// ```
/// use pgmap_core::addr::{Pfn, PfnRange};
/// use pgmap_core::memremap::{MemoryMap, MemoryType, Order, Request};
/// use pgmap_core::platform::HeapPlatform;
///
/// let map = MemoryMap::new(&HeapPlatform, 4096)?;
/// let ranges = [PfnRange::new(Pfn::from_u32(1024), 2048).ok_or("no such frames")?];
/// let request = Request { order: Order::Pmd, ..Request::at("dax0.0", &ranges, MemoryType::Generic) };
/// let device = map.memremap_request(request)?;
/// device.get_page(Pfn::from_u32(1500))?;
/// assert_eq!(map.frame(Pfn::from_u32(1024)).refs(), 1);
/// device.put_page(Pfn::from_u32(1500));
/// device.kill().drain(None).map_err(|held| held.users.to_string())?.remove();
/// # Ok::<(), Box<dyn core::error::Error>>(())
/// ```
pub struct Request<'a> {
    /// The name that people will see.
    pub name: Cow<'static, str>,
    /// Which frames.
    pub place: Place<'a>,
    /// What they are.
    pub kind: MemoryType,
    /// How many of them one head stands for.
    pub order: Order,
    /// Where on the device their metadata lives; `None` for RAM.
    pub altmap: Option<Altmap>,
    /// Who may migrate them.
    pub owner: Option<Owner>,
    /// Called at least once in [`PROGRESS_FRAMES`] frames where frames have to be made ready: to yield, and to tell (MAP-7).
    pub progress: &'a (dyn Fn(Progress) + Sync),
}

/// Frames that are made ready between two calls of [`Request::progress`], at most: 2 MiB of metadata.
pub const PROGRESS_FRAMES: u64 = 65_536;

impl fmt::Debug for Request<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("name", &self.name)
            .field("place", &self.place)
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

impl<'a> Request<'a> {
    /// Base pages with their metadata in RAM, at these frames.
    #[must_use]
    pub fn at(
        name: impl Into<Cow<'static, str>>,
        ranges: &'a [PfnRange],
        kind: MemoryType,
    ) -> Self {
        Self::new(name.into(), Place::At(ranges), kind)
    }

    /// Base pages with their metadata in RAM, at frames of the map's choice.
    #[must_use]
    pub fn anywhere(name: impl Into<Cow<'static, str>>, frames: u64, kind: MemoryType) -> Self {
        Self::new(name.into(), Place::Anywhere { frames }, kind)
    }

    fn new(name: Cow<'static, str>, place: Place<'a>, kind: MemoryType) -> Self {
        Self {
            name,
            place,
            kind,
            order: Order::Base,
            altmap: None,
            owner: None,
            progress: &|_| {},
        }
    }

    /// Whether these ranges can be had as asked. Nothing has changed yet, so a refusal here takes nothing back.
    pub(super) fn check(&self, ranges: &[PfnRange], max_frames: u64) -> Result<(), MapError> {
        if ranges.is_empty() || ranges.iter().any(|range| aligned(*range).1 > max_frames) {
            return Err(MapError::NoRoom);
        }
        let simple = self.order == Order::Base && self.altmap.is_none();
        if self.kind.supply() == Supply::Allocated && !simple {
            return Err(MapError::Allocated);
        }
        let frames = self.order.frames();
        let whole = |range: &&PfnRange| {
            range.start().get().is_multiple_of(frames) && range.count().is_multiple_of(frames)
        };
        if let Some(range) = ranges.iter().find(|range| !whole(range)) {
            return Err(MapError::Unaligned(*range, self.order));
        }
        self.altmap
            .as_ref()
            .map_or(Ok(()), |altmap| fits(altmap, ranges))
    }
}

fn fits(altmap: &Altmap, ranges: &[PfnRange]) -> Result<(), MapError> {
    let area = altmap.area();
    let inside = |range: &PfnRange| range.start() <= area.start() && area.end() <= range.end();
    if !ranges.iter().any(inside) {
        return Err(MapError::AltmapOutside(area));
    }
    let needed = ranges.iter().map(|range| Altmap::pages_for(*range)).sum();
    let free = altmap.free();
    if needed > free {
        return Err(MapError::AltmapTooSmall { needed, free });
    }
    Ok(())
}

/// Why frames could not be given to a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MapError {
    /// The range, or a part of it, is System RAM (MAP-2; the kernel's ENXIO).
    #[error("the frames from {:?} on are System RAM", .0.start())]
    IntersectsRam(PfnRange),
    /// The range conflicts with another device's (MAP-2; the kernel's ENOMEM).
    #[error("the frames from {:?} on belong to another device", .0.start())]
    Conflict(PfnRange),
    /// There are as many device mappings as there can be, or no frame numbers are left.
    #[error("there is no room for another device mapping")]
    NoRoom,
    /// RAM was given out already.
    #[error("this map has its RAM already")]
    RamTwice,
    /// The range does not begin and end at whole pages of the order.
    #[error("the frames from {:?} on are not whole pages of {} frames: align the range, or ask for base pages", .0.start(), .1.frames())]
    Unaligned(PfnRange, Order),
    /// Pages of private and coherent memory are allocated one by one.
    #[error("private and coherent memory has base pages only, and its metadata in RAM")]
    Allocated,
    /// The metadata's pages are not the device's own.
    #[error("the metadata area from {:?} on is not inside the device's frames", .0.start())]
    AltmapOutside(PfnRange),
    /// The metadata needs more pages than are set aside for it.
    #[error(
        "the frames' metadata takes {needed} pages, and the device has {free} for it: make the area larger"
    )]
    AltmapTooSmall {
        /// Pages that are needed.
        needed: u64,
        /// Pages that there are.
        free: u64,
    },
    /// The device could not clear its metadata area.
    #[error("the device's metadata area cannot be cleared: {0}")]
    AltmapNotCleared(DeviceError),
    /// The machine could not use the device's metadata area.
    #[error("the device's metadata area cannot be used: {0}")]
    AltmapNotUsed(BackError),
}
