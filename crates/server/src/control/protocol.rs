//! What is asked over the control socket, and what is answered.
//!
//! One JSON object a line. The manager greets with [`Greeting`]; then the client sends [`Request`]s, one after the other, and
//! gets one [`Reply`] for each. Fields keep their names and meaning within one version of the protocol; the names are those
//! of `ndctl` and `daxctl` where they have one.

use serde::{Deserialize, Serialize};

/// The version of the protocol.
pub const VERSION: u32 = 1;

/// The first line that a manager sends.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Greeting {
    /// See [`VERSION`].
    pub protocol: u32,
    /// Who answers.
    pub manager: ManagerInfo,
}

/// A process that manages memory.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ManagerInfo {
    /// What it does.
    pub kind: Kind,
    /// Its process.
    pub pid: u32,
    /// The version of pgmap that it is.
    pub version: String,
    /// What a `run` runs; empty for `serve`.
    pub command: String,
}

/// What a manager does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// `pgmap serve`.
    Serve,
    /// `pgmap run`.
    Run,
}

/// What a client asks. Sizes, offsets and lengths are in bytes, times in milliseconds.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// What there is: answered by [`Answer::Listing`].
    List,
    /// The resource tree: [`Answer::Iomem`].
    Iomem,
    /// Who holds a device: [`Answer::Holders`].
    Holders {
        /// Its name.
        device: String,
    },
    /// What happened so far: [`Answer::Counters`].
    Counters,
    /// Makes a namespace: [`Answer::Namespace`].
    CreateNamespace(CreateNamespace),
    /// Makes a namespace not to be, with its bytes: [`Answer::Done`]. It has to be disabled.
    DestroyNamespace {
        /// Its name.
        namespace: String,
    },
    /// Brings a namespace into use: [`Answer::Done`].
    Enable {
        /// Its name.
        namespace: String,
    },
    /// Takes a namespace out of use, now and after a restart, and keeps its bytes: [`Answer::Done`].
    Disable {
        /// Its name.
        namespace: String,
        /// How long to wait for those who hold it.
        timeout_ms: Option<u64>,
    },
    /// Adds a region or a device to a running manager: [`Answer::Name`].
    Plug {
        /// As on the command line of the manager's start.
        spec: String,
    },
    /// Takes a device away: [`Answer::Done`].
    Unplug {
        /// Its name.
        device: String,
        /// How long to wait for those who hold it.
        timeout_ms: Option<u64>,
    },
    /// Makes blocks of a namespace bad: [`Answer::Done`].
    InjectError {
        /// Its name.
        namespace: String,
        /// The first block, of 512 bytes.
        block: u64,
        /// How many blocks.
        count: u64,
    },
    /// Makes blocks of a namespace good: [`Answer::Done`].
    ClearError {
        /// Its name.
        namespace: String,
        /// The first block, of 512 bytes.
        block: u64,
        /// How many blocks.
        count: u64,
    },
    /// Reads everything that a namespace has, to find what is bad: [`Answer::Scrub`].
    Scrub {
        /// Its name; all if there is none.
        namespace: Option<String>,
        /// Whether the answer comes at the end.
        wait: bool,
    },
    /// The blocks of RAM: [`Answer::Memory`].
    Memory,
    /// Takes a block of RAM into use: [`Answer::Done`].
    Online {
        /// Its number.
        block: u64,
        /// The zone that it joins.
        zone: Zone,
    },
    /// Takes a block of RAM out of use: [`Answer::Done`].
    Offline {
        /// Its number.
        block: u64,
        /// How long to wait until its pages have gone elsewhere.
        timeout_ms: Option<u64>,
    },
    /// Lets the client map a range of a namespace: [`Answer::Mapped`], with the file to map. For as long as the connection
    /// lives, or until [`Request::Release`].
    Map(RangeOf),
    /// Pins a range of a namespace: [`Answer::Held`]. Ends as a mapping does.
    Pin {
        /// What.
        #[serde(flatten)]
        range: RangeOf,
        /// What its holder is called.
        label: String,
    },
    /// What of a mapping is lost and was not told before: [`Answer::Lost`].
    Lost {
        /// What [`Answer::Mapped`] said.
        id: u64,
        /// Whether the answer comes when something is. Others' requests come on other connections.
        wait: bool,
    },
    /// Ends a mapping or a pin: [`Answer::Done`]. The client no longer touches it.
    Release {
        /// What [`Answer::Mapped`] or [`Answer::Held`] said.
        id: u64,
    },
}

/// A namespace to be made.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateNamespace {
    /// The region; the first with room if there is none.
    pub region: Option<String>,
    /// `fsdax`, `devdax` or `raw`.
    pub mode: Option<String>,
    /// All that is left in the region if there is none.
    pub size: Option<u64>,
    /// 4096, 2 MiB or 1 GiB.
    pub align: Option<u64>,
    /// Where the frames' metadata lives: `mem` or `dev`.
    pub map: Option<String>,
    /// For people.
    pub name: Option<String>,
}

/// A range of a namespace.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RangeOf {
    /// Its name.
    pub namespace: String,
    /// Where the range starts.
    pub offset: u64,
    /// To the end if there is none.
    pub length: Option<u64>,
}

/// A zone that a block of RAM can join.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Zone {
    /// Whichever fits.
    Auto,
    /// For pages that may stay.
    Normal,
    /// For pages that can be moved away.
    Movable,
}

/// What follows a request.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// It was done.
    Ok(Answer),
    /// It was not, and everything is as it was.
    Error(Failure),
}

/// What a request brought.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Nothing more to say.
    Done,
    /// What there is.
    Listing(Listing),
    /// The resources that lie in no other.
    Iomem(Vec<Resource>),
    /// A new name.
    Name(String),
    /// A new namespace.
    Namespace(Box<Namespace>),
    /// Who holds what was asked about, oldest first.
    Holders(Vec<Holder>),
    /// What happened.
    Counters(Vec<Counters>),
    /// What a scrub found.
    Scrub(Scrub),
    /// The blocks of RAM.
    Memory(Memory),
    /// A mapping: the file comes along.
    Mapped {
        /// For [`Request::Lost`] and [`Request::Release`].
        id: u64,
        /// Where in the file the range starts.
        offset: u64,
        /// How many bytes.
        length: u64,
    },
    /// Blocks of the namespace that are mapped and lost: do not touch the pages that they are in. They are told once, and again when
    /// they were mended and are lost once more.
    Lost(Vec<BadBlocks>),
    /// A hold.
    Held {
        /// For [`Request::Release`].
        id: u64,
    },
}

/// Why a request was refused.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What a program can decide by.
    pub code: Code,
    /// A sentence for people.
    pub message: String,
    /// Who stands in the way.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub holders: Vec<Holder>,
}

impl Failure {
    /// A refusal in which nobody stands in the way.
    pub fn new(code: Code, message: impl core::fmt::Display) -> Self {
        Self {
            code,
            message: message.to_string(),
            holders: Vec::new(),
        }
    }
}

/// What kind of refusal it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// The request is wrong.
    Invalid,
    /// There is no such thing.
    NotFound,
    /// Somebody holds it; try again, or ask them.
    Busy,
    /// This manager, or this kind of device, cannot do that.
    Unsupported,
    /// The machine refused.
    Failed,
    /// You may not.
    Denied,
}

/// What a manager has.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Listing {
    /// Images and volatile memories, with their namespaces.
    pub regions: Vec<Region>,
    /// Where the pages of a `run` go.
    pub devices: Vec<Device>,
}

/// An image, or volatile memory.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Region {
    /// Its name, such as `region0`.
    pub dev: String,
    /// Bytes, labels included.
    pub size: u64,
    /// Bytes that no namespace has.
    pub available_size: u64,
    /// Always `pmem`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The image's path; none for volatile memory.
    pub image: Option<String>,
    /// Its identity.
    pub uuid: String,
    /// Bytes that no namespace can have: labels, and the metadata of frames.
    pub metadata_size: u64,
    /// Whether who maps it makes his stores durable by writing back the CPU's caches, without a system call; nothing about
    /// volatile memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map_sync: Option<bool>,
    /// What is in it.
    pub namespaces: Vec<Namespace>,
}

/// A namespace.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Namespace {
    /// Its place, such as `namespace0.0`.
    pub dev: String,
    /// `fsdax`, `devdax` or `raw`.
    pub mode: String,
    /// `mem` or `dev`; none for raw ones, which have no frames.
    pub map: Option<String>,
    /// Bytes that can be used.
    pub size: u64,
    /// Bytes of the device that hold the metadata of its frames.
    pub metadata_size: u64,
    /// Its identity.
    pub uuid: String,
    /// Bytes.
    pub sector_size: u64,
    /// Bytes.
    pub align: u64,
    /// The block device, such as `pmem0`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blockdev: Option<String>,
    /// The character device, such as `dax0.0`, of a devdax namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chardev: Option<String>,
    /// What its maker called it.
    pub name: String,
    /// `enabled` or `disabled`.
    pub state: String,
    /// Blocks of 512 bytes that are bad.
    pub badblock_count: u64,
    /// The bad blocks.
    pub badblocks: Vec<BadBlocks>,
    /// Where NBD clients find it.
    pub nbd: Option<String>,
    /// Where else, if they are served at several places.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nbd_also: Vec<String>,
}

impl Namespace {
    /// All places where NBD clients find it.
    pub fn uris(&self) -> impl Iterator<Item = &String> {
        self.nbd.iter().chain(&self.nbd_also)
    }

    /// The device's name, whatever its kind.
    #[must_use]
    pub fn device(&self) -> &str {
        let name = self.blockdev.as_ref().or(self.chardev.as_ref());
        name.unwrap_or(&self.dev)
    }

    /// Whether people mean this one by a name.
    #[must_use]
    pub fn is_called(&self, name: &str) -> bool {
        [self.dev.as_str(), self.device(), &self.name, &self.uuid].contains(&name)
    }
}

/// A run of bad blocks.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BadBlocks {
    /// The first, of 512 bytes.
    pub offset: u64,
    /// How many.
    pub length: u64,
}

/// Where pages of a `run` go.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Device {
    /// Its name, such as `compressed0`.
    pub dev: String,
    /// How it was described.
    pub spec: String,
    /// `enabled`, `unplugging`, ...
    pub state: String,
    /// Pages that it holds.
    pub pages: u64,
    /// Bytes that those take.
    pub bytes: u64,
    /// Bytes that it may take.
    pub capacity: u64,
}

/// Somebody who holds pages (REF-7).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Holder {
    /// What it is: `pin`, `map`, `request`, `pages`, ...
    pub kind: String,
    /// What it calls itself.
    pub label: String,
    /// Its process, if it is known.
    pub pid: Option<u32>,
    /// How long, in milliseconds, if it is known.
    pub age_ms: Option<u64>,
    /// Where the range starts, if it is one.
    pub offset: Option<u64>,
    /// How many bytes; 0 if it holds none.
    pub length: u64,
}

/// Who has a range of the physical address space, as `/proc/iomem` tells it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Resource {
    /// What people know it by.
    pub name: String,
    /// The first byte.
    pub start: u64,
    /// How many bytes.
    pub size: u64,
    /// What lies in it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub children: Vec<Resource>,
}

/// What happened to one thing.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Counters {
    /// A device's name, or the manager's kind.
    pub of: String,
    /// Numbers by name, which only grow.
    pub counters: Vec<(String, u64)>,
    /// Numbers by name, of now.
    pub gauges: Vec<(String, u64)>,
}

/// What a scrub found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Scrub {
    /// Whether all of it was looked at.
    pub complete: bool,
    /// Bad blocks known now.
    pub badblock_count: u64,
}

/// The RAM of a manager.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Memory {
    /// Bytes of a block.
    pub block_size: u64,
    /// Bytes on line.
    pub online: u64,
    /// Bytes in use.
    pub in_use: u64,
    /// The blocks, in order.
    pub blocks: Vec<Block>,
}

/// A block of RAM.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Block {
    /// Its number.
    pub block: u64,
    /// Where it starts, in bytes.
    pub start: u64,
    /// `online`, `offline`, ...
    pub state: String,
    /// `Normal`, `Movable`; none while it is off line.
    pub zone: Option<String>,
}
