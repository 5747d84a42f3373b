//! What a region's bytes are stored in: how many there are, and what the machine can do with them.
//!
//! Namespaces are placed and taken into use by this, and people are told.

use pgmap_host::shared::{MapSync, SharedFrames};
use rustix::io::Errno;

use super::medium::Medium;
use super::namespace::{Align, HugePage, LABEL_AREA_BYTES};
use super::region::Region;

/// Where the bytes of namespaces are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Storage {
    /// On the region's medium, at their offset.
    Medium,
    /// Each in a memory file of its own, so that one can be revoked without the others; of huge pages, if there is a size.
    MemoryFiles(Option<HugePage>),
}

impl Region {
    /// How many bytes it has, its label area included.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.lock().label().medium_bytes - self.gap_bytes()
    }

    /// Bytes that it has besides those of its namespaces, if these fill it: label area and metadata on the device.
    #[must_use]
    pub fn overhead_bytes(&self) -> u64 {
        let state = self.lock();
        let label = state.label();
        let outside = label.namespaces.iter().map(|namespace| &namespace.metadata);
        let outside = outside.filter(|range| range.start >= LABEL_AREA_BYTES);
        let first = label
            .namespaces
            .iter()
            .map(|namespace| namespace.data.start)
            .min();
        let most = LABEL_AREA_BYTES.max(self.unit().bytes());
        let before = first
            .unwrap_or(most)
            .min(most)
            .saturating_sub(self.gap_bytes());
        before + outside.map(|range| range.end - range.start).sum::<u64>()
    }

    /// Bytes between the label area and the first huge page, which are addresses only.
    fn gap_bytes(&self) -> u64 {
        match self.storage() {
            Storage::MemoryFiles(_) => self.unit().bytes().saturating_sub(LABEL_AREA_BYTES),
            Storage::Medium => 0,
        }
    }

    /// The unit in which the machine can map the bytes: no namespace is mapped in a smaller one.
    pub(crate) fn unit(&self) -> Align {
        match self.storage() {
            Storage::MemoryFiles(huge) => huge.map_or(Align::Page, HugePage::align),
            Storage::Medium => unit_of(&*self.medium()),
        }
    }

    /// Whether who maps the bytes makes his stores durable by the CPU; nothing about memory, which nothing makes durable.
    #[must_use]
    pub fn map_sync(&self) -> Option<MapSync> {
        match self.storage() {
            Storage::MemoryFiles(_) => None,
            Storage::Medium => self.medium().frames()?.map_sync(),
        }
    }

    /// Whether writing may still fail because the file system is full: the image has holes.
    ///
    /// # Errors
    ///
    /// What the machine answers.
    pub fn is_sparse(&self) -> Result<bool, Errno> {
        match self.medium().frames() {
            Some(frames) => Ok(frames.room_bytes()? < frames.size_bytes()),
            None => Ok(false),
        }
    }
}

/// The unit in which a medium's frames can be mapped.
pub(super) fn unit_of(medium: &dyn Medium) -> Align {
    let unit = medium.frames().map_or(0, SharedFrames::unit_bytes);
    let mut aligns = Align::ALL.iter().copied();
    aligns
        .find(|align| align.bytes() >= unit)
        .unwrap_or(Align::Pud)
}
