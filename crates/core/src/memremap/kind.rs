//! The types of device memory, and what each brings along.

use alloc::sync::Arc;

use pgmap_sync::WaitQueue;

use crate::driver::{CoherentOps, P2pDmaOps, PrivateOps};
use crate::resource::Descriptor;

/// What kind of memory a device has, and what it must be able to do (MAP-1).
#[derive(Debug)]
pub enum MemoryType {
    /// The CPU cannot address it. Its pages are migrated to RAM when they are touched.
    Private(Arc<dyn PrivateOps>),
    /// The CPU can address it, and its pages can be migrated.
    Coherent(Arc<dyn CoherentOps>),
    /// A file system maps it directly; who waits for a page to be idle is woken by its last put.
    FsDax(Arc<WaitQueue>),
    /// A character device maps it directly.
    Generic,
    /// Other devices reach it directly.
    P2pDma(Arc<dyn P2pDmaOps>),
}

/// Who says which frame is used next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Supply {
    /// The mapping: it has a list of free frames.
    Allocated,
    /// Its user: a file system, a driver.
    Given,
}

impl MemoryType {
    pub(super) const fn supply(&self) -> Supply {
        match self {
            Self::Private(_) | Self::Coherent(_) => Supply::Allocated,
            Self::FsDax(_) | Self::Generic | Self::P2pDma(_) => Supply::Given,
        }
    }

    /// What the resource tree says of it.
    pub(super) const fn descriptor(&self) -> Descriptor {
        match self {
            Self::Private(_) => Descriptor::DevicePrivate,
            Self::FsDax(_) => Descriptor::PersistentMemory,
            Self::Coherent(_) | Self::Generic | Self::P2pDma(_) => Descriptor::None,
        }
    }

    /// The name that people know it by.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Private(_) => "private",
            Self::Coherent(_) => "coherent",
            Self::FsDax(_) => "fsdax",
            Self::Generic => "devdax",
            Self::P2pDma(_) => "p2pdma",
        }
    }
}
