//! Memory that pgmap manages: a program uses more of it than there is RAM, and the rest lives on devices.
//!
//! ```no_run
//! use pgmap::{Device, Memory};
//!
//! let memory = Memory::builder().ram(64 << 20).device(Device::compressed(1 << 30)).build()?;
//! let mut map = memory.map(512 << 20)?;
//! map.as_mut_slice().fill(7);            // 512 MiB in 64 MiB of RAM
//! assert!(map.as_slice().iter().all(|byte| *byte == 7));
//! println!("{} faults", memory.stats().faults());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`Memory`] is a RAM budget, its devices and its pager threads; [`AddressSpace`] the addresses that it
//! manages; [`Mapping`] a piece of them; [`Pin`] pages that stay where they are. The names below are those of
//! the rooms that do the work.
//!
//! # Files as memory
//!
//! | what | how |
//! |---|---|
//! | open, for reading only, in a group with a limit | [`Memory::open`], [`OpenOptions`], [`Memcg`] |
//! | map, read, write | [`AddressSpace::map_file`], [`FileMapping`] |
//! | pin for a device | [`AddressSpace::pin_user_pages`], [`Pin`], [`PinnedPages`] |
//! | transfer into and out of pinned pages | [`io::Ring`] |
//! | write back, make durable | [`File::sync_range`], [`File::sync_all`], [`Writeback`] |
//! | truncate, grow, punch | [`File::set_len`], [`File::punch`] |
//! | who holds what; who holds it for too long | [`Memory::holders`], [`MemoryBuilder::report_pins_older_than`] |
//! | what is in RAM, what happened | [`File::pages`], [`Memcg::charged_pages`], [`Memory::stats`] |
//! | lost RAM; a file that is none of the machine's | [`File::memory_failure`], [`Backing`] and [`Memory::open_over`] |
//!
//! ```no_run
//! use pgmap::{Memory, Pin, Prot, Writeback};
//!
//! let memory = Memory::builder().ram(64 << 20).build()?; // files need no device: they are where their pages go
//! let file = memory.open("data.bin")?;
//! let map = memory.space().map_file(&file, 0..file.len_bytes(), Prot::ReadWrite)?;
//! map.write(0, b"through the mapping");
//! let pins = memory.space().pin_user_pages(map.range(), &Pin::WRITE.label("rx ring"))?;
//! // A device may write to the pages now, behind everybody's back.
//! file.sync_range(0..file.len_bytes(), Writeback::Integrity)?; // bounded, even though they are pinned
//! drop(pins);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Files, mappings, pins and rings may be used from any thread, and dropped in any order: a file is closed, and its lock given up,
//! when the last handle, mapping and pin are gone.

mod blocks;
mod budget;
mod dax;
mod device;
mod file;
mod flusher;
pub mod io;
mod memory;
mod old_pins;
mod pager;
mod reader;
pub mod run;
pub mod shared;
mod space;
mod writer;

pub use dax::{DaxMapping, MapDaxError};
pub use device::{Device, open_backing};
pub use file::{File, FileMapping, MapFileError, OpenError, OpenOptions, SyncError, Writeback};
pub use memory::{BuildError, Mapping, Memory, MemoryBuilder};
pub use pgmap_core::holders::Holder;
pub use pgmap_core::hotplug::{BlockView, HotplugError};
pub use pgmap_core::memcg::Memcg;
pub use pgmap_core::memory_block::BlockState;
pub use pgmap_core::sparse::BlockId;
pub use pgmap_core::zone::{RamZone, ZoneChoice};
pub use pgmap_drivers::compressed::Algorithm;
pub use pgmap_drivers::file::FileDevice;
pub use pgmap_drivers::pmem;
pub use pgmap_drivers::spec;
pub use pgmap_host::file_memory::Prot;
pub use pgmap_host::probe;
pub use pgmap_mm::backing::{Backing, BackingError, Transfer};
pub use pgmap_mm::gup::{Pin, PinAccess, PinError, PinnedPages, Whose};
pub use pgmap_mm::page_cache::{Lost, TruncateError, Written};
pub use pgmap_mm::stats::Stats;
pub use space::{AddressSpace, MapError, Place};
