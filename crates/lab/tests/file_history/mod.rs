//! What a program did to a file that it maps, and what it may therefore find there.

use core::ops::{ControlFlow, Range};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use pgmap_core::addr::{PAGE_SIZE, VirtAddr};
use pgmap_lab::disk;
use pgmap_lab::file_machine::{FileCpu, FileMachine, word};
use pgmap_lab::machine::Signal;
use pgmap_lab::shared_memory::{self, SharedDma};
use pgmap_mm::backing::BackingError;
use pgmap_mm::errseq::Seen;
use pgmap_mm::gup::{Pin, PinAccess, PinError, PinnedPages};
use pgmap_mm::mmu::Stop;
use pgmap_mm::page_cache::{Cached, FileVma, Lost, OnPinned, TruncateError};

/// One thing that happens.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Load(usize, u32, usize),
    Store(usize, u32, usize),
    LoadRun(usize, Range<u32>),
    StoreRun(usize, Range<u32>),
    Pin(usize, Range<u32>, PinAccess),
    Unpin(usize),
    Dma(usize, usize),
    WriteBack(Range<u32>, Mode),
    WriteSome(u32),
    Sync,
    Shrink(usize),
    SetLen(u64),
    Punch(Range<u64>),
    MemoryFailure(u32),
    Map(usize),
    Unmap(usize),
    Fail(disk::Operation, BackingError),
    Refuse(shared_memory::Operation, Stop),
}

/// What becomes of pinned pages: [`OnPinned`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    Skip,
    Bounce,
    Wait(u32),
}

/// What is mapped where: mappings that overlap in the file.
pub(crate) const MAPPED: [Range<u32>; 3] = [0..192, 10..100, 60..130];

struct Pinned {
    _pin: PinnedPages,
    access: PinAccess,
    dma: BTreeMap<u32, SharedDma>,
}

/// The machine, and the bytes that it has to agree with.
pub(crate) struct FileHistory {
    machine: Arc<FileMachine>,
    cpu: FileCpu,
    bytes: Vec<u8>,
    vmas: [Option<FileVma>; 3],
    pins: Vec<Pinned>,
    /// Pages whose accesses get SIGBUS.
    lost: BTreeSet<u32>,
    /// Pages whose accesses may get SIGBUS until reads are tried again: one has failed.
    unread: BTreeSet<u32>,
    /// Read failures that may still cost a page.
    losses: u32,
    /// Something was asked for that may make memory scarce.
    scarce: bool,
    /// Something has happened that a sync may tell of.
    due: bool,
    seen: Seen,
    last: u64,
}

impl FileHistory {
    pub(crate) fn new(machine: Arc<FileMachine>) -> Self {
        let mut cpu = machine.cpu();
        // Nobody else frees memory here, but what was refused once may go well the next time.
        cpu.patience = 8;
        Self {
            cpu,
            bytes: machine.disk.written(),
            vmas: [Some(machine.map(0, &MAPPED[0])), None, None],
            pins: Vec::new(),
            lost: BTreeSet::new(),
            unread: BTreeSet::new(),
            losses: 0,
            scarce: false,
            due: false,
            seen: machine.cache.errors().sample(),
            last: 0,
            machine,
        }
    }

    pub(crate) fn step(&mut self, step: &Step) {
        match step {
            Step::Load(vma, page, nth) => self.load(*vma, *page, *nth),
            Step::Store(vma, page, nth) => self.store(*vma, *page, *nth),
            Step::LoadRun(vma, run) => run.clone().for_each(|page| self.load(*vma, page, 0)),
            Step::StoreRun(vma, run) => run.clone().for_each(|page| self.store(*vma, page, 0)),
            Step::Pin(vma, run, access) => self.pin(*vma, run, *access),
            Step::Unpin(nth) => drop(self.take_pin(*nth)),
            Step::Dma(nth, word) => self.dma(*nth, *word),
            Step::WriteBack(range, mode) => self.write_back(range, *mode),
            Step::WriteSome(blocks) => self.machine.cache.write_some(*blocks),
            Step::Sync => self.sync(),
            Step::Shrink(want) => drop(self.machine.cache.shrink(*want)),
            Step::SetLen(bytes) => self.set_len(*bytes),
            Step::Punch(bytes) => self.punch(bytes),
            Step::MemoryFailure(page) => self.memory_failure(*page),
            Step::Map(nth) => {
                let vma = &mut self.vmas[*nth];
                vma.get_or_insert_with(|| self.machine.map(*nth, &MAPPED[*nth]));
            }
            Step::Unmap(nth) => {
                if let Some(vma) = self.vmas[*nth].take() {
                    self.machine.unmap(&vma);
                }
            }
            Step::Fail(operation, error) => {
                self.due = true;
                self.scarce |= *operation == disk::Operation::Write;
                self.losses += u32::from(*operation == disk::Operation::Read);
                self.machine.disk.fail(*operation, *error);
            }
            Step::Refuse(operation, why) => {
                self.scarce = true;
                self.machine.memory.refuse(*operation, *why);
            }
        }
        self.check();
    }

    /// What holds after every step.
    fn check(&self) {
        let cache = &self.machine.cache;
        let pages = (0..192).filter_map(|page| cache.peek(page).cached());
        let pages: Vec<_> = pages.collect();
        let dirty = pages.iter().filter(|page| page.is_dirty()).count();
        assert_eq!(cache.cached_pages(), pages.len() as u64, "counters agree");
        assert_eq!(cache.dirty_pages(), dirty as u64, "counters agree");
        let in_use = self.machine.memory.pages_in_use();
        assert_eq!(in_use, pages.len(), "memory agrees with the pages in RAM");
        let ram = self.machine.machine.space.ram();
        assert!(
            ram.in_use() >= pages.len() as u64 && ram.in_use() <= ram.limit(),
            "the budget agrees with the pages in RAM"
        );
        assert!(
            !pages.iter().any(|page| page.is_under_writeback()),
            "writeback ends"
        );
        for pin in &self.pins {
            for page in pin.dma.keys() {
                let entry = cache.peek(*page).cached().expect("a pinned page stays");
                let good = pin.access == PinAccess::Read || entry.is_dirty();
                assert!(good, "page {page} agrees with its pin: it is dirty");
            }
        }
    }

    /// Everything ends: all loads agree, all is written, nothing is left.
    pub(crate) fn end(mut self) {
        self.machine.disk.fail_nothing();
        self.machine.memory.refuse_nothing();
        (self.losses, self.scarce) = (0, false);
        self.pins.clear();
        // Every page that could not be read can be now.
        self.machine.cache.retry_reads(u64::MAX);
        self.unread.clear();
        self.step(&Step::Map(0));
        self.step(&Step::LoadRun(0, 0..192));
        self.step(&Step::Sync);
        self.due = false;
        self.step(&Step::Sync);
        for nth in 0..3 {
            self.step(&Step::Unmap(nth));
        }
        drop(self.cpu);
        self.machine.assert_empty();
    }

    fn size_pages(&self) -> u32 {
        u32::try_from(self.bytes.len().div_ceil(PAGE_SIZE)).unwrap()
    }

    /// Where a page of the file is in a mapping.
    fn address(&self, vma: usize, page: u32, nth: usize) -> Option<VirtAddr> {
        let vma = self.vmas[vma].filter(|vma| vma.file_pages().contains(&page))?;
        Some(word(&vma, page - vma.first, nth))
    }

    /// The bytes of a word that are in the file, and where they are.
    fn in_file(&self, page: u32, nth: usize) -> Range<usize> {
        let start = page as usize * PAGE_SIZE + nth * 8;
        let end = (start + 8).min(self.bytes.len());
        start.min(end)..end
    }

    fn check_word(&self, page: u32, nth: usize, found: u64) {
        let at = self.in_file(page, nth);
        assert_eq!(
            found.to_ne_bytes()[..at.len()],
            self.bytes[at],
            "word {nth} of page {page} agrees"
        );
    }

    fn note(&mut self, page: u32, nth: usize, stored: u64) {
        let at = self.in_file(page, nth);
        let len = at.len();
        self.bytes[at].copy_from_slice(&stored.to_ne_bytes()[..len]);
    }

    /// An access to a page was refused: whether it had to be, or might.
    fn refused(&mut self, page: u32, signal: Signal) {
        match signal {
            Signal::Bus if page >= self.size_pages() || self.lost.contains(&page) => {}
            Signal::Bus if self.unread.contains(&page) => {}
            Signal::Bus => self.lose(page),
            Signal::OutOfMemory => self.assert_full(1),
            Signal::Segv => panic!("page {page} agrees with the mappings"),
        }
    }

    /// The file did not give a page.
    fn lose(&mut self, page: u32) {
        assert!(self.losses > 0, "page {page} agrees: nothing has failed");
        self.losses -= 1;
        self.unread.insert(page);
    }

    /// There may be no frame for `more` pages: nearly all are pinned, or cannot leave for another reason.
    fn assert_full(&self, more: u32) {
        let limit = self.machine.machine.space.ram().limit();
        let pinned: BTreeSet<_> = self.pins.iter().flat_map(|pin| pin.dma.keys()).collect();
        assert!(
            self.scarce || pinned.len() as u64 + u64::from(more) > limit,
            "the budget agrees with what is refused"
        );
    }

    fn assert_there(&self, page: u32) {
        assert!(
            page < self.size_pages(),
            "page {page} agrees: the file ends"
        );
        assert!(!self.lost.contains(&page), "page {page} agrees: lost");
    }

    fn load(&mut self, vma: usize, page: u32, nth: usize) {
        let Some(at) = self.address(vma, page, nth) else {
            return;
        };
        match self.cpu.load(at) {
            Ok(found) => {
                self.assert_there(page);
                self.check_word(page, nth, found);
            }
            Err(signal) => self.refused(page, signal),
        }
    }

    fn store(&mut self, vma: usize, page: u32, nth: usize) {
        let Some(at) = self.address(vma, page, nth) else {
            return;
        };
        self.last += 1;
        match self.cpu.store(at, self.last) {
            Ok(()) => {
                self.assert_there(page);
                self.note(page, nth, self.last);
            }
            Err(signal) => self.refused(page, signal),
        }
    }

    fn pin(&mut self, vma: usize, run: &Range<u32>, access: PinAccess) {
        let Some(shown) = self.vmas[vma].map(|vma| vma.file_pages()) else {
            return;
        };
        let run = run.start.max(shown.start)..run.end.min(shown.end);
        let Some(at) = self.address(vma, run.start, 0) else {
            return;
        };
        if run.is_empty() {
            return;
        }
        let pin = match access {
            PinAccess::Read => Pin::READ,
            PinAccess::Write => Pin::WRITE,
        };
        let count = run.end - run.start;
        let nth_page = |at: VirtAddr| {
            let vma = self.vmas[vma].unwrap();
            vma.page_at(at).unwrap()
        };
        match self.cpu.pin(at, count, &pin) {
            Ok(pin) => {
                run.clone().for_each(|page| self.assert_there(page));
                self.pins.push(Pinned {
                    _pin: pin,
                    access,
                    dma: run
                        .map(|page| (page, self.machine.memory.dma(page)))
                        .collect(),
                });
            }
            Err(PinError::BeyondTheEnd { at }) => {
                assert!(nth_page(at) >= self.size_pages(), "the end agrees");
            }
            Err(PinError::Poisoned { at }) => {
                let page = nth_page(at);
                if !self.lost.contains(&page) {
                    self.lose(page);
                }
            }
            Err(PinError::NoMemory { .. }) => {
                self.assert_full(count);
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn take_pin(&mut self, nth: usize) -> Option<Pinned> {
        let len = self.pins.len();
        (len > 0).then(|| self.pins.swap_remove(nth % len))
    }

    /// A device reads what it has pinned, and writes if it may.
    fn dma(&mut self, nth: usize, word: usize) {
        let Some(pin) = self.take_pin(nth) else {
            return;
        };
        for (page, dma) in &pin.dma {
            let at = VirtAddr::new(word * 8);
            self.check_word(*page, word, dma.load(at));
            if pin.access == PinAccess::Write {
                self.last += 1;
                dma.store(at, self.last);
                self.note(*page, word, self.last);
            }
        }
        self.pins.push(pin);
    }

    fn is_pinned(&self, page: u32) -> bool {
        self.pins.iter().any(|pin| pin.dma.contains_key(&page))
    }

    fn write_back(&mut self, range: &Range<u32>, mode: Mode) {
        let quiet = self.machine.disk.failures_left() == 0;
        let quiet = quiet && self.machine.memory.refusals_left() == 0;
        let mut left = match mode {
            Mode::Skip | Mode::Bounce => 0,
            Mode::Wait(times) => times,
        };
        let mut wait = |_| {
            left = left.saturating_sub(1);
            if left == 0 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        let on_pinned = match mode {
            Mode::Skip => OnPinned::Skip,
            Mode::Bounce => OnPinned::Bounce,
            Mode::Wait(_) => OnPinned::Wait(&mut wait),
        };
        let written = self.machine.cache.write_back(range.clone(), on_pinned);
        if quiet {
            assert_eq!(written.failed, 0, "what was written agrees");
            let written = self.machine.disk.written();
            let in_file = range.start..range.end.min(self.size_pages());
            in_file
                .filter(|page| mode != Mode::Skip || !self.is_pinned(*page))
                .for_each(|page| self.check_page(page, &written));
        }
    }

    /// The file has what a page holds.
    fn check_page(&self, page: u32, file: &[u8]) {
        assert_eq!(file.len(), self.bytes.len(), "the file's length agrees");
        if self.lost.contains(&page) {
            return;
        }
        let start = page as usize * PAGE_SIZE;
        let end = (start + PAGE_SIZE).min(self.bytes.len());
        let same = file[start..end] == self.bytes[start..end];
        assert!(same, "page {page} of the file agrees");
    }

    fn sync(&mut self) {
        match self.machine.sync(&mut self.seen) {
            Ok(()) => {
                let durable = self.machine.disk.durable();
                (0..self.size_pages()).for_each(|page| self.check_page(page, &durable));
                assert_eq!(durable.len(), self.bytes.len(), "the length agrees");
            }
            Err(error) => {
                assert!(self.due, "what sync says agrees: {error}");
                self.due = self.machine.disk.failures_left() > 0;
            }
        }
    }

    fn set_len(&mut self, bytes: u64) {
        let first = u32::try_from(bytes.div_ceil(PAGE_SIZE as u64)).unwrap();
        let done = self
            .machine
            .cache
            .set_len(bytes, |_| ControlFlow::Break(()));
        let bytes = usize::try_from(bytes).unwrap();
        let cuts = bytes < self.bytes.len();
        let gone = if cuts { first..192 } else { 0..0 };
        if self.resized(&gone, done) {
            self.bytes.resize(bytes, 0);
            self.lost.retain(|page| !gone.contains(page));
        }
    }

    fn punch(&mut self, bytes: &Range<u64>) {
        let end = usize::try_from(bytes.end).unwrap().min(self.bytes.len());
        let start = usize::try_from(bytes.start).unwrap().min(end);
        let whole = start.div_ceil(PAGE_SIZE)..end / PAGE_SIZE;
        let whole = u32::try_from(whole.start).unwrap()..u32::try_from(whole.end).unwrap();
        let done = self
            .machine
            .cache
            .punch(bytes.clone(), |_| ControlFlow::Break(()));
        if self.resized(&whole, done) {
            self.bytes[start..end].fill(0);
            self.lost.retain(|page| !whole.contains(page));
        }
    }

    /// Whether the file was changed, and these pages dropped. Pins decide that, exactly in the range (WB-5).
    fn resized(&self, gone: &Range<u32>, done: Result<(), TruncateError>) -> bool {
        let pinned = gone.clone().find(|page| self.is_pinned(*page));
        match done {
            Ok(()) => {
                assert_eq!(pinned, None, "pins agree with what was dropped");
                true
            }
            Err(TruncateError::Pinned { page }) => {
                assert_eq!(pinned, Some(page), "pins agree with what was refused");
                false
            }
            Err(TruncateError::Backing(_)) => {
                assert!(self.due || self.scarce, "what the file says agrees");
                false
            }
            Err(
                error @ (TruncateError::TooLong { .. }
                | TruncateError::ReadOnly
                | TruncateError::Inherited),
            ) => panic!("{error}"),
        }
    }

    fn memory_failure(&mut self, page: u32) {
        let before = self.machine.cache.peek(page).cached();
        let lost = self.machine.cache.memory_failure(page);
        let dirty = before.is_some_and(Cached::is_dirty);
        assert_eq!(lost == Lost::Page, dirty, "what is lost agrees");
        if before.is_some() {
            // What a device has pinned there is nobody's page any more.
            for pin in &mut self.pins {
                pin.dma.remove(&page);
            }
        }
        if lost == Lost::Page {
            self.due = true;
            self.lost.insert(page);
        }
    }
}
