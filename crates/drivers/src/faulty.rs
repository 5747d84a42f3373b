//! A device that fails on purpose, for tests of what happens then.
//!
//! Tests wrap a real device in this, or name it in a spec (`faulty:corrupt@every=10:compressed:64M`).
//! It is no device for use.

use core::fmt;
use std::sync::Arc;

use pgmap_core::driver::{DeviceData, DeviceError, Latency, Load, PrivateOps, Store, Usage};
use pgmap_sync::atomic::{AtomicU64, Ordering};

/// The errno that failing loads and stores report: EIO.
const EIO: i32 = 5;

/// What fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// A load ends with an I/O error.
    LoadError,
    /// A load finds that the bytes are not those that were stored.
    Corrupt,
    /// A store ends with an I/O error.
    StoreError,
}

impl Fault {
    /// Every fault.
    pub const ALL: [Self; 3] = [Self::LoadError, Self::Corrupt, Self::StoreError];

    /// The name in a spec.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::LoadError => "load-error",
            Self::Corrupt => "corrupt",
            Self::StoreError => "store-error",
        }
    }
}

/// Which of the loads, or of the stores, fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum When {
    /// Every n-th; none for 0.
    Every(u64),
    /// All after the first n.
    After(u64),
}

impl When {
    /// Whether the operation with this number, counted from 1, fails.
    const fn fails(self, number: u64) -> bool {
        match self {
            Self::Every(0) => false,
            Self::Every(count) => number.is_multiple_of(count),
            Self::After(count) => number > count,
        }
    }
}

/// What fails, and when.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plan {
    /// What fails.
    pub fault: Fault,
    /// When.
    pub when: When,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.when {
            When::Every(count) => write!(f, "{}@every={count}", self.fault.name()),
            When::After(count) => write!(f, "{}@after={count}", self.fault.name()),
        }
    }
}

/// A device that does what another does, except when its plan says that it fails.
#[derive(Debug)]
pub struct FaultyDevice {
    device: Arc<dyn PrivateOps>,
    plan: Plan,
    /// Pages loaded, or stored, whichever the plan is about.
    count: AtomicU64,
}

impl FaultyDevice {
    /// `device`, failing by `plan`.
    pub fn new(device: Arc<dyn PrivateOps>, plan: Plan) -> Self {
        Self {
            device,
            plan,
            count: AtomicU64::new(0),
        }
    }

    fn fails_now(&self) -> bool {
        // Relaxed: only the number matters, and each is given once.
        self.plan
            .when
            .fails(self.count.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

impl PrivateOps for FaultyDevice {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn latency(&self) -> Latency {
        self.device.latency()
    }

    /// A page that is to fail has been stored, and is freed again: the bytes went nowhere.
    fn migrate_to_device(&self, batch: &mut [Store<'_>]) {
        self.device.migrate_to_device(batch);
        if self.plan.fault != Fault::StoreError {
            return;
        }
        for store in batch {
            if self.fails_now()
                && let Ok(data) = store.outcome
            {
                self.device.page_free(data);
                store.outcome = Err(DeviceError::Io(EIO));
            }
        }
    }

    fn migrate_to_ram(&self, batch: &mut [Load<'_>]) {
        self.device.migrate_to_ram(batch);
        let error = match self.plan.fault {
            Fault::LoadError => DeviceError::Io(EIO),
            Fault::Corrupt => DeviceError::Corrupt,
            Fault::StoreError => return,
        };
        for load in batch {
            if self.fails_now() {
                // Whoever uses the bytes of a failed load is to notice.
                load.page.0.fill(0xa5);
                load.outcome = Err(error);
            }
        }
    }

    fn page_free(&self, data: DeviceData) {
        self.device.page_free(data);
    }

    fn usage(&self) -> Usage {
        self.device.usage()
    }
}

#[cfg(test)]
mod tests {
    use pgmap_core::addr::Page;

    use super::*;
    use crate::compressed::{Algorithm, CompressedDevice, CompressedOptions};
    use crate::quota::Quota;

    fn device(fault: Fault, when: When) -> FaultyDevice {
        let options = CompressedOptions {
            capacity_bytes: 1 << 20,
            algorithm: Algorithm::Lz4,
            max_pages: 100,
            quota: Quota::private(1 << 20),
        };
        let device = CompressedDevice::new(options).unwrap();
        FaultyDevice::new(Arc::new(device), Plan { fault, when })
    }

    fn stores(device: &FaultyDevice, count: usize) -> Vec<Result<DeviceData, DeviceError>> {
        let mut batch: Vec<_> = (0..count).map(|_| Store::new(&Page::ZERO)).collect();
        device.migrate_to_device(&mut batch);
        batch.into_iter().map(|store| store.outcome).collect()
    }

    fn load(device: &FaultyDevice, data: DeviceData) -> Result<(), DeviceError> {
        let mut page = Page::ZERO;
        let mut batch = [Load::new(data, &mut page)];
        device.migrate_to_ram(&mut batch);
        batch[0].outcome
    }

    #[test]
    fn every_third_store_fails_and_takes_no_room() {
        let device = device(Fault::StoreError, When::Every(3));
        let failed: Vec<_> = stores(&device, 7).iter().map(Result::is_err).collect();
        assert_eq!(failed, [false, false, true, false, false, true, false]);
        assert_eq!(device.usage().pages, 5);
    }

    #[test]
    fn loads_fail_after_the_first_two() {
        for (fault, error) in [
            (Fault::LoadError, DeviceError::Io(EIO)),
            (Fault::Corrupt, DeviceError::Corrupt),
        ] {
            let device = device(fault, When::After(2));
            let data = stores(&device, 1)[0].unwrap();
            let outcomes: Vec<_> = (0..4).map(|_| load(&device, data)).collect();
            assert_eq!(outcomes, [Ok(()), Ok(()), Err(error), Err(error)]);
        }
    }
}
