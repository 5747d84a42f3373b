//! A whole modelled machine: the real `core` and `mm` over the model's memory and devices.
//!
//! Tests build one, run [`Cpu`]s on it, and end with [`Machine::assert_empty`], which finds whatever leaked.

use core::fmt;
use std::sync::Arc;

use pgmap_core::addr::{PAGE_SIZE, VirtAddr};
use pgmap_core::memremap::{DevPagemap, MapError, MemoryMap, SUBSECTION_FRAMES};
use pgmap_core::platform::{HeapPlatform, OutOfAddressSpace};
use pgmap_mm::fault::{Access, Outcome};
use pgmap_mm::reclaim::Caller;
use pgmap_mm::space::{AddressSpace, Parts, Worker};
use pgmap_mm::unplug::NoRoom;

use pgmap_sync::atomic::spin_loop;

use crate::device::ModelDevice;
use crate::model::{Fault, ModelMmu};

/// Where managed memory begins.
const BASE: VirtAddr = VirtAddr::new(1 << 30);
/// Spare frames: a fork may want all pages in RAM, while one's frame is on its way to the free list.
const SPARE: u64 = 1;
/// Faults that one access may take before we say that it never ends, and times that it asks for memory.
pub(crate) const PATIENCE: u32 = 1000;

/// What a machine is made of.
#[derive(Debug)]
pub struct Setup {
    /// Pages of managed address space.
    pub pages: u32,
    /// Frames of RAM.
    pub frames: u64,
    /// Staging slots of `mmu`.
    pub slots: u32,
    /// The page tables.
    pub mmu: Arc<ModelMmu>,
    /// The devices, in the order in which they are tried.
    pub devices: Vec<Arc<ModelDevice>>,
}

/// Why a machine could not be built.
#[derive(Debug)]
pub enum SetupError {
    /// The frames do not fit.
    Map(MapError),
    /// The tables do not fit.
    Tables(OutOfAddressSpace),
}

impl From<MapError> for SetupError {
    fn from(error: MapError) -> Self {
        Self::Map(error)
    }
}

impl From<OutOfAddressSpace> for SetupError {
    fn from(error: OutOfAddressSpace) -> Self {
        Self::Tables(error)
    }
}

/// How an access ends that does not succeed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Signal {
    /// The bytes are lost (FLT-1).
    Bus,
    /// Nobody has mapped the address.
    Segv,
    /// RAM and devices are full.
    OutOfMemory,
}

/// A machine with one address space.
pub struct Machine {
    /// The address space.
    pub space: Arc<AddressSpace>,
    /// Its page tables.
    pub mmu: Arc<ModelMmu>,
    /// Its devices.
    pub devices: Vec<Arc<ModelDevice>>,
    /// Pages of managed address space.
    pub pages: u32,
}

impl Machine {
    /// Puts a machine together.
    ///
    /// # Errors
    ///
    /// [`SetupError`] if it is too large.
    pub fn new(setup: Setup) -> Result<Arc<Self>, SetupError> {
        let ram_end = (setup.frames + SPARE).next_multiple_of(SUBSECTION_FRAMES);
        let max_frames = ram_end + setup.devices.len() as u64 * SUBSECTION_FRAMES;
        let map = MemoryMap::new(&HeapPlatform, max_frames)?;
        let ram = map.add_ram_with_spare(setup.frames, SPARE)?;
        let pgmaps = setup
            .devices
            .iter()
            .map(|device| map.memremap_private(Arc::clone(device) as _, SUBSECTION_FRAMES));
        let space = AddressSpace::new(Parts {
            platform: &HeapPlatform,
            devices: pgmaps.collect::<Result<Vec<DevPagemap>, MapError>>()?,
            map,
            ram,
            mmu: Arc::clone(&setup.mmu) as _,
            base: BASE,
            pages: setup.pages,
            slots: setup.slots,
            stats: Box::leak(Box::default()),
        })?;
        Ok(Arc::new(Self {
            space: Arc::new(space),
            mmu: setup.mmu,
            devices: setup.devices,
            pages: setup.pages,
        }))
    }

    /// A processor for one thread of the program.
    #[must_use]
    pub fn cpu(self: &Arc<Self>) -> Cpu {
        Cpu {
            machine: Arc::clone(self),
            worker: Worker::new(),
            patience: PATIENCE,
        }
    }

    /// The address of a word: its page, counted from the base, and its place in the page.
    #[must_use]
    pub fn word(&self, page: u32, nth: usize) -> VirtAddr {
        let offset = page as usize * PAGE_SIZE + nth * size_of::<u64>();
        BASE.checked_add(offset).unwrap_or(BASE)
    }

    /// Takes a device away while the machine runs.
    ///
    /// # Errors
    ///
    /// [`NoRoom`] if its pages have no other place: then it works on.
    ///
    /// # Panics
    ///
    /// If somebody still uses it after a drain without a deadline.
    pub fn unplug(&self, worker: &mut Worker, nth: usize) -> Result<(), NoRoom> {
        let killed = self.space.devices().all()[nth].clone().kill();
        if let Err(no_room) = self.space.evacuate(worker, killed.device()) {
            // The address space has a handle to the same mapping.
            drop(killed.resurrect());
            return Err(no_room);
        }
        match killed.drain(None) {
            Ok(drained) => {
                self.space.devices().forget(drained.device());
                drained.remove();
            }
            Err(held) => panic!("a drain without a deadline ended with {} users", held.users),
        }
        Ok(())
    }

    /// Adds one of the machine's devices again, after it was taken away: it may get the frame numbers that it had.
    ///
    /// # Errors
    ///
    /// [`MapError::NoRoom`] if it is there already.
    pub fn plug(&self, nth: usize) -> Result<(), MapError> {
        let ops = Arc::clone(&self.devices[nth]);
        let map = self.space.map_of_frames();
        let device = map.memremap_private(ops, SUBSECTION_FRAMES)?;
        self.space.devices().add(device);
        Ok(())
    }

    /// Drops every page; nothing may be left anywhere then.
    ///
    /// # Panics
    ///
    /// If something is: it has leaked.
    pub fn assert_empty(&self) {
        let space = &self.space;
        for device in &self.devices {
            device.fail_nothing();
        }
        // Slots that were given up by their page, but not emptied yet.
        while space.store(usize::MAX) > 0 {}
        let dropped = space.discard(BASE, u32::MAX);
        assert_eq!(dropped, Ok(()), "a pin has leaked");
        while space.store(usize::MAX) > 0 {}
        assert_eq!(space.ram().in_use(), 0, "frames have leaked");
        assert_eq!(self.mmu.pages_in_use(), 0, "pages of memory have leaked");
        for device in &self.devices {
            assert_eq!(device.pages(), 0, "pages of a device have leaked");
        }
        for device in space.devices().all() {
            assert_eq!(device.users_now(), 0, "users of a device have leaked");
        }
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("mmu", &self.mmu)
            .finish_non_exhaustive()
    }
}

/// A processor: it runs a program's accesses, and serves their faults as the pager's threads would.
#[derive(Debug)]
pub struct Cpu {
    machine: Arc<Machine>,
    /// What its faults are served with.
    pub worker: Worker,
    /// How often an access asks for memory that others may free, at most.
    pub patience: u32,
}

impl Cpu {
    /// Reads a word.
    ///
    /// # Errors
    ///
    /// The signal that the program would get.
    ///
    /// # Panics
    ///
    /// If the access faults for ever.
    pub fn load(&mut self, at: VirtAddr) -> Result<u64, Signal> {
        for _ in 0..PATIENCE {
            match self.machine.mmu.load(at) {
                Ok(word) => return Ok(word),
                Err(fault) => self.serve(at, fault, Access::Read)?,
            }
        }
        panic!("a load at {at:?} never ends");
    }

    /// Writes a word.
    ///
    /// # Errors
    ///
    /// The signal that the program would get.
    ///
    /// # Panics
    ///
    /// If the access faults for ever.
    pub fn store(&mut self, at: VirtAddr, word: u64) -> Result<(), Signal> {
        for _ in 0..PATIENCE {
            match self.machine.mmu.store(at, word) {
                Ok(()) => return Ok(()),
                Err(fault) => self.serve(at, fault, Access::Write)?,
            }
        }
        panic!("a store at {at:?} never ends");
    }

    /// Frees frames, as the reclaimer does.
    #[allow(clippy::must_use_candidate, reason = "most callers only want it done")]
    pub fn reclaim(&self, want: usize) -> usize {
        self.machine.space.reclaim(Caller::Reclaimer, want)
    }

    fn serve(&mut self, at: VirtAddr, fault: Fault, access: Access) -> Result<(), Signal> {
        let access = match fault {
            Fault::Missing => access,
            Fault::WriteProtected => Access::WriteProtected,
            Fault::Poisoned => return Err(Signal::Bus),
        };
        for nth in 0..self.patience {
            match self
                .machine
                .space
                .fault(&mut self.worker, at.page_start(), access)
            {
                Outcome::Resolved => return Ok(()),
                Outcome::BadAddress => return Err(Signal::Segv),
                Outcome::NoMemory => let_others_run(nth),
            }
        }
        Err(Signal::OutOfMemory)
    }
}

/// Somebody else is about to free memory: at the first attempts at once, later perhaps after a while.
pub(crate) fn let_others_run(attempt: u32) {
    if attempt < 16 || cfg!(any(loom, shuttle)) {
        spin_loop();
    } else {
        std::thread::sleep(core::time::Duration::from_micros(50));
    }
}
