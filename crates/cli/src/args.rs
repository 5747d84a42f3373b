//! The command line, in one definition: help, man pages and shell completions come from it.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use pgmap::spec::{DeviceSpec, parse_size};

/// The least budget: below it the pager's own batches do not fit.
const LEAST_RAM_BYTES: u64 = 4 << 20;
/// More than any machine's addresses.
const MOST_RAM_BYTES: u64 = 1 << 46;

/// Run programs in less RAM than they ask for: the rest lives on devices of your choice.
#[derive(Parser, Debug)]
#[command(name = "pgmap", version, arg_required_else_help = true, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Run a program in memory that pgmap manages
    #[command(after_help = RUN_EXAMPLES)]
    Run(RunArgs),
    /// Check what this machine allows, and say how to mend what is missing
    Doctor {
        /// Print the checks as JSON
        #[arg(long)]
        json: bool,
    },
    /// Print a shell's completions
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the man pages
    Man {
        /// The directory to write them to
        #[arg(long, default_value = ".")]
        dir: PathBuf,
    },
    /// The built-in verifying workload, as `run` without a program starts it
    #[command(name = "__workload", hide = true)]
    Workload,
}

const EXAMPLES: &str = "\
Examples:
  pgmap doctor
  pgmap run --ram 64M
  pgmap run --ram 256M --device compressed:2G -- python3 job.py";

const RUN_EXAMPLES: &str = "\
Examples:
  pgmap run --ram 64M
      a built-in workload over 512 MiB, every page verified
  pgmap run --ram 256M --device compressed:2G -- python3 job.py
      at most 256 MiB resident, the rest compressed in memory
  pgmap run --ram 256M --device compressed:512M --device file:/var/tmp/cold.pgmap,size=8G -- sort big.txt
      what does not fit the pool goes to a file

Devices:
  compressed:SIZE[,algorithm=lz4|zstd][,level=N]   SIZE is what the pool may take
  file:PATH,size=SIZE[,keep][,direct=off]          deleted at once unless `keep`

The exit status is the program's; 127 and 126 if it cannot be found or started, 2 if pgmap cannot do what was asked.";

#[derive(Args, Debug)]
pub(crate) struct RunArgs {
    /// The most RAM that the program's managed memory may take, such as 256M or 2G
    #[arg(long, value_name = "SIZE", value_parser = ram)]
    pub(crate) ram: u64,

    /// Where the rest goes; may be given several times, tried in order
    /// [default: a compressed pool of half the machine's memory]
    #[arg(long = "device", value_name = "SPEC", value_parser = clap::builder::ValueParser::new(device))]
    pub(crate) devices: Vec<DeviceSpec>,

    /// Write the summary as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,

    /// Print nothing of our own
    #[arg(long, short, conflicts_with = "progress")]
    pub(crate) quiet: bool,

    /// Show what happens while it happens
    #[arg(long)]
    pub(crate) progress: bool,

    /// The program and its arguments; without one a built-in workload runs
    #[arg(trailing_var_arg = true, value_name = "PROGRAM")]
    pub(crate) program: Vec<OsString>,
}

fn ram(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text).map_err(|error| error.to_string())?;
    if bytes < LEAST_RAM_BYTES {
        return Err("a budget of less than 4M leaves no room to work: give more".to_owned());
    }
    if bytes > MOST_RAM_BYTES {
        return Err("that is more than any machine can address: give less".to_owned());
    }
    Ok(bytes)
}

fn device(text: &str) -> Result<DeviceSpec, String> {
    text.parse()
        .map_err(|error: pgmap::spec::SpecError| error.to_string())
}
