//! Devices: where pages go that are not in RAM.

use std::sync::Arc;

use pgmap_core::driver::PrivateOps;

/// A device-private memory, with the number of pages that it may hold.
#[derive(Clone, Debug)]
pub struct Device {
    pub(crate) ops: Arc<dyn PrivateOps>,
    pub(crate) frames: u64,
}

impl Device {
    /// A pool of `capacity_bytes` bytes that holds pages compressed with LZ4.
    #[must_use]
    pub fn compressed(capacity_bytes: u64) -> Self {
        todo!("drivers: {capacity_bytes}")
    }

    /// A device of your own: `ops` stores up to `frames` pages.
    #[must_use]
    pub fn custom(ops: Arc<dyn PrivateOps>, frames: u64) -> Self {
        Self { ops, frames }
    }
}
