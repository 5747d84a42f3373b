//! The command line, in one definition: help, man pages and shell completions come from it.

use core::time::Duration;
use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use pgmap::run::LEAST_RAM_BYTES;
use pgmap::spec::{DeviceSpec, SizeError, SpecError, parse_size};
use serde::Deserialize;

use crate::ask::args::Verb;

/// More than any machine's addresses.
const MOST_RAM_BYTES: u64 = 1 << 46;

/// Memory that is not plain RAM: run programs in less RAM than they ask for, serve images and memory to others
#[derive(Parser, Debug)]
#[command(name = "pgmap", version, arg_required_else_help = true, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Run a program in memory that pgmap manages
    ///
    /// At most --ram of the memory that the program allocates is in RAM ("resident"). Pages beyond that are moved to
    /// the devices, and come back when the program touches them. At the end a summary goes to standard error.
    ///
    /// Signals that are sent to pgmap are passed on: the program decides what they mean, as it would without pgmap.
    /// SIGKILL, sent to pgmap, kills the program, too; processes that the program has started go on.
    #[command(after_help = RUN_NOTES, override_usage = RUN_USAGE)]
    Run(RunArgs),
    /// Serve images and memory, as block devices (NBD) and as direct memory
    ///
    /// Each --pmem is a region: an image file, made if it is not there, or volatile memory, with one or more namespaces in
    /// it. Ends at SIGTERM or Ctrl-C, when all that clients wrote is flushed.
    #[command(after_help = SERVE_NOTES)]
    Serve(ServeArgs),
    #[command(flatten)]
    Ask(Verb),
    /// Check what this machine allows, and say how to mend what is missing
    #[command(after_help = DOCTOR_NOTES)]
    Doctor {
        /// Print the checks as JSON
        #[arg(long)]
        json: bool,
    },
    /// Print a shell's completions
    #[command(after_help = COMPLETIONS_NOTES)]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print a page of the manual, or write all pages
    #[command(after_help = MAN_NOTES)]
    Man {
        /// The command whose page is printed, such as run; without one it is the page of pgmap itself
        command: Option<String>,
        /// Write all pages to this directory instead
        #[arg(long, value_name = "DIR", conflicts_with = "command")]
        out: Option<PathBuf>,
    },
}

const SERVE_NOTES: &str = "\
Examples:
  pgmap serve --pmem disk.img,size=1G
      an image; clients find it at the nbd+unix address that is printed
  pgmap serve --pmem memory,size=512M --nbd 127.0.0.1:10809
      volatile memory, for clients on this machine
  pgmap serve --pmem disk.img --nbd 0.0.0.0:10809 --tls require \\
      --tls-certificates /etc/pki/pgmap --tls-verify-peer
      for clients anywhere that have a certificate

Regions:
  PATH,size=SIZE[,mode=fsdax|devdax|raw][,align=4K|2M|1G][,map=mem|dev]
      an image; mode, align and map are those of the namespace that a new one
      gets. mode=raw serves any file as it is
  /dev/dax0.0[,...]
      a device-dax, likewise
  memory,size=SIZE[,huge=2M|1G][,...]
      memory, gone at the end; of huge pages if that is said";

const EXAMPLES: &str = "\
Examples:
  pgmap doctor
  pgmap run --ram 64M
  pgmap run --ram 256M --device compressed:2G -- python3 job.py
  pgmap serve --pmem disk.img,size=1G
  pgmap list";

const RUN_USAGE: &str = "pgmap run --ram <SIZE> [OPTIONS] [--] [PROGRAM [ARGUMENTS]...]";

const RUN_NOTES: &str = "\
Examples:
  pgmap run --ram 64M
      a built-in workload over 512 MiB, every page verified
  pgmap run --ram 256M --device compressed:2G -- python3 job.py
      at most 256 MiB resident, the rest compressed in memory
  pgmap run --ram 256M --device compressed:512M \\
      --device file:/var/tmp/cold.pgmap,size=8G -- sort big.txt
      what does not fit the pool goes to a file

Devices:
  compressed:SIZE[,algorithm=lz4|zstd][,level=N]
      pages compressed in memory; SIZE is what the pool itself may take;
      lz4 unless you say zstd, whose level is -7 to 19 (1 unless you say so)
  file:PATH,size=SIZE[,keep][,direct=off]
      a file, deleted at once unless `keep`; `direct=off` uses the page cache
  Without --device there is a compressed pool of half the machine's memory, at
  least 1G: it is fast, and needs neither a disk nor any preparation.

Sizes:
  A whole number and K, M, G or T (powers of 1024). --ram is at least 4M.

Summary:
  Lines for what did not happen are left out.
  resident    the most that was in RAM at once; with --map-files the mapped
              files are included, as pgmap saw them when it looked: in
              between there may have been more
  faults      how often the program touched a page that was not ready: a new
              one, one on a device, one that was about to leave RAM, or the
              first write to one that had come back and was only read since
  waiting     how long its threads waited for the pager in faults, all together;
              waking them comes on top, some millionths of a second each time
  read ahead  pages that were made ready along with a neighbour
  moved out   pages that left RAM; if they have not changed since they came
              back, the device still has them, and nothing is written
  moved in    pages that came back from a device
  kept        how often a page could not leave RAM: the kernel or a device was
              working on it, or it was shared with another process
  device      the most that a device held

Exit status:
  The program's own. If a signal ended it, pgmap ends by the same signal, which
  shells show as 128 + its number.
  2         pgmap cannot do what was asked, and ran nothing
  126       the program was found, but cannot be started
  127       the program was not found";

const DOCTOR_NOTES: &str = "\
Exit status:
  0  `pgmap run` works here
  1  it does not, and what is missing was said";

const COMPLETIONS_NOTES: &str = "\
Examples:
  pgmap completions bash > ~/.local/share/bash-completion/completions/pgmap
  pgmap completions fish > ~/.config/fish/completions/pgmap.fish";

const MAN_NOTES: &str = "\
Examples:
  pgmap man run | man -l -
      read the page of `pgmap run`
  pgmap man --out ~/.local/share/man/man1
      install all pages, for `man pgmap-run`";

/// Whether NBD clients speak TLS.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Tls {
    /// They may.
    On,
    /// They have to.
    Require,
    /// They cannot.
    #[default]
    Off,
}

#[derive(Args, Debug)]
pub(crate) struct ServeArgs {
    /// A region to serve; may be given several times
    #[arg(long = "pmem", value_name = "SPEC")]
    pub(crate) regions: Vec<String>,

    /// Where NBD clients connect: unix:PATH, or ADDRESS:PORT of this machine; may be given several times [default: a
    /// socket beside the control socket]
    ///
    /// An address that other machines reach takes `--tls require` and --tls-verify-peer.
    #[arg(long, value_name = "WHERE")]
    pub(crate) nbd: Vec<String>,

    /// Whether NBD clients speak TLS: they may, they have to, or they cannot [default: off]
    #[arg(long, value_name = "WHEN")]
    pub(crate) tls: Option<Tls>,

    /// Where server-cert.pem and server-key.pem are, and with --tls-verify-peer ca-cert.pem, and ca-crl.pem if there is one
    #[arg(long, value_name = "DIR")]
    pub(crate) tls_certificates: Option<PathBuf>,

    /// Turn NBD clients away that have no certificate of the authority in ca-cert.pem
    #[arg(long)]
    pub(crate) tls_verify_peer: bool,

    /// The control socket [default: serve-PID.sock in the user's runtime directory]
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,

    /// Answer Prometheus at this address, such as 127.0.0.1:9464
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) metrics: Option<String>,

    /// Say who has pinned something for so long, such as 30s or 2h, once for each pin; 0s for never [default: 10m]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) old_pins: Option<Duration>,

    /// Read the options from a TOML file: the names of these options; those given here come on top
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// Print nothing but errors of pgmap's own, not those of NBD clients, nor old pins
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

#[derive(Args, Debug)]
pub(crate) struct RunArgs {
    /// The most RAM that the program's managed memory may take, such as 256M or 2G; at least 4M
    #[arg(long, value_name = "SIZE", value_parser = ram)]
    pub(crate) ram: u64,

    /// Where the rest goes; may be given several times, tried in order [default: a compressed pool of half the
    /// machine's memory]
    #[arg(long = "device", value_name = "SPEC", value_parser = clap::builder::ValueParser::new(device))]
    pub(crate) devices: Vec<DeviceSpec>,

    /// Keep files that the program maps within --ram, too: those mappings that have at least SIZE bytes, such as 64M
    ///
    /// The pages that have been in RAM longest are dropped; dirty ones are written by the kernel. Pages that
    /// the program changes of a private mapping go to the devices. Those of files that this user may not write stay, and do not count.
    #[arg(long, value_name = "SIZE", value_parser = map_files)]
    pub(crate) map_files: Option<u64>,

    /// Write the summary to a file, as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,

    /// Leave the summary out; only errors are printed
    #[arg(long, short, conflicts_with = "progress")]
    pub(crate) quiet: bool,

    /// Show what happens while it happens: RAM in use, faults, and pages moved, on standard error
    #[arg(long)]
    pub(crate) progress: bool,

    /// The program and its arguments; without one a built-in workload runs
    #[arg(trailing_var_arg = true, value_name = "PROGRAM")]
    pub(crate) program: Vec<OsString>,
}

fn ram(text: &str) -> Result<u64, String> {
    let bytes = match parse_size(text) {
        Ok(bytes) => bytes,
        // Of a page at least, which is no use here.
        Err(SizeError::TooSmall(_)) => 0,
        Err(error) => return Err(explain(&error)),
    };
    if bytes < LEAST_RAM_BYTES {
        let least = "the least that pgmap can work with is 4M";
        let is_bare = text.bytes().all(|byte| byte.is_ascii_digit());
        return Err(if is_bare && text.bytes().any(|byte| byte != b'0') {
            format!("{least}, and `{text}` is in bytes: write {text}M for MiB")
        } else {
            least.to_owned()
        });
    }
    if bytes > MOST_RAM_BYTES {
        return Err("that is more than any machine can address: give less".to_owned());
    }
    Ok(bytes)
}

fn map_files(text: &str) -> Result<u64, String> {
    parse_size(text).map_err(|error| explain(&error))
}

fn device(text: &str) -> Result<DeviceSpec, String> {
    let spec: Result<DeviceSpec, SpecError> = text.parse();
    spec.map_err(|error| {
        if let SpecError::Size(error) = error {
            explain(&error)
        } else {
            error.to_string()
        }
    })
}

fn explain(error: &SizeError) -> String {
    if let SizeError::UnknownUnit(text) = error
        && text.contains('.')
    {
        return format!("`{text}` is no whole number: write 1536M for 1.5G, 512M for 0.5G");
    }
    error.to_string()
}
