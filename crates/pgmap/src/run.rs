//! One managed process of a `pgmap run`: what the preloaded library calls, before `main` and at the end.
//!
//! The supervisor names its shared memory in [`RUN_VARIABLE`]; the process finds the configuration there, takes a place among
//! the processes, and builds its own [`Memory`] in its part of the budget.

use core::fmt::Write as _;
use core::str::FromStr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use pgmap_core::addr::PAGE_SIZE;
use pgmap_drivers::quota::Quota;
use pgmap_drivers::slots::{Owner, release_owner};
use pgmap_drivers::spec::DeviceSpec;
use pgmap_sync::atomic::Ordering;

use crate::budget::Grant;
use crate::device::{Device, Part};
use crate::memory::Memory;
use crate::pager::{Surroundings, kill_as_out_of_memory};
use crate::shared::{DEVICES, Process, Region};
use crate::space::AddressSpace;

/// The environment variable that names the shared memory's file.
pub const RUN_VARIABLE: &str = "PGMAP_RUN";

/// What a supervisor wants of its processes; travels as text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Bytes of RAM for all processes together.
    pub ram_bytes: u64,
    /// Which process numbers the run is counted in: see [`pid_namespace`].
    pub pid_namespace: u64,
    /// The devices, in the order in which they are tried.
    pub devices: Vec<DeviceConfig>,
}

/// One device of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// What the user wrote.
    pub spec: DeviceSpec,
    /// For a file: where the processes find the supervisor's open file, and its table's first word.
    pub opened: Option<(PathBuf, usize)>,
}

impl DeviceConfig {
    /// Where in the shared tables the slots of a file are, and how many: in words.
    #[must_use]
    pub fn table(&self) -> Option<(usize, usize)> {
        let (_, start) = self.opened.as_ref()?;
        let pages = self.spec.capacity_bytes() / PAGE_SIZE as u64;
        Some((*start, usize::try_from(pages).ok()?))
    }
}

impl Config {
    /// The text that [`parse`](Self::parse) understands.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = format!("ram {}\npids {}\n", self.ram_bytes, self.pid_namespace);
        for device in &self.devices {
            // Writing to a string cannot fail.
            let _ = match &device.opened {
                Some((path, table)) => {
                    writeln!(text, "opened {table} {} {}", path.display(), device.spec)
                }
                None => writeln!(text, "device {}", device.spec),
            };
        }
        text
    }

    /// The configuration in a text that [`to_text`](Self::to_text) made.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut config = Self::default();
        for line in text.lines() {
            match line.split_once(' ')? {
                ("ram", bytes) => config.ram_bytes = bytes.parse().ok()?,
                ("pids", namespace) => config.pid_namespace = namespace.parse().ok()?,
                ("device", spec) => {
                    let spec = DeviceSpec::from_str(spec).ok()?;
                    config.devices.push(DeviceConfig { spec, opened: None });
                }
                ("opened", rest) => {
                    let (table, rest) = rest.split_once(' ')?;
                    let (path, spec) = rest.split_once(' ')?;
                    let opened = Some((PathBuf::from(path), table.parse().ok()?));
                    config.devices.push(DeviceConfig {
                        spec: DeviceSpec::from_str(spec).ok()?,
                        opened,
                    });
                }
                _ => return None,
            }
        }
        Some(config)
    }
}

/// This process's part of a run.
#[derive(Debug)]
struct Run {
    region: Region,
    process: &'static Process,
    pid: u32,
    grant: Grant,
    memory: Memory,
}

static RUN: OnceLock<Run> = OnceLock::new();

/// The namespace in which this process's number means something, as the kernel numbers namespaces; 0 if it does not say.
#[must_use]
pub fn pid_namespace() -> u64 {
    std::fs::metadata("/proc/self/ns/pid").map_or(0, |namespace| namespace.ino())
}

/// Joins the run that the environment names, and starts the pager. `None` if there is no run, or it has as many
/// processes as it can have: then this process lives in plain memory.
///
/// # Errors
///
/// A sentence for people: why this process is not managed.
pub fn start() -> Result<Option<&'static AddressSpace>, String> {
    let Some(path) = std::env::var_os(RUN_VARIABLE) else {
        return Ok(None);
    };
    // A supervisor that has ended, or that we may not look at, manages nobody.
    let Ok(region) = Region::open(Path::new(&path)) else {
        return Ok(None);
    };
    let config = Config::parse(region.config()).ok_or("the configuration cannot be read")?;
    // The supervisor could not tell whether we are alive by a number that means another process to it.
    if config.pid_namespace != pid_namespace() {
        return Ok(None);
    }
    let pid = std::process::id();
    // After an exec the process finds its own old place.
    leave(&region, &config, |other| other == pid);
    let Some((number, process)) = region.claim(pid) else {
        return Ok(None);
    };
    pgmap_host::platform::use_membarrier();
    let built = build(&config, region, number, process);
    let memory = built.inspect_err(|_| leave(&region, &config, |other| other == pid))?;
    let quota = Quota {
        limit: config.ram_bytes,
        used: region.granted(),
        mine: &process.granted,
    };
    let ram = memory.space().inner().ram();
    let grant = Grant::new(quota, region.processes(), process, ram);
    let run = RUN.get_or_init(|| Run {
        region,
        process,
        pid,
        grant,
        memory,
    });
    Ok(Some(run.memory.space()))
}

/// Ends this process's part: its last numbers go to the supervisor.
pub fn stop() {
    if let Some(run) = RUN.get().filter(|run| run.pid == std::process::id()) {
        // The place itself stays until the process is gone: its other threads and later destructors still use what
        // it holds.
        publish(run);
    }
}

/// Gives back what the processes that `dead` names held: their places, their share of the devices.
pub fn leave(region: &Region, config: &Config, dead: impl Fn(u32) -> bool) {
    for number in region.reap(dead) {
        let Some(owner) = u8::try_from(number).ok().and_then(Owner::new) else {
            continue;
        };
        for (table, pages) in config.devices.iter().filter_map(DeviceConfig::table) {
            release_owner(region.table(table, pages), owner);
        }
    }
}

fn build(
    config: &Config,
    region: Region,
    number: usize,
    process: &'static Process,
) -> Result<Memory, String> {
    if config.devices.len() > DEVICES {
        return Err(format!("a run can have {DEVICES} devices at most"));
    }
    let mut builder = Memory::builder()
        .ram(config.ram_bytes)
        .stats(region.stats());
    for (device, shared) in config.devices.iter().enumerate() {
        let part = Part {
            taken: &region.devices()[device].taken,
            mine: &process.devices[device].taken,
            region,
            number,
        };
        builder = builder.device(Device::shared(shared, &part)?);
    }
    builder.surroundings = Surroundings {
        out_of_memory: kill_as_out_of_memory,
        short_of_frames,
        tick,
    };
    builder.build().map_err(|error| error.to_string())
}

/// Called by the reclaimer now and then.
fn tick() {
    // Before `start` has returned there is nothing to publish; in a fork's child there is no reclaimer.
    if let Some(run) = RUN.get() {
        run.grant.look(run.memory.space().inner().ram());
        publish(run);
    }
}

/// Called by the fault thread when frames are short.
fn short_of_frames() {
    if let Some(run) = RUN.get() {
        run.grant.grow(run.memory.space().inner().ram());
    }
}

fn publish(run: &Run) {
    let space = run.memory.space().inner();
    let bytes = |frames: u64| frames * PAGE_SIZE as u64;
    // Relaxed, all: numbers for people.
    run.process
        .resident
        .store(bytes(space.ram().in_use()), Ordering::Relaxed);
    for (device, shown) in space.devices().iter().zip(&run.process.devices) {
        if let Some(ops) = device.ops() {
            let usage = ops.usage();
            shown.pages.store(usage.pages, Ordering::Relaxed);
            shown.bytes.store(usage.bytes, Ordering::Relaxed);
        }
    }
    run.region.note_peaks(bytes(space.ram().peak()));
}

/// Whether the calling thread is one of the pager's own.
#[must_use]
pub fn is_pager_thread() -> bool {
    crate::pager::is_pager_thread()
}
