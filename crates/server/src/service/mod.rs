//! What `pgmap serve` is: regions, the devices of their namespaces, and the answers to what is asked about them.
//!
//! The command builds a [`Service`] and lends it to the fronts: NBD finds devices in it ([`Exports`](crate::nbd::Exports)), the control socket
//! asks it ([`Manager`](crate::control::Manager)). What must never happen here: a device that is out of use and can still be had by a new client.

mod answers;
mod exports;
mod failure;
mod holds;
mod metrics;

use core::time::Duration;
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use pgmap_core::addr::MAX_PFN;
use pgmap_core::memremap::MemoryMap;
use pgmap_core::platform::OutOfAddressSpace;
use pgmap_drivers::block::{BlockDevice, BlockError};
use pgmap_drivers::pmem::{
    Activation, Afterwards, BindError, Hold, HoldKind, Namespace, OpenError, Pmem, Region,
};
use pgmap_host::platform::HostPlatform;
use pgmap_sync::{Mutex, MutexGuard};

use crate::control::protocol::Failure;
use crate::nbd::{Export, Server};

pub use metrics::Metrics;
pub use pgmap_drivers::pmem::PmemSpec;

static PLATFORM: HostPlatform = HostPlatform;

/// All that one process serves.
#[derive(Debug)]
pub struct Service {
    map: Arc<MemoryMap>,
    /// One namespace at a time goes into use or out of it, which may wait for a disk. Before `regions`.
    turn: Mutex<()>,
    /// Never held while anything is waited for: NBD clients and `pgmap list` look here.
    regions: Mutex<Regions>,
    /// The front, once there is one, and the beginning and end of the addresses at which it is found.
    nbd: OnceLock<(Server, Vec<Uri>)>,
}

/// Where NBD clients find an export: its name goes in between.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Uri {
    /// Such as `nbd+unix:///`.
    pub before: String,
    /// Such as `?socket=/run/x.nbd`.
    pub after: String,
}

#[derive(Debug, Default)]
struct Regions {
    next: u32,
    all: BTreeMap<u32, Arc<Region>>,
    /// Namespaces in use, by region and number.
    devices: Devices,
}

type Devices = BTreeMap<(u32, u32), Device>;

/// A namespace in use.
#[derive(Clone, Debug)]
struct Device {
    pmem: Arc<Pmem>,
    export: Arc<Export>,
}

/// Why a region cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// It cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A namespace of it cannot be taken into use.
    #[error(transparent)]
    Bind(#[from] BindError),
}

/// A pin of a client's.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct OldPin {
    /// The device's name.
    pub device: String,
    /// Who pins which bytes, and since when.
    pub hold: Hold,
}

impl Service {
    /// Nothing yet.
    ///
    /// # Errors
    ///
    /// If the machine has no addresses for the tables.
    pub fn new() -> Result<Arc<Self>, OutOfAddressSpace> {
        Ok(Arc::new(Self {
            map: MemoryMap::new(&PLATFORM, MAX_PFN)?,
            turn: Mutex::default(),
            regions: Mutex::default(),
            nbd: OnceLock::new(),
        }))
    }

    /// Says by which front, and at which addresses, NBD clients find the devices.
    pub fn set_nbd(&self, server: Server, uris: Vec<Uri>) {
        // There is one front, and whoever comes second changes nothing.
        let _ = self.nbd.set((server, uris));
    }

    /// Opens a region, and takes into use those of its namespaces that are to be. Answers its name.
    ///
    /// # Errors
    ///
    /// [`PlugError`]; nothing is served then that was not before.
    pub fn plug(&self, spec: &PmemSpec) -> Result<String, PlugError> {
        let number = {
            let mut regions = self.regions.lock();
            regions.next += 1;
            regions.next - 1
        };
        let plugged = self.plug_as(spec, number);
        if plugged.is_err() {
            let mut regions = self.regions.lock();
            // The number is the next one's, unless somebody has one after it already.
            if regions.next == number + 1 {
                regions.next = number;
            }
        }
        plugged
    }

    fn plug_as(&self, spec: &PmemSpec, number: u32) -> Result<String, PlugError> {
        let region = Region::open(spec, number)?;
        let devices = self
            .devices_of(&region)
            .inspect_err(|_| region.take_back())?;
        let mut regions = self.regions.lock();
        regions.all.insert(number, region);
        regions.devices.extend(devices);
        Ok(format!("region{number}"))
    }

    /// Takes the namespaces of a new region into use that are to be.
    fn devices_of(&self, region: &Arc<Region>) -> Result<Devices, BindError> {
        let wanted = |namespace: &Namespace| namespace.activation == Activation::Enabled;
        let wanted = region.namespaces().into_iter().filter(wanted);
        let bound = wanted.map(|namespace| {
            let pmem = region.bind(&self.map, namespace.index)?;
            Ok(((region.number(), namespace.index), Device::new(pmem)))
        });
        bound.collect()
    }

    /// Ends a start that failed, before anybody was served: images that it made are gone again.
    pub fn give_up(&self) {
        let Regions { all, devices, .. } = core::mem::take(&mut *self.regions.lock());
        drop(devices);
        for region in all.values() {
            region.take_back();
        }
    }

    /// Makes everything durable that was written.
    ///
    /// # Errors
    ///
    /// For each device that failed its name, and why.
    pub fn flush(&self) -> Result<(), Vec<(String, BlockError)>> {
        let devices: Vec<Device> = self.regions.lock().devices.values().cloned().collect();
        let failed = devices.iter().filter_map(|device| {
            let name = device.pmem.name().to_owned();
            device.pmem.flush().err().map(|error| (name, error))
        });
        let failed: Vec<_> = failed.collect();
        if failed.is_empty() {
            Ok(())
        } else {
            Err(failed)
        }
    }

    /// Who still maps or pins something, for a last word before the end: a line for each.
    #[must_use]
    pub fn holders(&self) -> Vec<String> {
        let devices: Vec<Device> = self.regions.lock().devices.values().cloned().collect();
        let lines = devices.iter().flat_map(|device| {
            let name = device.pmem.name().to_owned();
            let holds = device.pmem.holds().into_iter();
            holds.map(move |hold| format!("{name}: {hold}"))
        });
        lines.collect()
    }

    /// Who has pinned something for so long, device by device, oldest first.
    #[must_use]
    pub fn pins_older_than(&self, limit: Duration) -> Vec<OldPin> {
        let devices: Vec<Device> = self.regions.lock().devices.values().cloned().collect();
        let now = self.map.now_ns();
        let pins = devices.iter().flat_map(|device| {
            let name = device.pmem.name().to_owned();
            let holds = device.pmem.holds().into_iter();
            holds.map(move |hold| (name.clone(), hold))
        });
        let old = pins.filter(|(_, hold)| hold.kind == HoldKind::Pinned && hold.age(now) >= limit);
        old.map(|(device, hold)| OldPin { device, hold }).collect()
    }

    /// The last step of taking a device out of use. Until then it is in the list, so that nobody brings its namespace back
    /// into use in between.
    fn forget(&self, key: (u32, u32), keep: Keep, device: &Device) -> Result<(), Failure> {
        let turn = self.turn.lock();
        self.regions.lock().devices.remove(&key);
        let noted = self.note_absence(&turn, key, keep);
        drop(turn);
        self.disconnect(&device.export.name);
        noted
    }

    /// Notes in the label that a namespace is to stay out of use, if it is and that is wanted.
    fn note_absence(
        &self,
        _turn: &MutexGuard<'_, ()>,
        key: (u32, u32),
        keep: Keep,
    ) -> Result<(), Failure> {
        let absent = {
            let regions = self.regions.lock();
            let region = regions.all.get(&key.0);
            region
                .filter(|_| !regions.devices.contains_key(&key))
                .cloned()
        };
        match (keep, absent) {
            (Keep::Bytes, Some(region)) => {
                answers::set_activation(&region, key.1, Activation::Disabled)
            }
            (Keep::Bytes | Keep::Nothing, _) => Ok(()),
        }
    }

    /// Where NBD clients find an export: an address for each socket.
    fn uris(&self, name: &str) -> Vec<String> {
        let uris = self.nbd.get().map(|(_, uris)| uris.iter());
        let uris = uris.into_iter().flatten();
        uris.map(|Uri { before, after }| format!("{before}{name}{after}"))
            .collect()
    }

    /// Ends the connections of those who use a device that is out of use.
    fn disconnect(&self, name: &str) {
        if let Some((server, _)) = self.nbd.get() {
            server.disconnect(name);
        }
    }
}

impl Device {
    fn new(pmem: Arc<Pmem>) -> Self {
        let export = Arc::new(Export::new(Arc::clone(&pmem) as Arc<dyn BlockDevice>));
        Self { pmem, export }
    }
}

/// What becomes of volatile bytes.
const fn afterwards(keep: Keep) -> Afterwards {
    match keep {
        Keep::Bytes => Afterwards::Keep,
        Keep::Nothing => Afterwards::Forget,
    }
}

/// Why a namespace is taken out of use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Keep {
    /// It will come back.
    Bytes,
    /// It is unplugged: volatile memory is gone.
    Nothing,
}
