//! A modelled machine with one file of which a program maps parts: the real page cache over the model's memory and disk.
//!
//! Tests build one, run [`FileCpu`]s on it, and end with [`FileMachine::assert_empty`], which finds whatever leaked.

use core::ops::{ControlFlow, Range};
use std::sync::Arc;

use pgmap_core::addr::{PAGE_SIZE, VirtAddr};
use pgmap_core::memcg::Memcg;
use pgmap_core::platform::HeapPlatform;
use pgmap_mm::backing::{Backing as _, BackingError};
use pgmap_mm::discard::Pinned;
use pgmap_mm::errseq::Seen;
use pgmap_mm::fault::{Access, Outcome};
use pgmap_mm::gup::{Pin, PinError, PinnedPages, pin_user_pages};
use pgmap_mm::page_cache::{CacheParts, FileVma, OnPinned, PageCache, VmaAccess};
use pgmap_mm::space::Worker;

use crate::disk::ModelFile;
use crate::machine::{Machine, PATIENCE, Setup, SetupError, Signal, let_others_run};
use crate::model::{self, Fault, ModelMmu};
use crate::shared_memory::ModelSharedMmu;

/// Where files are mapped: each mapping begins at a multiple of this.
const MAPPINGS: usize = 1 << 40;

/// What a machine with a file is made of.
#[derive(Debug)]
pub struct FileSetup {
    /// Frames of RAM.
    pub frames: u64,
    /// Pages that the file may ever have.
    pub most_pages: u32,
    /// What its pages are charged to.
    pub memcg: Option<Arc<Memcg>>,
    /// The memory of its pages.
    pub memory: Arc<ModelSharedMmu>,
    /// The file.
    pub disk: Arc<ModelFile>,
}

/// A machine with one file.
#[derive(Debug)]
pub struct FileMachine {
    /// The machine.
    pub machine: Arc<Machine>,
    /// The file's pages.
    pub cache: Arc<PageCache>,
    /// Their memory.
    pub memory: Arc<ModelSharedMmu>,
    /// The file.
    pub disk: Arc<ModelFile>,
}

impl FileMachine {
    /// Puts a machine together. Nothing of the file is mapped yet.
    ///
    /// # Errors
    ///
    /// [`SetupError`] if it is too large.
    pub fn new(setup: FileSetup) -> Result<Arc<Self>, SetupError> {
        let machine = Machine::new(Setup {
            pages: 1,
            frames: setup.frames,
            slots: 1,
            mmu: ModelMmu::new(1, model::Flaw::None),
            devices: Vec::new(),
        })?;
        let space = &machine.space;
        let cache = Arc::new(PageCache::new(CacheParts {
            platform: &HeapPlatform,
            number: space.files().next_number(),
            map: Arc::clone(space.map_of_frames()),
            ram: Arc::clone(space.ram()),
            mmu: Arc::clone(&setup.memory) as _,
            size_bytes: setup.disk.written().len() as u64,
            backing: Arc::clone(&setup.disk) as _,
            memcg: setup.memcg,
            most_pages: setup.most_pages,
            stats: space.stats(),
        })?);
        space.files().open(Arc::clone(&cache));
        Ok(Arc::new(Self {
            machine,
            cache,
            memory: setup.memory,
            disk: setup.disk,
        }))
    }

    /// A processor for one thread of the program.
    #[must_use]
    pub fn cpu(self: &Arc<Self>) -> FileCpu {
        FileCpu {
            machine: Arc::clone(self),
            worker: Worker::new(),
            patience: PATIENCE,
        }
    }

    /// Maps pages of the file at the place of the mapping that is `nth`, to be read and written.
    #[must_use]
    pub fn map(&self, nth: usize, pages: &Range<u32>) -> FileVma {
        self.map_for(nth, pages, VmaAccess::ReadWrite)
    }

    /// Maps pages of the file at the place of the mapping that is `nth`.
    #[must_use]
    pub fn map_for(&self, nth: usize, pages: &Range<u32>, access: VmaAccess) -> FileVma {
        let vma = FileVma {
            at: VirtAddr::new((nth + 1) * MAPPINGS),
            first: pages.start,
            pages: pages.end - pages.start,
            access,
        };
        self.memory.add_vma(vma);
        self.machine.space.files().map(&self.cache, vma);
        vma
    }

    /// Ends a mapping, unless somebody has pages there pinned.
    ///
    /// # Errors
    ///
    /// [`Pinned`]; then it is as it was.
    pub fn unmap_unpinned(&self, vma: &FileVma) -> Result<(), Pinned> {
        self.memory.leave_vma(vma);
        let unmapped = self.machine.space.unmap_file(vma);
        match unmapped {
            Ok(()) => self.memory.remove_vma(vma),
            Err(_) => self.memory.keep_vma(vma),
        }
        unmapped
    }

    /// Ends a mapping.
    pub fn unmap(&self, vma: &FileVma) {
        self.memory.leave_vma(vma);
        self.machine.space.files().unmap(vma);
        self.memory.remove_vma(vma);
    }

    /// Writes everything to the file and makes it durable, as `fsync` does; pinned pages from a copy.
    ///
    /// # Errors
    ///
    /// What the caller has not been told of: then not all of it is durable.
    pub fn sync(&self, seen: &mut Seen) -> Result<(), BackingError> {
        self.cache.write_back(0..u32::MAX, OnPinned::Bounce);
        let synced = self.disk.sync();
        self.cache.errors().check_and_advance(seen).and(synced)
    }

    /// Drops every page; nothing may be left anywhere then.
    ///
    /// # Panics
    ///
    /// If something is: it has leaked.
    pub fn assert_empty(&self) {
        self.disk.fail_nothing();
        let cut = self.cache.set_len(0, |_| ControlFlow::Break(()));
        assert_eq!(cut, Ok(()), "a pin has leaked");
        assert_eq!(self.cache.cached_pages(), 0, "cached pages have leaked");
        assert_eq!(self.cache.dirty_pages(), 0, "dirty pages have leaked");
        let memcg = self.cache.memcg();
        let charged = memcg.map_or(0, |memcg| memcg.charged_pages());
        assert_eq!(charged, 0, "charges have leaked");
        assert_eq!(self.memory.pages_in_use(), 0, "pages of memory have leaked");
        self.machine.assert_empty();
    }
}

/// The address of a word of a mapped file: its page, counted from the mapping's first, and its place in the page.
///
/// # Panics
///
/// If there is no such address.
#[must_use]
pub fn word(vma: &FileVma, page: u32, nth: usize) -> VirtAddr {
    let offset = page as usize * PAGE_SIZE + nth * size_of::<u64>();
    let at = vma.at.checked_add(offset);
    at.unwrap_or_else(|| panic!("page {page} is not in the mapping"))
}

/// A processor: it runs a program's accesses to mapped files, and serves their faults as the pager's threads would.
#[derive(Debug)]
pub struct FileCpu {
    machine: Arc<FileMachine>,
    /// What its faults are served with.
    pub worker: Worker,
    /// How often an access asks for memory that others may free, at most.
    pub patience: u32,
}

impl FileCpu {
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
            match self.machine.memory.load(at) {
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
            match self.machine.memory.store(at, word) {
                Ok(()) => return Ok(()),
                Err(_) if self.machine.memory.is_read_only(at) => return Err(Signal::Segv),
                Err(fault) => self.serve(at, fault, Access::Write)?,
            }
        }
        panic!("a store at {at:?} never ends");
    }

    /// Pins pages.
    ///
    /// # Errors
    ///
    /// See [`PinError`].
    pub fn pin(&mut self, at: VirtAddr, pages: u32, pin: &Pin) -> Result<PinnedPages, PinError> {
        pin_user_pages(
            &self.machine.machine.space,
            &mut self.worker,
            at,
            pages,
            pin,
        )
    }

    fn serve(&mut self, at: VirtAddr, fault: Fault, access: Access) -> Result<(), Signal> {
        let access = match fault {
            Fault::Missing => access,
            Fault::WriteProtected => Access::WriteProtected,
            Fault::Poisoned => return Err(Signal::Bus),
        };
        for nth in 0..self.patience {
            let space = &self.machine.machine.space;
            match space.fault(&mut self.worker, at.page_start(), access) {
                Outcome::Resolved => return Ok(()),
                Outcome::BadAddress => return Err(Signal::Segv),
                Outcome::NoMemory => let_others_run(nth),
            }
        }
        Err(Signal::OutOfMemory)
    }
}
