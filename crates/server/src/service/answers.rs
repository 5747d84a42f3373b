//! What `pgmap serve` answers over the control socket.

use core::time::Duration;
use std::sync::Arc;

use pgmap_drivers::block::{BlockDevice, BlockError};
use pgmap_drivers::pmem::{
    Activation, Align, Mode, Namespace, Pmem, PmemSpec, Region, RegionError, Wanted,
};
use pgmap_host::shared::MapSync;

use super::failure::Lost;
use super::holds::holder;
use super::{Device, Keep, Service};
use crate::control::protocol::{
    Answer, BadBlocks, Code, Counters, CreateNamespace, Failure, Kind, Listing, ManagerInfo,
    Namespace as NamespaceView, Region as RegionView, Request, Scrub,
};
use crate::control::{Manager, Session};
use crate::iomem;
use crate::nbd::Count;

/// Bytes of a block that can be bad.
const SECTOR_BYTES: u64 = 512;
/// How often somebody who waits is looked for.
const LOOK: Duration = Duration::from_millis(100);

impl Manager for Service {
    fn info(&self) -> ManagerInfo {
        ManagerInfo {
            kind: Kind::Serve,
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            command: String::new(),
        }
    }

    fn answer(&self, request: Request, session: &mut Session) -> Result<Answer, Failure> {
        match request {
            Request::List => Ok(Answer::Listing(self.listing())),
            Request::Iomem => Ok(Answer::Iomem(iomem::view(self.map.iomem().roots()))),
            Request::Holders { device } => self.holders_of(&device),
            Request::Counters => Ok(Answer::Counters(self.counters())),
            Request::CreateNamespace(wanted) => self.create(&wanted),
            Request::DestroyNamespace { namespace } => self.destroy(&namespace),
            Request::Enable { namespace } => self.enable(&namespace),
            Request::Disable {
                namespace,
                timeout_ms,
            } => self.disable(&namespace, timeout_ms.map(Duration::from_millis), session),
            Request::Plug { spec } => self.plug_text(&spec),
            Request::Unplug { device, timeout_ms } => {
                self.unplug(&device, timeout_ms.map(Duration::from_millis), session)
            }
            Request::InjectError {
                namespace,
                block,
                count,
            } => self.blocks(&namespace, block, count, Pmem::inject_error),
            Request::ClearError {
                namespace,
                block,
                count,
            } => self.blocks(&namespace, block, count, Pmem::clear_error),
            Request::Scrub { namespace, wait } => {
                let devices = self.some_devices(namespace.as_deref())?;
                let until = wait.then_some(session);
                scrub(&devices, until.as_deref())
            }
            Request::Memory | Request::Online { .. } | Request::Offline { .. } => {
                let text = "`pgmap serve` has no RAM of its own to resize: ask a `pgmap run`";
                Err(Failure::new(Code::Unsupported, text))
            }
            Request::Map(range) => self.map_range(&range, session),
            Request::Pin { range, label } => self.pin_range(&range, label, session),
            Request::Lost { id, wait } => {
                let when = if wait { Lost::Soon } else { Lost::Now };
                Self::lost_of(id, when, session)
            }
            Request::Release { id } => session.release(id),
        }
    }
}

impl Service {
    fn listing(&self) -> Listing {
        let regions: Vec<Arc<Region>> = self.regions.lock().all.values().cloned().collect();
        Listing {
            regions: regions.iter().map(|region| self.view(region)).collect(),
            devices: Vec::new(),
        }
    }

    fn view(&self, region: &Arc<Region>) -> RegionView {
        let namespaces = region.namespaces();
        RegionView {
            dev: format!("region{}", region.number()),
            size: region.size_bytes(),
            available_size: region.size_bytes().saturating_sub(
                region.overhead_bytes() + namespaces.iter().map(Namespace::size_bytes).sum::<u64>(),
            ),
            kind: "pmem".into(),
            image: (region.name() != "memory").then(|| region.name().to_owned()),
            uuid: region.uuid().to_string(),
            metadata_size: region.overhead_bytes(),
            map_sync: region.map_sync().map(|sync| sync == MapSync::Yes),
            namespaces: namespaces
                .iter()
                .map(|namespace| self.namespace_view(region, namespace))
                .collect(),
        }
    }

    fn namespace_view(&self, region: &Region, namespace: &Namespace) -> NamespaceView {
        let name = region.device_name(namespace);
        let (blockdev, chardev) = match namespace.mode {
            Mode::Devdax => (None, Some(name.clone())),
            Mode::Fsdax | Mode::Raw => (Some(name.clone()), None),
        };
        let bound = region.bound(namespace.index);
        let bad = bound.as_ref().map(|pmem| pmem.bad_blocks());
        let bad = bad.unwrap_or_default();
        let sectors = bad.ranges().iter().map(|range| range.end - range.start);
        let badblocks = bad.ranges().iter().map(|range| BadBlocks {
            offset: range.start,
            length: range.end - range.start,
        });
        let uris = bound.as_ref().map(|_| self.uris(&name));
        let mut uris = uris.unwrap_or_default().into_iter();
        NamespaceView {
            dev: format!("namespace{}.{}", region.number(), namespace.index),
            mode: namespace.mode.to_string(),
            map: (namespace.mode != Mode::Raw).then(|| namespace.map.to_string()),
            size: namespace.size_bytes(),
            metadata_size: namespace.metadata.end - namespace.metadata.start,
            uuid: namespace.uuid.to_string(),
            sector_size: SECTOR_BYTES,
            align: namespace.align.bytes(),
            blockdev,
            chardev,
            name: namespace.name.clone(),
            state: if bound.is_some() {
                "enabled"
            } else {
                "disabled"
            }
            .into(),
            badblock_count: sectors.sum(),
            badblocks: badblocks.collect(),
            nbd: uris.next(),
            nbd_also: uris.collect(),
        }
    }

    fn holders_of(&self, name: &str) -> Result<Answer, Failure> {
        let device = self.device(name)?;
        let now = self.map.now_ns();
        let holds = device.pmem.holds();
        Ok(Answer::Holders(
            holds.iter().map(|hold| holder(hold, now)).collect(),
        ))
    }

    /// What happened so far, for each device in use.
    #[must_use]
    pub fn counters(&self) -> Vec<Counters> {
        let devices: Vec<Device> = self.regions.lock().devices.values().cloned().collect();
        let clients = self.nbd.get().map(|(server, _)| server.clients());
        let clients = clients.unwrap_or_default();
        let of = |device: &Device| {
            let name = &device.export.name;
            let connected = clients
                .iter()
                .filter(|client| client.export.as_ref() == Some(name));
            let counts = Count::ALL.map(|count| {
                let value = device.export.counters.get(count);
                (count_name(count).to_owned(), value)
            });
            Counters {
                of: name.clone(),
                counters: counts.into(),
                gauges: vec![
                    ("clients".into(), connected.count() as u64),
                    ("holders".into(), device.pmem.holds().len() as u64),
                    ("size_bytes".into(), device.pmem.size_bytes()),
                ],
            }
        };
        devices.iter().map(of).collect()
    }

    fn create(&self, wanted: &CreateNamespace) -> Result<Answer, Failure> {
        let (wanted_region, wanted) = (wanted.region.as_deref(), parse(wanted)?);
        let mut regions: Vec<Arc<Region>> = self.regions.lock().all.values().cloned().collect();
        if let Some(name) = wanted_region {
            regions.retain(|region| format!("region{}", region.number()) == name);
        }
        let mut why = Failure::new(Code::NotFound, "there is no such region");
        for region in regions {
            match region.create_namespace(&wanted) {
                Ok(namespace) => return self.begin(&region, &namespace),
                Err(error) => why = region_failure(&error),
            }
        }
        Err(why)
    }

    /// Takes a namespace into use that was just made. If that cannot be, there is none.
    fn begin(&self, region: &Arc<Region>, namespace: &Namespace) -> Result<Answer, Failure> {
        if let Err(failure) = self.bind(region, namespace.index) {
            // If it is in use all the same, it stays.
            let _ = region.destroy_namespace(namespace.index);
            return Err(failure);
        }
        let view = self.namespace_view(region, namespace);
        Ok(Answer::Namespace(Box::new(view)))
    }

    /// Takes a namespace into use, unless it is, and notes in its label that it is to be.
    fn bind(&self, region: &Arc<Region>, index: u32) -> Result<(), Failure> {
        let _turn = self.turn.lock();
        let key = (region.number(), index);
        let bound = region.bound(index).is_some();
        let leaving = {
            let regions = self.regions.lock();
            !regions.all.contains_key(&key.0) || (!bound && regions.devices.contains_key(&key))
        };
        if leaving {
            let text = "it is just being taken out of use: try again";
            return Err(Failure::new(Code::Busy, text));
        }
        if !bound {
            let pmem = region.bind(&self.map, index);
            let pmem = pmem.map_err(|error| Failure::new(Code::Failed, error))?;
            self.regions.lock().devices.insert(key, Device::new(pmem));
        }
        set_activation(region, index, Activation::Enabled)
    }

    fn destroy(&self, name: &str) -> Result<Answer, Failure> {
        let (region, namespace) = self.namespace(name)?;
        let destroyed = region.destroy_namespace(namespace.index);
        destroyed.map_err(|error| region_failure(&error))?;
        Ok(Answer::Done)
    }

    fn enable(&self, name: &str) -> Result<Answer, Failure> {
        let (region, namespace) = self.namespace(name)?;
        self.bind(&region, namespace.index)?;
        Ok(Answer::Done)
    }

    fn disable(
        &self,
        name: &str,
        patience: Option<Duration>,
        session: &Session,
    ) -> Result<Answer, Failure> {
        let (region, namespace) = self.namespace(name)?;
        let key = (region.number(), namespace.index);
        self.take_away(key, patience, Keep::Bytes, session)?;
        Ok(Answer::Done)
    }

    fn plug_text(&self, spec: &str) -> Result<Answer, Failure> {
        let spec: PmemSpec = spec
            .parse()
            .map_err(|error| Failure::new(Code::Invalid, error))?;
        let plugged = self.plug(&spec);
        let name = plugged.map_err(|error| Failure::new(Code::Failed, error))?;
        Ok(Answer::Name(name))
    }

    /// Takes a namespace away until it is enabled again, or a region with all of its namespaces.
    fn unplug(
        &self,
        name: &str,
        patience: Option<Duration>,
        session: &Session,
    ) -> Result<Answer, Failure> {
        let number = self.regions.lock().all.values().find_map(|region| {
            let number = region.number();
            (format!("region{number}") == name).then_some(number)
        });
        let Some(number) = number else {
            let (region, namespace) = self.namespace(name)?;
            let key = (region.number(), namespace.index);
            self.take_away(key, patience, Keep::Nothing, session)?;
            return Ok(Answer::Done);
        };
        self.take_region_away(number, patience, session)?;
        let _turn = self.turn.lock();
        let mut regions = self.regions.lock();
        if regions.devices.keys().any(|key| key.0 == number) {
            let text = format!("a namespace of {name} was enabled meanwhile: unplug it again");
            return Err(Failure::new(Code::Busy, text));
        }
        regions.all.remove(&number);
        Ok(Answer::Done)
    }

    fn blocks(
        &self,
        name: &str,
        block: u64,
        count: u64,
        change: impl Fn(&Pmem, core::ops::Range<u64>) -> Result<(), BlockError>,
    ) -> Result<Answer, Failure> {
        if count == 0 {
            let text = "no blocks are meant: a count is at least 1";
            return Err(Failure::new(Code::Invalid, text));
        }
        let device = self.device(name)?;
        let start = block.saturating_mul(SECTOR_BYTES);
        let end = start.saturating_add(count.saturating_mul(SECTOR_BYTES));
        change(&device.pmem, start..end).map_err(|error| block_failure(&error))?;
        Ok(Answer::Done)
    }

    fn some_devices(&self, name: Option<&str>) -> Result<Vec<Device>, Failure> {
        match name {
            Some(name) => Ok(vec![self.device(name)?]),
            None => Ok(self.regions.lock().devices.values().cloned().collect()),
        }
    }

    /// The namespace that people mean.
    fn namespace(&self, name: &str) -> Result<(Arc<Region>, Namespace), Failure> {
        let regions: Vec<Arc<Region>> = self.regions.lock().all.values().cloned().collect();
        let all = regions.iter().flat_map(|region| {
            let namespaces = region.namespaces().into_iter();
            namespaces.map(move |namespace| (Arc::clone(region), namespace))
        });
        let mut named = all
            .filter(|(region, namespace)| self.namespace_view(region, namespace).is_called(name));
        let none = || {
            let text = format!("there is no `{name}`: `pgmap list` shows what there is");
            Failure::new(Code::NotFound, text)
        };
        named.next().ok_or_else(none)
    }

    /// The device in use that people mean.
    pub(super) fn device(&self, name: &str) -> Result<Device, Failure> {
        let (region, namespace) = self.namespace(name)?;
        let key = (region.number(), namespace.index);
        let device = self.regions.lock().devices.get(&key).cloned();
        device.ok_or_else(|| {
            let text = format!("{name} is out of use: `pgmap enable {name}` brings it back");
            Failure::new(Code::NotFound, text)
        })
    }
}

/// Notes in the label whether a namespace is to be in use.
pub(super) fn set_activation(region: &Region, index: u32, to: Activation) -> Result<(), Failure> {
    match region.set_activation(index, to) {
        // A file without a label has nowhere to keep it: that is what raw means.
        Ok(()) | Err(RegionError::Unlabelled(_)) => Ok(()),
        Err(error) => Err(region_failure(&error)),
    }
}

fn parse(wanted: &CreateNamespace) -> Result<Wanted, Failure> {
    let invalid = |error| Failure::new(Code::Invalid, error);
    let usual = Wanted::default();
    let align = match wanted.align {
        None => usual.align,
        Some(bytes) => [Align::Page, Align::Pmd, Align::Pud]
            .into_iter()
            .find(|align| align.bytes() == bytes)
            .ok_or_else(|| Failure::new(Code::Invalid, "an alignment is 4K, 2M or 1G"))?,
    };
    let mode = wanted.mode.as_deref().map(str::parse).transpose();
    let map = wanted.map.as_deref().map(str::parse).transpose();
    Ok(Wanted {
        size_bytes: wanted.size,
        mode: mode.map_err(invalid)?.unwrap_or(usual.mode),
        align,
        map: map.map_err(invalid)?.unwrap_or(usual.map),
        name: wanted.name.clone().unwrap_or_default(),
    })
}

/// Begins a pass over each device; if somebody waits, until all are done or they are gone.
fn scrub(devices: &[Device], until: Option<&Session>) -> Result<Answer, Failure> {
    let passes: Vec<_> = devices.iter().map(|device| device.pmem.scrub()).collect();
    let mut complete = false;
    if let Some(session) = until {
        for (device, pass) in devices.iter().zip(passes) {
            let look = || device.pmem.wait_for_scrub(pass, Some(LOOK));
            let mut seen = look();
            while seen == Err(pgmap_drivers::pmem::ScrubError::Patience) && !session.is_hung_up() {
                seen = look();
            }
            seen.map_err(|error| Failure::new(Code::Failed, error))?;
        }
        complete = true;
    }
    let bad = devices.iter().map(|device| device.pmem.bad_blocks());
    let sectors = bad.map(|bad| {
        let ranges = bad.ranges().iter();
        ranges.map(|range| range.end - range.start).sum::<u64>()
    });
    Ok(Answer::Scrub(Scrub {
        complete,
        badblock_count: sectors.sum(),
    }))
}

fn region_failure(error: &RegionError) -> Failure {
    let code = match error {
        RegionError::NoNamespace(_) => Code::Invalid,
        RegionError::Unknown { .. } => Code::NotFound,
        RegionError::InUse { .. } => Code::Busy,
        RegionError::Unlabelled(_) => Code::Unsupported,
        RegionError::Commit(_)
        | RegionError::FewHugePages { .. }
        | RegionError::NoHugePages(_)
        | RegionError::NoCopies
        | RegionError::Io(_) => Code::Failed,
    };
    Failure::new(code, error)
}

fn block_failure(error: &BlockError) -> Failure {
    let code = match error {
        BlockError::OutOfRange => Code::Invalid,
        BlockError::Frozen(_) => Code::Busy,
        BlockError::Bad { .. } | BlockError::ReadOnly | BlockError::Io(_) => Code::Failed,
    };
    Failure::new(code, error)
}

/// The name under which a count is shown and scraped.
const fn count_name(count: Count) -> &'static str {
    match count {
        Count::Reads => "reads",
        Count::BytesRead => "read_bytes",
        Count::Writes => "writes",
        Count::BytesWritten => "written_bytes",
        Count::Flushes => "flushes",
        Count::Trims => "trims",
        Count::Zeroes => "zeroes",
        Count::Statuses => "statuses",
        Count::Errors => "errors",
    }
}
