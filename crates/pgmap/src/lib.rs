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
pub use pgmap_mm::gup::{Pin, PinError, PinnedPages};
pub use pgmap_mm::page_cache::{Lost, TruncateError, Written};
pub use pgmap_mm::stats::Stats;
pub use space::{AddressSpace, MapError, Place};
