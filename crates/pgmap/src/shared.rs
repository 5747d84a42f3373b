//! What the processes of one `pgmap run` share: the budget, the devices, the counters, and who is alive.
//!
//! The supervisor makes it (a memory file), every preloaded process maps it. All of it is atomics, so a process that dies at
//! any moment leaves nothing half done that others depend on: the supervisor subtracts what the dead one held. The tables of
//! slots of files follow: the file is as long as they need, and the mapping as long as they can ever be.

use core::ptr::{self, NonNull};
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use pgmap_mm::stats::Stats;
use pgmap_sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use rustix::fs::{FallocateFlags, MemfdFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap};

pub use slot::{Answer, AnswerWord, DeviceSlot, Order, Wish};

mod slot;

/// Processes that can be managed at once; more than these run in plain memory.
pub const PROCESSES: usize = 64;
/// Devices that one run can have.
pub const DEVICES: usize = 8;
/// The shared memory's file, as the kernel names it in `/proc`.
pub(crate) const REGION_NAME: &str = "pgmap-run";
/// Words of all tables together: one for each page of 16 TiB.
pub(crate) const TABLE_WORDS: usize = 1 << 32;
/// "pgmap" and the version of this layout.
const MAGIC: u64 = 0x7067_6d61_7000_0004;

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

/// In a place's word: it is being given back. No process has such a number.
pub(crate) const BURYING: u32 = 1 << 31;

/// One managed process.
#[derive(Debug)]
#[repr(C)]
pub struct Process {
    /// 0: free. A number: that process's, which claimed it by compare-exchange. A number and [`BURYING`]: somebody gives back
    /// what that process held, who set the flag by compare-exchange.
    pid: AtomicU32,
    /// Bytes of the budget that are its own to use.
    pub granted: AtomicU64,
    /// Whether it lacked frames when it looked last.
    pub hungry: AtomicBool,
    /// Bytes in RAM.
    pub resident: AtomicU64,
    /// Whether its program has waited for memory for long.
    pub(crate) starved: AtomicBool,
    /// What each device holds for it.
    pub devices: [DeviceUse; DEVICES],
    /// What it says about each device.
    pub(crate) answers: [AnswerWord; DEVICES],
}

impl Process {
    /// The process's number; 0 for a free place.
    pub(crate) fn pid(&self) -> u32 {
        // SeqCst: pairs with `claim`, and with the wishes: see `DeviceSlot::order`.
        self.pid.load(Ordering::SeqCst) & !BURYING
    }
}

/// The shared memory itself.
#[derive(Debug)]
#[repr(C)]
struct Layout {
    magic: AtomicU64,
    /// Which process numbers the run is counted in.
    pid_namespace: AtomicU64,
    /// Bytes of RAM for all processes together.
    ram_bytes: AtomicU64,
    /// What the budget was, while it is being lowered and may be restored; otherwise 0.
    ram_before: AtomicU64,
    /// Mappings of files with at least so many bytes count in the budget; 0: none do.
    map_files: AtomicU64,
    stats: Stats,
    managed: AtomicU64,
    /// Bytes of the budget that processes have.
    granted: AtomicU64,
    peak_resident: AtomicU64,
    devices: [DeviceSlot; DEVICES],
    processes: [Process; PROCESSES],
}

/// A mapping of the shared memory.
///
/// # Invariants
///
/// `layout` is a mapping of `MAPPED_BYTES` bytes that is never unmapped. The file behind it has a whole `Layout`, and the
/// tables that it was grown for.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    layout: NonNull<Layout>,
}

/// The layout, and room for all tables that there can ever be.
const MAPPED_BYTES: usize = size_of::<Layout>() + TABLE_WORDS * size_of::<u64>();

// SAFETY: everything behind the pointer is atomics.
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
}

impl From<Errno> for RegionError {
    fn from(errno: Errno) -> Self {
        Self::Refused(errno.into())
    }
}

impl Region {
    /// Makes the shared memory of a run with a budget and no devices. Answers its file, too.
    ///
    /// # Errors
    ///
    /// [`RegionError::Refused`].
    pub fn create(ram_bytes: u64, pid_namespace: u64) -> Result<(Self, OwnedFd), RegionError> {
        let fd = rustix::fs::memfd_create(REGION_NAME, MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&fd, size_of::<Layout>() as u64)?;
        let region = Self::map(&fd)?;
        let layout = region.layout();
        // Relaxed, both, then release: pairs with the acquire in `open`.
        layout.pid_namespace.store(pid_namespace, Ordering::Relaxed);
        layout.ram_bytes.store(ram_bytes, Ordering::Relaxed);
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
        if file.metadata()?.len() < size_of::<Layout>() as u64 {
            return Err(RegionError::Foreign);
        }
        let region = Self::map(&file)?;
        // Acquire: pairs with the release in `create`.
        let ours = region.layout().magic.load(Ordering::Acquire) == MAGIC;
        if ours {
            Ok(region)
        } else {
            Err(RegionError::Foreign)
        }
    }

    fn map(fd: impl AsFd) -> Result<Self, RegionError> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
        let at = unsafe { mmap(ptr::null_mut(), MAPPED_BYTES, protection, flags, fd, 0)? };
        // SAFETY: the range was just mapped; what a core dump leaves out changes nothing else. A kernel that refuses makes
        // larger dumps.
        let _ = unsafe { madvise(at, MAPPED_BYTES, Advice::LinuxDontDump) };
        let layout = NonNull::new(at.cast()).ok_or(RegionError::Foreign)?;
        // INVARIANT: just mapped, never unmapped, and the file has a whole layout as both callers have seen to.
        Ok(Self { layout })
    }

    fn layout(self) -> &'static Layout {
        // SAFETY: by the type invariant the mapping is valid and stays; all of `Layout` may be shared.
        unsafe { self.layout.as_ref() }
    }

    /// Which process numbers the run is counted in.
    #[must_use]
    pub fn pid_namespace(&self) -> u64 {
        Stats::get(&self.layout().pid_namespace)
    }

    /// Bytes of RAM for all processes together, now.
    #[must_use]
    pub fn ram_bytes(&self) -> &'static AtomicU64 {
        &self.layout().ram_bytes
    }

    /// What the budget was, while it is being lowered and may be restored; otherwise 0.
    pub(crate) fn ram_before(self) -> &'static AtomicU64 {
        &self.layout().ram_before
    }

    /// Mappings of files with at least so many bytes count in the budget; 0: none do.
    pub(crate) fn map_files(self) -> &'static AtomicU64 {
        &self.layout().map_files
    }

    /// Whether something is being taken away that may be given back.
    pub(crate) fn is_shrinking(self) -> bool {
        let leaving = |slot: &DeviceSlot| slot.order().wish == Wish::Leaving;
        Stats::get(self.ram_before()) != 0 || self.devices().iter().any(leaving)
    }

    /// The counters of all processes together.
    #[must_use]
    pub fn stats(&self) -> &'static Stats {
        &self.layout().stats
    }

    /// The places for devices.
    #[must_use]
    pub fn devices(&self) -> &'static [DeviceSlot; DEVICES] {
        &self.layout().devices
    }

    /// Makes the file long enough for a table that ends at word `end`. `file` is the region's.
    ///
    /// # Errors
    ///
    /// [`RegionError::Refused`].
    pub(crate) fn grow(file: impl AsFd, end: usize) -> Result<(), RegionError> {
        let bytes = (size_of::<Layout>() + end * size_of::<u64>()) as u64;
        let now = rustix::fs::fstat(&file)?.st_size;
        if u64::try_from(now).unwrap_or(0) < bytes {
            rustix::fs::ftruncate(&file, bytes)?;
        }
        Ok(())
    }

    /// Gives a table's memory back, after its last user: it is zeros again.
    pub(crate) fn clear_table(self, file: impl AsFd, start: usize, len: usize) {
        let offset = size_of::<Layout>() + start * size_of::<u64>();
        let bytes = (len * size_of::<u64>()) as u64;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if rustix::fs::fallocate(file, flags, offset as u64, bytes).is_err() {
            // Relaxed: nobody uses it.
            let words = self.table(start, len).iter();
            words.for_each(|word| word.store(0, Ordering::Relaxed));
        }
    }

    /// `len` words of the tables that follow, from word `start` on; none if there cannot be so many. The supervisor has made
    /// the file long enough before it named the table to anybody.
    #[must_use]
    pub fn table(&self, start: usize, len: usize) -> &'static [AtomicU64] {
        if start.checked_add(len).is_none_or(|end| end > TABLE_WORDS) {
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
            // SeqCst: pairs with the release in `reap`, and with `pid`. Relaxed on failure: the place is somebody else's.
            let claim = (Ordering::SeqCst, Ordering::Relaxed);
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

    /// Gives back the places of the processes that `dead` names, and what they held. Of each place `release` is told before
    /// somebody else can have it. A number with `1 << 31` added is to be named only if whoever was at it has died: it was that
    /// process itself, after an exec, or a caller like this one.
    pub fn reap(&self, dead: impl Fn(u32) -> bool, release: impl Fn(usize)) {
        let layout = self.layout();
        for (number, process) in layout.processes.iter().enumerate() {
            // Relaxed, both: what the dead held is read as it is found, and changes no more.
            let word = process.pid.load(Ordering::Relaxed);
            let flagged = word | BURYING;
            if word == 0 || !dead(word) {
                continue;
            }
            let relaxed = Ordering::Relaxed;
            if word != flagged
                && process
                    .pid
                    .compare_exchange(word, flagged, relaxed, relaxed)
                    .is_err()
            {
                continue;
            }
            for (held, total) in process.devices.iter().zip(&layout.devices) {
                // Relaxed: counters; the dead do not change theirs any more.
                let taken = held.taken.swap(0, Ordering::Relaxed);
                total.usage.taken.fetch_sub(taken, Ordering::Relaxed);
                held.pages.store(0, Ordering::Relaxed);
                held.bytes.store(0, Ordering::Relaxed);
            }
            let granted = process.granted.swap(0, Ordering::Relaxed);
            layout.granted.fetch_sub(granted, Ordering::Relaxed);
            process.hungry.store(false, Ordering::Relaxed);
            process.starved.store(false, Ordering::Relaxed);
            process.answers.iter().for_each(AnswerWord::clear);
            process.resident.store(0, Ordering::Relaxed);
            release(number);
            // Release: pairs with the claim; the next owner finds the place empty.
            process.pid.store(0, Ordering::Release);
        }
    }

    /// Bytes of the budget that processes have.
    pub(crate) fn granted(self) -> &'static AtomicU64 {
        &self.layout().granted
    }

    /// All processes, and free places for some.
    pub(crate) fn processes(self) -> &'static [Process; PROCESSES] {
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
            total.usage.pages.fetch_max(pages, Ordering::Relaxed);
            total.usage.bytes.fetch_max(bytes, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    fn shared() -> (Region, Region, OwnedFd) {
        let (region, fd) = Region::create(1 << 30, 7).unwrap();
        Region::grow(&fd, 16).unwrap();
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        (region, Region::open(Path::new(&path)).unwrap(), fd)
    }

    /// What the supervisor writes, a process reads, and the other way round.
    #[test]
    fn both_sides_see_the_same() {
        let (ours, theirs, _fd) = shared();
        assert_eq!(theirs.pid_namespace(), 7);
        Stats::add(&theirs.stats().forks, 3);
        assert_eq!(Stats::get(&ours.stats().forks), 3);
        theirs.table(3, 1)[0].store(9, Ordering::Relaxed);
        assert_eq!(ours.table(0, 16)[3].load(Ordering::Relaxed), 9);
        assert!(ours.table(8, TABLE_WORDS).is_empty());
    }

    /// What a dead process held is free again, and so is its place.
    #[test]
    fn the_dead_hold_nothing() {
        let (region, _, _fd) = shared();
        let (first, process) = region.claim(100).unwrap();
        let (second, _) = region.claim(200).unwrap();
        assert_ne!(first, second);
        Stats::add(&process.devices[0].taken, 50);
        Stats::add(&region.devices()[0].usage.taken, 70);
        region.reap(|pid| pid == 100, |number| assert_eq!(number, first));
        assert_eq!(Stats::get(&region.devices()[0].usage.taken), 20);
        assert_eq!(region.alive(), 1);
        assert_eq!(region.claim(300).unwrap().0, first);
    }

    /// What one is burying, nobody else buries; unless that one has died, too.
    #[test]
    fn the_dead_are_buried_once() {
        let (region, other, _fd) = shared();
        region.claim(100).unwrap();
        let before = |_: usize| {
            other.reap(|word| word == 100, |_| panic!("buried twice"));
            assert_eq!(other.alive(), 1);
        };
        region.reap(|word| word == 100, before);
        assert_eq!(region.alive(), 0);
        let (_, process) = region.claim(100).unwrap();
        process.pid.fetch_or(BURYING, Ordering::Relaxed);
        region.reap(|word| word & !BURYING == 100, |_| {});
        assert_eq!(region.alive(), 0);
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
