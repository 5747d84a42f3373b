//! Memory hotplug: RAM is added, goes on line and off line, and is removed, while it is used.
//!
//! Every change of what there is happens inside `mem_hotplug_begin`, for a moment only (HOT-3): a block that
//! goes on or off line says so by its state, and neither those who are asked, nor the pages that move meanwhile, are waited
//! for inside. Frames need no initialisation, inside or outside: zeros are free frames (MAP-7).

use alloc::borrow::Cow;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

use pgmap_sync::{Reading, Writing};

use crate::addr::{Pfn, PfnRange};
use crate::holders::Holder;
use crate::memory_block::{BlockState, MemoryBlock};
use crate::memremap::{MapError, MemoryMap};
use crate::ram::Ram;
use crate::resource::{InTheWay, NotThere, Resource, ResourceTree};
use crate::sparse::{BlockId, BlockSize};
use crate::zone::{self, RamZone, WrongZone, Zone, ZoneChoice};

/// What is about to happen to a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Going {
    /// It goes on line.
    Online,
    /// It goes off line.
    Offline,
}

/// What has happened to a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// It is on line.
    Online,
    /// It stays off line.
    CancelOnline,
    /// It is off line.
    Offline,
    /// It stays on line.
    CancelOffline,
}

/// Why a block must stay as it is.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct Veto(pub Cow<'static, str>);

/// Who wants to know of blocks that go on and off line. Called without any lock.
pub trait MemoryNotifier: Send + Sync + fmt::Debug {
    /// Something is about to happen to a block.
    ///
    /// # Errors
    ///
    /// A [`Veto`]: then it does not happen, and those who agreed are told.
    fn going(&self, what: Going, block: PfnRange) -> Result<(), Veto>;

    /// What became of that; only told to those who agreed.
    fn happened(&self, event: Event, block: PfnRange);
}

/// What keeps a block's frames in use.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Obstacle {
    /// A page is pinned (GUP-3), or its bytes are lost.
    #[error("{pfn:?} is held{}; it has to be let go of first", by(.holder.as_deref()))]
    Held {
        /// Its frame.
        pfn: Pfn,
        /// Who has pinned it, if anybody has.
        holder: Option<Box<Holder>>,
    },
    /// Other RAM and the devices have no room for what is in the block.
    #[error("{frames} frames have no other place; add a device, or bring another block on line")]
    NoRoom {
        /// Frames of the block in use.
        frames: u64,
    },
    /// Frames are on their way somewhere.
    #[error("{frames} frames are on their way somewhere; try again")]
    InTransit {
        /// Frames of the block in use.
        frames: u64,
    },
}

fn by(holder: Option<&Holder>) -> String {
    holder.map_or_else(String::new, |holder| {
        alloc::format!(" by {} ({})", holder.label, holder.site)
    })
}

/// Who can make others use other frames: `mm`.
pub trait Migrate {
    /// Replaces the frames of a block that are in use by others ([`Ram::replace`]), until none is
    /// ([`Ram::used_in`]) or it gives up.
    ///
    /// # Errors
    ///
    /// What keeps them in use.
    fn empty(&mut self, ram: &Ram, block: BlockId) -> Result<(), Obstacle>;
}

/// Why a block did not go on or off line, or was not removed. It is as it was.
#[derive(Debug, thiserror::Error)]
pub enum HotplugError {
    /// There is no such memory.
    #[error("{0} is not there")]
    Absent(BlockId),
    /// It is a device's memory, in `ZONE_DEVICE` (HOT-2).
    #[error("{0} is in ZONE_DEVICE, the memory of {1}; a device is taken away as a whole")]
    Device(BlockId, String),
    /// It is in another state.
    #[error("{0} is {1}")]
    State(BlockId, BlockState),
    /// The zone that was asked for cannot be there (HOT-2).
    #[error(transparent)]
    Zone(#[from] WrongZone),
    /// Somebody who was asked refused.
    #[error("{0} stays as it is: {1}")]
    Vetoed(BlockId, Veto),
    /// Nothing else is on line.
    #[error("{0} is all the RAM that is on line; bring another block on line first")]
    Last(BlockId),
    /// Its frames stay in use (HOT-4).
    #[error("{0} stays on line: {1}")]
    Busy(BlockId, Obstacle),
}

/// What there is to know about a block of RAM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlockView {
    /// Its number.
    pub id: BlockId,
    /// Its frames.
    pub range: PfnRange,
    /// Whether its frames may be used, and in which zone.
    pub state: BlockState,
    /// Frames in use.
    pub used_frames: u64,
    /// Frames that are pinned: as long as there are any, the block cannot go off line.
    pub pinned_frames: u64,
}

impl BlockView {
    /// Why the block could not go off line now, as far as can be told without trying; `None` if nothing speaks against it.
    #[must_use]
    pub fn obstacle(&self) -> Option<String> {
        match self.state {
            BlockState::Online(_) if self.pinned_frames > 0 => {
                Some(alloc::format!("{} frames are pinned", self.pinned_frames))
            }
            BlockState::Online(_) => None,
            BlockState::Absent
            | BlockState::Offline
            | BlockState::GoingOnline(_)
            | BlockState::GoingOffline(_) => Some(alloc::format!("it is {}", self.state)),
        }
    }
}

impl fmt::Display for BlockState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Absent => "absent",
            Self::Offline => "offline",
            Self::GoingOnline(_) => "going-online",
            Self::Online(_) => "online",
            Self::GoingOffline(_) => "going-offline",
        })
    }
}

impl MemoryMap {
    /// Keeps everybody else from adding or removing memory, and from relying on what there is, until it is dropped (HOT-3).
    #[doc(alias = "mem_hotplug_done")]
    pub(crate) fn mem_hotplug_begin(&self) -> Writing<'_> {
        self.hotplug.write()
    }

    /// Keeps memory from being added and removed until it is dropped. Not to be held while any is, nor twice by a thread.
    #[doc(alias = "put_online_mems")]
    pub fn get_online_mems(&self) -> Reading<'_> {
        self.hotplug.read()
    }

    /// The resource tree as it is now; it prints like `/proc/iomem`.
    #[must_use]
    pub fn iomem(&self) -> ResourceTree {
        let _online = self.get_online_mems();
        self.resources.lock().tree.clone()
    }

    /// Enters what a range is, so that what is mapped of it lies inside (HOT-1).
    ///
    /// # Errors
    ///
    /// [`InTheWay`].
    pub fn insert_resource(&self, resource: Resource) -> Result<(), InTheWay> {
        let _hotplug = self.mem_hotplug_begin();
        self.resources.lock().tree.insert(resource)
    }

    /// Enters what the lowest free frames are from `from` on: `frames` of them, aligned to `align` frames. Answers which.
    ///
    /// # Errors
    ///
    /// [`MapError::NoRoom`], also where no frames can be: `frames` or `align` is 0.
    pub fn allocate_resource(
        &self,
        frames: u64,
        from: u64,
        align: u64,
        describe: impl FnOnce(PfnRange) -> Resource,
    ) -> Result<PfnRange, MapError> {
        let _hotplug = self.mem_hotplug_begin();
        let mut resources = self.resources.lock();
        let room = resources.room(frames, from, align);
        let room = room.filter(|room| room.end() <= self.max_frames);
        let room = room.ok_or(MapError::NoRoom)?;
        let entered = resources.tree.insert(describe(room));
        entered.map_err(|other| MapError::Conflict(other.range))?;
        Ok(room)
    }

    /// Takes away what [`insert_resource`](Self::insert_resource) and [`allocate_resource`](Self::allocate_resource) entered.
    ///
    /// # Errors
    ///
    /// [`NotThere`], also if something lies in it.
    pub fn remove_resource(&self, range: PfnRange) -> Result<(), NotThere> {
        let _hotplug = self.mem_hotplug_begin();
        self.resources.lock().tree.release(range)
    }
}

impl Ram {
    /// Tells somebody of blocks that go on and off line, from now on.
    pub fn register_memory_notifier(&self, notifier: Arc<dyn MemoryNotifier>) {
        self.notifiers.lock().push(notifier);
    }

    /// The size of the blocks.
    #[must_use]
    pub fn block_size(&self) -> BlockSize {
        self.blocks.lock().size()
    }

    /// All blocks that there are.
    #[must_use]
    pub fn blocks(&self) -> Vec<BlockView> {
        let _online = self.map.get_online_mems();
        let view = |block: &MemoryBlock| BlockView {
            id: block.id,
            range: block.range,
            state: block.state(),
            used_frames: block.used(),
            pinned_frames: 0,
        };
        let is_there = |block: &&MemoryBlock| block.state() != BlockState::Absent;
        let seen = |block: &MemoryBlock| (view(block), block.touched());
        let blocks: Vec<_> = self
            .blocks
            .lock()
            .iter()
            .filter(is_there)
            .map(seen)
            .collect();
        let with_pins = blocks.into_iter().map(|(mut view, touched)| {
            let frames = touched.filter_map(Pfn::new);
            let pinned = frames.filter(|pfn| self.map.frame(*pfn).is_pinned());
            view.pinned_frames = pinned.count() as u64;
            view
        });
        with_pins.collect()
    }

    /// The zone of a frame; `None` if it is off line, or nobody's.
    #[must_use]
    #[doc(alias = "page_zone")]
    pub fn zone_of(&self, pfn: Pfn) -> Option<Zone> {
        let state = self.blocks.lock().of(pfn).map(MemoryBlock::state);
        match state {
            Some(BlockState::Online(zone) | BlockState::GoingOffline(zone)) => {
                Some(Zone::Ram(zone))
            }
            Some(BlockState::Offline | BlockState::GoingOnline(_)) => None,
            Some(BlockState::Absent) | None => self.map.get_dev_pagemap(pfn).map(|_| Zone::Device),
        }
    }

    /// Adds RAM: whole blocks, at the lowest frame numbers that nobody has, off line and in no zone (HOT-2). Answers the first.
    ///
    /// # Errors
    ///
    /// [`MapError::NoRoom`] if `blocks` is 0, or there is no room for so many.
    #[doc(alias = "add_memory")]
    pub fn add(&self, blocks: u32) -> Result<BlockId, MapError> {
        let _hotplug = self.map.mem_hotplug_begin();
        let size = self.block_size();
        let frames = size.frames() * u64::from(blocks);
        let mut resources = self.map.resources.lock();
        let room = resources.room(frames, 0, size.frames());
        let room = room.filter(|room| room.end() <= self.map.max_frames);
        let room = room.ok_or(MapError::NoRoom)?;
        resources.enter_ram(room)?;
        let first = size.block_of(room.start());
        let mut all = self.blocks.lock();
        for id in (first.0..first.0 + blocks).map(BlockId) {
            if let Some(range) = size.range_of(id) {
                all.add(id, range);
            }
        }
        Ok(first)
    }

    /// Removes a block that is off line.
    ///
    /// # Errors
    ///
    /// [`HotplugError`].
    #[doc(alias = "offline_and_remove_memory")]
    pub fn remove(&self, id: BlockId) -> Result<(), HotplugError> {
        let _hotplug = self.map.mem_hotplug_begin();
        let range = self
            .in_state(id, |state| (state == BlockState::Offline).then_some(()))?
            .0;
        self.blocks.lock().set_state(id, BlockState::Absent);
        let released = self.map.resources.lock().tree.release(range);
        debug_assert_eq!(released, Ok(()), "RAM was not in the resource tree");
        Ok(())
    }

    /// Brings a block on line: its frames can be had, and the limit is higher by so many, unless a lower one was set (HOT-5).
    ///
    /// # Errors
    ///
    /// [`HotplugError`]; the block is off line then.
    #[doc(alias = "memory_block_online")]
    pub fn online(&self, id: BlockId, choice: ZoneChoice) -> Result<RamZone, HotplugError> {
        let (range, zone) = self.begin_online(id, choice)?;
        let (told, answer) = self.ask(Going::Online, range);
        if let Err(veto) = answer {
            self.settle(id, BlockState::Offline);
            tell(&told, Event::CancelOnline, range);
            return Err(HotplugError::Vetoed(id, veto));
        }
        {
            let _hotplug = self.map.mem_hotplug_begin();
            let mut blocks = self.blocks.lock();
            blocks.set_state(id, BlockState::Online(zone));
            self.grow(&blocks, range.count(), zone);
        }
        tell(&told, Event::Online, range);
        Ok(zone)
    }

    /// Takes a block off line: `mm` replaces its frames that are in use, and no more frames may be used than are left on line
    /// (HOT-5). That holds from the start, so that reclaim makes room meanwhile.
    ///
    /// # Errors
    ///
    /// [`HotplugError`]; the block is on line, and the limit is what it was (HOT-4).
    ///
    /// # Panics
    ///
    /// If `mm` says that it has emptied the block, and has not.
    #[doc(alias = "memory_block_offline")]
    pub fn offline(&self, id: BlockId, mm: &mut dyn Migrate) -> Result<(), HotplugError> {
        let (range, zone) = self.begin_offline(id)?;
        let (told, answer) = self.ask(Going::Offline, range);
        let emptied = answer
            .map_err(|veto| HotplugError::Vetoed(id, veto))
            .and_then(|()| {
                let emptied = mm.empty(self, id);
                emptied.map_err(|obstacle| HotplugError::Busy(id, obstacle))
            });
        if let Err(error) = emptied {
            {
                let _hotplug = self.map.mem_hotplug_begin();
                let mut blocks = self.blocks.lock();
                blocks.set_state(id, BlockState::Online(zone));
                self.grow(&blocks, range.count(), zone);
            }
            tell(&told, Event::CancelOffline, range);
            return Err(error);
        }
        assert_eq!(
            self.used_in(id),
            0,
            "{id} was emptied, and has frames in use"
        );
        self.settle(id, BlockState::Offline);
        tell(&told, Event::Offline, range);
        Ok(())
    }

    /// Frames of a block in use.
    #[must_use]
    pub fn used_in(&self, id: BlockId) -> u64 {
        self.blocks.lock().get(id).map_or(0, MemoryBlock::used)
    }

    /// Frames of a block that have ever been in use; none of the others is.
    #[must_use]
    pub fn touched_in(&self, id: BlockId) -> Range<u64> {
        let blocks = self.blocks.lock();
        blocks.get(id).map_or(0..0, MemoryBlock::touched)
    }

    fn begin_online(
        &self,
        id: BlockId,
        choice: ZoneChoice,
    ) -> Result<(PfnRange, RamZone), HotplugError> {
        let _hotplug = self.map.mem_hotplug_begin();
        let is_off = |state| (state == BlockState::Offline).then_some(());
        let (range, ()) = self.in_state(id, is_off)?;
        let mut blocks = self.blocks.lock();
        let zone = {
            let zone_of = |block: &MemoryBlock| Some((block.range, block.state().zone()?));
            zone::choose(choice, range, &blocks.iter().filter_map(zone_of))?
        };
        blocks.set_state(id, BlockState::GoingOnline(zone));
        Ok((range, zone))
    }

    fn begin_offline(&self, id: BlockId) -> Result<(PfnRange, RamZone), HotplugError> {
        let _hotplug = self.map.mem_hotplug_begin();
        let (range, zone) = self.in_state(id, |state| match state {
            BlockState::Online(zone) => Some(zone),
            BlockState::Absent
            | BlockState::Offline
            | BlockState::GoingOnline(_)
            | BlockState::GoingOffline(_) => None,
        })?;
        let mut blocks = self.blocks.lock();
        if !self.shrink(&blocks, range.count()) {
            return Err(HotplugError::Last(id));
        }
        blocks.set_state(id, BlockState::GoingOffline(zone));
        Ok((range, zone))
    }

    /// A block's frames, and what `wanted` makes of its state. Inside [`MemoryMap::mem_hotplug_begin`].
    fn in_state<T>(
        &self,
        id: BlockId,
        wanted: impl FnOnce(BlockState) -> Option<T>,
    ) -> Result<(PfnRange, T), HotplugError> {
        let found = {
            let blocks = self.blocks.lock();
            blocks.get(id).map(|block| (block.range, block.state()))
        };
        let Some((range, state)) = found.filter(|(_, state)| *state != BlockState::Absent) else {
            return Err(self.not_ram(id));
        };
        let wanted = wanted(state).ok_or(HotplugError::State(id, state))?;
        Ok((range, wanted))
    }

    fn not_ram(&self, id: BlockId) -> HotplugError {
        let range = self.block_size().range_of(id);
        let resources = self.map.resources.lock();
        match range.and_then(|range| resources.tree.first_busy(range)) {
            Some(device) => HotplugError::Device(id, device.name().into()),
            None => HotplugError::Absent(id),
        }
    }

    /// Ends a change of state that touches no frame in use.
    fn settle(&self, id: BlockId, state: BlockState) {
        let _hotplug = self.map.mem_hotplug_begin();
        self.blocks.lock().set_state(id, state);
    }

    /// Asks everybody until somebody refuses. Answers those who agreed.
    fn ask(&self, what: Going, block: PfnRange) -> (Vec<Notifier>, Result<(), Veto>) {
        let notifiers = self.notifiers.lock().clone();
        let mut agreed = Vec::with_capacity(notifiers.len());
        for notifier in notifiers {
            if let Err(veto) = notifier.going(what, block) {
                return (agreed, Err(veto));
            }
            agreed.push(notifier);
        }
        (agreed, Ok(()))
    }
}

type Notifier = Arc<dyn MemoryNotifier>;

fn tell(notifiers: &[Notifier], event: Event, block: PfnRange) {
    for notifier in notifiers {
        notifier.happened(event, block);
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
