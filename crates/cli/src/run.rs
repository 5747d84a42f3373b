//! `pgmap run`: a program in memory that pgmap manages.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, bail};
use pgmap::run::{Config, DeviceConfig, RUN_VARIABLE};
use pgmap::shared::{DEVICES, Region};
use pgmap::spec::DeviceSpec;
use pgmap::{Algorithm, FileDevice, open_backing};

use crate::args::RunArgs;
use crate::program::{self, Refusal};
use crate::progress::Progress;
use crate::report::Report;
use crate::{doctor, summary, supervisor};

/// The library that is preloaded.
const LIBRARY: &str = "libpgmap_preload.so";
/// The least pool of the default device, in bytes.
const LEAST_POOL_BYTES: u64 = 1 << 30;

/// What a run's processes share, and what keeps it alive.
struct Shared {
    config: Config,
    region: Region,
    region_file: OwnedFd,
    /// The device files, which every process opens through us.
    _backing: Vec<FileDevice>,
}

pub(crate) fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    let (program, arguments) = match args.program.split_first() {
        Some((name, arguments)) => match program::resolve(name) {
            Ok(path) => (path, arguments.to_vec()),
            Err(Refusal { status, message }) => {
                eprintln!("pgmap: {message}");
                return Ok(ExitCode::from(status));
            }
        },
        None => (std::env::current_exe()?, vec![OsString::from("__workload")]),
    };
    doctor::refuse_if_hopeless()?;
    let library = library()?;
    let report = args.report.as_deref().map(Report::create).transpose()?;
    let shared = share(args)?;
    let started = Instant::now();
    let name = args
        .program
        .first()
        .map_or(program.as_os_str(), OsString::as_os_str);
    let mut child = match start(&shared, &library, &program, name, &arguments) {
        Ok(child) => child,
        Err(error) => {
            eprintln!("pgmap: {}: {error}", program.display());
            return Ok(ExitCode::from(126));
        }
    };
    let mut progress = args.progress.then(Progress::new);
    let status = supervisor::stand_by(&child, || {
        bury(&shared);
        shared.region.note_peaks(0);
        if let Some(progress) = &mut progress {
            progress.show(&shared.region, started.elapsed());
        }
    })?;
    // It has been waited for: this only tells the standard library.
    let _ = child.try_wait();
    if let Some(progress) = progress {
        progress.end();
    }
    bury(&shared);
    let summary = summary::Summary::new(&shared.config, &shared.region, started.elapsed(), status);
    if let Some(report) = report {
        report.write(&summary)?;
    }
    if !args.quiet {
        eprint!("{summary}");
    }
    Ok(supervisor::leave_as(status))
}

/// Gives back what dead processes held.
fn bury(shared: &Shared) {
    pgmap::run::leave(&shared.region, &shared.config, |pid| {
        let pid = i32::try_from(pid)
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        let answer = pid.map(rustix::process::test_kill_process);
        answer == Some(Err(rustix::io::Errno::SRCH))
    });
}

/// The library beside this command, or where it would be installed.
fn library() -> anyhow::Result<PathBuf> {
    let command = std::env::current_exe().context("cannot find this command's own file")?;
    let directory = command.parent().unwrap_or(Path::new("/"));
    let places = [
        directory.join(LIBRARY),
        directory.join("../lib/pgmap").join(LIBRARY),
    ];
    let found = places.iter().find(|place| place.is_file());
    found.cloned().with_context(|| {
        format!(
            "{LIBRARY} is not in {}: build it with `cargo build --release`, or reinstall pgmap",
            directory.display()
        )
    })
}

fn share(args: &RunArgs) -> anyhow::Result<Shared> {
    let devices = if args.devices.is_empty() {
        vec![default_device()]
    } else {
        args.devices.clone()
    };
    if devices.len() > DEVICES {
        bail!(
            "{} devices are too many: {DEVICES} can be used in one run",
            devices.len()
        );
    }
    let (mut backing, mut words) = (Vec::new(), 0);
    let mut config = Config {
        ram_bytes: args.ram,
        devices: Vec::new(),
    };
    for spec in devices {
        let mut device = DeviceConfig { spec, opened: None };
        if let Some(file) = open_backing(&device.spec)? {
            let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
            device.opened = Some((PathBuf::from(path), words));
            words += device.table().map_or(0, |(_, pages)| pages);
            backing.push(file);
        }
        config.devices.push(device);
    }
    let (region, region_file) = Region::create(&config.to_text(), words)?;
    Ok(Shared {
        config,
        region,
        region_file,
        _backing: backing,
    })
}

/// A compressed pool of half the machine's memory.
fn default_device() -> DeviceSpec {
    let info = rustix::system::sysinfo();
    #[allow(
        clippy::useless_conversion,
        reason = "its width differs between machines"
    )]
    let total = u64::from(info.totalram) * u64::from(info.mem_unit);
    let capacity_bytes = (total / 2).max(LEAST_POOL_BYTES);
    DeviceSpec::Compressed {
        capacity_bytes,
        algorithm: Algorithm::Lz4,
    }
}

fn start(
    shared: &Shared,
    library: &Path,
    program: &Path,
    name: &OsStr,
    arguments: &[OsString],
) -> std::io::Result<Child> {
    let region = format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        shared.region_file.as_raw_fd()
    );
    let mut command = Command::new(program);
    command.arg0(name).args(arguments).env(RUN_VARIABLE, region);
    command.env("LD_PRELOAD", preload(library));
    command.spawn()
}

/// Our library, before those that the user preloads.
fn preload(library: &Path) -> OsString {
    let mut list = nameable(library);
    if let Some(others) = std::env::var_os("LD_PRELOAD").filter(|others| !others.is_empty()) {
        list.push(":");
        list.push(others);
    }
    list
}

/// The loader takes blanks and colons for separators: such a path is named by its descriptor.
fn nameable(library: &Path) -> OsString {
    let text = library.as_os_str();
    let awkward = |byte: &u8| byte.is_ascii_whitespace() || *byte == b':';
    if !text.as_encoded_bytes().iter().any(awkward) {
        return text.to_owned();
    }
    match std::fs::File::open(library) {
        Ok(file) => {
            let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
            // Open for as long as this process lives: the program's children load it, too.
            let _ = std::os::fd::IntoRawFd::into_raw_fd(file);
            OsString::from(path)
        }
        Err(_) => text.to_owned(),
    }
}
