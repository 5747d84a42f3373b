//! The verbs that ask a running manager, on the command line. Words and short options are those of ndctl and daxctl where
//! they have one.

use core::time::Duration;
use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use pgmap::spec::{parse_bytes, parse_size};
use pgmap_server::control::protocol::Zone;

const MAP_NOTES: &str = "\
Examples:
  pgmap map pmem0 --length 2M > start.bin
  pgmap map pmem0 --offset 2M --length 2M --write < some.bin
  pgmap map pmem0 --pin rings -- ./my-program
      the program maps the file $PGMAP_FILE from $PGMAP_OFFSET on,
      $PGMAP_LENGTH bytes

Exit status of `pgmap map ... -- PROGRAM`: the program's own, as with `pgmap run`:
2 if the range cannot be mapped, 126 if the program cannot be started, 127 if it
was not found.";

const IOMEM_NOTES: &str = "\
The processes of a run have a memory map each. What is shown is that of one that
starts now: RAM, as much as there may be, in the blocks of `pgmap memory`, and
the devices in the order in which they are tried. A pool of compressed pages has
eight frames for each page of RAM that it may take.";

/// The verbs.
#[derive(Subcommand, Debug)]
pub(crate) enum Verb {
    /// List what running managers have: regions, namespaces, devices
    List(ListArgs),
    /// Show who has which physical addresses, as /proc/iomem does
    #[command(after_help = IOMEM_NOTES)]
    Iomem(IomemArgs),
    /// Name those who hold a device: mappings, pins, requests
    Holders(HoldersArgs),
    /// Show what happens now
    Top(TopArgs),
    /// Map a range of a namespace, and copy it, or run a program that maps it
    #[command(after_help = MAP_NOTES)]
    Map(MapArgs),
    /// Make a namespace in a region
    CreateNamespace(CreateArgs),
    /// Take a namespace out of its region, with all bytes
    DestroyNamespace(DestroyArgs),
    /// Bring a namespace into use
    #[command(visible_alias = "enable-namespace")]
    Enable(NamespaceArgs),
    /// Take a namespace out of use; its bytes stay
    #[command(visible_alias = "disable-namespace")]
    Disable(DisableArgs),
    /// Add a region to `pgmap serve`, or a device to a `pgmap run`, while it runs
    Plug(PlugArgs),
    /// Take a namespace or a device away: waits for those who hold it, or names them
    Unplug(UnplugArgs),
    /// Make blocks of a namespace bad, to see what becomes of it
    InjectError(BlocksArgs),
    /// Make bad blocks good
    #[command(visible_alias = "clear-errors")]
    ClearError(BlocksArgs),
    /// Read everything, to find what is bad
    Scrub(ScrubArgs),
    /// Show the blocks of RAM, and take them on and off line
    #[command(args_conflicts_with_subcommands = true)]
    Memory(MemoryArgs),
}

/// Which manager is asked.
#[derive(Args, Debug, Clone)]
pub(crate) struct Whom {
    /// Ask the manager at this socket [default: all of yours that run; for a verb that names a device, the one that has it]
    #[arg(long, value_name = "PATH", global = true)]
    pub(crate) socket: Option<PathBuf>,
}

/// How long those who hold a device are waited for.
#[derive(Args, Debug)]
pub(crate) struct Patience {
    /// Give up after this time, such as 500ms, 5s or 2m, and name who holds it; nothing has changed then [default: wait]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) timeout: Option<Duration>,
}

#[derive(Args, Debug)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "each is an option that is given or not"
)]
pub(crate) struct ListArgs {
    /// Namespaces only
    #[arg(short = 'N', long)]
    pub(crate) namespaces: bool,
    /// Regions; with -N their namespaces, too
    #[arg(short = 'R', long)]
    pub(crate) regions: bool,
    /// Devices of runs only
    #[arg(short = 'D', long)]
    pub(crate) devices: bool,
    /// Bad blocks, too
    #[arg(short = 'M', long)]
    pub(crate) media_errors: bool,
    /// As JSON, with the fields that `ndctl list` has
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) whom: Whom,
}

impl ListArgs {
    /// Whether no kind of things was named.
    pub(super) const fn is_all(&self) -> bool {
        !(self.namespaces || self.regions || self.devices)
    }
}

#[derive(Args, Debug)]
pub(crate) struct IomemArgs {
    /// As JSON: the trees of all managers, sizes in bytes
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) whom: Whom,
}

#[derive(Args, Debug)]
pub(crate) struct HoldersArgs {
    /// The device or namespace, such as pmem0
    pub(crate) device: String,
    /// As JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) whom: Whom,
}

#[derive(Args, Debug)]
pub(crate) struct TopArgs {
    /// Look this often
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = humantime::parse_duration)]
    pub(crate) interval: Duration,
    /// Look this many times, then end [default: until Ctrl-C]
    #[arg(long, short = 'n', value_name = "COUNT", value_parser = count)]
    pub(crate) count: Option<u64>,
    #[command(flatten)]
    pub(crate) whom: Whom,
}

#[derive(Args, Debug)]
pub(crate) struct CreateArgs {
    /// The region [default: the first with room]
    #[arg(short, long)]
    pub(crate) region: Option<String>,
    /// fsdax, devdax or raw [default: fsdax]
    #[arg(short, long)]
    pub(crate) mode: Option<String>,
    /// Its size, such as 256M [default: all that is left]
    #[arg(short, long, value_name = "SIZE", value_parser = size)]
    pub(crate) size: Option<u64>,
    /// Its alignment: 4K, 2M or 1G [default: 2M]
    #[arg(short, long, value_name = "SIZE", value_parser = size)]
    pub(crate) align: Option<u64>,
    /// Where the metadata of its frames lives: mem or dev [default: mem]
    #[arg(short = 'M', long)]
    pub(crate) map: Option<String>,
    /// A name, for people
    #[arg(short, long)]
    pub(crate) name: Option<String>,
    /// As JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) whom: Whom,
}

#[derive(Args, Debug)]
pub(crate) struct DestroyArgs {
    /// The namespace, such as pmem0 or namespace0.0
    pub(crate) namespace: String,
    /// Disable it first if it is in use
    #[arg(short, long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) patience: Patience,
    #[command(flatten)]
    pub(crate) whom: Whom,
}

#[derive(Args, Debug)]
pub(crate) struct NamespaceArgs {
    /// The namespace, such as pmem0 or namespace0.0
    pub(crate) namespace: String,
    #[command(flatten)]
    pub(crate) whom: Whom,
}

#[derive(Args, Debug)]
pub(crate) struct DisableArgs {
    /// The namespace, such as pmem0 or namespace0.0
    pub(crate) namespace: String,
    #[command(flatten)]
    pub(crate) patience: Patience,
    #[command(flatten)]
    pub(crate) whom: Whom,
}

#[derive(Args, Debug)]
pub(crate) struct PlugArgs {
    /// What: for `pgmap serve` as after --pmem, for `pgmap run` as after --device
    pub(crate) spec: String,
    #[command(flatten)]
    pub(crate) whom: Whom,
}

#[derive(Args, Debug)]
pub(crate) struct UnplugArgs {
    /// The namespace or device, such as pmem0 or compressed0
    pub(crate) device: String,
    #[command(flatten)]
    pub(crate) patience: Patience,
    #[command(flatten)]
    pub(crate) whom: Whom,
}

#[derive(Args, Debug)]
pub(crate) struct BlocksArgs {
    /// The namespace, such as pmem0
    pub(crate) namespace: String,
    /// The first block, of 512 bytes
    #[arg(short = 'B', long, value_parser = number)]
    pub(crate) block: u64,
    /// How many blocks, at least 1
    #[arg(short = 'n', long, default_value = "1", value_parser = count)]
    pub(crate) count: u64,
    #[command(flatten)]
    pub(crate) whom: Whom,
}

#[derive(Args, Debug)]
pub(crate) struct ScrubArgs {
    /// The namespace [default: all]
    pub(crate) namespace: Option<String>,
    /// Wait for its end
    #[arg(long)]
    pub(crate) wait: bool,
    #[command(flatten)]
    pub(crate) whom: Whom,
}

#[derive(Args, Debug)]
pub(crate) struct MemoryArgs {
    #[command(subcommand)]
    pub(crate) action: Option<MemoryAction>,
    /// As JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) whom: Whom,
}

#[derive(Subcommand, Debug)]
pub(crate) enum MemoryAction {
    /// Take a block into use: the budget grows by it
    Online {
        /// Its number
        #[arg(value_parser = number)]
        block: u64,
        /// The zone that it joins
        #[arg(long, value_enum, default_value = "auto")]
        zone: ZoneName,
    },
    /// Take a block out of use: its pages go elsewhere, and the budget shrinks by it
    Offline {
        /// Its number
        #[arg(value_parser = number)]
        block: u64,
        #[command(flatten)]
        patience: Patience,
    },
}

#[derive(ValueEnum, Clone, Copy, Debug)]
pub(crate) enum ZoneName {
    /// Whichever fits
    Auto,
    /// For pages that may stay
    Normal,
    /// For pages that can be moved away
    Movable,
}

impl From<ZoneName> for Zone {
    fn from(name: ZoneName) -> Self {
        match name {
            ZoneName::Auto => Self::Auto,
            ZoneName::Normal => Self::Normal,
            ZoneName::Movable => Self::Movable,
        }
    }
}

#[derive(Args, Debug)]
pub(crate) struct MapArgs {
    /// The namespace, such as pmem0
    pub(crate) namespace: String,
    /// Where to start, such as 0 or 2M
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = offset)]
    pub(crate) offset: u64,
    /// How much [default: to the end]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) length: Option<u64>,
    /// Copy standard input to the range, instead of the range to standard output
    #[arg(long, conflicts_with = "program")]
    pub(crate) write: bool,
    /// Pin the range meanwhile, under this name
    #[arg(long, value_name = "LABEL")]
    pub(crate) pin: Option<String>,
    #[command(flatten)]
    pub(crate) whom: Whom,
    /// Run this while the range is mapped: its environment says which file to map, and where the range is in it
    #[arg(trailing_var_arg = true, value_name = "PROGRAM")]
    pub(crate) program: Vec<OsString>,
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text).map_err(|error| error.to_string())
}

/// Any number of bytes: what it has to be a multiple of, the manager knows.
fn offset(text: &str) -> Result<u64, String> {
    parse_bytes(text).map_err(|error| error.to_string())
}

fn number(text: &str) -> Result<u64, String> {
    let number = text.trim().parse();
    number.map_err(|_| "write a whole number, such as 3".to_owned())
}

fn count(text: &str) -> Result<u64, String> {
    match number(text)? {
        0 => Err("write at least 1".to_owned()),
        count => Ok(count),
    }
}
