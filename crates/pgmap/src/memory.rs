//! A RAM budget, devices, and the pager that moves pages between them.

use core::mem::{self, ManuallyDrop};
use core::ops::Range;
use core::slice;
use core::time::Duration;
use std::sync::Arc;
use std::thread::JoinHandle;

use pgmap_core::addr::{MAX_PFN, PAGE_SIZE, VirtAddr};
use pgmap_core::holders::Holder;
use pgmap_core::memremap::{MapError as DeviceMapError, MemoryMap};
use pgmap_core::platform::OutOfAddressSpace;
use pgmap_host::mmu::{Children, HostError, HostMmu};
use pgmap_host::platform::HostPlatform;
use pgmap_mm::gup::{Pin, PinError, PinnedPages};
use pgmap_mm::space::Parts;
use pgmap_mm::stats::Stats;
use pgmap_sync::Mutex;

use crate::device::Device;
use crate::flusher;
use crate::old_pins::OldPins;
use crate::pager::{Allocator, Pager, Surroundings, kill_as_out_of_memory};
use crate::reader;
use crate::space::{AddressSpace, MapError};

/// The least budget, in bytes: 1 MiB. Below it the pager's own batches would not fit.
pub(crate) const MIN_RAM_BYTES: u64 = 1 << 20;
/// Staging slots that are for pages on their way to a device, whatever the budget.
const SPARE_SLOTS: u64 = 256;
/// Frames whose pages were just stored, and that are not free yet, while a fork wants all pages in RAM: a few batches.
const IN_TRANSIT: u64 = 256;
/// Managed addresses, in bytes: 1 TiB, as virtual machines reserve hundreds of GiB.
const ADDRESSES: usize = 1 << 40;

pub(crate) static PLATFORM: HostPlatform = HostPlatform;

/// Why a [`Memory`] could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The budget is too small to work with.
    #[error("a RAM budget of {bytes} bytes is too small: give at least 1 MiB")]
    TooLittleRam {
        /// What was asked for.
        bytes: u64,
    },
    /// The machine lacks what the pager needs; `pgmap doctor` says more.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The machine has no room for the tables.
    #[error(transparent)]
    Tables(#[from] OutOfAddressSpace),
    /// A device could not be mapped.
    #[error(transparent)]
    Device(#[from] DeviceMapError),
    /// The pager's threads could not be started.
    #[error("the pager's threads could not be started: {0}")]
    Threads(#[from] std::io::Error),
}

/// What a [`Memory`] is to be made of.
#[derive(Debug)]
pub struct MemoryBuilder {
    ram_bytes: u64,
    most_ram_bytes: u64,
    devices: Vec<Device>,
    stats: Option<&'static Stats>,
    old_pins: Option<OldPins>,
    pub(crate) surroundings: Surroundings,
}

impl MemoryBuilder {
    /// The most bytes that may be in RAM.
    #[must_use]
    pub const fn ram(mut self, bytes: u64) -> Self {
        self.ram_bytes = bytes;
        self
    }

    /// What the budget may be raised to while the memory is in use; without it, nothing more than it is. Addresses are all
    /// that it costs.
    #[must_use]
    pub(crate) const fn ram_at_most(mut self, bytes: u64) -> Self {
        self.most_ram_bytes = bytes;
        self
    }

    /// Adds a device; devices are tried in the order in which they are added.
    #[must_use]
    pub fn device(mut self, device: Device) -> Self {
        self.devices.push(device);
        self
    }

    /// Counts events there instead of in memory of its own.
    #[must_use]
    pub const fn stats(mut self, stats: &'static Stats) -> Self {
        self.stats = Some(stats);
        self
    }

    /// Has `report` called with each pin that gets older than `limit`, once, from a thread of its own, some hundredths of a second
    /// later: a page that is pinned for ever can neither leave RAM nor be truncated, and its writer has to be looked for (REF-7).
    ///
    /// The thread is the one that writes dirty pages of files back, which waits while `report` runs. `report` may pin and unpin, and
    /// ask for [`holders`](Memory::holders).
    #[must_use]
    pub fn report_pins_older_than(
        mut self,
        limit: Duration,
        report: impl Fn(&Holder) + Send + 'static,
    ) -> Self {
        self.old_pins = Some(OldPins::new(limit, report));
        self
    }

    /// Builds the memory and starts its pager.
    ///
    /// # Errors
    ///
    /// See [`BuildError`].
    pub fn build(self) -> Result<Memory, BuildError> {
        if self.ram_bytes < MIN_RAM_BYTES {
            return Err(BuildError::TooLittleRam {
                bytes: self.ram_bytes,
            });
        }
        let ram_frames = self.ram_bytes / PAGE_SIZE as u64;
        let device_frames: u64 = self.devices.iter().map(|device| device.frames).sum();
        let slots = u32::try_from(ram_frames / 8 + SPARE_SLOTS).unwrap_or(u32::MAX / 2);
        let mmu = Arc::new(HostMmu::new(ADDRESSES, slots)?);
        let map = MemoryMap::new(&PLATFORM, MAX_PFN)?;
        let most_ram_frames = ram_frames.max(self.most_ram_bytes / PAGE_SIZE as u64);
        let spare_frames = match mmu.children() {
            Children::Served => 0,
            // For a moment all pages may have to be in RAM.
            Children::Announced => (ram_frames + device_frames)
                .min(machine_frames())
                .saturating_sub(most_ram_frames)
                .saturating_add(IN_TRANSIT),
        };
        let ram = map.add_ram_with_spare(most_ram_frames, spare_frames)?;
        // Without a limit, what comes on line later may be used as well.
        if ram.capacity() > ram_frames {
            ram.set_limit(ram_frames);
        }
        let mut devices = Vec::with_capacity(self.devices.len());
        for device in self.devices {
            devices.push(map.memremap_private(device.ops, device.frames)?);
        }
        let addresses = mmu.range();
        let inner = Arc::new(pgmap_mm::space::AddressSpace::new(Parts {
            platform: &PLATFORM,
            map,
            ram,
            devices,
            mmu: mmu.clone(),
            base: VirtAddr::new(addresses.start),
            pages: u32::try_from(addresses.len() / PAGE_SIZE).unwrap_or(u32::MAX),
            slots,
            // One per memory, for the life of the process: its pager may outlive every other owner.
            stats: self.stats.unwrap_or_else(|| Box::leak(Box::default())),
        })?);
        let most = (ram_frames + device_frames).saturating_mul(PAGE_SIZE as u64);
        let pager = Pager::new(Arc::clone(&inner), Arc::clone(&mmu));
        let started = pager.start(self.surroundings);
        let threads = started.inspect_err(|_| pager.stop())?;
        let space = Arc::new(AddressSpace::new(inner, mmu, most));
        space.begin_forks();
        let memory = Memory {
            space,
            pager,
            threads: ManuallyDrop::new(threads),
            file_threads: ManuallyDrop::default(),
        };
        if let Some(old_pins) = self.old_pins {
            memory.start_flusher(Some(old_pins))?;
        }
        Ok(memory)
    }
}

/// Frames of RAM that the whole machine has.
pub(crate) fn machine_frames() -> u64 {
    let info = rustix::system::sysinfo();
    #[allow(
        clippy::useless_conversion,
        reason = "its width differs between machines"
    )]
    let bytes = u64::from(info.totalram) * u64::from(info.mem_unit);
    bytes / PAGE_SIZE as u64
}

/// Memory of which only a part is in RAM.
///
/// Dropping it stops its pager; its mappings and files borrow it, so none is left then. A program that uses it to its end, from any
/// thread, keeps it in a `static` [`OnceLock`](std::sync::OnceLock), or leaks it (`Box::leak`): then its files are `File<'static>`.
/// [`PinnedPages`] may outlive it: their pages stay where they are, and are written back when they are unpinned.
///
/// A fork's child has what was mapped of anonymous memory, as it was, and in RAM; it has no pager, and no mappings of files. A process that
/// may not be told of its forks (that takes `CAP_SYS_PTRACE`) has children without any of it.
///
/// An access that has to wait for a page (a read of a file, or of a device) waits in the fault, however long that takes. If there is
/// no room for it, and none can be made within some seconds, the process is killed with a message that says why, as by a full machine.
#[derive(Debug)]
pub struct Memory {
    space: Arc<AddressSpace>,
    pager: Arc<Pager>,
    /// Handles are not to be dropped in a fork's child, which has no such threads.
    threads: ManuallyDrop<Vec<JoinHandle<()>>>,
    /// Those that write files back, and read them ahead.
    file_threads: ManuallyDrop<Mutex<Vec<JoinHandle<()>>>>,
}

impl Memory {
    /// Starts to describe a memory: no RAM and no devices yet.
    #[must_use]
    pub fn builder() -> MemoryBuilder {
        let surroundings = Surroundings {
            allocator: Allocator::Shared,
            out_of_memory: kill_as_out_of_memory,
            short_of_frames: || {},
            hold_out: || false,
            tick: || {},
            follow: || Duration::MAX,
        };
        MemoryBuilder {
            ram_bytes: 0,
            most_ram_bytes: 0,
            devices: Vec::new(),
            stats: None,
            old_pins: None,
            surroundings,
        }
    }

    /// The addresses that this memory manages.
    #[must_use]
    pub const fn space(&self) -> &Arc<AddressSpace> {
        &self.space
    }

    /// All frames: of the RAM, of the devices, and of whatever else is given frames there, such as a namespace that is bound
    /// ([`pmem::Region::bind`](pgmap_drivers::pmem::Region::bind)).
    #[must_use]
    pub fn map_of_frames(&self) -> &Arc<MemoryMap> {
        self.space.inner().map_of_frames()
    }

    pub(crate) const fn pager(&self) -> &Arc<Pager> {
        &self.pager
    }

    /// Starts to write dirty pages of files back, and to look for old pins if that is wanted, unless that has begun.
    fn start_flusher(&self, old_pins: Option<OldPins>) -> std::io::Result<()> {
        let mut threads = self.file_threads.lock();
        if threads.is_empty() {
            threads.push(flusher::start(&self.pager, &self.space, old_pins)?);
        }
        Ok(())
    }

    /// Starts to write dirty pages of files back, and to read ahead, unless that has begun.
    pub(crate) fn start_file_threads(&self) -> std::io::Result<()> {
        self.start_flusher(None)?;
        let mut threads = self.file_threads.lock();
        // If one of these could not be started before, it is tried again.
        while threads.len() <= reader::READERS {
            threads.push(reader::start(&self.pager)?);
        }
        Ok(())
    }

    /// What happened so far.
    #[must_use]
    pub fn stats(&self) -> &'static Stats {
        self.space.inner().stats()
    }

    /// The clock of [`Holder::since_ns`], in nanoseconds, to a few milliseconds: the difference is how long a pin has lasted.
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        self.map_of_frames().now_ns()
    }

    /// Who has pages pinned, of files or of anonymous memory, oldest first: what they say they are, since when, and where in the
    /// source they did it (REF-7).
    #[must_use]
    pub fn holders(&self) -> Vec<Holder> {
        self.space.holders()
    }

    /// Who has pinned any of these addresses, oldest first (REF-7).
    #[must_use]
    pub fn holders_of(&self, range: &Range<usize>) -> Vec<Holder> {
        self.space.holders_of(range)
    }

    /// Maps `bytes` bytes, rounded up to pages, that read as zeros.
    ///
    /// # Errors
    ///
    /// [`MapError::OutOfMemory`] for more than RAM and devices could ever hold; [`MapError::Empty`] and [`MapError::Inherited`].
    pub fn map(&self, bytes: usize) -> Result<Mapping<'_>, MapError> {
        if bytes == 0 {
            return Err(MapError::Empty);
        }
        if self.space.is_inherited() {
            return Err(MapError::Inherited);
        }
        let at = self.space.map(bytes, PAGE_SIZE)?;
        // INVARIANT: fresh addresses, which nobody else has.
        Ok(Mapping {
            memory: self,
            range: at..at + bytes.next_multiple_of(PAGE_SIZE),
        })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.space.is_inherited() {
            // A fork's child has no pager.
            return;
        }
        self.space.end_forks();
        self.pager.stop();
        let file_threads = mem::take(&mut *self.file_threads.lock());
        for thread in mem::take(&mut *self.threads)
            .into_iter()
            .chain(file_threads)
        {
            thread.thread().unpark();
            // A pager thread that panicked has ended the process already.
            let _ = thread.join();
        }
        self.space.leave_lingering();
    }
}

/// A piece of managed memory; its addresses are given back when it is dropped.
///
/// # Invariants
///
/// The range is mapped in the memory's address space, and nobody else has it.
#[derive(Debug)]
pub struct Mapping<'a> {
    memory: &'a Memory,
    range: Range<usize>,
}

impl Mapping<'_> {
    /// The mapped addresses.
    #[must_use]
    pub const fn range(&self) -> &Range<usize> {
        &self.range
    }

    /// Pins all of it.
    #[track_caller]
    pub(crate) fn pin(&self, pin: &Pin) -> Result<PinnedPages, PinError> {
        self.memory.space.pin_user_pages(self.range.clone(), pin)
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: by the type invariant the range is mapped, and `&self` keeps writers away; pages that are
        // not in RAM come back when they are touched.
        unsafe { slice::from_raw_parts(self.range.start as *const u8, self.range.len()) }
    }

    /// The bytes, to be changed.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: by the type invariant the range is mapped and ours, and `&mut self` keeps everybody else away.
        unsafe { slice::from_raw_parts_mut(self.range.start as *mut u8, self.range.len()) }
    }
}

impl Drop for Mapping<'_> {
    fn drop(&mut self) {
        if self.memory.space.is_inherited() {
            return self.memory.space.drop_inherited(&self.range);
        }
        // It fails only while somebody has a page pinned; then the addresses stay taken, which is what the pin's
        // holder needs.
        // SAFETY: by the type invariant the range is ours, and nobody borrows it any more.
        let _ = unsafe { self.memory.space.unmap(self.range.start, self.range.len()) };
    }
}
