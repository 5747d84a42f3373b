//! The machine's page tables and memory, as a model.
//!
//! `mm` calls it through [`Mmu`]; a test's threads call [`load`](ModelMmu::load) and [`store`](ModelMmu::store), which
//! answer with the fault that an access would raise, and [`dma`](ModelMmu::dma), which is what a pinned page's user sees.
//! An operation over several pages is several steps. What must never happen here: a misuse that goes unnoticed. A
//! page that is dropped is filled with junk and kept until the model ends, so that whoever still reads it shows.

use core::fmt;
use core::ptr::NonNull;
use core::slice;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use pgmap_core::addr::{PAGE_SIZE, Page, VirtAddr};
use pgmap_mm::mmu::{Mmu, Progress, Protect, Slot, Stop};
use pgmap_sync::Mutex;

/// What a dropped page holds.
pub(crate) const JUNK: u8 = 0xdb;

/// An operation on a page that found one.
const EXISTS: Progress = Progress {
    done: 0,
    stop: Some(Stop::Exists),
};

/// What an access found instead of its word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// There is no page.
    Missing,
    /// A write found a page that may only be read.
    WriteProtected,
    /// The page's bytes are lost: the program gets SIGBUS.
    Poisoned,
}

/// What is wrong with a model on purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flaw {
    /// Nothing.
    None,
    /// It takes out pages that somebody has pinned.
    TakesPinned,
    /// It says that pages are dropped before they are: the next operation drops them.
    DropsLate,
    /// It maps writable what was to be protected.
    NeverProtects,
}

/// An operation that can be told to fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// [`Mmu::install`] and [`Mmu::install_zero`].
    Install,
    /// [`Mmu::take_out`].
    TakeOut,
    /// [`Mmu::give_back`].
    GiveBack,
}

/// A page of the modelled memory.
///
/// # Invariants
///
/// It came from `Box::into_raw` and lives as long as the [`ModelMmu`] that it belongs to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Body(NonNull<Page>);

// SAFETY: every access goes through the lock of the model, except for `staged`, whose contract excludes writers.
unsafe impl Send for Body {}

impl Body {
    fn new(page: &Page) -> Self {
        // INVARIANT: `ModelMmu::drop` frees it.
        Self(NonNull::from(Box::leak(Box::new(page.clone()))))
    }

    fn word_at(self, at: VirtAddr) -> NonNull<u64> {
        let offset = at.get() % PAGE_SIZE;
        assert!(
            offset.is_multiple_of(8),
            "{at:?} is not the address of a word"
        );
        // SAFETY: the offset is less than a page.
        unsafe { self.0.byte_add(offset) }.cast()
    }

    fn load(self, at: VirtAddr) -> u64 {
        // SAFETY: the word is inside the page, which lives by the type invariant, and the model's lock keeps writers away.
        unsafe { self.word_at(at).read() }
    }

    fn store(self, at: VirtAddr, word: u64) {
        // SAFETY: as in `load`; that no reader is there is what `staged` asks of `mm`, and what the tests look for.
        unsafe { self.word_at(at).write(word) };
    }

    fn fill_with_junk(self) {
        // SAFETY: as in `store`.
        unsafe { self.0.write(Page([JUNK; PAGE_SIZE])) };
    }
}

#[derive(Clone, Copy, Debug)]
enum Mapping {
    Page { body: Body, protect: Protect },
    Poison,
}

#[derive(Debug, Default)]
struct Memory {
    mapped: BTreeMap<VirtAddr, Mapping>,
    slots: Vec<Option<Body>>,
    dropped: Vec<Body>,
    /// Pins that `mm` does not know of.
    pins: BTreeMap<Body, u32>,
    refusals: Vec<(Operation, Stop)>,
    /// Pages that a flawed model has not dropped yet.
    late: BTreeSet<VirtAddr>,
}

impl Memory {
    fn refusal(&mut self, operation: Operation) -> Option<Stop> {
        let nth = self.refusals.iter().position(|(of, _)| *of == operation)?;
        Some(self.refusals.remove(nth).1)
    }

    fn drop_body(&mut self, body: Body) {
        if !self.pins.contains_key(&body) {
            body.fill_with_junk();
        }
        self.dropped.push(body);
    }

    fn unmap(&mut self, at: VirtAddr) -> bool {
        match self.mapped.remove(&at) {
            Some(Mapping::Page { body, .. }) => {
                self.drop_body(body);
                true
            }
            Some(Mapping::Poison) => true,
            None => false,
        }
    }

    fn slot(&mut self, slot: Slot) -> &mut Option<Body> {
        &mut self.slots[slot.0 as usize]
    }
}

/// The page tables and the memory of a modelled machine.
pub struct ModelMmu {
    memory: Mutex<Memory>,
    flaw: Flaw,
}

impl ModelMmu {
    /// A machine without pages, and with `slots` empty staging slots.
    #[must_use]
    pub fn new(slots: u32, flaw: Flaw) -> Arc<Self> {
        let memory = Memory {
            slots: vec![None; slots as usize],
            ..Memory::default()
        };
        Arc::new(Self {
            memory: Mutex::new(memory),
            flaw,
        })
    }

    /// The program reads the word at an address.
    ///
    /// # Errors
    ///
    /// The fault that the machine would raise.
    ///
    /// # Panics
    ///
    /// If the address is not a multiple of 8.
    pub fn load(&self, at: VirtAddr) -> Result<u64, Fault> {
        match self.memory.lock().mapped.get(&at.page_start()) {
            Some(Mapping::Page { body, .. }) => Ok(body.load(at)),
            Some(Mapping::Poison) => Err(Fault::Poisoned),
            None => Err(Fault::Missing),
        }
    }

    /// The program writes the word at an address.
    ///
    /// # Errors
    ///
    /// The fault that the machine would raise.
    ///
    /// # Panics
    ///
    /// If the address is not a multiple of 8.
    pub fn store(&self, at: VirtAddr, word: u64) -> Result<(), Fault> {
        let memory = self.memory.lock();
        // Under the lock: as a machine's store, it is done before the page can be taken away, or not at all.
        writable(&memory, at).map(|body| body.store(at, word))
    }

    /// Somebody pins the page at an address for DMA, and `mm` is not told (`io_uring`, `O_DIRECT`).
    ///
    /// # Errors
    ///
    /// The fault that pinning for writing would raise.
    pub fn pin_unseen(self: &Arc<Self>, at: VirtAddr) -> Result<Dma, Fault> {
        let mut memory = self.memory.lock();
        let body = writable(&memory, at)?;
        *memory.pins.entry(body).or_default() += 1;
        drop(memory);
        Ok(Dma {
            mmu: Arc::clone(self),
            body,
            pinned: Pinned::Here,
        })
    }

    /// What a device sees of the page at an address, pinned through `mm` by the caller.
    ///
    /// # Errors
    ///
    /// The fault that a write would raise.
    pub fn dma(self: &Arc<Self>, at: VirtAddr) -> Result<Dma, Fault> {
        let body = writable(&self.memory.lock(), at)?;
        Ok(Dma {
            mmu: Arc::clone(self),
            body,
            pinned: Pinned::ByMm,
        })
    }

    /// The program drops a page with a system call that `mm` does not see. Whether there was a page.
    pub fn drop_unseen(&self, at: VirtAddr) -> bool {
        let mut memory = self.memory.lock();
        let is_page = matches!(memory.mapped.get(&at), Some(Mapping::Page { .. }));
        is_page && memory.unmap(at)
    }

    /// Makes the next page of an operation stop with this reason.
    pub fn refuse(&self, operation: Operation, stop: Stop) {
        self.memory.lock().refusals.push((operation, stop));
    }

    /// Forgets what [`refuse`](Self::refuse) asked for and has not happened.
    pub fn refuse_nothing(&self) {
        self.memory.lock().refusals.clear();
    }

    /// Pages that use memory: the mapped ones, and those in slots.
    pub fn pages_in_use(&self) -> usize {
        self.drop_late();
        let memory = self.memory.lock();
        let pages = memory.mapped.values();
        pages
            .filter(|mapping| matches!(mapping, Mapping::Page { .. }))
            .count()
            + memory.slots.iter().flatten().count()
    }

    fn is_mapped(&self, at: VirtAddr) -> bool {
        self.memory.lock().mapped.contains_key(&at)
    }

    fn drop_late(&self) {
        if self.flaw == Flaw::DropsLate {
            let mut memory = self.memory.lock();
            while let Some(at) = memory.late.pop_first() {
                memory.unmap(at);
            }
        }
    }
}

fn writable(memory: &Memory, at: VirtAddr) -> Result<Body, Fault> {
    match memory.mapped.get(&at.page_start()) {
        Some(Mapping::Page {
            body,
            protect: Protect::ReadWrite,
        }) => Ok(*body),
        Some(Mapping::Page { .. }) => Err(Fault::WriteProtected),
        Some(Mapping::Poison) => Err(Fault::Poisoned),
        None => Err(Fault::Missing),
    }
}

/// One step per page, until one stops.
pub(crate) fn each(count: usize, mut step: impl FnMut(usize) -> Result<(), Stop>) -> Progress {
    for done in 0..count {
        if let Err(stop) = step(done) {
            return Progress {
                done,
                stop: Some(stop),
            };
        }
    }
    Progress::complete(count)
}

/// The page `nth` pages after an address.
pub(crate) fn nth_page(at: VirtAddr, nth: usize) -> VirtAddr {
    at.checked_add(nth * PAGE_SIZE).unwrap_or(at)
}

fn nth_slot(slot: Slot, nth: usize) -> Slot {
    Slot(slot.0 + u32::try_from(nth).unwrap_or(u32::MAX))
}

// SAFETY: `take_out` moves the page itself into the slot under the model's lock, and only `mapped` makes a page reachable
// for `load` and `store`. A `Dma` of a page pinned here is refused by `take_out`, unless the model is flawed on purpose.
unsafe impl Mmu for ModelMmu {
    fn install(&self, at: VirtAddr, pages: &[Page], protect: Protect) -> Progress {
        self.drop_late();
        let protect = match self.flaw {
            Flaw::NeverProtects => Protect::ReadWrite,
            Flaw::None | Flaw::TakesPinned | Flaw::DropsLate => protect,
        };
        each(pages.len(), |nth| {
            let at = nth_page(at, nth);
            let memory = &mut *self.memory.lock();
            assert!(
                !memory.mapped.contains_key(&at),
                "a page was installed over the one at {at:?}"
            );
            if let Some(stop) = memory.refusal(Operation::Install) {
                return Err(stop);
            }
            let body = Body::new(&pages[nth]);
            memory.mapped.insert(at, Mapping::Page { body, protect });
            Ok(())
        })
    }

    fn install_if_missing(&self, at: VirtAddr, page: &Page) -> Progress {
        self.drop_late();
        if self.is_mapped(at) {
            return EXISTS;
        }
        self.install(at, slice::from_ref(page), Protect::ReadWrite)
    }

    fn install_zero(&self, at: VirtAddr, count: usize) -> Progress {
        self.drop_late();
        each(count, |nth| {
            let at = nth_page(at, nth);
            let memory = &mut *self.memory.lock();
            if memory.mapped.contains_key(&at) {
                return Err(Stop::Exists);
            }
            if let Some(stop) = memory.refusal(Operation::Install) {
                return Err(stop);
            }
            let (body, protect) = (Body::new(&Page::ZERO), Protect::ReadWrite);
            memory.mapped.insert(at, Mapping::Page { body, protect });
            Ok(())
        })
    }

    fn take_out(&self, at: VirtAddr, count: usize, to: Slot) -> Progress {
        self.drop_late();
        each(count, |nth| {
            let (at, to) = (nth_page(at, nth), nth_slot(to, nth));
            let memory = &mut *self.memory.lock();
            assert_eq!(
                *memory.slot(to),
                None,
                "{to:?} was taken out to, and is filled"
            );
            let Some(Mapping::Page { body, .. }) = memory.mapped.get(&at).copied() else {
                return Err(Stop::Hole);
            };
            if memory.pins.contains_key(&body) && self.flaw != Flaw::TakesPinned {
                return Err(Stop::Busy);
            }
            if let Some(stop) = memory.refusal(Operation::TakeOut) {
                return Err(stop);
            }
            memory.mapped.remove(&at);
            *memory.slot(to) = Some(body);
            Ok(())
        })
    }

    fn give_back(&self, from: Slot, count: usize, at: VirtAddr) -> Progress {
        self.drop_late();
        each(count, |nth| {
            let (at, from) = (nth_page(at, nth), nth_slot(from, nth));
            let memory = &mut *self.memory.lock();
            assert!(
                !memory.mapped.contains_key(&at),
                "a page was given back over the one at {at:?}"
            );
            let body = memory
                .slot(from)
                .unwrap_or_else(|| panic!("{from:?} was given back, and is empty"));
            if let Some(stop) = memory.refusal(Operation::GiveBack) {
                return Err(stop);
            }
            *memory.slot(from) = None;
            let protect = Protect::ReadWrite;
            memory.mapped.insert(at, Mapping::Page { body, protect });
            Ok(())
        })
    }

    unsafe fn staged(&self, slot: Slot) -> &Page {
        let body = self.memory.lock().slots[slot.0 as usize];
        let body = body.unwrap_or_else(|| panic!("{slot:?} was looked at, and is empty"));
        // SAFETY: by the type invariant the page lives as long as `self`; the caller promises that nobody moves or
        // empties the slot meanwhile, and what is in a slot is written by nobody.
        unsafe { body.0.as_ref() }
    }

    fn empty(&self, from: Slot, count: usize) {
        self.drop_late();
        for nth in 0..count {
            let from = nth_slot(from, nth);
            let memory = &mut *self.memory.lock();
            let body = memory.slot(from).take();
            memory.drop_body(body.unwrap_or_else(|| panic!("{from:?} was emptied, and is empty")));
        }
    }

    fn unprotect(&self, at: VirtAddr, count: usize) {
        self.drop_late();
        for nth in 0..count {
            let mut memory = self.memory.lock();
            if let Some(Mapping::Page { protect, .. }) = memory.mapped.get_mut(&nth_page(at, nth)) {
                *protect = Protect::ReadWrite;
            }
        }
    }

    fn wake(&self, _: VirtAddr, _: usize) {
        // Nobody sleeps here: a `Cpu` looks again when its fault has been served.
        self.drop_late();
    }

    fn poison(&self, at: VirtAddr, count: usize) -> Progress {
        self.drop_late();
        each(count, |nth| {
            let at = nth_page(at, nth);
            let before = self.memory.lock().mapped.insert(at, Mapping::Poison);
            assert!(
                before.is_none(),
                "the page at {at:?} was poisoned over {before:?}"
            );
            Ok(())
        })
    }

    fn poison_if_missing(&self, at: VirtAddr) -> Progress {
        self.drop_late();
        if self.is_mapped(at) {
            return EXISTS;
        }
        self.poison(at, 1)
    }

    fn zap(&self, at: VirtAddr, count: usize) {
        self.drop_late();
        for at in (0..count).map(|nth| nth_page(at, nth)) {
            let mut memory = self.memory.lock();
            if self.flaw == Flaw::DropsLate {
                memory.late.insert(at);
            } else {
                memory.unmap(at);
            }
        }
    }

    fn unshare(&self, at: VirtAddr) -> bool {
        // There are no forks here, so nothing is shared. Writing must be no fault: nobody would come to serve it.
        assert!(
            writable(&self.memory.lock(), at).is_ok(),
            "a page that is made private agrees to be written"
        );
        true
    }
}

impl Drop for ModelMmu {
    fn drop(&mut self) {
        let memory = core::mem::take(&mut *self.memory.lock());
        let mapped = memory
            .mapped
            .into_values()
            .filter_map(|mapping| match mapping {
                Mapping::Page { body, .. } => Some(body),
                Mapping::Poison => None,
            });
        let bodies = mapped
            .chain(memory.slots.into_iter().flatten())
            .chain(memory.dropped);
        for body in bodies {
            // SAFETY: by the type invariant it came from a box; every page is in one place, so it is freed once.
            drop(unsafe { Box::from_raw(body.0.as_ptr()) });
        }
    }
}

impl fmt::Debug for ModelMmu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelMmu")
            .field("flaw", &self.flaw)
            .finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Pinned {
    Here,
    ByMm,
}

/// A page as a device sees it that was told its physical address: wherever the page is mapped meanwhile, or not.
#[derive(Debug)]
pub struct Dma {
    mmu: Arc<ModelMmu>,
    body: Body,
    pinned: Pinned,
}

impl Dma {
    /// The device reads a word of the page; only the offset in the page of `at` counts.
    #[must_use]
    pub fn load(&self, at: VirtAddr) -> u64 {
        let _memory = self.mmu.memory.lock();
        self.body.load(at)
    }

    /// The device writes a word of the page; only the offset in the page of `at` counts.
    pub fn store(&self, at: VirtAddr, word: u64) {
        let _memory = self.mmu.memory.lock();
        self.body.store(at, word);
    }
}

impl Drop for Dma {
    fn drop(&mut self) {
        if self.pinned == Pinned::Here {
            let pins = &mut self.mmu.memory.lock().pins;
            let count = pins.get_mut(&self.body);
            let left = count.map_or(0, |count| {
                *count -= 1;
                *count
            });
            if left == 0 {
                pins.remove(&self.body);
            }
        }
    }
}
