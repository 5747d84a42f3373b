//! Devices: where pages go that are not in RAM.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use pgmap_core::addr::PAGE_SIZE;
use pgmap_core::driver::PrivateOps;
use pgmap_drivers::compressed::{Algorithm, CompressedDevice, CompressedOptions};
use pgmap_drivers::faulty::FaultyDevice;
use pgmap_drivers::file::{Direct, FileDevice, FileError, FileOptions};
use pgmap_drivers::quota::Quota;
use pgmap_drivers::slots::{Owner, Slots};
use pgmap_drivers::spec::DeviceSpec;
use pgmap_sync::atomic::AtomicU64;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;

use crate::run::DeviceConfig;
use crate::shared::Region;

/// Pages that a compressed pool may hold for each page that it takes: zero pages take nothing, and most others an
/// eighth at best.
const PAGES_PER_POOL_PAGE: u64 = 8;

/// One process's part of a shared device.
#[derive(Debug)]
pub(crate) struct Part {
    /// Bytes taken by all processes, and by this one.
    pub(crate) taken: &'static AtomicU64,
    pub(crate) mine: &'static AtomicU64,
    /// Where the tables of slots are.
    pub(crate) region: Region,
    /// This process's place.
    pub(crate) number: usize,
}

/// A device-private memory, with the number of pages that it may hold.
#[derive(Clone, Debug)]
pub struct Device {
    pub(crate) ops: Arc<dyn PrivateOps>,
    pub(crate) frames: u64,
}

impl Device {
    /// A pool of `capacity_bytes` bytes that holds pages compressed with LZ4.
    ///
    /// # Panics
    ///
    /// If there is no memory for the compressor's few kilobytes.
    #[must_use]
    pub fn compressed(capacity_bytes: u64) -> Self {
        let quota = Quota::private(capacity_bytes);
        let device = Self::compressed_within(capacity_bytes, Algorithm::Lz4, quota);
        device.unwrap_or_else(|error| panic!("{error}"))
    }

    /// A device of your own: `ops` stores up to `frames` pages.
    #[must_use]
    pub fn custom(ops: Arc<dyn PrivateOps>, frames: u64) -> Self {
        Self { ops, frames }
    }

    /// This process's part of a device that a run's processes share.
    pub(crate) fn shared(config: &DeviceConfig, part: &Part) -> Result<Self, String> {
        match &config.spec {
            DeviceSpec::Compressed {
                capacity_bytes,
                algorithm,
            } => {
                let quota = Quota {
                    limit: *capacity_bytes,
                    used: part.taken,
                    mine: part.mine,
                };
                Self::compressed_within(*capacity_bytes, *algorithm, quota)
            }
            DeviceSpec::File {
                path,
                size_bytes,
                direct,
                ..
            } => {
                let (opened, _) = config.opened.as_ref().ok_or("the file is not open")?;
                let frames = size_bytes / PAGE_SIZE as u64;
                let table = config.table().ok_or("the file is too large")?;
                let words = part.region.table(table.start, table.len());
                let owner = u8::try_from(part.number).ok().and_then(Owner::new);
                let owner = owner.ok_or("there are too many processes")?;
                let fd = reopen(opened, *direct).map_err(|error| error.to_string())?;
                let slots = Slots::shared(words, owner);
                let device = FileDevice::from_fd(fd, slots, &path.display().to_string());
                Ok(Self {
                    ops: Arc::new(device),
                    frames,
                })
            }
            DeviceSpec::Faulty { plan, device } => {
                let config = DeviceConfig {
                    spec: (**device).clone(),
                    ..config.clone()
                };
                let Self { ops, frames } = Self::shared(&config, part)?;
                Ok(Self {
                    ops: Arc::new(FaultyDevice::new(ops, *plan)),
                    frames,
                })
            }
        }
    }

    pub(crate) fn compressed_within(
        capacity_bytes: u64,
        algorithm: Algorithm,
        quota: Quota,
    ) -> Result<Self, String> {
        let frames = capacity_bytes.saturating_mul(PAGES_PER_POOL_PAGE) / PAGE_SIZE as u64;
        let options = CompressedOptions {
            capacity_bytes,
            algorithm,
            max_pages: frames,
            quota,
        };
        let device = CompressedDevice::new(options).map_err(|error| error.to_string())?;
        Ok(Self {
            ops: Arc::new(device),
            frames,
        })
    }
}

/// Opens the file that the supervisor holds, past the page cache if that is wanted and possible.
fn reopen(path: &Path, direct: Direct) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let past_cache = match direct {
        Direct::Auto => open(path, flags | OFlags::DIRECT, Mode::empty()).ok(),
        Direct::Off => None,
    };
    past_cache.map_or_else(|| open(path, flags, Mode::empty()), Ok)
}

/// Opens the file that a device needs, for all processes of a run; `None` for a device that needs none.
///
/// # Errors
///
/// [`FileError`], which says what to do.
pub fn open_backing(spec: &DeviceSpec) -> Result<Option<FileDevice>, FileError> {
    match spec {
        DeviceSpec::Compressed { .. } => Ok(None),
        DeviceSpec::File {
            path,
            size_bytes,
            keep,
            direct,
        } => {
            let (size_bytes, keep, direct) = (*size_bytes, *keep, *direct);
            let options = FileOptions {
                size_bytes,
                keep,
                slots: None,
                direct,
            };
            FileDevice::open(path, options).map(Some)
        }
        DeviceSpec::Faulty { device, .. } => open_backing(device),
    }
}
