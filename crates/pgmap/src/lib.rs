//! Temporary.
mod device;
mod memory;
mod pager;
mod space;

pub use device::Device;
pub use memory::{BuildError, Mapping, Memory, MemoryBuilder};
pub use pgmap_mm::gup::{Pin, PinAccess, PinError};
pub use pgmap_mm::stats::Stats;
pub use space::{AddressSpace, MapError, Place};
