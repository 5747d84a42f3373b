//! A device-private memory, as a model.
//!
//! `mm` calls it through [`PrivateOps`]. It checks that a page is freed once and not read afterwards, it copies bytes
//! in two steps with room for others between them, and it fails when it is told to.

use std::collections::BTreeMap;
use std::sync::Arc;

use pgmap_core::addr::{PAGE_SIZE, Page};
use pgmap_core::driver::{DeviceData, DeviceError, Latency, Load, PrivateOps, Store, Usage};
use pgmap_sync::Mutex;

/// What a device does wrong when it is told to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failure {
    /// The next page that is stored is refused with EIO.
    Write,
    /// The next page that is loaded is refused with EIO.
    Read,
    /// The next page that is loaded has other bytes, and the device notices.
    Corrupt,
}

/// What is wrong with a device on purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flaw {
    /// Nothing.
    None,
    /// It says that pages are stored before they are: the next call stores them.
    CompletesEarly,
    /// It is slow, which is no error: others may do much while it stores a page.
    Slow,
}

#[derive(Debug, Default)]
struct State {
    last: u64,
    pages: BTreeMap<u64, Box<Page>>,
    failures: Vec<Failure>,
    /// Pages that a flawed device has not stored yet.
    early: BTreeMap<u64, Box<Page>>,
}

impl State {
    fn fails(&mut self, failure: Failure) -> bool {
        let nth = self.failures.iter().position(|of| *of == failure);
        nth.is_some_and(|nth| self.failures.remove(nth) == failure)
    }

    fn complete(&mut self) {
        self.pages.append(&mut self.early);
    }
}

/// A device with room for some pages.
#[derive(Debug)]
pub struct ModelDevice {
    state: Mutex<State>,
    capacity: usize,
    flaw: Flaw,
}

impl ModelDevice {
    /// An empty device with room for `capacity` pages.
    #[must_use]
    pub fn new(capacity: usize, flaw: Flaw) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State::default()),
            capacity,
            flaw,
        })
    }

    /// Pages that there is room for.
    #[must_use]
    pub const fn capacity(&self) -> usize {
        self.capacity
    }

    /// Makes the next fitting operation fail.
    pub fn fail(&self, failure: Failure) {
        self.state.lock().failures.push(failure);
    }

    /// Forgets what [`fail`](Self::fail) asked for and has not happened.
    pub fn fail_nothing(&self) {
        self.state.lock().failures.clear();
    }

    /// Pages stored.
    pub fn pages(&self) -> usize {
        self.state.lock().pages.len()
    }

    fn store(&self, page: &Page) -> Result<DeviceData, DeviceError> {
        let (number, mut copy) = {
            let state = &mut *self.state.lock();
            if state.fails(Failure::Write) {
                return Err(DeviceError::Io(5));
            }
            if state.pages.len() >= self.capacity {
                return Err(DeviceError::Full);
            }
            state.last += 1;
            // Takes up the room before the bytes are there.
            state.pages.insert(state.last, Box::new(Page::ZERO));
            (state.last, Box::new(Page::ZERO))
        };
        // The first word last, because that is where most tests look.
        copy.0[PAGE_SIZE / 2..].copy_from_slice(&page.0[PAGE_SIZE / 2..]);
        let steps = match self.flaw {
            Flaw::None | Flaw::CompletesEarly => 1,
            Flaw::Slow => 100,
        };
        for _ in 0..steps {
            // In the models, others may go on here.
            drop(self.state.lock());
        }
        copy.0[..PAGE_SIZE / 2].copy_from_slice(&page.0[..PAGE_SIZE / 2]);
        let state = &mut *self.state.lock();
        match self.flaw {
            Flaw::None | Flaw::Slow => state.pages.insert(number, copy),
            Flaw::CompletesEarly => state.early.insert(number, copy),
        };
        Ok(DeviceData(number))
    }

    fn load(&self, load: &mut Load<'_>) -> Result<(), DeviceError> {
        let state = &mut *self.state.lock();
        if state.fails(Failure::Read) {
            return Err(DeviceError::Io(5));
        }
        let number = load.data.0;
        let Some(page) = state.pages.get(&number) else {
            panic!("page {number} was loaded, and is not stored");
        };
        load.page.0.copy_from_slice(&page.0);
        if state.fails(Failure::Corrupt) {
            load.page.0[0] ^= 1;
            return Err(DeviceError::Corrupt);
        }
        Ok(())
    }
}

impl PrivateOps for ModelDevice {
    fn name(&self) -> &'static str {
        "model"
    }

    fn latency(&self) -> Latency {
        Latency::Memory
    }

    fn migrate_to_device(&self, batch: &mut [Store<'_>]) {
        self.state.lock().complete();
        for store in batch {
            store.outcome = self.store(store.page);
        }
    }

    fn migrate_to_ram(&self, batch: &mut [Load<'_>]) {
        for load in batch {
            load.outcome = self.load(load);
        }
        self.state.lock().complete();
    }

    fn page_free(&self, data: DeviceData) {
        let state = &mut *self.state.lock();
        state.complete();
        let page = state.pages.remove(&data.0);
        assert!(
            page.is_some(),
            "page {} was freed, and is not stored",
            data.0
        );
    }

    fn usage(&self) -> Usage {
        let bytes = |pages: usize| (pages * PAGE_SIZE) as u64;
        let pages = self.pages();
        Usage {
            pages: pages as u64,
            bytes: bytes(pages),
            capacity_bytes: bytes(self.capacity),
        }
    }
}
