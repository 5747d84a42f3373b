//! Regions: persistent memory as it was plugged in, divided into namespaces.
//!
//! The server opens one for each `--pmem`, lists and changes its namespaces, and takes them into use with
//! [`Region::bind`]. A change of the label is durable when it returns, and is one change whatever happens meanwhile.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use pgmap_core::memremap::{MapError, MemoryMap};
use pgmap_host::shared::SharedFrames;
use pgmap_sync::{Mutex, MutexGuard};
use rustix::io::Errno;

use super::area::{AreaError, CommitError, LabelArea};
use super::badblocks::BadBlocks;
use super::device::Pmem;
use super::image::{self, Image, ImageError, LEAST_BYTES};
use super::label::{Label, SLOT_BYTES};
use super::made::Made;
use super::medium::{Medium, Unforgetting, is_zero};
use super::namespace::{
    Activation, Align, LABEL_AREA_BYTES, MapLocation, Mode, Namespace, NoNamespace, Wanted,
};
use super::place::Place;
use super::spec::{Foreign, PmemSpec, Source};
use super::storage::{Storage, unit_of};
use super::uuid::Uuid;

/// Bytes of both labels.
const SLOTS_BYTES: u64 = 2 * SLOT_BYTES as u64;

/// A region.
#[derive(Debug)]
pub struct Region {
    number: u32,
    name: String,
    medium: Arc<dyn Medium>,
    storage: Storage,
    state: Mutex<State>,
}

#[derive(Debug)]
pub(crate) struct State {
    labels: Labels,
    /// Namespaces in use.
    pub(crate) bound: BTreeMap<u32, Weak<Pmem>>,
    /// The memory files of volatile namespaces.
    pub(crate) files: BTreeMap<u32, Arc<SharedFrames>>,
    /// Where the region is among the physical addresses, once a namespace was bound.
    place: Option<Place>,
    /// What of its image was not there before it was opened.
    made: Option<Made>,
}

#[derive(Debug)]
enum Labels {
    Area(LabelArea),
    /// A file as it is; what is noted about it is gone with the server.
    Unlabelled(Label),
}

/// Why a region cannot be opened. Its image is as it was.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OpenError {
    /// The file cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// It has bytes, and no label of ours.
    #[error("{} is not empty and has no pgmap label: add mode=raw to serve it as it is, or overwrite to lose what is in it", .0.display())]
    Foreign(PathBuf),
    /// It has a label, and was to be served without one.
    #[error("{} has a pgmap label: leave out mode=raw", .0.display())]
    Labelled(PathBuf),
    /// It is shorter than its label says.
    #[error("{} has {has} of the {needed} bytes that its label says: it was truncated; restore it", .path.display())]
    Truncated {
        /// The image.
        path: PathBuf,
        /// How long it is.
        has: u64,
        /// How long it was.
        needed: u64,
    },
    /// The label cannot be believed.
    #[error("{}: {error}: move the file away, or restore it", .path.display())]
    Label {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        error: AreaError,
    },
    /// The first label cannot be written.
    #[error("{}: {error}", .path.display())]
    Create {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        error: CommitError,
    },
    /// There can be no first namespace.
    #[error(transparent)]
    NoNamespace(#[from] NoNamespace),
    /// The machine refused.
    #[error("the machine has no memory of this size: {0}")]
    Memory(Errno),
}

/// Why a change of a region failed. The region is as it was.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RegionError {
    /// There can be no such namespace.
    #[error(transparent)]
    NoNamespace(#[from] NoNamespace),
    /// There is no namespace of this number.
    #[error("region{region} has no namespace{region}.{index}")]
    Unknown {
        /// The region.
        region: u32,
        /// The number.
        index: u32,
    },
    /// The namespace is in use.
    #[error("namespace{region}.{index} is in use: disable it first")]
    InUse {
        /// The region.
        region: u32,
        /// The number.
        index: u32,
    },
    /// The region is a file without a label.
    #[error("region{0} is served as it is (mode=raw), and has no label to change")]
    Unlabelled(u32),
    /// The label cannot be written.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// There are too few huge pages.
    #[error("too few huge pages of {size}: {needed} needed, {available} free: write {enough} to {}", .file.display())]
    FewHugePages {
        /// How many are needed.
        needed: u64,
        /// Of what size.
        size: Align,
        /// How many there are.
        available: u64,
        /// How many the machine would have to have, those in use included.
        enough: u64,
        /// Where that is said.
        file: PathBuf,
    },
    /// There are none of this size.
    #[error("this machine has no huge pages of {0}: use another size, or leave huge out")]
    NoHugePages(Align),
    /// Such pages have no calls to write, and what stands in for them is forbidden.
    #[error(
        "huge pages cannot be served: process_vm_readv and process_vm_writev are forbidden here: allow them (seccomp)"
    )]
    NoCopies,
    /// The machine refused.
    #[error("the machine refused: {0}")]
    Io(#[from] Errno),
}

impl Region {
    /// Opens what the text names, as the region of this number; a fresh image gets one namespace that fills it.
    ///
    /// # Errors
    ///
    /// [`OpenError`], which says what to do.
    pub fn open(spec: &PmemSpec, number: u32) -> Result<Arc<Self>, OpenError> {
        match (&spec.source, spec.mode) {
            (Source::Memory, _) => {
                let bytes = spec.size_bytes.unwrap_or(0);
                // Namespaces begin at whole units.
                let before = LABEL_AREA_BYTES.max(spec.wanted().align.bytes());
                let bytes = bytes.saturating_add(before);
                let label = SharedFrames::memory("pgmap-label", LABEL_AREA_BYTES);
                let medium = Arc::new(label.map_err(OpenError::Memory)?);
                let labels = fresh(&*medium, bytes, spec)?;
                let name = "memory".to_owned();
                Ok(Self::new(
                    number,
                    name,
                    medium,
                    Storage::MemoryFiles(spec.huge),
                    labels,
                ))
            }
            (Source::Image(path), Mode::Raw) => {
                let image = image::open(path, spec.size_bytes, 1)?;
                Self::on_image(image, |frames| Self::as_it_is(frames, path, number))
            }
            (Source::Image(path), Mode::Fsdax | Mode::Devdax) => {
                let image = image::open(path, spec.size_bytes, LEAST_BYTES)?;
                Self::on_image(image, |frames| {
                    let bytes = frames.size_bytes();
                    Self::on_medium(frames, bytes, spec, number)
                })
            }
        }
    }

    /// If it cannot be opened, what was made for it is taken back.
    fn on_image(
        image: Image,
        open: impl FnOnce(Arc<SharedFrames>) -> Result<Arc<Self>, OpenError>,
    ) -> Result<Arc<Self>, OpenError> {
        let Image { frames, made } = image;
        let frames = Arc::new(frames);
        let opened = open(Arc::clone(&frames));
        match (&opened, made) {
            (Ok(region), made) => region.state.lock().made = made,
            (Err(_), Some(made)) => made.take_back(frames.fd()),
            (Err(_), None) => {}
        }
        opened
    }

    /// A file without a label.
    fn as_it_is(
        frames: Arc<SharedFrames>,
        path: &Path,
        number: u32,
    ) -> Result<Arc<Self>, OpenError> {
        match LabelArea::open(&*frames) {
            Err(AreaError::None) => {}
            Err(error @ AreaError::Io(_)) => {
                let path = path.to_owned();
                return Err(OpenError::Label { path, error });
            }
            Ok(_) | Err(AreaError::Damaged(_) | AreaError::Version(_)) => {
                return Err(OpenError::Labelled(path.to_owned()));
            }
        }
        let labels = Labels::Unlabelled(whole(frames.size_bytes())?);
        let name = path.display().to_string();
        Ok(Self::new(number, name, frames, Storage::Medium, labels))
    }

    /// Opens what is on a medium of so many bytes; `spec` says how to treat it, as in [`open`](Self::open).
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub fn on_medium(
        medium: Arc<dyn Medium>,
        bytes: u64,
        spec: &PmemSpec,
        number: u32,
    ) -> Result<Arc<Self>, OpenError> {
        let path = match &spec.source {
            Source::Image(path) => path.clone(),
            Source::Memory => PathBuf::from("memory"),
        };
        let read = |errno| {
            let error = AreaError::Io(errno);
            let path = path.clone();
            OpenError::Label { path, error }
        };
        let labels = match LabelArea::open(&*medium) {
            Ok(area) => Labels::Area(area),
            Err(AreaError::None) => {
                let foreign = spec.foreign == Foreign::Refuse
                    && !is_zero(&*medium, 0..bytes).map_err(read)?;
                if foreign {
                    return Err(OpenError::Foreign(path));
                }
                // A label is to be written on a full file system, too.
                let room = medium
                    .frames()
                    .map(|frames| frames.allocate(&(0..SLOTS_BYTES)));
                match room {
                    None | Some(Ok(()) | Err(Errno::OPNOTSUPP)) => {}
                    Some(Err(errno)) => {
                        let error = CommitError::Io(errno);
                        return Err(OpenError::Create { path, error });
                    }
                }
                fresh(&*medium, bytes, spec)?
            }
            Err(error) => return Err(OpenError::Label { path, error }),
        };
        let needed = labels.label().medium_bytes;
        if needed > bytes {
            let has = bytes;
            return Err(OpenError::Truncated { path, has, needed });
        }
        let name = path.display().to_string();
        Ok(Self::new(number, name, medium, Storage::Medium, labels))
    }

    fn new(
        number: u32,
        name: String,
        medium: Arc<dyn Medium>,
        storage: Storage,
        labels: Labels,
    ) -> Arc<Self> {
        let state = State {
            labels,
            bound: BTreeMap::new(),
            files: BTreeMap::new(),
            place: None,
            made: None,
        };
        Arc::new(Self {
            number,
            name,
            medium: Arc::new(Unforgetting::new(medium)),
            storage,
            state: Mutex::new(state),
        })
    }

    /// Takes back the image, or its length, if this opened region made it: for whoever cannot use the region after all. One that
    /// has a namespace in use stays.
    pub fn take_back(&self) {
        let mut state = self.state.lock();
        let mut bound = state.bound.values();
        if bound.any(|pmem| pmem.strong_count() > 0) {
            return;
        }
        if let (Some(made), Some(frames)) = (state.made.take(), self.medium.frames()) {
            made.take_back(frames.fd());
        }
    }

    /// Its number: the `0` of `region0`.
    #[must_use]
    pub const fn number(&self) -> u32 {
        self.number
    }

    /// The path of its image, or `memory`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its name for machines.
    #[must_use]
    pub fn uuid(&self) -> Uuid {
        self.state.lock().label().region
    }

    /// Its namespaces.
    #[must_use]
    pub fn namespaces(&self) -> Vec<Namespace> {
        self.state.lock().label().namespaces.clone()
    }

    /// Its lost sectors, counted from its start.
    #[must_use]
    pub fn bad_blocks(&self) -> BadBlocks {
        self.state.lock().label().bad.clone()
    }

    /// A namespace in use.
    #[must_use]
    pub fn bound(&self, index: u32) -> Option<Arc<Pmem>> {
        self.state.lock().bound.get(&index)?.upgrade()
    }

    /// Makes a namespace. Its bytes are what was there before.
    ///
    /// # Errors
    ///
    /// [`RegionError`].
    pub fn create_namespace(&self, wanted: &Wanted) -> Result<Namespace, RegionError> {
        let uuid = Uuid::random()?;
        let wanted = Wanted {
            align: wanted.align.max(self.unit()),
            map: match self.storage {
                Storage::Medium => wanted.map,
                // The device is RAM.
                Storage::MemoryFiles(_) => MapLocation::Mem,
            },
            ..wanted.clone()
        };
        self.change(|label| {
            let (bytes, others) = (label.medium_bytes, &label.namespaces);
            let made = Namespace::place(&wanted, uuid, bytes, others)?;
            label.namespaces.push(made.clone());
            Ok(made)
        })
    }

    /// Takes a namespace away; it must not be in use. Its room is free for others.
    ///
    /// # Errors
    ///
    /// [`RegionError`].
    pub fn destroy_namespace(&self, index: u32) -> Result<(), RegionError> {
        let mut state = self.state.lock();
        self.not_in_use(&state, index)?;
        self.change_locked(&mut state, |label| {
            self.find(label, index)?;
            label
                .namespaces
                .retain(|namespace| namespace.index != index);
            Ok(())
        })?;
        state.files.remove(&index);
        Ok(())
    }

    /// Says whether a namespace is to be used when the region is opened.
    ///
    /// # Errors
    ///
    /// [`RegionError`].
    pub fn set_activation(&self, index: u32, activation: Activation) -> Result<(), RegionError> {
        self.change(|label| {
            self.find(label, index)?.activation = activation;
            Ok(())
        })
    }

    /// Changes the bad blocks of the region; `publish` gets the new ones once they are durable.
    pub(crate) fn change_bad(
        &self,
        change: impl FnOnce(&mut BadBlocks),
        publish: impl FnOnce(&BadBlocks),
    ) -> Result<(), CommitError> {
        let mut state = self.state.lock();
        let mut label = state.label().clone();
        change(&mut label.bad);
        if label.bad != state.label().bad {
            state.commit(&*self.medium, label)?;
        }
        publish(&state.label().bad);
        Ok(())
    }

    pub(crate) fn find<'a>(
        &self,
        label: &'a mut Label,
        index: u32,
    ) -> Result<&'a mut Namespace, RegionError> {
        let mut all = label.namespaces.iter_mut();
        let region = self.number;
        all.find(|namespace| namespace.index == index)
            .ok_or(RegionError::Unknown { region, index })
    }

    pub(crate) fn not_in_use(&self, state: &State, index: u32) -> Result<(), RegionError> {
        let used = state
            .bound
            .get(&index)
            .is_some_and(|pmem| pmem.strong_count() > 0);
        let region = self.number;
        if used {
            return Err(RegionError::InUse { region, index });
        }
        Ok(())
    }

    pub(crate) const fn storage(&self) -> Storage {
        self.storage
    }

    pub(crate) fn medium(&self) -> Arc<dyn Medium> {
        Arc::clone(&self.medium)
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    fn change<T>(
        &self,
        change: impl FnOnce(&mut Label) -> Result<T, RegionError>,
    ) -> Result<T, RegionError> {
        self.change_locked(&mut self.state.lock(), change)
    }

    /// One change of the label: all of it, or none.
    fn change_locked<T>(
        &self,
        state: &mut State,
        change: impl FnOnce(&mut Label) -> Result<T, RegionError>,
    ) -> Result<T, RegionError> {
        if matches!(state.labels, Labels::Unlabelled(_)) {
            return Err(RegionError::Unlabelled(self.number));
        }
        let mut label = state.label().clone();
        let changed = change(&mut label)?;
        state.commit(&*self.medium, label)?;
        Ok(changed)
    }
}

impl State {
    /// What the region says about itself.
    pub(crate) const fn label(&self) -> &Label {
        self.labels.label()
    }

    /// Where the region is on this map, from now on.
    pub(crate) fn place(&mut self, map: &Arc<MemoryMap>) -> Result<&Place, MapError> {
        let known = self.place.take().filter(|place| place.is_on(map));
        let place = match known {
            Some(place) => place,
            None => Place::new(map, self.label().medium_bytes)?,
        };
        Ok(self.place.insert(place))
    }

    fn commit(&mut self, medium: &dyn Medium, label: Label) -> Result<(), CommitError> {
        match &mut self.labels {
            Labels::Area(area) => area.commit(medium, label),
            Labels::Unlabelled(old) => {
                *old = label;
                Ok(())
            }
        }
    }
}

impl Labels {
    const fn label(&self) -> &Label {
        match self {
            Self::Area(area) => area.label(),
            Self::Unlabelled(label) => label,
        }
    }
}

/// A medium that becomes a region with one namespace that fills it.
fn fresh(medium: &dyn Medium, bytes: u64, spec: &PmemSpec) -> Result<Labels, OpenError> {
    let uuid = || Uuid::random().map_err(OpenError::Memory);
    let mut wanted = spec.wanted();
    wanted.align = wanted.align.max(unit_of(medium));
    let namespace = Namespace::place(&wanted, uuid()?, bytes, &[])?;
    let label = Label {
        region: uuid()?,
        medium_bytes: bytes,
        namespaces: vec![namespace],
        bad: BadBlocks::default(),
    };
    let area = LabelArea::create(medium, label).map_err(|error| {
        let path = PathBuf::from(spec.source.to_string());
        OpenError::Create { path, error }
    })?;
    Ok(Labels::Area(area))
}

/// What is known about a file that is served as it is.
fn whole(bytes: u64) -> Result<Label, OpenError> {
    let uuid = || Uuid::random().map_err(OpenError::Memory);
    let wanted = Wanted::default();
    Ok(Label {
        region: uuid()?,
        medium_bytes: bytes,
        namespaces: vec![Namespace {
            index: 0,
            uuid: uuid()?,
            name: String::new(),
            mode: Mode::Raw,
            align: wanted.align,
            map: MapLocation::Mem,
            activation: Activation::Enabled,
            data: 0..bytes,
            metadata: 0..0,
        }],
        bad: BadBlocks::default(),
    })
}
