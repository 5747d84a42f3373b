//! Telling other processes which bytes of their mappings are lost (WB-6).
//!
//! What another process has mapped cannot be taken out of its address space from here, and the file's page could only be punched,
//! which shows zeros, or truncated with all that follows. So who maps may ask what is lost, and wait for it; `pgmap map` does, and
//! sends its program SIGBUS.

use core::time::Duration;
use std::sync::Arc;

use pgmap_drivers::pmem::badblocks::BadBlocks as Sectors;
use pgmap_drivers::pmem::{MapGuard, Mapper};
use pgmap_sync::{Mutex, WaitQueue};

use super::Service;
use crate::control::Session;
use crate::control::protocol::{Answer, BadBlocks, Code, Failure};

/// How often somebody who waits is looked for.
const LOOK: Duration = Duration::from_millis(100);

/// Whether somebody waits until something is lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Lost {
    Now,
    Soon,
}

/// A mapping of another process.
#[derive(Debug)]
pub(super) struct Mapping {
    guard: MapGuard,
    /// What its process has been told of, and is lost still.
    told: Mutex<Sectors>,
    changed: WaitQueue,
}

impl Mapper for Mapping {
    fn memory_failure(&self) {
        let mut told = self.told.lock();
        // What is lost once more is told once more.
        let mended = told.without(&self.guard.lost());
        *told = told.without(&mended);
        drop(told);
        self.changed.wake_all();
    }
}

impl Mapping {
    pub(super) fn new(guard: MapGuard) -> Arc<Self> {
        let mapping = Arc::new(Self {
            guard,
            told: Mutex::default(),
            changed: WaitQueue::new(),
        });
        mapping.guard.watch(&mapping);
        mapping
    }

    fn untold(&self, told: &Sectors) -> Sectors {
        self.guard.lost().without(told)
    }

    /// What is lost and was not told before.
    fn tell(&self) -> Vec<BadBlocks> {
        let mut told = self.told.lock();
        let untold = self.untold(&told);
        let tell = |sectors: &core::ops::Range<u64>| {
            told.set(sectors.clone());
            BadBlocks {
                offset: sectors.start,
                length: sectors.end - sectors.start,
            }
        };
        untold.ranges().iter().map(tell).collect()
    }

    /// Waits until something is lost that was not told, or nobody waits for the answer any more.
    fn wait(&self, session: &Session) {
        let lost = || !self.untold(&self.told.lock()).ranges().is_empty();
        while !self.changed.wait_until(Some(LOOK), lost) && !session.is_hung_up() {}
    }
}

impl Service {
    /// What is lost of a mapping: what is now, or, if that is to be waited for, what will be.
    pub(super) fn lost_of(id: u64, when: Lost, session: &Session) -> Result<Answer, Failure> {
        let mapping = session.held::<Arc<Mapping>>(id);
        let unknown = || Failure::new(Code::NotFound, format!("you map nothing as {id}"));
        let mapping = mapping.ok_or_else(unknown)?;
        match when {
            Lost::Now => {}
            Lost::Soon => mapping.wait(session),
        }
        Ok(Answer::Lost(mapping.tell()))
    }
}
