//! Who has which frame numbers.

use alloc::vec::Vec;

use crate::addr::{Pfn, PfnRange};
use crate::memremap::{MapError, aligned};

/// Ranges of frames and their owners.
#[derive(Debug, Default)]
pub(crate) struct Resources {
    ram: Option<PfnRange>,
    devices: Vec<(u8, PfnRange)>,
}

impl Resources {
    pub(crate) fn add_ram(&mut self, range: PfnRange) -> Result<(), MapError> {
        if self.ram.is_some() {
            return Err(MapError::RamTwice);
        }
        if let Some((_, other)) = self
            .devices
            .iter()
            .find(|(_, other)| collide(*other, range))
        {
            return Err(MapError::Conflict(*other));
        }
        self.ram = Some(range);
        Ok(())
    }

    /// Reserves ranges for a device: all, or none and an error that names the range in the way (MAP-2, MAP-3).
    pub(crate) fn insert(&mut self, device: u8, ranges: &[PfnRange]) -> Result<(), MapError> {
        for (nth, range) in ranges.iter().enumerate() {
            if self.ram.is_some_and(|ram| collide(ram, *range)) {
                return Err(MapError::IntersectsRam(*range));
            }
            let mut others = self
                .devices
                .iter()
                .map(|(_, other)| other)
                .chain(&ranges[..nth]);
            if let Some(other) = others.find(|other| collide(**other, *range)) {
                return Err(MapError::Conflict(*other));
            }
        }
        self.devices
            .extend(ranges.iter().map(|range| (device, *range)));
        Ok(())
    }

    pub(crate) fn remove(&mut self, device: u8) {
        self.devices.retain(|(owner, _)| *owner != device);
    }

    pub(crate) fn is_used(&self, device: u8) -> bool {
        self.devices.iter().any(|(owner, _)| *owner == device)
    }

    /// The lowest whole sub-sections after RAM that have room for so many frames.
    pub(crate) fn find_room(&self, frames: u64) -> Option<PfnRange> {
        let after_ram = self.ram.map_or(0, |ram| aligned(ram).1);
        let ends = self.devices.iter().map(|(_, range)| aligned(*range).1);
        ends.chain([after_ram])
            .filter(|start| *start >= after_ram)
            .filter_map(|start| PfnRange::new(Pfn::new(start)?, frames))
            .filter(|room| !self.devices.iter().any(|(_, range)| collide(*range, *room)))
            .min_by_key(|room| room.start())
    }
}

/// Whether two ranges share a sub-section (MAP-2: the test is made on the ranges that will really be used).
const fn collide(a: PfnRange, b: PfnRange) -> bool {
    let (a, b) = (aligned(a), aligned(b));
    a.0 < b.1 && b.0 < a.1
}
