//! What the processes of one `pgmap run` share: the configuration, the counters, and who is alive.
//!
//! The supervisor makes it (a memory file), every preloaded process maps it. All of it is atomics and bytes that are
//! written before anybody else looks, so a process that dies at any moment leaves nothing half done that others
//! depend on: the supervisor subtracts what the dead one held.

use core::ptr::{self, NonNull};
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use pgmap_mm::stats::Stats;
use pgmap_sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap};

/// Processes that can be managed at once; more than these run in plain memory.
pub const PROCESSES: usize = 64;
/// Devices that one run can have.
pub const DEVICES: usize = 8;
/// Bytes of configuration text.
const CONFIG_BYTES: usize = 8192;
/// "pgmap" and the version of this layout.
const MAGIC: u64 = 0x7067_6d61_7000_0002;

/// What is known about one device of one process, or of all.
#[derive(Debug, Default)]
#[repr(C)]
pub struct DeviceUse {
    /// Pages held.
    pub pages: AtomicU64,
    /// Bytes that they take there.
    pub bytes: AtomicU64,
    /// Bytes of the shared capacity that are taken.
    pub taken: AtomicU64,
}

/// One managed process.
#[derive(Debug)]
#[repr(C)]
pub struct Process {
    pid: AtomicU32, // 0: free; claimed by compare-exchange
    /// Bytes of the budget that are its own to use.
    pub granted: AtomicU64,
    /// Whether it lacked frames when it looked last.
    pub hungry: AtomicBool,
    /// Bytes in RAM.
    pub resident: AtomicU64,
    /// What each device holds for it.
    pub devices: [DeviceUse; DEVICES],
}

/// The shared memory itself.
#[derive(Debug)]
#[repr(C)]
struct Layout {
    magic: AtomicU64,
    config_len: AtomicU64,
    config: [u8; CONFIG_BYTES],
    stats: Stats,
    managed: AtomicU64,
    /// Bytes of the budget that processes have.
    granted: AtomicU64,
    peak_resident: AtomicU64,
    /// The most that each device has held, and what is taken of its capacity now.
    devices: [DeviceUse; DEVICES],
    processes: [Process; PROCESSES],
}

/// A mapping of the shared memory.
///
/// # Invariants
///
/// `layout` is a mapping of a whole `Layout` that is never unmapped, and `tables` follows it.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    layout: NonNull<Layout>,
    bytes: usize,
}

// SAFETY: everything behind the pointer is atomics, or bytes that are not written after they were published.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

/// Why the shared memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// The machine refused.
    #[error("the run's shared memory could not be made or mapped: {0}")]
    Refused(#[from] std::io::Error),
    /// The file is something else, or another version made it.
    #[error("the run's shared memory is not what this version of pgmap expects")]
    Foreign,
    /// There is too much configuration.
    #[error("the devices' descriptions are longer than {CONFIG_BYTES} bytes together")]
    TooLong,
}

impl From<Errno> for RegionError {
    fn from(errno: Errno) -> Self {
        Self::Refused(errno.into())
    }
}

impl Region {
    /// Makes the shared memory, with room for `table_words` words of device tables. Answers its file, too.
    ///
    /// # Errors
    ///
    /// [`RegionError::TooLong`] or [`RegionError::Refused`].
    pub fn create(config: &str, table_words: usize) -> Result<(Self, OwnedFd), RegionError> {
        if config.len() > CONFIG_BYTES {
            return Err(RegionError::TooLong);
        }
        let fd = rustix::fs::memfd_create("pgmap-run", MemfdFlags::CLOEXEC)?;
        let bytes = size_of::<Layout>() + table_words * size_of::<u64>();
        rustix::fs::ftruncate(&fd, bytes as u64)?;
        let region = Self::map(&fd, bytes)?;
        let layout = region.layout.as_ptr();
        // SAFETY: by the type invariant the place is valid, and nobody else maps the memory yet.
        let place = unsafe { &raw mut (*layout).config };
        // SAFETY: the text is not longer than the place, and is elsewhere.
        unsafe { ptr::copy_nonoverlapping(config.as_ptr(), place.cast::<u8>(), config.len()) };
        let layout = region.layout();
        // Relaxed, then release: pairs with the acquire in `open`.
        layout
            .config_len
            .store(config.len() as u64, Ordering::Relaxed);
        layout.magic.store(MAGIC, Ordering::Release);
        Ok((region, fd))
    }

    /// Maps the shared memory that a supervisor has made.
    ///
    /// # Errors
    ///
    /// [`RegionError::Foreign`] or [`RegionError::Refused`].
    pub fn open(path: &Path) -> Result<Self, RegionError> {
        let file: File = OpenOptions::new().read(true).write(true).open(path)?;
        let bytes = usize::try_from(file.metadata()?.len()).map_err(|_| RegionError::Foreign)?;
        if bytes < size_of::<Layout>() {
            return Err(RegionError::Foreign);
        }
        let region = Self::map(&file, bytes)?;
        // Acquire: pairs with the release in `create`.
        let ours = region.layout().magic.load(Ordering::Acquire) == MAGIC;
        if ours {
            Ok(region)
        } else {
            Err(RegionError::Foreign)
        }
    }

    fn map(fd: impl AsFd, bytes: usize) -> Result<Self, RegionError> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
        let at = unsafe { mmap(ptr::null_mut(), bytes, protection, MapFlags::SHARED, fd, 0)? };
        let layout = NonNull::new(at.cast()).ok_or(RegionError::Foreign)?;
        // INVARIANT: just mapped, long enough as both callers have seen to, and never unmapped.
        Ok(Self { layout, bytes })
    }

    fn layout(&self) -> &'static Layout {
        // SAFETY: by the type invariant the mapping is valid and stays; all of `Layout` may be shared.
        unsafe { self.layout.as_ref() }
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &'static str {
        let layout = self.layout();
        // Relaxed: ordered by the acquire of `magic` in `open`.
        let len = usize::try_from(layout.config_len.load(Ordering::Relaxed)).unwrap_or(0);
        core::str::from_utf8(&layout.config[..len.min(CONFIG_BYTES)]).unwrap_or_default()
    }

    /// The counters of all processes together.
    #[must_use]
    pub fn stats(&self) -> &'static Stats {
        &self.layout().stats
    }

    /// What is taken of each device's capacity by all processes together.
    #[must_use]
    pub fn devices(&self) -> &'static [DeviceUse; DEVICES] {
        &self.layout().devices
    }

    /// `len` words of the tables that follow, from word `start` on; none if there are not so many.
    #[must_use]
    pub fn table(&self, start: usize, len: usize) -> &'static [AtomicU64] {
        let words = (self.bytes - size_of::<Layout>()) / size_of::<u64>();
        if start.checked_add(len).is_none_or(|end| end > words) {
            return &[];
        }
        // SAFETY: by the type invariant the tables follow the layout in the same mapping.
        let tables = unsafe { self.layout.as_ptr().add(1) };
        // SAFETY: `start` was just checked to be inside the tables.
        let first = unsafe { tables.cast::<AtomicU64>().add(start) };
        // SAFETY: just checked to be inside the mapping; atomics may be shared.
        unsafe { core::slice::from_raw_parts(first, len) }
    }

    /// The most bytes that were in RAM, as far as anybody looked.
    #[must_use]
    pub fn peak_resident(&self) -> u64 {
        Stats::get(&self.layout().peak_resident)
    }

    /// Bytes in RAM now, as the processes last said.
    #[must_use]
    pub fn resident(&self) -> u64 {
        self.layout()
            .processes
            .iter()
            .map(|process| Stats::get(&process.resident))
            .sum()
    }

    /// How many processes have been managed so far.
    #[must_use]
    pub fn managed(&self) -> u64 {
        Stats::get(&self.layout().managed)
    }

    /// Claims a place for a process. `None` if there are too many.
    #[must_use]
    pub fn claim(&self, pid: u32) -> Option<(usize, &'static Process)> {
        let places = self.layout().processes.iter().enumerate();
        let mut free = places.filter(|(_, process)| {
            // AcqRel: pairs with the release in `release`. Relaxed on failure: the place is somebody else's.
            let claim = (Ordering::AcqRel, Ordering::Relaxed);
            process
                .pid
                .compare_exchange(0, pid, claim.0, claim.1)
                .is_ok()
        });
        let place = free.next();
        if place.is_some() {
            Stats::add(&self.layout().managed, 1);
        }
        place
    }

    /// Gives back the places of the processes that `dead` names, and what they held.
    pub fn reap(&self, dead: impl Fn(u32) -> bool) -> Vec<usize> {
        let layout = self.layout();
        let mut reaped = Vec::new();
        for (number, process) in layout.processes.iter().enumerate() {
            // Relaxed: only the process itself or its reaper writes its pid while it is not 0.
            let pid = process.pid.load(Ordering::Relaxed);
            if pid == 0 || !dead(pid) {
                continue;
            }
            for (held, total) in process.devices.iter().zip(&layout.devices) {
                // Relaxed: counters; the dead do not change theirs any more.
                let taken = held.taken.swap(0, Ordering::Relaxed);
                total.taken.fetch_sub(taken, Ordering::Relaxed);
                held.pages.store(0, Ordering::Relaxed);
                held.bytes.store(0, Ordering::Relaxed);
            }
            let granted = process.granted.swap(0, Ordering::Relaxed);
            layout.granted.fetch_sub(granted, Ordering::Relaxed);
            process.hungry.store(false, Ordering::Relaxed);
            process.resident.store(0, Ordering::Relaxed);
            reaped.push(number);
            // Release: pairs with the claim; the next owner finds the place empty.
            process.pid.store(0, Ordering::Release);
        }
        reaped
    }

    /// Bytes of the budget that processes have.
    pub(crate) fn granted(&self) -> &'static AtomicU64 {
        &self.layout().granted
    }

    /// All processes, and free places for some.
    pub(crate) fn processes(&self) -> &'static [Process; PROCESSES] {
        &self.layout().processes
    }

    /// How many processes are alive, or have not been reaped.
    #[must_use]
    pub fn alive(&self) -> u64 {
        // Relaxed: a snapshot.
        let used = |process: &&Process| process.pid.load(Ordering::Relaxed) != 0;
        self.layout().processes.iter().filter(used).count() as u64
    }

    /// Sums up what all processes hold, and remembers the most. `peak` is the most bytes that one process knows of itself.
    pub fn note_peaks(&self, peak: u64) {
        let layout = self.layout();
        let sum = |get: &dyn Fn(&Process) -> u64| layout.processes.iter().map(get).sum::<u64>();
        // Relaxed, all: snapshots and maxima that stand alone.
        let resident = sum(&|process| Stats::get(&process.resident));
        layout
            .peak_resident
            .fetch_max(resident.max(peak), Ordering::Relaxed);
        for (device, total) in layout.devices.iter().enumerate() {
            let pages = sum(&|process| Stats::get(&process.devices[device].pages));
            let bytes = sum(&|process| Stats::get(&process.devices[device].bytes));
            total.pages.fetch_max(pages, Ordering::Relaxed);
            total.bytes.fetch_max(bytes, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    fn shared() -> (Region, Region, OwnedFd) {
        let (region, fd) = Region::create("ram 1\n", 16).unwrap();
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        (region, Region::open(Path::new(&path)).unwrap(), fd)
    }

    /// What the supervisor writes, a process reads, and the other way round.
    #[test]
    fn both_sides_see_the_same() {
        let (ours, theirs, _fd) = shared();
        assert_eq!(theirs.config(), "ram 1\n");
        Stats::add(&theirs.stats().forks, 3);
        assert_eq!(Stats::get(&ours.stats().forks), 3);
        theirs.table(3, 1)[0].store(9, Ordering::Relaxed);
        assert_eq!(ours.table(0, 16)[3].load(Ordering::Relaxed), 9);
        assert!(ours.table(8, 9).is_empty());
    }

    /// What a dead process held is free again, and so is its place.
    #[test]
    fn the_dead_hold_nothing() {
        let (region, _, _fd) = shared();
        let (first, process) = region.claim(100).unwrap();
        let (second, _) = region.claim(200).unwrap();
        assert_ne!(first, second);
        Stats::add(&process.devices[0].taken, 50);
        Stats::add(&region.devices()[0].taken, 70);
        assert_eq!(region.reap(|pid| pid == 100), [first]);
        assert_eq!(Stats::get(&region.devices()[0].taken), 20);
        assert_eq!(region.alive(), 1);
        assert_eq!(region.claim(300).unwrap().0, first);
    }

    /// A file of another program is refused.
    #[test]
    fn foreign_memory_is_refused() {
        let fd = rustix::fs::memfd_create("other", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 1 << 20).unwrap();
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        assert!(matches!(
            Region::open(Path::new(&path)),
            Err(RegionError::Foreign)
        ));
    }
}
