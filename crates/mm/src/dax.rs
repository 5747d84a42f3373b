//! Memory of devices that is mapped directly: where it is mapped, and pins of it.
//!
//! The machine maps it without our help, and none of it is RAM of ours: no fault comes here, and nothing is reclaimed. A pin
//! by address is a pin of the device's frames, which its driver makes, so that whoever takes the device away, or punches a hole
//! in it, waits for it or can say whose it is (MAP-6, WB-5). A look at the list is a lock that is taken once for a range.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

use pgmap_core::addr::{PAGE_SIZE, VirtAddr};
use pgmap_core::dax::{DaxDevice, DaxError};
use pgmap_core::holders::Who;
use pgmap_core::memremap::{HeldPages, MemoryType};
use pgmap_sync::Mutex;

use crate::gup::{Pin, PinAccess, PinError, PinTerm};
use crate::page_cache::VmaAccess;
use crate::space::AddressSpace;

/// A mapping of a device's memory.
#[derive(Clone, Debug)]
pub struct DaxVma {
    /// Its first address.
    pub at: VirtAddr,
    /// The bytes of the device that are there: whole pages.
    pub bytes: Range<u64>,
    /// What it allows.
    pub access: VmaAccess,
    /// The device.
    pub device: Arc<dyn DaxDevice>,
}

impl DaxVma {
    /// The bytes of the device from an address on, if it is in the mapping.
    fn from(&self, at: VirtAddr) -> Option<Range<u64>> {
        let offset = at.checked_offset_from(self.at)? as u64;
        let start = self.bytes.start.checked_add(offset)?;
        (start < self.bytes.end).then_some(start..self.bytes.end)
    }

    /// The address of a byte of the device that is mapped.
    fn address_of(&self, byte: u64) -> VirtAddr {
        let offset = usize::try_from(byte.saturating_sub(self.bytes.start)).unwrap_or(0);
        self.at.checked_add(offset).unwrap_or(self.at).page_start()
    }

    /// Whether pages may be pinned so.
    fn allows(&self, pin: &Pin, at: VirtAddr) -> Result<(), PinError> {
        match (pin.access, self.access) {
            (PinAccess::Write, VmaAccess::Read) => return Err(PinError::NotWritable { at }),
            (PinAccess::Read, _) | (PinAccess::Write, VmaAccess::ReadWrite) => {}
        }
        let pagemap = self.device.pagemap();
        let pagemap = pagemap.ok_or(PinError::BadAddress { at })?;
        match (pin.term, pagemap.kind()) {
            (PinTerm::Short, _) | (PinTerm::Long, MemoryType::Generic) => Ok(()),
            (
                PinTerm::Long,
                MemoryType::FsDax(_)
                | MemoryType::Private(_)
                | MemoryType::Coherent(_)
                | MemoryType::P2pDma(_),
            ) => Err(PinError::FsDax { at }),
        }
    }
}

/// The mappings of devices' memory in one address space, by first address.
#[derive(Debug, Default)]
pub struct DaxVmas(Mutex<BTreeMap<VirtAddr, DaxVma>>);

impl DaxVmas {
    /// Enters a mapping.
    pub fn map(&self, vma: DaxVma) {
        self.0.lock().insert(vma.at, vma);
    }

    /// Takes a mapping out: nobody pins anything there any more. What is pinned stays pinned.
    pub fn unmap(&self, at: VirtAddr) {
        let gone = self.0.lock().remove(&at);
        // Not under the lock: it may be the last handle to the device.
        drop(gone);
    }

    /// The mapping at an address.
    #[must_use]
    pub fn at(&self, at: VirtAddr) -> Option<DaxVma> {
        let vmas = self.0.lock();
        let (_, vma) = vmas.range(..=at).next_back()?;
        vma.from(at).map(|_| vma.clone())
    }
}

/// Pins on the frames of a device.
#[derive(Debug)]
pub(crate) struct DaxPin {
    // Dropped in this order: the device is not gone before its frames are let go of.
    _held: HeldPages,
    _device: Arc<dyn DaxDevice>,
}

impl AddressSpace {
    /// Where memory of devices is mapped directly.
    #[must_use]
    pub const fn dax(&self) -> &DaxVmas {
        &self.dax
    }

    /// Pins pages of mapped devices, one hold for each mapping that the range touches.
    pub(crate) fn pin_dax_pages(
        &self,
        at: VirtAddr,
        pages: u32,
        pin: &Pin,
        who: Who,
        pinned: &mut Vec<DaxPin>,
    ) -> Result<(), PinError> {
        let mut left = u64::from(pages) * PAGE_SIZE as u64;
        let mut start = at;
        while left > 0 {
            let bad = PinError::BadAddress { at: start };
            let vma = self.dax.at(start).ok_or(bad)?;
            vma.allows(pin, start)?;
            let bytes = vma.from(start).ok_or(bad)?;
            let bytes = bytes.start..bytes.end.min(bytes.start.saturating_add(left));
            let held = vma.device.pin_bytes(&bytes, pin.label.clone(), who);
            let held = held.map_err(|error| refusal(error, &vma, start))?;
            pinned.push(DaxPin {
                _held: held,
                _device: vma.device,
            });
            let done = bytes.end - bytes.start;
            left -= done;
            let end = usize::try_from(done)
                .ok()
                .and_then(|done| start.checked_add(done));
            start = end.ok_or(bad)?;
        }
        Ok(())
    }
}

fn refusal(error: DaxError, vma: &DaxVma, at: VirtAddr) -> PinError {
    match error {
        DaxError::Leaving => PinError::DeviceLeaving { at },
        DaxError::OutOfRange => PinError::BadAddress { at },
        DaxError::Lost { offset } => PinError::Poisoned {
            at: vma.address_of(offset),
        },
        DaxError::TooMany => PinError::TooManyPins { at },
        DaxError::Busy => PinError::DeviceBusy { at },
    }
}
