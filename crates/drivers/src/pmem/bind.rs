//! Taking a namespace into use: frames for its bytes, and the device.

use std::sync::Arc;

use pgmap_core::altmap::Altmap;
use pgmap_core::memremap::{DevPagemap, MapError, MemoryMap, MemoryType, Order, Request};
use pgmap_core::queue::RequestQueue;
use pgmap_host::hugetlb;
use pgmap_host::shared::SharedFrames;
use pgmap_sync::atomic::AtomicBool;
use pgmap_sync::{Mutex, PercpuRef, WaitQueue};
use rustix::io::Errno;

use super::altmap::ImagePages;
use super::dax::Dax;
use super::device::{Bad, Pmem};
use super::failure::Mappers;
use super::medium::Medium;
use super::namespace::{Align, HugePage, Mode, Namespace};
use super::place::Place;
use super::region::{Region, RegionError, State};
use super::scrub::Scrub;
use super::storage::Storage;
use super::unbind::Stage;

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
        let name = self.device_name(&namespace);
        let dax = match dax {
            Some(kind) => {
                let place = state.place(map)?;
                Some(give_frames(place, map, &name, &namespace, &medium, kind)?)
            }
            None => None,
        };
        let bad = Bad::default();
        bad.load(&state.label().bad, &namespace.data);
        let pmem = Arc::new_cyclic(|own| Pmem {
            name,
            namespace,
            region: Arc::clone(self),
            medium,
            start,
            queue: RequestQueue::new(),
            bad,
            mappers: Mappers::default(),
            dax,
            scrub: Scrub::default(),
            stage: Mutex::new(Stage::Live),
            loss_told: AtomicBool::new(false),
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
            Storage::MemoryFiles(huge) => {
                let kept = state.files.get(&namespace.index).cloned();
                let file = match kept {
                    Some(file) => file,
                    None => Arc::new(memory(namespace.size_bytes(), huge)?),
                };
                state.files.insert(namespace.index, Arc::clone(&file));
                Ok((file, 0))
            }
        }
    }
}

/// Memory for a namespace.
fn memory(bytes: u64, huge: Option<HugePage>) -> Result<SharedFrames, RegionError> {
    /// What `/proc/self/maps` shows.
    const NAME: &str = "pgmap-pmem";
    let Some(huge) = huge else {
        return Ok(SharedFrames::memory(NAME, bytes)?);
    };
    let size = huge.align();
    let needed = bytes / size.bytes();
    SharedFrames::huge(NAME, bytes, size.bytes()).map_err(|errno| {
        match hugetlb::pool(size.bytes()) {
            None => RegionError::NoHugePages(size),
            Some(_) if errno == Errno::NOSYS => RegionError::NoCopies,
            Some(pool) if errno == Errno::NOMEM && pool.available < needed => {
                RegionError::FewHugePages {
                    needed,
                    size,
                    available: pool.available,
                    enough: pool.pages + needed - pool.available,
                    file: pool.file,
                }
            }
            Some(_) => RegionError::Io(errno),
        }
    })
}

/// Gives frames to a namespace, at its place in its region.
fn give_frames(
    place: &Place,
    map: &Arc<MemoryMap>,
    name: &str,
    namespace: &Namespace,
    medium: &Arc<dyn Medium>,
    kind: MemoryType,
) -> Result<Dax, MapError> {
    let (data, metadata) = (&namespace.data, &namespace.metadata);
    let frames = place.frames(data).ok_or(MapError::NoRoom)?;
    let altmap = place.frames(metadata).and_then(|area| {
        let pages = ImagePages {
            medium: Arc::clone(medium),
            first: frames.start(),
            start: data.start,
        };
        Altmap::new(Arc::new(pages), area, 0)
    });
    let all = place.frames(&(data.start..data.end.max(metadata.end)));
    let ranges = [all.ok_or(MapError::NoRoom)?];
    let request = Request {
        order: match namespace.align {
            Align::Page => Order::Base,
            Align::Pmd => Order::Pmd,
            Align::Pud => Order::Pud,
        },
        altmap,
        ..Request::at(name.to_owned(), &ranges, kind)
    };
    Ok(Dax {
        map: Arc::clone(map),
        pagemap: map.memremap_request(request)?,
        frames,
        mappings: PercpuRef::new(),
        holes: Mutex::new(()),
    })
}

/// Takes frames away that nobody can have got hold of for longer than a lookup.
pub(super) fn give_back(pagemap: DevPagemap) {
    if let Ok(drained) = pagemap.kill().drain(None) {
        drained.remove();
    }
}
