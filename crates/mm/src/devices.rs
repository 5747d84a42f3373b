//! The devices of an address space, in the order in which they are tried, and which of them has a page.
//!
//! Devices come and go while the program runs. The list is a lock that is taken once for a batch of pages that leave; who
//! brings a page back finds its device from the page itself. What must never happen here: a device looked up for a page that
//! is not in use.

use alloc::vec::Vec;

use pgmap_core::memremap::{DevPagemap, PagePgmap};
use pgmap_sync::Mutex;

use crate::page_table::{Cursor, PageIndex};
use crate::pte::Pte;
use crate::space::AddressSpace;

/// Devices that there can be at once: as many as there can be mappings in all.
const MOST: usize = 32;

/// Where pages go.
#[derive(Debug)]
pub struct Devices {
    list: Mutex<Vec<DevPagemap>>,
}

impl Devices {
    pub(crate) fn new(devices: Vec<DevPagemap>) -> Self {
        let mut list = Vec::with_capacity(devices.len().max(MOST));
        list.extend(devices);
        Self {
            list: Mutex::new(list),
        }
    }

    /// The device that is tried `nth`.
    #[must_use]
    pub fn get(&self, nth: usize) -> Option<DevPagemap> {
        self.list.lock().get(nth).cloned()
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> Vec<DevPagemap> {
        // One by one: nothing is allocated under the lock.
        (0..).map_while(|nth| self.get(nth)).collect()
    }

    /// Adds a device, to be tried after the others.
    pub fn add(&self, device: DevPagemap) {
        self.list.lock().push(device);
    }

    /// Takes a device off the list, after it was removed: nothing is on it any more, and nothing goes there.
    pub fn forget(&self, device: &DevPagemap) {
        let mut list = self.list.lock();
        let nth = list.iter().position(|other| other.is_same(device));
        let forgotten = nth.map(|nth| list.remove(nth));
        drop(list);
        // Not under the lock: it may be the last handle, and then the driver goes with it.
        drop(forgotten);
    }
}

impl AddressSpace {
    /// The device that a page is on, if its entry says that it is on one.
    pub(crate) fn device_of<'c>(
        &'c self,
        cursor: &'c Cursor<'_>,
        page: PageIndex,
    ) -> Option<PagePgmap<'c>> {
        let Pte::Device { page, .. } = cursor.get(page) else {
            return None;
        };
        // SAFETY: by the address space's invariant the entry holds the device page. The cursor keeps others from changing the
        // entry, and the answer borrows the cursor, so that we do not either while it lives.
        unsafe { self.map.page_pgmap(page) }
    }
}
