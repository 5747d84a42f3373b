//! Taking a namespace into use: frames for its bytes, and the device.

use std::sync::Arc;

use pgmap_core::addr::{MAX_PFN, PAGE_SIZE, Pfn, PfnRange};
use pgmap_core::memremap::{DevPagemap, MapError, MemoryMap, MemoryType};
use pgmap_core::queue::RequestQueue;
use pgmap_host::shared::SharedFrames;
use pgmap_sync::{Mutex, WaitQueue};

use super::dax::Dax;
use super::device::{Bad, Pmem};
use super::ledger::Ledger;
use super::medium::Medium;
use super::namespace::{Mode, Namespace};
use super::region::{Region, RegionError, State, Storage};
use super::scrub::Scrub;
use super::unbind::Stage;

/// Regions begin at multiples of 1 GiB, so that a namespace can be mapped in such units.
const REGION_FRAMES: u64 = (1 << 30) / PAGE_SIZE as u64;

/// Why a namespace cannot be taken into use.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BindError {
    /// There is none, or it is in use, or the machine refused.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// There are no frames for it.
    #[error("there are no frames for the namespace: {0}")]
    Map(#[from] MapError),
}

impl Region {
    /// Takes a namespace into use: gives frames to its bytes, above RAM, and opens its queue.
    ///
    /// # Errors
    ///
    /// [`BindError`]; nothing has changed then.
    #[doc(alias = "pmem_attach_disk")]
    pub fn bind(
        self: &Arc<Self>,
        map: &Arc<MemoryMap>,
        index: u32,
    ) -> Result<Arc<Pmem>, BindError> {
        let mut state = self.lock();
        self.not_in_use(&state, index)?;
        let namespace = self.find(&mut state.label().clone(), index)?.clone();
        let (medium, start) = self.bytes_of(&mut state, &namespace)?;
        let dax = match namespace.mode {
            Mode::Raw => None,
            Mode::Fsdax => Some(MemoryType::FsDax(Arc::new(WaitQueue::new()))),
            Mode::Devdax => Some(MemoryType::Generic),
        };
        let dax = dax
            .map(|kind| give_frames(&mut state, map, &namespace, kind))
            .transpose()?;
        let bad = Bad::default();
        bad.load(&state.label().bad, &namespace.data);
        let pmem = Arc::new_cyclic(|own| Pmem {
            name: self.device_name(&namespace),
            namespace,
            region: Arc::clone(self),
            medium,
            start,
            queue: RequestQueue::new(),
            bad,
            dax,
            scrub: Scrub::default(),
            stage: Mutex::new(Stage::Live),
            own: own.clone(),
        });
        state.bound.insert(index, Arc::downgrade(&pmem));
        Ok(pmem)
    }

    /// The name that people know a namespace's device by: `pmem0`, `pmem0.1`, `dax0.0`.
    #[must_use]
    pub fn device_name(&self, namespace: &Namespace) -> String {
        let (region, index) = (self.number(), namespace.index);
        match (namespace.mode, index) {
            (Mode::Devdax, index) => format!("dax{region}.{index}"),
            (Mode::Fsdax | Mode::Raw, 0) => format!("pmem{region}"),
            (Mode::Fsdax | Mode::Raw, index) => format!("pmem{region}.{index}"),
        }
    }

    /// Where a namespace's bytes are: the medium, and the offset on it.
    fn bytes_of(
        &self,
        state: &mut State,
        namespace: &Namespace,
    ) -> Result<(Arc<dyn Medium>, u64), RegionError> {
        match self.storage() {
            Storage::Medium => Ok((self.medium(), namespace.data.start)),
            Storage::MemoryFiles => {
                let kept = state.files.get(&namespace.index).cloned();
                let file = match kept {
                    Some(file) => file,
                    None => Arc::new(SharedFrames::memory("pgmap-pmem", namespace.size_bytes())?),
                };
                state.files.insert(namespace.index, Arc::clone(&file));
                Ok((file, 0))
            }
        }
    }
}

/// Gives frames to a namespace, at its place in its region.
fn give_frames(
    state: &mut State,
    map: &Arc<MemoryMap>,
    namespace: &Namespace,
    kind: MemoryType,
) -> Result<Dax, BindError> {
    let base = match state.base {
        Some(base) => base,
        None => free_range(map, state.label().medium_bytes / PAGE_SIZE as u64)?,
    };
    let first = base.checked_add(namespace.data.start / PAGE_SIZE as u64);
    let frames = first
        .and_then(|first| PfnRange::new(first, namespace.size_bytes() / PAGE_SIZE as u64))
        .ok_or(MapError::NoRoom)?;
    // `namespace.metadata` is where an altmap goes (MAP-8), and `namespace.align` is the order of the compounds.
    let pagemap = map.memremap_pages(&[frames], kind)?;
    state.base = Some(base);
    Ok(Dax {
        map: Arc::clone(map),
        pagemap,
        frames,
        ledger: Ledger::default(),
    })
}

/// The start of a range of frames that nobody has. It is looked for by having it for a moment.
fn free_range(map: &Arc<MemoryMap>, frames: u64) -> Result<Pfn, MapError> {
    let mut start = REGION_FRAMES;
    while start < MAX_PFN {
        let first = Pfn::new(start).ok_or(MapError::NoRoom)?;
        let range = PfnRange::new(first, frames.max(1)).ok_or(MapError::NoRoom)?;
        let in_the_way = match map.memremap_pages(&[range], MemoryType::Generic) {
            Ok(free) => {
                give_back(free);
                return Ok(first);
            }
            Err(MapError::Conflict(other)) => other.end(),
            Err(MapError::IntersectsRam(_)) => start + 1,
            Err(error) => return Err(error),
        };
        start = in_the_way.max(start + 1).next_multiple_of(REGION_FRAMES);
    }
    Err(MapError::NoRoom)
}

/// Takes frames away that nobody can have got hold of for longer than a lookup.
pub(super) fn give_back(pagemap: DevPagemap) {
    if let Ok(drained) = pagemap.kill().drain(None) {
        drained.remove();
    }
}
