//! Memory of a device, mapped directly: a namespace of persistent memory in the program's own address space (DAX-1).
//!
//! The device's memory is mapped, not a copy of it: nothing of it is RAM of the budget, and no fault comes to the pager. Pins by
//! address are pins of the device's frames, so that taking the device away waits for them, or names them (MAP-6).

use core::ops::Range;
use std::sync::Arc;

use pgmap_core::addr::PAGE_SIZE;
use pgmap_drivers::pmem::{AccessError, Client, MapGuard, Pmem, Sharing};
use pgmap_host::dax::DaxMapping as HostMapping;
use pgmap_host::file_memory::Prot;
use pgmap_mm::dax::DaxVma;
use pgmap_mm::page_cache::VmaAccess;
use rustix::io::Errno;

use crate::space::AddressSpace;

/// Why memory of a device could not be mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MapDaxError {
    /// The device refuses: only shared and aligned mappings are possible (DAX-1).
    #[error(transparent)]
    Refused(#[from] AccessError),
    /// The machine refuses.
    #[error("the machine does not map the device: {0}")]
    Machine(#[from] Errno),
}

/// A part of a device's memory, mapped.
///
/// Others may write to the same bytes at any time, so no reference to them is given out. A fork's child does not have it. When
/// volatile memory is taken away for ever, who still maps it gets SIGBUS.
#[derive(Debug)]
pub struct DaxMapping {
    // Dropped in this order: the device waits for its mappings, and the guard says that this one is gone.
    mapping: HostMapping,
    guard: MapGuard,
    space: Arc<AddressSpace>,
    prot: Prot,
}

impl AddressSpace {
    /// Maps bytes of a namespace, which begin and end at multiples of its alignment, at an address that is such a multiple, too:
    /// the machine can map it in pages of that size. `label` is the name of whoever maps it (REF-7).
    ///
    /// # Errors
    ///
    /// [`MapDaxError`]: a mapping that is not shared, or not aligned, is refused (DAX-1).
    #[doc(alias = "dax_mmap")]
    pub fn map_dax(
        self: &Arc<Self>,
        pmem: &Arc<Pmem>,
        bytes: Range<u64>,
        sharing: Sharing,
        prot: Prot,
        label: &'static str,
    ) -> Result<DaxMapping, MapDaxError> {
        let client = Client {
            label: label.into(),
            pid: std::process::id(),
        };
        let align = pmem.namespace().align.bytes();
        let guard = pmem.map(bytes.clone(), sharing, client)?;
        let file = guard.fd().ok_or(AccessError::NoFrames)?;
        let size = |bytes: u64| usize::try_from(bytes).map_err(|_| Errno::NOMEM);
        let (len, align) = (size(guard.len())?, size(align)?.max(PAGE_SIZE));
        let mapping = HostMapping::new(file, guard.offset(), len, align, prot)?;
        self.inner().dax().map(DaxVma {
            at: mapping.start(),
            bytes,
            access: match prot {
                Prot::Read => VmaAccess::Read,
                Prot::ReadWrite => VmaAccess::ReadWrite,
            },
            device: Arc::clone(pmem) as _,
        });
        Ok(DaxMapping {
            mapping,
            guard,
            space: Arc::clone(self),
            prot,
        })
    }
}

impl DaxMapping {
    /// The mapped addresses.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        let start = self.mapping.start().get();
        start..start + self.len_bytes()
    }

    /// Mapped bytes.
    #[must_use]
    pub const fn len_bytes(&self) -> usize {
        self.mapping.len_bytes()
    }

    /// Where on the device's file the bytes are.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.guard.offset()
    }

    /// Copies bytes out of the mapping; SIGBUS if they were taken away. If others write them meanwhile, each is an old one or a
    /// new one.
    ///
    /// # Panics
    ///
    /// If the mapping is not so long.
    pub fn read(&self, offset: usize, to: &mut [u8]) {
        self.mapping.read(offset, to);
    }

    /// Copies bytes into the mapping; SIGBUS if they were taken away.
    ///
    /// # Panics
    ///
    /// If the mapping is not so long, or may not be written.
    pub fn write(&self, offset: usize, from: &[u8]) {
        assert_eq!(self.prot, Prot::ReadWrite, "the mapping may not be written");
        self.mapping.write(offset, from);
    }
}

impl Drop for DaxMapping {
    fn drop(&mut self) {
        self.space.inner().dax().unmap(self.mapping.start());
    }
}
