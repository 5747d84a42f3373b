//! A namespace in use: a block device, and direct-access memory, over the same frames (PMEM-1).
//!
//! The servers call this; [`Region::bind`] makes it, and [`unbind`](Pmem::unbind) takes it away again. Every request
//! enters the queue first, so that a frozen device is touched by nobody (PMEM-2).

use core::ops::Range;
use std::sync::{Arc, Weak};

use pgmap_core::memremap::DevPagemap;
use pgmap_core::queue::RequestQueue;
use pgmap_host::shared::{Extent, SharedFrames};
use pgmap_sync::Mutex;
use pgmap_sync::atomic::{AtomicBool, Ordering};
use rustix::io::Errno;

use super::area::CommitError;
use super::badblocks::{BadBlocks, SECTOR_BYTES, sectors_around, sectors_within};
use super::dax::Dax;
use super::failure::Mappers;
use super::medium::{Medium, write_zeros};
use super::namespace::Namespace;
use super::region::Region;
use super::scrub::Scrub;
use super::unbind::Stage;
use crate::block::{Access, BlockDevice, BlockError, Contents, Direct, Zeros};

/// A namespace in use.
#[derive(Debug)]
pub struct Pmem {
    pub(super) name: String,
    pub(super) namespace: Namespace,
    pub(super) region: Arc<Region>,
    pub(super) medium: Arc<dyn Medium>,
    /// Where the namespace begins on the medium, in bytes.
    pub(super) start: u64,
    pub(super) queue: RequestQueue,
    pub(super) bad: Bad,
    /// Those who map its bytes, and have to know which are lost.
    pub(super) mappers: Mappers,
    /// What can be mapped and pinned; nothing of a raw namespace.
    pub(super) dax: Option<Dax>,
    pub(super) scrub: Scrub,
    pub(super) stage: Mutex<Stage>,
    /// Somebody who wanted to take the device away has heard that what was written cannot be made durable.
    pub(super) loss_told: AtomicBool,
    /// For its own threads.
    pub(super) own: Weak<Self>,
}

/// The namespace's lost sectors, counted from its start: a copy of what the region's label says.
#[derive(Debug, Default)]
pub(super) struct Bad {
    any: AtomicBool,
    list: Mutex<BadBlocks>, // changed under the region's lock
}

impl Bad {
    /// Takes over what the label says about these bytes of the region.
    pub(super) fn load(&self, label: &BadBlocks, data: &Range<u64>) {
        let sectors = sectors_around(data);
        let mut list = BadBlocks::default();
        for range in label.within(&sectors) {
            list.set(range.start - sectors.start..range.end - sectors.start);
        }
        let any = !list.ranges().is_empty();
        *self.list.lock() = list;
        // Release: pairs with the acquire in `first_in`; who sees that there are some finds them in the list.
        self.any.store(any, Ordering::Release);
    }

    /// What is where, with nothing lost in a hole: who skips holes would take zeros for it, and see no error.
    fn shown_as_data(&self, extents: Vec<(Range<u64>, Contents)>) -> Vec<(Range<u64>, Contents)> {
        // Acquire: pairs with the release in `load`.
        if !self.any.load(Ordering::Acquire) {
            return extents;
        }
        let list = self.list.lock();
        let mut shown = Vec::with_capacity(extents.len());
        for (extent, contents) in extents {
            let mut at = extent.start;
            let sectors = match contents {
                Contents::Data => 0..0,
                Contents::Hole => sectors_around(&extent),
            };
            for lost in list.within(&sectors) {
                let start = extent.start.max(lost.start * SECTOR_BYTES);
                let end = extent.end.min(lost.end * SECTOR_BYTES);
                shown.push((at..start, Contents::Hole));
                shown.push((start..end, Contents::Data));
                at = end;
            }
            shown.push((at..extent.end, contents));
        }
        shown.retain(|(extent, _)| !extent.is_empty());
        shown
    }

    /// The first lost sector that bytes touch. Where none is lost, this is one load.
    pub(super) fn first_in(&self, bytes: &Range<u64>) -> Option<u64> {
        // Acquire: pairs with the release in `load`.
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        self.list.lock().first_in(&sectors_around(bytes))
    }
}

impl Pmem {
    /// The namespace, as its label says; what was changed since it was taken into use is not in here.
    #[must_use]
    pub const fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// The region that it is a part of.
    #[must_use]
    pub const fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// Its frames; none of a raw namespace.
    #[must_use]
    pub fn pagemap(&self) -> Option<&DevPagemap> {
        self.dax.as_ref().map(|dax| &dax.pagemap)
    }

    /// Requests under way: a guess, unless the device is being taken away.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.queue.in_flight()
    }

    /// The lost sectors, counted from the namespace's start.
    #[must_use]
    pub fn bad_blocks(&self) -> BadBlocks {
        self.bad.list.lock().clone()
    }

    /// Takes all sectors that the bytes touch for lost, durably (PMEM-3).
    ///
    /// # Errors
    ///
    /// [`BlockError`]; the list is as it was.
    pub fn inject_error(&self, bytes: Range<u64>) -> Result<(), BlockError> {
        let _in_flight = self.queue.enter()?;
        self.check(&bytes)?;
        self.lose(&sectors_around(&bytes))
    }

    /// Takes no sector for lost that is wholly among the bytes, durably. What can be read there is whatever the medium has.
    ///
    /// # Errors
    ///
    /// [`BlockError`]; the list is as it was.
    pub fn clear_error(&self, bytes: Range<u64>) -> Result<(), BlockError> {
        let _in_flight = self.queue.enter()?;
        self.check(&bytes)?;
        self.mended(&sectors_within(&bytes))
    }

    pub(super) fn lose(&self, sectors: &Range<u64>) -> Result<(), BlockError> {
        let sectors = self.in_region(sectors);
        self.change_bad(|list| list.set(sectors))
    }

    fn mended(&self, sectors: &Range<u64>) -> Result<(), BlockError> {
        let sectors = self.in_region(sectors);
        self.change_bad(|list| {
            list.clear(&sectors);
        })
    }

    fn change_bad(&self, change: impl FnOnce(&mut BadBlocks)) -> Result<(), BlockError> {
        let publish = |label: &BadBlocks| self.bad.load(label, &self.namespace.data);
        let changed = self.region.change_bad(change, publish);
        if changed.is_ok() {
            self.mappers.tell();
        }
        changed.map_err(|error| match error {
            CommitError::Io(errno) => BlockError::Io(errno),
            CommitError::TooLong(_) => BlockError::Io(Errno::NOSPC),
        })
    }

    fn in_region(&self, sectors: &Range<u64>) -> Range<u64> {
        let first = self.namespace.data.start / SECTOR_BYTES;
        first + sectors.start..first + sectors.end
    }

    pub(super) fn check(&self, bytes: &Range<u64>) -> Result<(), BlockError> {
        let within = bytes.start <= bytes.end && bytes.end <= self.namespace.size_bytes();
        within.then_some(()).ok_or(BlockError::OutOfRange)
    }

    /// The range of so many bytes, if it is on the device.
    fn range(&self, offset: u64, len: usize) -> Result<Range<u64>, BlockError> {
        let range = offset..offset.saturating_add(len as u64);
        self.check(&range)?;
        Ok(range)
    }

    fn on_medium(&self, bytes: &Range<u64>) -> Range<u64> {
        self.start + bytes.start..self.start + bytes.end
    }

    /// Refuses to read what is lost.
    fn readable(&self, bytes: &Range<u64>) -> Result<(), BlockError> {
        match self.bad.first_in(bytes) {
            None => Ok(()),
            Some(sector) => Err(lost(sector, bytes)),
        }
    }

    /// Does what writes all these bytes, and mends the lost sectors among them (PMEM-3).
    pub(super) fn overwrite(
        &self,
        bytes: &Range<u64>,
        write: impl FnOnce() -> Result<(), Errno>,
    ) -> Result<(), BlockError> {
        if self.bad.first_in(bytes).is_none() {
            return Ok(write()?);
        }
        let whole = sectors_within(bytes);
        let around = sectors_around(bytes);
        // A sector of which only a part is written would stay half lost.
        for part in [around.start..whole.start, whole.end..around.end] {
            if let Some(sector) = self.bad.list.lock().first_in(&part) {
                return Err(lost(sector, bytes));
            }
        }
        write()?;
        // The bytes are on the medium before the label stops calling them lost.
        self.medium.flush()?;
        self.mended(&whole)
    }

    /// Zeros and no room, unless somebody holds the bytes; where there are no holes, zeros.
    pub(super) fn try_zero(&self, bytes: &Range<u64>) -> Option<Result<(), Errno>> {
        let range = self.on_medium(bytes);
        self.unless_held(bytes, || {
            let punched = match self.medium.frames() {
                Some(frames) => frames.punch(&range),
                None => Err(Errno::OPNOTSUPP),
            };
            match punched {
                Err(Errno::OPNOTSUPP) => write_zeros(&*self.medium, range.clone()),
                punched => punched,
            }
        })
    }

    /// Zeros, by the cheapest way that the medium has.
    fn zero(&self, bytes: &Range<u64>, zeros: Zeros) -> Result<(), Errno> {
        let range = self.on_medium(bytes);
        let Some(frames) = self.medium.frames() else {
            return write_zeros(&*self.medium, range);
        };
        let zeroed = self.unless_held(bytes, || match zeros {
            Zeros::MayPunch => frames.punch(&range),
            Zeros::KeepRoom => frames.zero(&range),
        });
        match zeroed {
            None | Some(Err(Errno::OPNOTSUPP)) => write_zeros(&*self.medium, range),
            Some(zeroed) => zeroed,
        }
    }

    /// Punches or zeroes in the file system, unless somebody maps or pins the bytes: either would take the frames from under
    /// them (GUP-3, WB-5).
    fn unless_held(
        &self,
        bytes: &Range<u64>,
        punch: impl FnOnce() -> Result<(), Errno>,
    ) -> Option<Result<(), Errno>> {
        match self.dax.as_ref().zip(self.frames_around(bytes)) {
            Some((dax, frames)) => dax.unless_held(frames, punch),
            None => Some(punch()),
        }
    }

    /// Looks for what else is lost, if an error may mean that.
    fn noticed(&self, errno: Errno) -> BlockError {
        if errno == Errno::IO {
            self.scrub();
        }
        BlockError::Io(errno)
    }

    fn frames(&self) -> Result<&SharedFrames, BlockError> {
        self.medium.frames().ok_or(BlockError::Io(Errno::OPNOTSUPP))
    }
}

/// The error for a lost sector among these bytes.
fn lost(sector: u64, bytes: &Range<u64>) -> BlockError {
    let offset = (sector * SECTOR_BYTES).max(bytes.start);
    BlockError::Bad { offset }
}

impl BlockDevice for Pmem {
    fn name(&self) -> &str {
        &self.name
    }

    fn size_bytes(&self) -> u64 {
        self.namespace.size_bytes()
    }

    fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), BlockError> {
        let _in_flight = self.queue.enter()?;
        let range = self.range(offset, to.len())?;
        self.readable(&range)?;
        let read = self.medium.read(self.start + offset, to);
        read.map_err(|errno| self.noticed(errno))
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), BlockError> {
        let _in_flight = self.queue.enter()?;
        let range = self.range(offset, from.len())?;
        self.overwrite(&range, || self.medium.write(self.start + offset, from))
    }

    fn flush(&self) -> Result<(), BlockError> {
        let _in_flight = self.queue.enter()?;
        Ok(self.medium.flush()?)
    }

    fn discard(&self, range: Range<u64>) -> Result<(), BlockError> {
        let _in_flight = self.queue.enter()?;
        self.check(&range)?;
        let Some(frames) = self.medium.frames().filter(|_| !range.is_empty()) else {
            return Ok(());
        };
        let on_medium = self.on_medium(&range);
        match self.unless_held(&range, || frames.punch(&on_medium)) {
            // The bytes may stay, so they may also stay where they cannot go.
            None | Some(Ok(()) | Err(Errno::OPNOTSUPP)) => Ok(()),
            Some(Err(errno)) => Err(errno.into()),
        }
    }

    fn write_zeroes(&self, range: Range<u64>, zeros: Zeros) -> Result<(), BlockError> {
        let _in_flight = self.queue.enter()?;
        self.check(&range)?;
        if range.is_empty() {
            return Ok(());
        }
        self.overwrite(&range, || self.zero(&range, zeros))
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<(Range<u64>, Contents)>, BlockError> {
        let _in_flight = self.queue.enter()?;
        self.check(&range)?;
        let Some(frames) = self.medium.frames() else {
            return Ok(vec![(range, Contents::Data)]);
        };
        let extents = frames.extents(self.on_medium(&range))?.into_iter();
        let here = |part: Range<u64>| part.start - self.start..part.end - self.start;
        let extents = extents.map(|extent| match extent {
            Extent::Data(part) => (here(part), Contents::Data),
            Extent::Hole(part) => (here(part), Contents::Hole),
        });
        Ok(self.bad.shown_as_data(extents.collect()))
    }

    /// The bytes themselves. [`BlockError::Bad`] for a write says no more than that the bytes have to be written by
    /// [`write`](Self::write), which mends what is lost.
    fn likes_direct_writes(&self) -> bool {
        self.medium.frames().is_some_and(SharedFrames::is_memory)
    }

    fn direct(&self, range: Range<u64>, access: Access) -> Result<Direct<'_>, BlockError> {
        let in_flight = self.queue.enter()?;
        self.check(&range)?;
        match access {
            Access::Read | Access::Write => self.readable(&range)?,
        }
        Ok(Direct::new(
            self.frames()?,
            self.on_medium(&range),
            in_flight,
        ))
    }
}
