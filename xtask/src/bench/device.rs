//! A device that does nothing but copy: what is left of a fault when storing costs as little as it can.

use pgmap_core::addr::Page;
use pgmap_core::driver::{DeviceData, DeviceError, Latency, Load, PrivateOps, Store, Usage};
use pgmap_sync::Mutex;

/// Pages in ordinary memory.
#[derive(Debug)]
pub(crate) struct CopyDevice {
    places: Mutex<Places>,
}

#[derive(Debug)]
struct Places {
    pages: Vec<Page>,
    free: Vec<usize>,
}

impl CopyDevice {
    /// A device for `pages` pages, all touched, so that the first store is like every other.
    pub(crate) fn new(pages: usize) -> Self {
        let places = Places {
            pages: vec![Page([1; _]); pages],
            free: (0..pages).collect(),
        };
        Self {
            places: Mutex::new(places),
        }
    }
}

impl PrivateOps for CopyDevice {
    #[allow(clippy::unnecessary_literal_bound, reason = "the trait's signature")]
    fn name(&self) -> &str {
        "copy"
    }

    fn latency(&self) -> Latency {
        Latency::Memory
    }

    fn migrate_to_device(&self, batch: &mut [Store<'_>]) {
        let mut places = self.places.lock();
        for store in batch {
            store.outcome = match places.free.pop() {
                Some(place) => {
                    places.pages[place].0.copy_from_slice(&store.page.0);
                    Ok(DeviceData(place as u64))
                }
                None => Err(DeviceError::Full),
            };
        }
    }

    fn migrate_to_ram(&self, batch: &mut [Load<'_>]) {
        let places = self.places.lock();
        for load in batch {
            let place = usize::try_from(load.data.0).unwrap_or(usize::MAX);
            load.outcome = match places.pages.get(place) {
                Some(page) => {
                    load.page.0.copy_from_slice(&page.0);
                    Ok(())
                }
                None => Err(DeviceError::Corrupt),
            };
        }
    }

    fn page_free(&self, data: DeviceData) {
        let place = usize::try_from(data.0).unwrap_or(usize::MAX);
        self.places.lock().free.push(place);
    }

    fn usage(&self) -> Usage {
        Usage::default()
    }
}
