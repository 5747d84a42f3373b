//! Telling those who map bytes of a namespace which of them are lost (WB-6).
//!
//! Whoever maps in this process watches its mapping by a [`Mapper`], and takes the pages away from itself; the server watches for
//! processes elsewhere, and tells them. What must never happen here: a lost byte that is announced before it is in the list, or a
//! mended one that is mapped while it is still there: who is called looks at the list of now.

use core::fmt;
use core::ops::Range;
use std::sync::{Arc, Weak};

use pgmap_sync::Mutex;

use super::badblocks::{BadBlocks, sectors_around};
use super::dax::MapGuard;

/// Somebody who maps bytes of a namespace.
#[doc(alias = "struct dax_holder_operations")]
pub trait Mapper: fmt::Debug + Send + Sync {
    /// Sectors were lost or mended, here or elsewhere: look at [`MapGuard::lost`]. Called by whoever made it so, on their thread and
    /// before they have an answer, without a lock.
    #[doc(alias = "dax_holder_notify_failure")]
    fn memory_failure(&self);
}

/// Those who watch their mappings.
#[derive(Debug, Default)]
pub(super) struct Mappers(Mutex<Vec<Weak<dyn Mapper>>>);

impl Mappers {
    fn add(&self, mapper: Weak<dyn Mapper>) {
        let mut mappers = self.0.lock();
        mappers.retain(|mapper| mapper.strong_count() > 0);
        mappers.push(mapper);
    }

    /// Calls all who watch, after the list was changed.
    pub(super) fn tell(&self) {
        let mappers: Vec<_> = self.0.lock().iter().filter_map(Weak::upgrade).collect();
        for mapper in mappers {
            mapper.memory_failure();
        }
    }
}

impl MapGuard {
    /// Has somebody called whenever sectors of the namespace are lost or mended, and once now: what was lost before is theirs to
    /// find, too.
    pub fn watch<M: Mapper + 'static>(&self, mapper: &Arc<M>) {
        let weak = Arc::downgrade(mapper);
        self.pmem().mappers.add(weak);
        mapper.memory_failure();
    }

    /// The lost sectors of the mapping, counted from the namespace's start.
    #[must_use]
    pub fn lost(&self) -> BadBlocks {
        let mut lost = BadBlocks::default();
        for sectors in self
            .pmem()
            .bad_blocks()
            .within(&sectors_around(self.bytes()))
        {
            lost.set(sectors);
        }
        lost
    }

    /// The sectors that nobody may touch, counted as above: the units in which the machine maps the namespace that have a lost
    /// sector.
    #[must_use]
    pub fn lost_units(&self) -> BadBlocks {
        let unit = sectors_around(&(0..self.unit_bytes())).end;
        let around = |lost: &Range<u64>| lost.start / unit * unit..lost.end.next_multiple_of(unit);
        let mut units = BadBlocks::default();
        for lost in self.lost().ranges() {
            units.set(around(lost));
        }
        units
    }
}
