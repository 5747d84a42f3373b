//! Memory of a device, mapped directly: a namespace of persistent memory in the program's own address space (DAX-1).
//!
//! The device's memory is mapped, not a copy of it: nothing of it is RAM of the budget, and no fault comes to the pager. Pins by
//! address are pins of the device's frames, so that taking the device away waits for them, or names them (MAP-6). Pages of which bytes
//! are lost are taken out of the mapping for as long, so that who touches them gets SIGBUS (WB-6).

use core::mem::ManuallyDrop;
use core::ops::Range;
use std::sync::Arc;

use pgmap_core::addr::PAGE_SIZE;
use pgmap_drivers::pmem::badblocks::{BadBlocks, SECTOR_BYTES};
use pgmap_drivers::pmem::{AccessError, Client, MapGuard, Mapper, Pmem, Sharing};
use pgmap_host::dax::DaxMapping as HostMapping;
use pgmap_host::file_memory::Prot;
use pgmap_mm::dax::DaxVma;
use pgmap_mm::page_cache::VmaAccess;
use pgmap_sync::Mutex;
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
/// volatile memory is taken away for ever, who still maps it gets SIGBUS. So does who touches a page of which a sector is lost, until all of it
/// is mended (WB-6); a page of the device's or of huge memory is as large as the machine's mapping of it.
#[derive(Debug)]
pub struct DaxMapping {
    mapped: Arc<Mapped>,
    space: Arc<AddressSpace>,
    prot: Prot,
}

/// What is mapped, for the mapping and for who tells it of lost bytes.
#[derive(Debug)]
struct Mapped {
    // Dropped in this order: the device waits for its mappings, and the guard says that this one is gone.
    mapping: HostMapping,
    guard: MapGuard,
    /// What is taken out of the mapping, counted from the namespace's start. Whoever changes the mapping holds it.
    poisoned: Mutex<BadBlocks>,
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
        let mapped = Arc::new(Mapped {
            mapping,
            guard,
            poisoned: Mutex::default(),
        });
        mapped.guard.watch(&mapped);
        Ok(DaxMapping {
            mapped,
            space: Arc::clone(self),
            prot,
        })
    }
}

impl Mapper for Mapped {
    fn memory_failure(&self) {
        let mut poisoned = self.poisoned.lock();
        // The list of now: of two who change it, the one who comes here last sees what both did.
        let lost = self.guard.lost_units();
        for sectors in lost.without(&poisoned).ranges() {
            self.poison(sectors, &mut poisoned);
        }
        for sectors in poisoned.without(&lost).ranges() {
            self.heal(sectors, &mut poisoned);
        }
    }
}

impl Mapped {
    /// Takes sectors out of the mapping. If the machine has no room for more mappings, all of it goes: rather that than lost bytes.
    fn poison(&self, sectors: &Range<u64>, poisoned: &mut BadBlocks) {
        let bytes = self.guard.bytes();
        let all = bytes.start / SECTOR_BYTES..bytes.end / SECTOR_BYTES;
        for sectors in [sectors, &all] {
            if self.mapping.poison(self.range(sectors)).is_ok() {
                poisoned.set(sectors.clone());
                return;
            }
        }
    }

    /// Puts sectors back. Those that cannot be stay away until the next change of the list.
    fn heal(&self, sectors: &Range<u64>, poisoned: &mut BadBlocks) {
        let range = self.range(sectors);
        let offset = self.guard.offset() + range.start as u64;
        let file = self.guard.fd();
        if file.is_some_and(|file| self.mapping.heal(range, file, offset).is_ok()) {
            poisoned.clear(sectors);
        }
    }

    /// Where in the mapping sectors of the namespace are.
    fn range(&self, sectors: &Range<u64>) -> Range<usize> {
        let place = |sector: u64| {
            let byte = (sector * SECTOR_BYTES).saturating_sub(self.guard.bytes().start);
            usize::try_from(byte).map_or(self.mapping.len_bytes(), |byte| {
                byte.min(self.mapping.len_bytes())
            })
        };
        place(sectors.start)..place(sectors.end)
    }
}

impl DaxMapping {
    /// The mapped addresses.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        let start = self.mapped.mapping.start().get();
        start..start + self.len_bytes()
    }

    /// Mapped bytes.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.mapped.mapping.len_bytes()
    }

    /// Where on the device's file the bytes are.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.mapped.guard.offset()
    }

    /// Copies bytes out of the mapping; SIGBUS if they were taken away, or lost. If others write them meanwhile, each is an old one or a
    /// new one.
    ///
    /// # Panics
    ///
    /// If the mapping is not so long.
    pub fn read(&self, offset: usize, to: &mut [u8]) {
        self.mapped.mapping.read(offset, to);
    }

    /// Copies bytes into the mapping; SIGBUS if they were taken away, or lost.
    ///
    /// # Panics
    ///
    /// If the mapping is not so long, or may not be written.
    pub fn write(&self, offset: usize, from: &[u8]) {
        assert_eq!(self.prot, Prot::ReadWrite, "the mapping may not be written");
        self.mapped.mapping.write(offset, from);
    }
}

impl Drop for DaxMapping {
    fn drop(&mut self) {
        if self.space.is_inherited() {
            // Whoever had one of the locks may not be here to let go of it: nothing is taken back.
            let _kept = ManuallyDrop::new(Arc::clone(&self.mapped));
            return;
        }
        self.space.inner().dax().unmap(self.mapped.mapping.start());
    }
}
