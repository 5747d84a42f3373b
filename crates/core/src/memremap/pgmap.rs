//! One device's frames, and the handles to them.

use alloc::borrow::Cow;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::mem::ManuallyDrop;

use pgmap_sync::atomic::{AtomicU8, Ordering};
use pgmap_sync::{Mutex, PercpuRef, WaitQueue};

use crate::addr::{Pfn, PfnRange};
use crate::altmap::Altmap;
use crate::driver::{DeviceData, PrivateOps};
use crate::holders::FrameHolder;
use crate::ram::FreeList;

use super::MemoryMap;
use super::kind::{MemoryType, Supply};
use super::lookup::PgmapGuard;
use super::request::{Order, Owner, Request};

/// One device's frames.
#[derive(Debug)]
pub(super) struct Pgmap {
    pub(super) name: Cow<'static, str>,
    /// What was asked for. What is reserved is the same, aligned to sub-sections.
    pub(super) ranges: Vec<PfnRange>,
    pub(super) entry: u8,
    pub(super) kind: MemoryType,
    pub(super) order: Order,
    pub(super) altmap: Option<Altmap>,
    pub(super) owner: Option<Owner>,
    /// Free frames of the first range of private and coherent mappings.
    pub(super) free: Mutex<FreeList>,
    /// Who waits for frames of a generic mapping to be idle.
    pub(super) idle: WaitQueue,
    pub(super) stage: AtomicU8, // A: LIVE -> KILLED by compare-exchange; from there on by who did that
}

impl Pgmap {
    /// In use.
    pub(super) const LIVE: u8 = 0;
    /// One handle is taking it away: it is that handle's `Killed` or `Drained`.
    pub(super) const KILLED: u8 = 1;
    /// Taken away, for ever. Its entry may be another mapping's by now, and so may its frame numbers.
    pub(super) const REMOVED: u8 = 2;

    pub(super) fn new(entry: u8, ranges: Vec<PfnRange>, request: Request<'_>) -> Self {
        Self {
            name: request.name,
            ranges,
            entry,
            kind: request.kind,
            order: request.order,
            altmap: request.altmap,
            owner: request.owner,
            free: Mutex::default(),
            idle: WaitQueue::new(),
            stage: AtomicU8::new(Self::LIVE),
        }
    }

    pub(super) fn stage(&self) -> u8 {
        // Acquire: pairs with the releases in `kill`, `resurrect` and `remove`.
        self.stage.load(Ordering::Acquire)
    }

    pub(super) fn has(&self, pfn: Pfn) -> bool {
        self.ranges.iter().any(|range| range.contains(pfn))
    }

    /// The last hold of a page was dropped: gives it back as its kind of memory demands, and never to the RAM allocator
    /// (REF-3). The page's live reference on the mapping is still there.
    pub(super) fn free_page(&self, map: &MemoryMap, head: Pfn) {
        match &self.kind {
            MemoryType::Private(ops) => {
                ops.page_free(map.frame(head).data());
                self.give(map, head);
            }
            MemoryType::Coherent(ops) => {
                ops.page_free(head);
                self.give(map, head);
            }
            MemoryType::FsDax(idle) => idle.wake_all(),
            MemoryType::Generic => self.idle.wake_all(),
            MemoryType::P2pDma(ops) => ops.page_free(head),
        }
    }

    fn give(&self, map: &MemoryMap, pfn: Pfn) {
        map.frame(pfn).set_mapping(0);
        self.free.lock().give(map, self.ranges[0].start(), pfn);
    }

    pub(super) fn is_visible_to(&self, owner: Option<Owner>) -> bool {
        match self.kind {
            MemoryType::Private(_) | MemoryType::Coherent(_) => self.owner == owner,
            MemoryType::FsDax(_) | MemoryType::Generic | MemoryType::P2pDma(_) => true,
        }
    }
}

/// A device mapping, live, dying or gone: once it was removed, nothing more comes from any handle to it.
#[derive(Clone, Debug)]
pub struct DevPagemap {
    pub(super) map: Arc<MemoryMap>,
    pub(super) pgmap: Arc<Pgmap>,
}

impl DevPagemap {
    pub(super) fn users(&self) -> &PercpuRef {
        self.map.lookup.users(self.pgmap.entry)
    }

    fn first_range(&self) -> PfnRange {
        self.pgmap.ranges[0]
    }

    /// The name that people see.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.pgmap.name
    }

    /// Whether the device has this frame. A device that was removed has none.
    #[must_use]
    pub fn contains(&self, pfn: Pfn) -> bool {
        self.pgmap.has(pfn) && self.pgmap.stage() != Pgmap::REMOVED
    }

    /// The device's frames.
    #[must_use]
    pub fn ranges(&self) -> &[PfnRange] {
        &self.pgmap.ranges
    }

    /// Whether another handle is to the same mapping.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.pgmap, &other.pgmap)
    }

    /// What kind of memory it is.
    #[must_use]
    pub fn kind(&self) -> &MemoryType {
        &self.pgmap.kind
    }

    /// How many frames one head stands for.
    #[must_use]
    pub fn order(&self) -> Order {
        self.pgmap.order
    }

    /// Where on the device its frames' metadata lives.
    #[must_use]
    pub fn altmap(&self) -> Option<&Altmap> {
        self.pgmap.altmap.as_ref()
    }

    /// Whether somebody who migrates or walks on behalf of `owner` may see the device's pages (MAP-9).
    #[must_use]
    pub fn is_visible_to(&self, owner: Option<Owner>) -> bool {
        self.pgmap.is_visible_to(owner)
    }

    /// What a private device can do; `None` for memory of another kind.
    #[must_use]
    pub fn ops(&self) -> Option<&dyn PrivateOps> {
        match &self.pgmap.kind {
            MemoryType::Private(ops) => Some(&**ops),
            MemoryType::Coherent(_)
            | MemoryType::FsDax(_)
            | MemoryType::Generic
            | MemoryType::P2pDma(_) => None,
        }
    }

    /// Holds the mapping while something is under way on it; `None` if it is dying.
    #[must_use]
    pub fn try_get(&self) -> Option<PgmapGuard<'_>> {
        self.map.lookup.try_get(&self.pgmap)
    }

    /// Whether the mapping has been killed: nothing may go there any more.
    #[must_use]
    pub fn is_dying(&self) -> bool {
        self.pgmap.stage() != Pgmap::LIVE
    }

    /// Users now: pages in use, and guards. A guess while the mapping is live.
    #[must_use]
    pub fn users_now(&self) -> u64 {
        if self.pgmap.stage() == Pgmap::REMOVED {
            return 0;
        }
        self.users().count()
    }

    /// Who holds pages of it and has said so, oldest first (REF-7).
    #[must_use]
    pub fn holders(&self) -> Vec<FrameHolder> {
        let ranges = self.pgmap.ranges.iter();
        ranges
            .flat_map(|range| self.map.holders().of_frames(*range))
            .collect()
    }

    /// Takes a free frame of private or coherent memory, with one reference, and one live reference on the mapping (REF-2).
    /// `None` if no frame is free or the mapping is dying, and for memory whose user says which frame:
    /// [`get_page`](Self::get_page).
    #[must_use]
    pub fn alloc(&self) -> Option<Pfn> {
        if self.pgmap.kind.supply() == Supply::Given {
            return None;
        }
        let guard = self.try_get()?;
        let range = self.first_range();
        let mut free = self.pgmap.free.lock();
        let taken = free.take(&self.map, range.start(), range.count())?;
        // The page keeps the guard's reference, until `put_page` finds it unused.
        let _kept = ManuallyDrop::new(guard);
        Some(taken)
    }

    /// Notes what the driver keeps about a page.
    pub fn set_data(&self, pfn: Pfn, data: DeviceData) {
        self.map.frame(pfn).set_private(data.0);
    }

    /// What the driver keeps about a page.
    #[must_use]
    pub fn data(&self, pfn: Pfn) -> DeviceData {
        self.map.frame(pfn).data()
    }
}
