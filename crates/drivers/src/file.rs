//! Pages in a file: on a local disk, past the page cache where the file system allows.
//!
//! `mm` calls this through [`PrivateOps`]. The word of a page is its slot and the checksum of its bytes,
//! so that a torn, lost or misplaced write is an error and never wrong bytes. Several processes can
//! share one file through a shared table of slots. Loading allocates nothing.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Mutex;

use pgmap_core::addr::{PAGE_SIZE, Page};
use pgmap_core::driver::{DeviceData, DeviceError, Latency, Load, PrivateOps, Store, Usage};
use pgmap_host::fds::OurFd;
use pgmap_host::uring::Ring;

pub use crate::medium::{Direct, FileError};

use crate::io::{RUN_PAGES, read_run, read_scattered, write_run};
use crate::medium::{self, HEADER_BYTES, Keep};
use crate::slots::{Owner, Slots};

/// Reads in flight at once.
const RING_DEPTH: u32 = 32;
/// Runs of this many pages are read as such, and not page by page.
const WORTHWHILE_RUN_PAGES: usize = 4;

/// How a file is used.
#[derive(Debug)]
pub struct FileOptions {
    /// Bytes of pages that it holds; what is left of a whole page is not used.
    pub size_bytes: u64,
    /// Whether the file keeps its name. Its bytes mean nothing to a later run all the same.
    pub keep: bool,
    /// The table of slots, if other processes use the file too: one word for each page of the size.
    pub slots: Option<Slots>,
    /// Whether the page cache is passed by.
    pub direct: Direct,
}

/// A file that holds pages.
#[derive(Debug)]
pub struct FileDevice {
    fd: OurFd,
    slots: Slots,
    /// For one thread at a time; who finds it taken does without.
    ring: Mutex<Ring>,
    name: String,
}

/// Where a page is, and what its bytes add up to: slot in the high 32 bits, CRC-32C in the low.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Place {
    slot: u32,
    checksum: u32,
}

impl Place {
    fn encode(self) -> DeviceData {
        DeviceData(u64::from(self.slot) << 32 | u64::from(self.checksum))
    }

    #[allow(clippy::cast_possible_truncation, reason = "the word is two halves")]
    fn decode(data: DeviceData) -> Self {
        Self {
            slot: (data.0 >> 32) as u32,
            checksum: data.0 as u32,
        }
    }

    fn offset(self) -> u64 {
        HEADER_BYTES + u64::from(self.slot) * PAGE_SIZE as u64
    }
}

fn checksum(page: &Page) -> u32 {
    crc32c::crc32c(&page.0)
}

impl FileDevice {
    /// Opens or creates the file, for this run alone.
    ///
    /// # Errors
    ///
    /// [`FileError`], which says what to do.
    ///
    /// # Panics
    ///
    /// If the table of slots is not as long as the size says.
    pub fn open(path: &Path, options: FileOptions) -> Result<Self, FileError> {
        let count = options.size_bytes / PAGE_SIZE as u64;
        if count == 0 || count > 1 << 32 {
            return Err(FileError::Size(options.size_bytes));
        }
        let count = usize::try_from(count).map_err(|_| FileError::Size(options.size_bytes))?;
        let shared = options.slots.as_ref();
        assert!(
            shared.is_none_or(|slots| slots.len() == count),
            "one slot for each page"
        );
        let keep = if options.keep {
            Keep::Name
        } else {
            Keep::Unlink
        };
        let fd = medium::open(path, (count * PAGE_SIZE) as u64, options.direct, keep)?;
        let slots = match options.slots {
            Some(slots) => slots,
            None => Slots::private(count).map_err(|_| FileError::NoTable(options.size_bytes))?,
        };
        Ok(Self::from_fd(fd, slots, &path.display().to_string()))
    }

    /// The file that another process opened: `fd` is a copy of that process's, `slots` has the same table.
    #[must_use]
    pub fn from_fd(fd: OwnedFd, slots: Slots, path: &str) -> Self {
        Self {
            fd: OurFd::new(fd),
            slots,
            ring: Mutex::new(Ring::new(RING_DEPTH)),
            name: format!("file:{path}"),
        }
    }

    /// Holds everything that the parent held, as `child`. A fork's child calls this once, before its parent
    /// goes on.
    pub fn adopt(&self, child: Owner) {
        self.slots.adopt(child);
    }

    /// Stores pages in consecutive slots; the first slot is given.
    fn store_run(&self, first: usize, run: &mut [Store<'_>]) {
        let place = |index: usize, page: &Page| Place {
            // By the invariant of `Slots`, a slot has 32 bits.
            slot: u32::try_from(first + index).unwrap_or(u32::MAX),
            checksum: checksum(page),
        };
        for (index, store) in run.iter_mut().enumerate() {
            store.outcome = Ok(place(index, store.page).encode());
        }
        let offset = HEADER_BYTES + (first * PAGE_SIZE) as u64;
        write_run(self.fd.as_fd(), offset, run);
        for (index, store) in run.iter().enumerate() {
            if store.outcome.is_err() {
                self.slots.free(first + index);
            }
        }
    }

    /// Fills the pages of a batch, right or wrong.
    fn read(&self, batch: &mut [Load<'_>]) {
        let runs = batch.chunk_by(follows).count();
        if runs > 1
            && batch.len() < runs * WORTHWHILE_RUN_PAGES
            && let Ok(mut ring) = self.ring.try_lock()
        {
            let offset = |load: &Load<'_>| Place::decode(load.data).offset();
            return read_scattered(&mut ring, self.fd.as_fd(), batch, offset);
        }
        for run in batch.chunk_by_mut(follows) {
            for run in run.chunks_mut(RUN_PAGES) {
                let first = Place::decode(run[0].data);
                read_run(self.fd.as_fd(), first.offset(), run);
            }
        }
    }

    /// Whether the page has the bytes that were stored under its word.
    fn is_whole(&self, load: &Load<'_>) -> bool {
        let place = Place::decode(load.data);
        self.slots.holds(place.slot as usize) && checksum(load.page) == place.checksum
    }
}

/// Whether the second page lies right behind the first.
fn follows(one: &Load<'_>, next: &Load<'_>) -> bool {
    let [one, next] = [one, next].map(|load| Place::decode(load.data).slot);
    one.checked_add(1) == Some(next)
}

impl PrivateOps for FileDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn latency(&self) -> Latency {
        Latency::Storage
    }

    fn migrate_to_device(&self, batch: &mut [Store<'_>]) {
        for store in &mut *batch {
            store.outcome = Err(DeviceError::Full);
        }
        let mut rest = batch;
        while let Some(slots) = self.slots.alloc(rest.len().min(RUN_PAGES)) {
            let (run, later) = rest.split_at_mut(slots.len());
            self.store_run(slots.start, run);
            rest = later;
        }
    }

    fn migrate_to_ram(&self, batch: &mut [Load<'_>]) {
        self.read(batch);
        for load in batch {
            if load.outcome.is_ok() && !self.is_whole(load) {
                load.outcome = Err(DeviceError::Corrupt);
            }
        }
    }

    fn page_free(&self, data: DeviceData) {
        let freed = self.slots.free(Place::decode(data).slot as usize);
        debug_assert!(freed, "{data:?} is no page of this device");
    }

    fn usage(&self) -> Usage {
        let pages = self.slots.held();
        let page = PAGE_SIZE as u64;
        Usage {
            pages,
            bytes: pages * page,
            capacity_bytes: self.slots.len() as u64 * page,
        }
    }
}

impl AsFd for FileDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for FileDevice {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_fd().as_raw_fd()
    }
}

#[cfg(test)]
mod tests;
