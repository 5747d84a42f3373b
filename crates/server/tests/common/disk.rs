//! A disk of memory, without anything that could fail; and exports of it.

use core::ops::Range;
use std::sync::Arc;

use pgmap_core::queue::RequestQueue;
use pgmap_drivers::block::{Access, BlockDevice, BlockError, Contents, Direct, Zeros};
use pgmap_host::shared::{Extent, SharedFrames};
use pgmap_server::nbd::{Export, Exports, Refused};
use pgmap_sync::Mutex;
use pgmap_sync::atomic::{AtomicU64, Ordering};
use rustix::io::Errno;

/// No byte is lost.
pub(crate) const NONE_BAD: u64 = u64::MAX;

/// A disk of shared frames.
#[derive(Debug)]
pub(crate) struct MemoryDisk {
    name: String,
    frames: SharedFrames,
    pub(crate) queue: RequestQueue,
    /// The only byte that is lost, or [`NONE_BAD`]; a write of its whole block mends it.
    pub(crate) bad: AtomicU64,
    /// Who holds it keeps flushes from ending, as a disk does that takes its time.
    pub(crate) busy: Mutex<()>,
}

impl MemoryDisk {
    pub(crate) fn new(name: &str, bytes: u64) -> Result<Arc<Self>, Errno> {
        Ok(Arc::new(Self {
            name: name.to_owned(),
            frames: SharedFrames::memory(name, bytes)?,
            queue: RequestQueue::new(),
            bad: AtomicU64::new(NONE_BAD),
            busy: Mutex::new(()),
        }))
    }

    fn check(&self, range: &Range<u64>) -> Result<(), BlockError> {
        // Relaxed: a test sets it while no request is under way.
        let offset = self.bad.load(Ordering::Relaxed);
        if range.contains(&offset) {
            return Err(BlockError::Bad { offset });
        }
        let within = range.start <= range.end && range.end <= self.frames.size_bytes();
        within.then_some(()).ok_or(BlockError::OutOfRange)
    }
}

impl BlockDevice for MemoryDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn size_bytes(&self) -> u64 {
        self.frames.size_bytes()
    }

    fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), BlockError> {
        let _in_flight = self.queue.enter()?;
        self.check(&(offset..offset.saturating_add(to.len() as u64)))?;
        Ok(self.frames.read(offset, to)?)
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), BlockError> {
        let _in_flight = self.queue.enter()?;
        let range = offset..offset.saturating_add(from.len() as u64);
        // Relaxed: a test looks at it when the request is answered.
        let bad = self.bad.load(Ordering::Relaxed);
        let block = bad / 4096 * 4096;
        if range.contains(&block) && range.end - block >= 4096 {
            self.bad.store(NONE_BAD, Ordering::Relaxed);
        }
        self.check(&range)?;
        Ok(self.frames.write(offset, from)?)
    }

    fn flush(&self) -> Result<(), BlockError> {
        let _in_flight = self.queue.enter()?;
        let _turn = self.busy.lock();
        Ok(self.frames.flush()?)
    }

    fn discard(&self, range: Range<u64>) -> Result<(), BlockError> {
        self.write_zeroes(range, Zeros::MayPunch)
    }

    fn write_zeroes(&self, range: Range<u64>, zeros: Zeros) -> Result<(), BlockError> {
        let _in_flight = self.queue.enter()?;
        self.check(&range)?;
        self.frames.punch(&range)?;
        if zeros == Zeros::KeepRoom {
            self.frames.allocate(&range)?;
        }
        Ok(())
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<(Range<u64>, Contents)>, BlockError> {
        let _in_flight = self.queue.enter()?;
        let extents = self.frames.extents(range)?.into_iter();
        let extents = extents.map(|extent| match extent {
            Extent::Data(range) => (range, Contents::Data),
            Extent::Hole(range) => (range, Contents::Hole),
        });
        Ok(extents.collect())
    }

    fn likes_direct_writes(&self) -> bool {
        self.frames.is_memory()
    }

    fn direct(&self, range: Range<u64>, _access: Access) -> Result<Direct<'_>, BlockError> {
        let in_flight = self.queue.enter()?;
        self.check(&range)?;
        Ok(Direct::new(&self.frames, range, in_flight))
    }
}

/// A fixed list; the first is for clients that do not choose.
#[derive(Debug)]
pub(crate) struct Fixed(pub(crate) Vec<Arc<Export>>);

impl Exports for Fixed {
    fn find(&self, name: &str) -> Result<Arc<Export>, Refused> {
        let named = |export: &&Arc<Export>| name.is_empty() || export.name == name;
        let found = self.0.iter().find(named).cloned();
        found.ok_or_else(|| Refused(format!("there is no export \"{name}\"")))
    }

    fn list(&self) -> Vec<Arc<Export>> {
        self.0.clone()
    }
}
