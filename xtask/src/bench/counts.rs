//! Counting and looking up: what every get and put costs.

use core::hint::black_box;
use std::fs;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Instant;

use anyhow::{Context, anyhow};
use pgmap_core::addr::{MAX_PFN, PAGE_SIZE, Pfn, PfnRange};
use pgmap_core::memremap::{MemoryMap, MemoryType};
use pgmap_core::page::Put;
use pgmap_host::platform::HostPlatform;
use pgmap_sync::PercpuRef;
use pgmap_sync::atomic::{AtomicU64, Ordering};

use super::Effort;
use super::table::{Row, Table, Want, median};

const LOOPS: u32 = 1 << 21;
/// Frames that lookups go round.
const FRAMES: u16 = 4096;
const TIB_FRAMES: u64 = (1 << 40) / PAGE_SIZE as u64;

static PLATFORM: HostPlatform = HostPlatform;

pub(crate) fn measure(effort: Effort) -> anyhow::Result<Vec<Table>> {
    let map = MemoryMap::new(&PLATFORM, MAX_PFN)?;
    pgmap_host::platform::use_membarrier();
    let mut rows = vec![frame(&map, effort)?];
    rows.extend(percpu(effort));
    rows.extend(lookups(&map, effort)?);
    rows.extend(tebibyte(&map, effort)?);
    Ok(vec![Table {
        title: "Counting and looking up".to_owned(),
        against: "floor",
        rows,
        notes: vec![format!(
            "Medians of {} rounds. The floors: two locked additions for a frame's get and put; a load and a store of a \
             word, twice, for PercpuRef; an index into an array of words for lookups.",
            effort.rounds
        )],
    }])
}

/// Nanoseconds for each call.
fn per_call(mut call: impl FnMut(usize)) -> f64 {
    let start = Instant::now();
    for nth in 0..LOOPS as usize {
        call(nth);
    }
    start.elapsed().as_secs_f64() * 1e9 / f64::from(LOOPS)
}

/// The medians of two calls, measured by turns.
fn by_turns(effort: Effort, ours: impl Fn() -> f64, theirs: impl Fn() -> f64) -> (f64, f64) {
    let rounds = (0..effort.rounds).map(|_| (ours(), theirs()));
    let (ours, theirs) = rounds.unzip();
    (median(ours), median(theirs))
}

fn row(what: &str, (ours, theirs): (f64, f64), want: Want) -> Row {
    Row {
        what: what.to_owned(),
        ours,
        theirs: Some(theirs),
        unit: "ns",
        want,
    }
}

fn frame(map: &Arc<MemoryMap>, effort: Effort) -> anyhow::Result<Row> {
    let ram = map.add_ram(u64::from(FRAMES))?;
    let mut pfn = [Pfn::from_u32(0)];
    if ram.alloc(&mut pfn) != 1 {
        return Err(anyhow!("no frame"));
    }
    let frame = map.frame(pfn[0]);
    let word = AtomicU64::new(0);
    let ours = || {
        per_call(|_| {
            let got = black_box(frame).try_get();
            debug_assert!(got.is_ok());
            let put = frame.put();
            debug_assert_eq!(put, Put::Held);
        })
    };
    let theirs = || {
        per_call(|_| {
            // SeqCst: the strongest, as the floor is the locked instruction itself.
            black_box(&word).fetch_add(1, Ordering::SeqCst);
            black_box(&word).fetch_sub(1, Ordering::SeqCst);
        })
    };
    let figures = by_turns(effort, ours, theirs);
    ram.free(&pfn);
    Ok(row("get + put of a frame", figures, Want::AtMost(1.1)))
}

/// Runs a loop on two threads at once: nanoseconds for each call, the mean of both.
fn on_two(run: impl Fn() -> f64 + Sync) -> f64 {
    let together = Barrier::new(2);
    let run = || {
        together.wait();
        run()
    };
    thread::scope(|scope| {
        let other = scope.spawn(run);
        let mine = run();
        other
            .join()
            .map_or(mine, |other| f64::midpoint(mine, other))
    })
}

/// Two additions to a word that is nobody else's.
fn plain_adds() -> f64 {
    // Not on the stack, where some CPUs forward stores for nothing.
    let word = Box::new(AtomicU64::new(0));
    per_call(|_| {
        for _ in 0..2 {
            let word = black_box(&*word);
            // Relaxed: one thread's own word.
            word.store(word.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
    })
}

fn percpu(effort: Effort) -> Vec<Row> {
    let count = PercpuRef::new();
    let ours = || {
        per_call(|_| {
            let live = black_box(&count).try_get_live();
            debug_assert!(live);
            count.put();
        })
    };
    let shared = Arc::new(0);
    let arc = || {
        per_call(|_| {
            drop(black_box(Arc::clone(&shared)));
        })
    };
    let alone = by_turns(effort, ours, plain_adds);
    let two = by_turns(effort, || on_two(ours), || on_two(plain_adds));
    let arcs = by_turns(effort, || on_two(ours), || on_two(arc));
    vec![
        row("PercpuRef get + put", alone, Want::AtMost(3.0)),
        row("PercpuRef get + put, 2 threads", two, Want::AtMost(3.0)),
        row(
            "the same against a shared `Arc`, 2 threads",
            arcs,
            Want::Faster(10.0),
        ),
    ]
}

fn lookups(map: &Arc<MemoryMap>, effort: Effort) -> anyhow::Result<Vec<Row>> {
    let start = Pfn::new(1 << 20).context("pfn")?;
    let range = PfnRange::new(start, u64::from(FRAMES)).context("range")?;
    let device = map.memremap_pages(&[range], MemoryType::Generic)?;
    let order: Vec<_> = (0..usize::from(FRAMES))
        .map(|nth| (nth * 2_654_435_761) % usize::from(FRAMES))
        .filter_map(|nth| start.checked_add(nth as u64))
        .collect();
    let next = |nth: usize| order[nth % order.len()];
    let words = vec![1u64; usize::from(FRAMES)];
    let floor = || {
        per_call(|nth| {
            let index = next(nth).get() - start.get();
            black_box(words.get(usize::try_from(index).unwrap_or(0)));
        })
    };
    let frame = || {
        per_call(|nth| {
            black_box(map.frame(next(nth)));
        })
    };
    let guard = || {
        per_call(|nth| {
            black_box(map.get_dev_pagemap(next(nth)).is_some());
        })
    };
    let page = || {
        per_call(|nth| {
            let pfn = next(nth);
            // A page that nobody else has: the first get and the last put.
            if device.get_page(pfn).is_ok() {
                device.put_page(pfn);
            }
        })
    };
    let whole = || {
        let begin = Instant::now();
        for _ in 0..64 {
            if device.get_pages(range).is_ok() {
                device.put_pages(range);
            }
        }
        begin.elapsed().as_secs_f64() * 1e9 / (64.0 * f64::from(FRAMES))
    };
    let frame = by_turns(effort, frame, floor);
    let guard = by_turns(effort, guard, floor);
    let page = by_turns(effort, page, floor);
    let whole = by_turns(effort, whole, floor);
    remove(device)?;
    Ok(vec![
        row("PFN to frame", frame, Want::Below(2.0)),
        row("PFN to pgmap guard, and drop", guard, Want::Below(8.0)),
        row(
            "first get and last put of a device's page",
            page,
            Want::Below(60.0),
        ),
        row("the same in a batch, per page", whole, Want::Below(40.0)),
    ])
}

fn remove(device: pgmap_core::memremap::DevPagemap) -> anyhow::Result<()> {
    let drained = device.kill().drain(None);
    drained.map_err(|_| anyhow!("still held"))?.remove();
    Ok(())
}

/// KiB of this process that are in RAM.
fn resident_kib() -> anyhow::Result<f64> {
    let statm = fs::read_to_string("/proc/self/statm")?;
    let pages = statm.split(' ').nth(1).context("statm")?;
    let kib: f64 = pages.parse()?;
    Ok(kib * 4.0)
}

fn tebibyte(map: &Arc<MemoryMap>, effort: Effort) -> anyhow::Result<Vec<Row>> {
    let (mut times, mut growths) = (Vec::new(), Vec::new());
    for nth in 0..effort.rounds.min(9) as u64 {
        // Another tebibyte each time: the second use of a place finds its table there.
        let start = Pfn::new((1 << 21) + nth * TIB_FRAMES).context("pfn")?;
        let range = PfnRange::new(start, TIB_FRAMES).context("range")?;
        let before = resident_kib()?;
        let begin = Instant::now();
        let device = map.memremap_pages(&[range], MemoryType::Generic)?;
        times.push(begin.elapsed().as_secs_f64() * 1e6);
        growths.push(resident_kib()? - before);
        remove(device)?;
    }
    let row = |what: &str, ours, unit, most| Row {
        what: what.to_owned(),
        ours,
        theirs: None,
        unit,
        want: Want::Below(most),
    };
    Ok(vec![
        row("memremap_pages of 1 TiB", median(times), "us", 1000.0),
        row("what that makes resident", median(growths), "KiB", 1024.0),
    ])
}
