//! Device memory: where pages go that are not in RAM, and persistent memory.
//!
//! Here live the compressed pool, the file, and the text in which people name them. `mm` calls the
//! devices through [`PrivateOps`](pgmap_core::driver::PrivateOps); `pgmap` builds them from a
//! [`DeviceSpec`](spec::DeviceSpec). Here also lives [`pmem`], which the servers use as a
//! [`BlockDevice`](block::BlockDevice). Nothing here calls back into `mm`, touches managed memory other
//! than the pages that it is shown, or allocates while it loads a page.
#![forbid(unsafe_code)]

pub mod block;
pub mod compressed;
mod compression;
pub mod faulty;
pub mod file;
mod io;
mod medium;
pub mod pmem;
pub mod quota;
pub mod size;
pub mod slots;
pub mod spec;
pub mod zsmalloc;
