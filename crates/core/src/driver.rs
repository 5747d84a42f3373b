//! What a device must be able to do, for each type of memory that asks anything of it (MAP-1).
//!
//! `mm` calls these when it sends pages to a device and brings them back, and the last put of a page when it gives the
//! page back; drivers implement them.
//! A driver never calls back into `mm`, never waits for a fault to be served, and never keeps a
//! reference to the bytes that it was shown.

use core::fmt;

use crate::addr::{Page, Pfn};
use crate::platform::DevicePages;

/// What a driver keeps about one of its pages: a slot number, a handle, a checksum.
///
/// It means nothing to anyone but the driver that made it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DeviceData(pub u64);

/// Why a device could not take or give a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DeviceError {
    /// The device has no room for this page; another device may have.
    #[error("the device is full")]
    Full,
    /// The medium refused: the errno that it gave.
    #[error("the device failed with errno {0}")]
    Io(i32),
    /// The bytes that came back are not the bytes that were stored.
    #[error("the page's checksum does not match its bytes")]
    Corrupt,
    /// The device has been taken away or has failed as a whole.
    #[error("the device is gone")]
    Gone,
}

/// One page on its way to a device.
#[derive(Debug)]
pub struct Store<'a> {
    /// The bytes, which nobody changes during the call.
    pub page: &'a Page,
    /// Filled in by the driver, for each page on its own.
    pub outcome: Result<DeviceData, DeviceError>,
}

impl<'a> Store<'a> {
    /// A page that is still to be stored.
    #[must_use]
    pub fn new(page: &'a Page) -> Self {
        Self {
            page,
            outcome: Err(DeviceError::Gone),
        }
    }
}

/// One page on its way back.
#[derive(Debug)]
pub struct Load<'a> {
    /// What the driver returned when the page was stored.
    pub data: DeviceData,
    /// Where the bytes go. Its contents mean nothing unless `outcome` is `Ok`.
    pub page: &'a mut Page,
    /// Filled in by the driver, for each page on its own.
    pub outcome: Result<(), DeviceError>,
}

impl<'a> Load<'a> {
    /// A page that is still to be loaded.
    #[must_use]
    pub fn new(data: DeviceData, page: &'a mut Page) -> Self {
        Self {
            data,
            page,
            outcome: Err(DeviceError::Gone),
        }
    }
}

/// Whether an access to the device is as quick as memory, or worth a sleep.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Latency {
    /// A few microseconds of CPU time: a compressed pool, far memory.
    Memory,
    /// Somebody else works while the caller sleeps: a file, a disk.
    Storage,
}

/// What a device holds now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// Pages stored.
    pub pages: u64,
    /// Bytes that those pages take on the device, its own bookkeeping left out.
    pub bytes: u64,
    /// Bytes that the device may take.
    pub capacity_bytes: u64,
}

/// The operations of device-private memory: memory that the CPU cannot address.
pub trait PrivateOps: Send + Sync + fmt::Debug {
    /// The name that people know the device by, such as `compressed` or `file:/var/tmp/cold`.
    fn name(&self) -> &str;

    /// How long an access takes, in kind.
    fn latency(&self) -> Latency;

    /// Stores pages and fills in the outcome of each.
    ///
    /// A page whose outcome is `Ok` is complete on the device when this returns (FLT-4), and takes
    /// room there until [`page_free`](Self::page_free). Several threads may call at once.
    fn migrate_to_device(&self, batch: &mut [Store<'_>]);

    /// Loads pages and fills in the outcome of each. They stay stored.
    ///
    /// `Ok` means exactly the bytes that were stored: a driver that cannot know that answers
    /// [`DeviceError::Corrupt`]. It allocates no memory; several threads may call at once.
    fn migrate_to_ram(&self, batch: &mut [Load<'_>]);

    /// Gives back the room of one stored page, once.
    fn page_free(&self, data: DeviceData);

    /// What the device holds now.
    fn usage(&self) -> Usage;
}

/// The operations of coherent device memory: the CPU can address it, and its pages can move to RAM and back.
pub trait CoherentOps: Send + Sync + fmt::Debug {
    /// The name that people know the device by.
    fn name(&self) -> &str;

    /// Copies a page of the device to RAM. It stays in use until its last put.
    ///
    /// # Errors
    ///
    /// [`DeviceError`]; then what is in `to` means nothing.
    fn migrate_to_ram(&self, from: Pfn, to: &mut Page) -> Result<(), DeviceError>;

    /// Copies a page of RAM to a page of the device that was allocated for it.
    ///
    /// # Errors
    ///
    /// [`DeviceError`]; then what is in `to` means nothing.
    fn migrate_to_device(&self, from: &Page, to: Pfn) -> Result<(), DeviceError>;

    /// A page is not used any more. Called once for each, before it can be allocated again.
    fn page_free(&self, page: Pfn);
}

/// The operations of memory behind which there is a device that other devices reach directly (PCI peer to peer).
pub trait P2pDmaOps: Send + Sync + fmt::Debug {
    /// The name that people know the provider by.
    fn provider(&self) -> &str;

    /// What other devices add to an address of this memory to reach it, in bytes, wrapping.
    fn bus_offset_bytes(&self) -> u64;

    /// A page is not used any more. The provider, which gives pages out, may give it out again.
    fn page_free(&self, page: Pfn);
}

/// A device's place for the frames' own metadata (MAP-8).
pub trait AltmapOps: Send + Sync + fmt::Debug {
    /// Where in the device's file this page of the device is, and those behind it. The file stays open as long as this
    /// value lives.
    fn pages(&self, first: Pfn) -> DevicePages;

    /// Makes `count` pages zeros, whatever was there: stale bytes, bad blocks. Called for a bounded number of pages at a time.
    ///
    /// # Errors
    ///
    /// [`DeviceError`] if they cannot be made to hold zeros.
    fn clear(&self, first: Pfn, count: u64) -> Result<(), DeviceError>;
}
