//! `pgmap run`: a program in memory that pgmap manages.

use std::ffi::{OsStr, OsString};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, anyhow, bail};
use pgmap::Algorithm;
use pgmap::run::{Control, RUN_VARIABLE};
use pgmap::shared::DEVICES;
use pgmap::spec::DeviceSpec;
use pgmap_server::control::protocol::Kind;
use pgmap_server::control::{Listener, place};
use pgmap_server::running::Running;

use crate::args::RunArgs;
use crate::doctor;
use crate::output::tell;
use crate::program::{self, Refusal};
use crate::progress::Progress;
use crate::report::Report;
use crate::summary::Summary;
use crate::supervisor::{self, Supervisor};
use crate::workload;

/// The library that is preloaded.
const LIBRARY: &str = "libpgmap_preload.so";
/// What to do without it.
pub(crate) const LIBRARY_MEND: &str = "build it with `cargo build --release`, or reinstall pgmap";
/// The least pool of the default device, in bytes.
const LEAST_POOL_BYTES: u64 = 1 << 30;
/// And the most.
const MOST_POOL_BYTES: u64 = 1 << 40;

pub(crate) fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    let (program, arguments) = match args.program.split_first() {
        Some((name, arguments)) => match program::resolve(name) {
            Ok(path) => (path, arguments.to_vec()),
            Err(refusal) => return Ok(refusal.tell()),
        },
        None => (
            std::env::current_exe()?,
            vec![OsString::from(workload::VERB)],
        ),
    };
    doctor::refuse_if_hopeless()?;
    let library = library().map_err(|error| anyhow!("{error}: {LIBRARY_MEND}"))?;
    let control = Arc::new(control(args)?);
    // Last: what is refused above leaves an older report as it is.
    let report = args.report.as_deref().map(Report::create).transpose()?;
    let supervisor = Supervisor::new();
    let started = Instant::now();
    let name = args
        .program
        .first()
        .map_or(program.as_os_str(), OsString::as_os_str);
    let mut command = command(&control, &library, &program, name, &arguments);
    supervisor.tie(&mut command);
    let child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            report.into_iter().for_each(Report::cancel);
            return Ok(Refusal::not_started(&program, &error).tell());
        }
    };
    let listener = listen(&control, &program, &arguments);
    let status = stand_by(args, supervisor, child, &control, started)?;
    drop(listener);
    let summary = Summary::new(&control, started.elapsed(), status);
    if !args.quiet {
        tell(&summary);
    }
    // The exit status stays the program's, whatever becomes of the report.
    if let Some(Err(error)) = report.map(|report| report.write(&summary)) {
        tell(format_args!("pgmap: {error:#}\n"));
    }
    Ok(supervisor::leave_as(status))
}

/// Answers those who ask about this run. One that nobody can ask goes on all the same.
fn listen(control: &Arc<Control>, program: &Path, arguments: &[OsString]) -> Option<Listener> {
    let directory = place::directory();
    place::prepare(&directory).ok()?;
    let words = [program.as_os_str()]
        .into_iter()
        .chain(arguments.iter().map(OsString::as_os_str));
    let words: Vec<_> = words.map(OsStr::to_string_lossy).collect();
    let running = Running::new(Arc::clone(control), words.join(" "), machine_bytes());
    let path = place::own(&directory, Kind::Run);
    Listener::start(&path, Arc::new(running)).ok()
}

fn stand_by(
    args: &RunArgs,
    supervisor: Supervisor,
    mut child: Child,
    control: &Control,
    started: Instant,
) -> std::io::Result<ExitStatus> {
    let mut progress = args.progress.then(Progress::new);
    let status = supervisor.stand_by(&child, || {
        control.look();
        if let Some(progress) = &mut progress {
            progress.show(control.region(), started.elapsed());
        }
    });
    // It has been waited for: this only tells the standard library.
    let _ = child.try_wait();
    if let Some(progress) = progress {
        progress.end();
    }
    control.look();
    status
}

/// The library beside this command, or where it would be installed.
pub(crate) fn library() -> anyhow::Result<PathBuf> {
    let command = std::env::current_exe().context("cannot find this command's own file")?;
    let directory = command.parent().unwrap_or(Path::new("/"));
    let places = [
        directory.join(LIBRARY),
        directory.join("../lib/pgmap").join(LIBRARY),
    ];
    let found = places.iter().find(|place| place.is_file());
    found
        .cloned()
        .with_context(|| format!("{LIBRARY} is not in {}", directory.display()))
}

fn control(args: &RunArgs) -> anyhow::Result<Control> {
    let devices = if args.devices.is_empty() {
        &[default_device()][..]
    } else {
        &args.devices
    };
    if devices.len() > DEVICES {
        bail!(
            "{} devices are too many: {DEVICES} can be used in one run",
            devices.len()
        );
    }
    let control = Control::new(args.ram, devices)?;
    if let Some(least_bytes) = args.map_files {
        control.map_files(least_bytes);
    }
    Ok(control)
}

/// RAM of the whole machine, in bytes.
fn machine_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    #[allow(
        clippy::useless_conversion,
        reason = "its width differs between machines"
    )]
    let bytes = u64::from(info.totalram) * u64::from(info.mem_unit);
    bytes
}

/// A compressed pool of half the machine's memory, in whole MiB.
fn default_device() -> DeviceSpec {
    let capacity_bytes = (machine_bytes() / 2)
        .next_multiple_of(1 << 20)
        .clamp(LEAST_POOL_BYTES, MOST_POOL_BYTES);
    DeviceSpec::Compressed {
        capacity_bytes,
        algorithm: Algorithm::Lz4,
    }
}

fn command(
    control: &Control,
    library: &Path,
    program: &Path,
    name: &OsStr,
    arguments: &[OsString],
) -> Command {
    let mut command = Command::new(program);
    command
        .arg0(name)
        .args(arguments)
        .env(RUN_VARIABLE, control.path());
    command.env("LD_PRELOAD", preload(library));
    command
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
