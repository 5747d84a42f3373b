//! Pages in and out, against userfaultfd alone.
//!
//! The rooms below `pgmap` are put together by hand, with a thread that serves faults as the pager does and no
//! reclaimer, so that each direction is measured alone. Everything runs on one CPU, where faults are quickest.

use std::sync::Arc;
use std::thread;
use std::time::Instant;

use anyhow::{Context, ensure};
use pgmap_core::addr::{MAX_PFN, PAGE_SIZE, Page, VirtAddr};
use pgmap_core::memremap::MemoryMap;
use pgmap_host::event::Event;
use pgmap_host::mmu::HostMmu;
use pgmap_host::platform::HostPlatform;
use pgmap_mm::fault::{Access, Outcome};
use pgmap_mm::reclaim::Caller;
use pgmap_mm::space::{AddressSpace, Parts, Worker};
use pgmap_mm::stats::Stats;
use pgmap_sync::atomic::{AtomicBool, Ordering};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::Effort;
use super::device::CopyDevice;
use super::floor::{Bare, touch};
use super::table::{Row, Table, Want, median};

const PAGES: usize = 8192;
/// Pages that one call copies or moves at the floor.
const COPIES: usize = 16;
const MOVES: usize = 64;

static PLATFORM: HostPlatform = HostPlatform;

pub(crate) fn measure(effort: Effort) -> anyhow::Result<Vec<Table>> {
    pgmap_host::platform::use_membarrier();
    let before = stay_on_one_cpu()?;
    let figures = rounds(effort);
    sched_setaffinity(None, &before)?;
    let (ours, theirs) = figures?;
    let names = [
        ("fault: bring back one page", Want::AtMost(1.25)),
        ("sequential bring-back, per page", Want::AtMost(1.3)),
        ("take out, per page", Want::AtMost(1.5)),
    ];
    let rows = names.into_iter().zip(ours.into_iter().zip(theirs));
    let rows = rows.map(|((what, want), (ours, theirs))| Row {
        what: what.to_owned(),
        ours,
        theirs: Some(theirs),
        unit: "us",
        want,
    });
    Ok(vec![Table {
        title: "Pages in and out".to_owned(),
        against: "floor",
        rows: rows.collect(),
        notes: vec![format!(
            "Medians of {} rounds over {PAGES} pages, on one CPU, with a device that only copies. The floors: a bare \
             userfaultfd round trip with UFFDIO_COPY; UFFDIO_COPY of {COPIES} pages at a time; UFFDIO_MOVE of {MOVES} \
             at a time. Ours copy twice where the floor copies once: from the device, and into the page.",
            effort.rounds
        )],
    }])
}

/// Confines this thread, and those that it starts, to one CPU. Answers where it could run before.
fn stay_on_one_cpu() -> anyhow::Result<CpuSet> {
    let before = sched_getaffinity(None)?;
    let mut cpus = (0..CpuSet::MAX_CPU).filter(|cpu| before.is_set(*cpu));
    let mut one = CpuSet::new();
    one.set(cpus.next().context("no CPU")?);
    sched_setaffinity(None, &one)?;
    Ok(before)
}

/// One figure for each row, in microseconds.
type Figures = [f64; 3];

fn rounds(effort: Effort) -> anyhow::Result<(Figures, Figures)> {
    let (rig, bare) = (Rig::new()?, Bare::new(2 * PAGES)?);
    let source = vec![Page([1; PAGE_SIZE]); PAGES];
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..effort.rounds {
        ours.push(rig.round()?);
        theirs.push(bare_round(&bare, &source)?);
    }
    let middle = |all: &[Figures]| {
        core::array::from_fn(|row| median(all.iter().map(|figures| figures[row]).collect()))
    };
    Ok((middle(&ours), middle(&theirs)))
}

/// Numbers below [`PAGES`] in an order that no readahead foresees: no multiplication alone, whose steps recur.
fn scattered() -> Vec<usize> {
    let mix = |word: usize| (word ^ (word >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mut order: Vec<_> = (0..PAGES).collect();
    order.sort_by_key(|page| mix(mix(mix(page + 1))) >> 16);
    order
}

fn micros(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e6
}

/// Microseconds for each of `pages` pages.
fn per_page(pages: usize, start: Instant) -> f64 {
    let pages = u32::try_from(pages).unwrap_or(u32::MAX);
    micros(start) / f64::from(pages)
}

fn bare_round(bare: &Bare, source: &[Page]) -> anyhow::Result<Figures> {
    bare.clear()?;
    let touched = bare.serve(source, || {
        let touches = scattered().into_iter().map(|number| {
            let start = Instant::now();
            // SAFETY: the memory is the bare one's, and its server answers.
            unsafe { touch(bare.page(number)) };
            micros(start)
        });
        touches.collect()
    })?;
    bare.clear()?;
    let start = Instant::now();
    for (nth, pages) in source.chunks(COPIES).enumerate() {
        bare.copy(bare.page(nth * COPIES), pages)?;
    }
    let copied = per_page(PAGES, start);
    let start = Instant::now();
    for number in (0..PAGES).step_by(MOVES) {
        bare.take(bare.page(PAGES + number), bare.page(number), MOVES)?;
    }
    Ok([median(touched), copied, per_page(PAGES, start)])
}

const fn fault(event: &Event) -> Option<(VirtAddr, Access)> {
    match event {
        Event::Fault { at, access, .. } => Some((*at, *access)),
        Event::Kick | Event::Fork(_) => None,
    }
}

/// An address space with all of its pages mapped, and room for them in RAM and on a device.
struct Rig {
    mmu: Arc<HostMmu>,
    space: AddressSpace,
    start: VirtAddr,
}

impl Rig {
    fn new() -> anyhow::Result<Self> {
        let slots = u32::try_from(PAGES)?;
        // Bytes beyond the pages, so that a worker's cache of frames keeps nobody waiting.
        let frames = 2 * PAGES as u64;
        let mmu = Arc::new(HostMmu::new(2 * PAGES * PAGE_SIZE, slots)?);
        let map = MemoryMap::new(&PLATFORM, MAX_PFN)?;
        let ram = map.add_ram(frames)?;
        let device = Arc::new(CopyDevice::new(2 * PAGES));
        let device = map.memremap_private(device, frames)?;
        let space = AddressSpace::new(Parts {
            platform: &PLATFORM,
            map,
            ram,
            devices: vec![device],
            mmu: mmu.clone(),
            base: VirtAddr::new(mmu.range().start),
            pages: 2 * slots,
            slots,
            stats: Box::leak(Box::<Stats>::default()),
        })?;
        let start = space.map(slots, 1).context("no addresses")?;
        Ok(Self { mmu, space, start })
    }

    fn page(&self, number: usize) -> usize {
        assert!(number < PAGES, "page {number} of {PAGES}");
        self.start.get() + number * PAGE_SIZE
    }

    /// Serves faults while `touch` runs, as the pager does.
    fn serve<T>(&self, touch: impl FnOnce() -> T) -> anyhow::Result<T> {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let server = scope.spawn(|| self.answer(&stop));
            let result = touch();
            // Release: pairs with the acquire load in `answer`.
            stop.store(true, Ordering::Release);
            self.mmu.kick();
            ensure!(
                server.join().is_ok_and(|served| served),
                "a fault could not be answered"
            );
            Ok(result)
        })
    }

    fn answer(&self, stop: &AtomicBool) -> bool {
        let mut worker = Worker::new();
        let mut events = [const { Event::Kick }; 32];
        let mut served = true;
        // Acquire: pairs with the release store in `serve`.
        while !stop.load(Ordering::Acquire) {
            let count = self.mmu.next_events(&mut events, None);
            let faults = events[..count].iter().filter_map(fault);
            served &= faults.fold(true, |served, (at, access)| {
                served & (self.space.fault(&mut worker, at, access) == Outcome::Resolved)
            });
        }
        served
    }

    /// Touches pages in this order. Microseconds for each that was missing, and for each of all.
    fn touch(&self, order: &[usize]) -> anyhow::Result<(f64, f64)> {
        self.serve(|| {
            let start = Instant::now();
            let touches = order.iter().map(|number| {
                let start = Instant::now();
                // SAFETY: the page is mapped in the rig's address space, and its server answers.
                unsafe { touch(self.page(*number)) };
                micros(start)
            });
            let touches = touches.collect();
            (median(touches), per_page(order.len(), start))
        })
    }

    /// Takes every page out, and stores it. Microseconds for each page taken out.
    fn take_out(&self) -> anyhow::Result<f64> {
        let (mut time, mut pages) = (0.0, 0);
        loop {
            let start = Instant::now();
            self.space.deactivate(Caller::Reclaimer, usize::MAX);
            time += micros(start);
            match self.space.store(usize::MAX) {
                0 => break,
                stored => pages += stored,
            }
        }
        ensure!(pages >= PAGES * 9 / 10, "only {pages} pages were taken out");
        Ok(time / f64::from(u32::try_from(pages)?))
    }

    fn round(&self) -> anyhow::Result<Figures> {
        let sequential: Vec<_> = (0..PAGES).collect();
        // The first round begins with pages that were never there.
        self.touch(&sequential)?;
        self.take_out()?;
        let (fault, _) = self.touch(&scattered())?;
        let took = self.take_out()?;
        let (_, brought) = self.touch(&sequential)?;
        Ok([fault, brought, took])
    }
}
