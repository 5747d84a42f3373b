//! What a program did to its memory, and what it may therefore find there.

use core::ops::{ControlFlow, Range};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use pgmap_core::addr::PAGE_SIZE;
use pgmap_core::hotplug::{HotplugError, Obstacle};
use pgmap_core::sparse::BlockId;
use pgmap_core::zone::ZoneChoice;
use pgmap_lab::device::Failure;
use pgmap_lab::machine::{Cpu, Machine, Signal};
use pgmap_lab::model::{Dma, Fault, Operation};
use pgmap_mm::gup::{Pin, PinAccess, PinError, PinnedPages, pin_user_pages};
use pgmap_mm::mmu::Stop;
use pgmap_mm::offline::Round;
use pgmap_mm::reclaim::Caller;
use pgmap_mm::stats::Stats;

/// One thing that happens.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Store(u32, usize),
    Load(u32, usize),
    StoreRun(Range<u32>),
    LoadRun(Range<u32>),
    LoadStride(u32, u32),
    Discard(Range<u32>),
    Unmap(Range<u32>),
    Map(u32),
    Reclaim(usize),
    Deactivate(usize),
    SendAway(usize),
    Pin(Range<u32>, PinAccess),
    Unpin(usize),
    DmaStore(usize, usize),
    PinUnseen(u32),
    UnpinUnseen(usize),
    DropUnseen(u32),
    SetLimit(u64),
    Fork,
    Unplug(usize),
    Toggle(BlockId),
    Fail(usize, Failure),
    Refuse(Operation, Stop),
}

struct Pinned {
    _pin: PinnedPages,
    pages: Range<u32>,
    dma: Vec<(u32, Dma)>,
}

/// The machine, and the map that it has to agree with.
pub(crate) struct History {
    machine: Arc<Machine>,
    cpu: Cpu,
    words: BTreeMap<(u32, usize), u64>,
    live: Vec<bool>,
    lost: BTreeSet<u32>,
    pins: Vec<Pinned>,
    unseen: Vec<(u32, Dma)>,
    /// Pages dropped behind the back of `mm`, which learns of it when they are touched.
    holes: BTreeSet<u32>,
    /// Pages that may still turn out to be lost: read failures that were asked for.
    losses: u32,
    /// Something was asked for that may make memory scarce.
    scarce: bool,
    /// A fork has brought more pages into RAM than the budget allows.
    overdrawn: bool,
    last: u64,
    peak: u64,
}

impl History {
    pub(crate) fn new(machine: Arc<Machine>) -> Self {
        let pages = machine.pages;
        let scarce = machine
            .devices
            .iter()
            .map(|device| device.capacity())
            .sum::<usize>()
            < pages as usize;
        let mapped = machine.space.map(pages, 1);
        assert_eq!(mapped, Some(machine.word(0, 0)));
        let mut cpu = machine.cpu();
        // Nobody else frees memory here, but what was refused once may go well the next time.
        cpu.patience = 8;
        Self {
            cpu,
            words: BTreeMap::new(),
            live: vec![true; pages as usize],
            lost: BTreeSet::new(),
            pins: Vec::new(),
            unseen: Vec::new(),
            holes: BTreeSet::new(),
            losses: 0,
            scarce,
            overdrawn: false,
            last: 0,
            peak: 0,
            machine,
        }
    }

    pub(crate) fn step(&mut self, step: &Step) {
        match step {
            Step::Store(page, nth) => self.store(*page, *nth),
            Step::Load(page, nth) => self.load(*page, *nth),
            Step::StoreRun(run) => self.clip(run).for_each(|page| self.store(page, 0)),
            Step::LoadRun(run) => self.clip(run).for_each(|page| self.load(page, 0)),
            Step::LoadStride(page, step) => {
                for page in self
                    .clip(&(*page..u32::MAX))
                    .step_by(*step as usize)
                    .take(20)
                {
                    self.load(page, 0);
                }
            }
            Step::Discard(run) => self.discard(&self.clip(run)),
            Step::Unmap(run) => self.unmap(self.clip(run)),
            Step::Map(pages) => self.map(*pages),
            Step::Reclaim(want) => drop(self.cpu.reclaim(*want)),
            Step::Deactivate(most) => self.machine.space.deactivate(Caller::Reclaimer, *most),
            Step::SendAway(want) => drop(self.machine.space.store(*want)),
            Step::Pin(run, access) => self.pin(self.clip(run), *access),
            Step::Unpin(nth) => drop(take(&mut self.pins, *nth)),
            Step::DmaStore(nth, word) => self.dma_store(*nth, *word),
            Step::PinUnseen(page) => self.pin_unseen(*page),
            Step::UnpinUnseen(nth) => drop(take(&mut self.unseen, *nth)),
            Step::DropUnseen(page) => self.drop_unseen(*page),
            Step::Fork => self.fork(),
            Step::SetLimit(frames) => self.machine.space.ram().set_limit(*frames),
            Step::Unplug(nth) => self.unplug(*nth),
            Step::Toggle(block) => self.toggle(*block),
            Step::Fail(nth, failure) => self.fail(*nth, *failure),
            Step::Refuse(operation, why) => {
                self.scarce = true;
                self.machine.mmu.refuse(*operation, *why);
            }
        }
        self.check();
    }

    /// What holds after every step.
    fn check(&mut self) {
        let ram = self.machine.space.ram();
        self.overdrawn &= ram.deficit() > 0;
        let slack = if self.overdrawn { 64 } else { 0 };
        assert!(
            ram.in_use() <= ram.limit().max(self.peak + slack),
            "the budget is exceeded"
        );
        self.peak = ram.in_use();
        assert!(
            self.machine.mmu.pages_in_use() as u64 <= ram.in_use(),
            "pages are in RAM that no frame accounts for"
        );
        for page in self.pins.iter().flat_map(|pinned| pinned.pages.clone()) {
            let word = self.machine.mmu.load(self.machine.word(page, 0));
            let expected = self.words.get(&(page, 0)).copied().unwrap_or(0);
            assert_eq!(word, Ok(expected), "pinned page {page} agrees and stays");
        }
    }

    /// Looks at every word, lets go of everything, and looks for leaks.
    pub(crate) fn end(mut self) {
        self.machine.mmu.refuse_nothing();
        let words: Vec<_> = self.words.keys().copied().collect();
        for (page, nth) in words {
            self.load(page, nth);
        }
        self.pins.clear();
        self.unseen.clear();
        let poisoned = Stats::get(&self.machine.space.stats().poisoned);
        assert!(poisoned >= self.lost.len() as u64);
        drop(self.cpu);
        self.machine.assert_empty();
    }

    fn clip(&self, run: &Range<u32>) -> Range<u32> {
        let pages = u32::try_from(self.live.len()).unwrap();
        run.start.min(pages)..run.end.min(pages)
    }

    fn load(&mut self, page: u32, nth: usize) {
        let word = self.cpu.load(self.machine.word(page, nth));
        let expected = self.words.get(&(page, nth)).copied().unwrap_or(0);
        if let Some(word) = self.outcome(page, word) {
            assert_eq!(word, expected, "word {nth} of page {page} agrees");
        }
    }

    fn store(&mut self, page: u32, nth: usize) {
        self.last += 1;
        let stored = self.cpu.store(self.machine.word(page, nth), self.last);
        if self.outcome(page, stored).is_some() {
            self.words.insert((page, nth), self.last);
        }
    }

    /// Judges how an access ended; its result if it succeeded.
    fn outcome<T>(&mut self, page: u32, outcome: Result<T, Signal>) -> Option<T> {
        let live = self.live[page as usize];
        let lost = self.lost.contains(&page);
        match outcome {
            Ok(value) => {
                assert!(live, "page {page} is not mapped, and could be used");
                assert!(!lost, "page {page} is lost, and could be used");
                Some(value)
            }
            Err(Signal::Segv) => {
                assert!(!live, "page {page} is mapped, and could not be used");
                None
            }
            Err(Signal::Bus) => {
                if self.lost.insert(page) {
                    self.losses = self.losses.checked_sub(1).expect("no device has failed");
                    self.words.retain(|(of, _), _| *of != page);
                }
                None
            }
            Err(Signal::OutOfMemory) => {
                let held = !self.pins.is_empty() || !self.unseen.is_empty();
                assert!(
                    held || self.scarce,
                    "there is room, and page {page} could not be had"
                );
                None
            }
        }
    }

    /// An announced fork: the child inherits every page, however little RAM there is.
    fn fork(&mut self) {
        let complete = self.machine.space.before_fork(&mut self.cpu.worker);
        assert!(
            complete || self.scarce,
            "there is room, and not every page could be had"
        );
        self.cpu.reclaim(8);
        let words: Vec<_> = self
            .words
            .iter()
            .map(|(place, word)| (*place, *word))
            .collect();
        for ((page, nth), expected) in words {
            match self.machine.mmu.load(self.machine.word(page, nth)) {
                Ok(word) => assert_eq!(word, expected, "word {nth} of page {page} agrees"),
                Err(Fault::Poisoned) => drop(self.outcome::<()>(page, Err(Signal::Bus))),
                Err(_) => assert!(
                    !complete || self.holes.contains(&page),
                    "the child inherits page {page}"
                ),
            }
        }
        self.machine.space.after_fork();
        self.peak = self.machine.space.ram().in_use();
        self.overdrawn = true;
    }

    fn forget(&mut self, run: Range<u32>) {
        self.words.retain(|(page, _), _| !run.contains(page));
        self.lost.retain(|page| !run.contains(page));
        // Their pages are the device's alone from now on.
        self.unseen.retain(|(page, _)| !run.contains(page));
    }

    fn discard(&mut self, run: &Range<u32>) {
        let pinned = |page: &u32| self.pins.iter().any(|pinned| pinned.pages.contains(page));
        let end = run.clone().find(pinned);
        let at = self.machine.word(run.start, 0);
        let discarded = self.machine.space.discard(at, run.end - run.start);
        assert_eq!(
            discarded.map_err(|pinned| pinned.at).err(),
            end.map(|page| self.machine.word(page, 0)),
            "the first pinned page is named"
        );
        self.forget(run.start..end.unwrap_or(run.end));
    }

    fn unmap(&mut self, run: Range<u32>) {
        self.pins
            .retain(|pinned| !pinned.pages.clone().any(|page| run.contains(&page)));
        let at = self.machine.word(run.start, 0);
        assert_eq!(self.machine.space.unmap(at, run.end - run.start), Ok(()));
        self.live[run.start as usize..run.end as usize].fill(false);
        self.forget(run);
    }

    fn map(&mut self, pages: u32) {
        let Some(at) = self.machine.space.map(pages, 1) else {
            return;
        };
        let start = (at.get() - self.machine.word(0, 0).get()) / PAGE_SIZE;
        let area = &mut self.live[start..start + pages as usize];
        assert!(
            area.iter().all(|live| !live),
            "an area was handed out twice"
        );
        area.fill(true);
    }

    fn pin(&mut self, pages: Range<u32>, access: PinAccess) {
        if pages.is_empty() || self.pins.len() > 3 {
            return;
        }
        // A pin is for whoever goes on to use the page: the machine's own pin would touch it.
        let holes = core::mem::take(&mut self.holes);
        for page in holes {
            self.load(page, 0);
        }
        let at = self.machine.word(pages.start, 0);
        let (space, count) = (&self.machine.space, pages.end - pages.start);
        let pin = pin_user_pages(
            space,
            &mut self.cpu.worker,
            at,
            count,
            &match access {
                PinAccess::Read => Pin::READ.label("test"),
                PinAccess::Write => Pin::WRITE.label("test"),
            },
        );
        let pin = match pin {
            Ok(pin) => pin,
            Err(error) => return self.not_pinned(error),
        };
        let dma = pages.clone().filter(|_| access == PinAccess::Write);
        let dma = dma.map(|page| {
            (
                page,
                self.machine.mmu.dma(self.machine.word(page, 0)).unwrap(),
            )
        });
        self.pins.push(Pinned {
            _pin: pin,
            dma: dma.collect(),
            pages,
        });
    }

    /// Judges a pin that could not be had as if it were an access.
    fn not_pinned(&mut self, error: PinError) {
        let (at, signal) = match error {
            PinError::Poisoned { at } => (at, Signal::Bus),
            PinError::BadAddress { at } => (at, Signal::Segv),
            PinError::Empty | PinError::Inherited => panic!("{error}"),
            PinError::NoMemory { at } => (at, Signal::OutOfMemory),
            PinError::TooManyPins { at }
            | PinError::BeyondTheEnd { at }
            | PinError::NotWritable { at }
            | PinError::Movable { at }
            | PinError::FsDax { at }
            | PinError::DeviceLeaving { at }
            | PinError::DeviceBusy { at }
            | PinError::LongTerm { at } => panic!("{at:?}: {error}"),
        };
        let page = (at.get() - self.machine.word(0, 0).get()) / PAGE_SIZE;
        self.outcome::<()>(u32::try_from(page).unwrap(), Err(signal));
    }

    fn dma_store(&mut self, nth: usize, word: usize) {
        let seen = self.pins.iter().flat_map(|pinned| &pinned.dma);
        let all: Vec<_> = seen.chain(&self.unseen).collect();
        if all.is_empty() {
            return;
        }
        let (page, dma) = all[nth % all.len()];
        self.last += 1;
        dma.store(self.machine.word(*page, word), self.last);
        self.words.insert((*page, word), self.last);
    }

    fn pin_unseen(&mut self, page: u32) {
        if self.unseen.len() < 4
            && let Ok(dma) = self.machine.mmu.pin_unseen(self.machine.word(page, 0))
        {
            self.unseen.push((page, dma));
        }
    }

    fn drop_unseen(&mut self, page: u32) {
        let pinned = self.pins.iter().any(|pinned| pinned.pages.contains(&page));
        if !pinned && self.machine.mmu.drop_unseen(self.machine.word(page, 0)) {
            self.forget(page..page + 1);
            self.holes.insert(page);
        }
    }

    /// Takes a device away, and gives it back.
    fn unplug(&mut self, nth: usize) {
        let Some(device) = self.machine.space.devices().get(nth) else {
            return;
        };
        let killed = device.kill();
        let gone = self
            .machine
            .space
            .evacuate(&mut self.cpu.worker, killed.device());
        if gone.is_ok() {
            assert_eq!(killed.device().users_now(), 0, "pages were left behind");
            assert_eq!(
                self.machine.devices[nth].pages(),
                0,
                "pages were left behind"
            );
        }
        drop(killed.resurrect());
    }

    /// Takes a block of RAM off line, or brings it back; only a pin keeps it on line.
    fn toggle(&mut self, block: BlockId) {
        let ram = self.machine.space.ram();
        if ram.online(block, ZoneChoice::Auto).is_ok() {
            return;
        }
        let give_up = |_: Round<'_>| ControlFlow::Break(());
        let space = &self.machine.space;
        let in_use = ram.in_use();
        match space.offline(Caller::Reclaimer, block, give_up) {
            Ok(()) => assert_eq!(ram.used_in(block), 0, "frames are left in the block"),
            Err(HotplugError::Last(_)) => {}
            Err(HotplugError::Busy(_, Obstacle::Held { holder, .. })) => {
                assert!(!self.pins.is_empty(), "nobody has pinned anything");
                assert_eq!(holder.map(|holder| holder.label), Some("test".into()));
            }
            Err(error) => panic!("{error}"),
        }
        assert_eq!(ram.in_use(), in_use, "every page has a frame");
    }

    fn fail(&mut self, nth: usize, failure: Failure) {
        let Some(device) = self.machine.devices.get(nth) else {
            return;
        };
        device.fail(failure);
        match failure {
            Failure::Write => self.scarce = true,
            Failure::Read | Failure::Corrupt => self.losses += 1,
        }
    }
}

fn take<T>(list: &mut Vec<T>, nth: usize) -> Option<T> {
    (!list.is_empty()).then(|| list.swap_remove(nth % list.len()))
}
