//! One managed process of a `pgmap run`: what the preloaded library calls, before `main` and at the end.
//!
//! The supervisor ([`Control`]) names its shared memory in [`RUN_VARIABLE`]; the process finds the devices there, takes a place
//! among the processes, and builds its own [`Memory`] in its part of the budget. While its program runs, it follows what the
//! supervisor changes.

use core::time::Duration;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::OnceLock;

use pgmap_core::addr::PAGE_SIZE;
use pgmap_core::driver::PrivateOps;
use pgmap_drivers::slots::{Owner, release_owner};
use pgmap_mm::stats::Stats;
use pgmap_sync::Mutex;
use pgmap_sync::atomic::{AtomicBool, Ordering};

pub use config::{DeviceConfig, Unreadable};
pub use control::{
    Change, Control, ControlError, DeviceState, DeviceView, Failed, Held, LEAST_RAM_BYTES,
    ProcessView, RamView, Refused,
};

use crate::budget::Grant;
use crate::memory::{Memory, machine_frames};
use crate::pager::{Allocator, Surroundings, kill_as_out_of_memory};
use crate::shared::{Process, Region};
use crate::space::AddressSpace;
use file_maps::FileMaps;
use plugged::Plugged;

mod config;
mod control;
mod file_maps;
mod plugged;

/// The environment variable that names the shared memory's file.
pub const RUN_VARIABLE: &str = "PGMAP_RUN";

/// This process's part of a run.
#[derive(Debug)]
struct Run {
    region: Region,
    process: &'static Process,
    pid: u32,
    grant: Grant,
    memory: Memory,
    plugged: Mutex<Plugged>,
    files: Mutex<FileMaps>,
    /// The program has mapped a file that may count in the budget.
    has_mapped: AtomicBool,
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
    // The supervisor could not tell whether we are alive by a number that means another process to it.
    if region.pid_namespace() != pid_namespace() {
        return Ok(None);
    }
    let pid = std::process::id();
    // After an exec the process finds its own old place.
    leave(&region, |other| other == pid);
    let Some((number, process)) = region.claim(pid) else {
        return Ok(None);
    };
    pgmap_host::platform::use_membarrier();
    let mut plugged = Plugged::new(region, number, process);
    let built = build(region).and_then(|memory| {
        plugged.take_all(memory.space().inner())?;
        Ok(memory)
    });
    let memory = built.inspect_err(|_| leave(&region, |other| other == pid))?;
    let grant = Grant::new(region, process, memory.space().inner().ram());
    let run = RUN.get_or_init(|| Run {
        region,
        process,
        pid,
        grant,
        memory,
        plugged: Mutex::new(plugged),
        files: Mutex::new(FileMaps::new(Stats::get(region.map_files()))),
        has_mapped: AtomicBool::new(false),
    });
    run.note_capacity(&run.plugged.lock());
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
pub fn leave(region: &Region, dead: impl Fn(u32) -> bool) {
    region.reap(dead, |number| {
        // Under whatever is wanted of a device now, a process that died on the way may have places in its table.
        let slots = region.devices().iter();
        let configs = slots.filter_map(|slot| slot.description().parse().ok());
        let owner = u8::try_from(number).ok().and_then(Owner::new);
        for table in configs.filter_map(|config: DeviceConfig| config.table()) {
            let words = region.table(table.start, table.len());
            if let Some(owner) = owner {
                release_owner(words, owner);
            }
        }
    });
}

fn build(region: Region) -> Result<Memory, String> {
    // Relaxed: a number that may change at any time.
    let ram_bytes = region.ram_bytes().load(Ordering::Relaxed);
    let mut builder = Memory::builder()
        .ram(ram_bytes)
        .ram_at_most(machine_frames() * PAGE_SIZE as u64)
        .stats(region.stats());
    builder.surroundings = Surroundings {
        allocator: Allocator::Own,
        out_of_memory: kill_as_out_of_memory,
        short_of_frames,
        hold_out,
        tick,
        follow,
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

/// Called by the reclaimer between its other work: a part of what the supervisor wants of the devices. Answers when to call
/// again.
fn follow() -> Duration {
    let Some(run) = RUN.get() else {
        return Duration::MAX;
    };
    let space = run.memory.space().inner();
    let mut plugged = run.plugged.lock();
    let again = plugged.follow(space);
    run.note_capacity(&plugged);
    if !again.is_zero() && again < Duration::from_millis(100) {
        // What comes back needs frames that nobody has.
        run.grant.grow(space.ram());
    }
    drop(plugged);
    again.min(run.follow_files())
}

/// Whether mappings of so many bytes of a file are to be within the budget.
#[must_use]
pub fn maps_files_of(bytes: usize) -> bool {
    RUN.get().is_some_and(|run| {
        let least = Stats::get(run.region.map_files());
        least > 0 && bytes as u64 >= least
    })
}

/// Says that the program has mapped so many bytes of a file. It is found without that, but not as soon.
pub fn note_mapped_file(bytes: usize) {
    if let Some(run) = RUN.get()
        && maps_files_of(bytes)
    {
        // Relaxed: see `follow_files`.
        run.has_mapped.store(true, Ordering::Relaxed);
        run.memory.pager().wake_reclaimer();
    }
}

/// Called by the fault thread when frames are short.
fn short_of_frames() {
    if let Some(run) = RUN.get() {
        run.grant.grow(run.memory.space().inner().ram());
        // Before the first page moves: who looks at both is not to see that pages have left a RAM that nobody is in.
        publish_resident(run);
    }
}

/// Called by the fault thread when a fault has waited for memory for long. Whether there may be some in a while, because
/// something is being taken away that the supervisor gives back when it hears of this.
fn hold_out() -> bool {
    RUN.get().is_some_and(|run| {
        // Relaxed: a hint to the supervisor.
        run.process.starved.store(true, Ordering::Relaxed);
        run.region.is_shrinking()
    })
}

impl Run {
    /// Keeps the program's own mappings of files within the budget. Answers when to call again.
    fn follow_files(&self) -> Duration {
        let ram = self.memory.space().inner().ram();
        let mut files = self.files.lock();
        // Relaxed: a hint; the mapping is found at the next look in any case.
        if self.has_mapped.swap(false, Ordering::Relaxed) {
            files.look_again();
        }
        let again = files.follow(|resident| {
            self.grant.note_files(resident, ram);
            (self.grant.held(), ram.in_use())
        });
        self.grant.note_files(files.resident_frames(), ram);
        again
    }

    /// The most that a mapping can have changes with the budget and the devices.
    fn note_capacity(&self, plugged: &Plugged) {
        // Relaxed: as in `build`.
        let ram_bytes = self.region.ram_bytes().load(Ordering::Relaxed);
        let device_bytes = plugged.capacity_frames() * PAGE_SIZE as u64;
        self.memory.space().set_most(ram_bytes + device_bytes);
    }
}

/// Answers how many bytes are resident.
fn publish_resident(run: &Run) -> u64 {
    let frames = run.memory.space().inner().ram().in_use() + run.grant.files();
    let bytes = frames * PAGE_SIZE as u64;
    // Relaxed: a number for people.
    run.process.resident.store(bytes, Ordering::Relaxed);
    bytes
}

fn publish(run: &Run) {
    let space = run.memory.space().inner();
    let bytes = |frames: u64| frames * PAGE_SIZE as u64;
    let resident = publish_resident(run);
    // Relaxed, all: numbers for people.
    let plugged = run.plugged.lock();
    for (nth, shown) in run.process.devices.iter().enumerate() {
        let ops = plugged.device(nth).and_then(|device| device.ops());
        let usage = ops.map(PrivateOps::usage).unwrap_or_default();
        shown.pages.store(usage.pages, Ordering::Relaxed);
        shown.bytes.store(usage.bytes, Ordering::Relaxed);
    }
    run.region
        .note_peaks(bytes(space.ram().peak()).max(resident));
}

/// Whether the calling thread is one of the pager's own.
#[must_use]
pub fn is_pager_thread() -> bool {
    crate::pager::is_pager_thread()
}
