//! The resource tree of a run.
//!
//! Every process has a memory map of its own, and nobody else sees its frames; so the supervisor tells of one map for all: that of
//! a process which starts now.

use pgmap_core::addr::{PAGE_SIZE, Pfn, PfnRange};
use pgmap_core::memremap::MapError;
use pgmap_core::resource::{Descriptor, Flags, Resource, ResourceTree};
use pgmap_core::sparse::SUBSECTION_FRAMES;

use super::Control;
use super::seat::{Seat, numbered_bytes};

impl Control {
    /// Who has which frames in a process that starts now (HOT-1): RAM, as much as the budget can be raised to, and behind it the
    /// devices in the order in which they are tried. A pool of compressed pages has more frames than it takes bytes. In a process
    /// that was there when a device was taken away, later ones may have its place.
    ///
    /// # Errors
    ///
    /// [`MapError::NoRoom`], if there are not as many frames.
    pub fn iomem(&self) -> Result<ResourceTree, MapError> {
        let state = self.state();
        let seats = state.seats.iter().flatten();
        let mut live: Vec<&Seat> = seats.filter(|seat| !seat.is_gone()).collect();
        live.sort_unstable_by_key(|seat| seat.config.number);
        let mut map = Map::default();
        let (ram, none) = (Flags::SYSTEM_RAM, Descriptor::None);
        map.add(state.most_ram_bytes(), ram, none, "System RAM")?;
        for seat in live {
            let (bytes, name) = (numbered_bytes(&seat.config.spec), seat.config.name());
            map.add(bytes, Flags::MEMORY, Descriptor::DevicePrivate, &name)?;
        }
        Ok(map.tree)
    }
}

/// A memory map, as far as it is full.
#[derive(Debug, Default)]
struct Map {
    tree: ResourceTree,
    end: u64,
}

impl Map {
    /// Enters what comes next, from the next sub-section on.
    fn add(
        &mut self,
        bytes: u64,
        flags: Flags,
        descriptor: Descriptor,
        name: &str,
    ) -> Result<(), MapError> {
        let start = Pfn::new(self.end.next_multiple_of(SUBSECTION_FRAMES));
        let range = start.and_then(|start| PfnRange::new(start, bytes / PAGE_SIZE as u64));
        let range = range.ok_or(MapError::NoRoom)?;
        self.end = range.end();
        let new = Resource::new(range, flags, descriptor, name);
        let entered = self.tree.insert(new);
        entered.map_err(|other| MapError::Conflict(other.range))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pgmap_core::addr::MAX_PFN;
    use pgmap_core::memremap::MemoryMap;
    use pgmap_drivers::compressed::Algorithm;
    use pgmap_drivers::quota::Quota;
    use pgmap_drivers::spec::DeviceSpec;
    use pgmap_host::platform::HostPlatform;

    use super::*;
    use crate::device::Device;
    use crate::memory::machine_frames;

    static PLATFORM: HostPlatform = HostPlatform;

    /// HOT-1: the run's map is that of a process, with the devices' own names.
    #[test]
    fn a_run_has_the_map_of_a_process() {
        let specs: [DeviceSpec; 2] =
            ["compressed:1028K", "compressed:8M"].map(|spec| spec.parse().unwrap());
        let control = Control::new(64 << 20, &specs).unwrap();

        let map: Arc<MemoryMap> = MemoryMap::new(&PLATFORM, MAX_PFN).unwrap();
        let _ram = map.add_ram(machine_frames()).unwrap();
        let devices = specs.map(|spec| {
            let bytes = spec.capacity_bytes();
            let quota = Quota::private(bytes);
            let device = Device::compressed_within(bytes, Algorithm::Lz4, quota).unwrap();
            map.memremap_private(device.ops, device.frames).unwrap()
        });

        let ours = control.iomem().unwrap();
        let places = |tree: &ResourceTree| -> Vec<_> {
            let roots = tree.roots().iter();
            roots
                .map(|root| (root.range(), root.descriptor()))
                .collect()
        };
        assert_eq!(places(&ours), places(&map.iomem()));
        let names: Vec<_> = ours.roots().iter().map(Resource::name).collect();
        assert_eq!(names, ["System RAM", "compressed0", "compressed1"]);
        drop(devices);
    }
}
