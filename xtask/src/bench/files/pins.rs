//! What it costs to pin a page and to let go of it again.

use core::ops::Range;
use std::path::Path;
use std::thread;

use anyhow::{Context, anyhow};
use pgmap::{Memory, Pin, Prot};
use pgmap_core::addr::PAGE_SIZE;
use pgmap_sync::atomic::{AtomicU64, Ordering};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::registered::Registered;
use super::{MIB, Scratch, compared, memory, seconds};
use crate::bench::Effort;
use crate::bench::table::{Row, Table, Want};

/// Pages that are pinned in a round, and how often.
const PAGES: usize = 8_192;
const PASSES: usize = 8;
/// How many times as long two threads are watched.
const LONGER: usize = 40;
/// How many of them at once.
const RANGES: [usize; 3] = [1, 16, 512];

pub(super) fn measure(directory: &Path, effort: Effort) -> anyhow::Result<Table> {
    // So large that the flusher is not called for the pages that are pinned to be written.
    let memory = memory(1024 * MIB)?;
    let scratch = Scratch::new(directory, (PAGES * PAGE_SIZE) as u64)?;
    let file = memory.open(&scratch.0)?;
    let mapped = memory
        .space()
        .map_file(&file, 0..file.len_bytes(), Prot::ReadWrite)?;
    let mut anonymous = memory.map(PAGES * PAGE_SIZE)?;
    anonymous.as_mut_slice().fill(1);
    let start = anonymous.as_slice().as_ptr() as usize;
    let anonymous = start..start + PAGES * PAGE_SIZE;
    let peer = Registered::new(PAGES)?;
    let mut rows = Vec::new();
    for (kind, range) in [
        ("a mapped file", mapped.range()),
        ("anonymous memory", anonymous),
    ] {
        // The first pins bring the pages in.
        pin_all(&memory, &range, 512)?;
        for count in RANGES {
            rows.push(pinned(&memory, &peer, kind, &range, count, effort)?);
        }
        for count in [16, 512] {
            rows.push(by_two(&memory, kind, &range, count, effort)?);
        }
    }
    Ok(Table {
        title: "Pins".to_owned(),
        against: "peer",
        rows,
        notes: vec![format!(
            "A page of 4 KiB pinned and unpinned, in ranges of so many pages; medians of {} rounds over {PAGES} pages. The peer: \
             `io_uring` buffers of as many pages of a memory file, registered and unregistered; of two threads: \
             two that count for themselves, each in a word of its own.",
            effort.rounds
        )],
    })
}

/// Pins and unpins a range, so many pages at a time, several times.
fn pin_all(memory: &Memory, range: &Range<usize>, count: usize) -> anyhow::Result<()> {
    for _ in 0..PASSES {
        for at in range.clone().step_by(count * PAGE_SIZE) {
            let pages = at..at + count * PAGE_SIZE;
            drop(memory.space().pin_user_pages(pages, &Pin::WRITE)?);
        }
    }
    Ok(())
}

/// Nanoseconds for each page.
fn per_page(act: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    #[allow(clippy::cast_precision_loss, reason = "a small number")]
    Ok(seconds(act)? * 1e9 / (PASSES * PAGES) as f64)
}

fn pinned(
    memory: &Memory,
    peer: &Registered,
    kind: &str,
    range: &Range<usize>,
    count: usize,
    effort: Effort,
) -> anyhow::Result<Row> {
    let what = format!("{kind}, by {count}, per page");
    compared(effort, (&what, "ns", Want::AtMost(0.5)), || {
        let ours = per_page(|| pin_all(memory, range, count))?;
        let theirs = per_page(|| {
            let mut firsts = (0..PASSES).flat_map(|_| (0..PAGES).step_by(count));
            firsts.try_for_each(|first| peer.pin(first, count))
        })?;
        Ok((ours, theirs))
    })
}

/// How much longer it takes one thread to do everything than two to do a half each: two threads that pin, beside two that
/// count for themselves.
fn by_two(
    memory: &Memory,
    kind: &str,
    range: &Range<usize>,
    count: usize,
    effort: Effort,
) -> anyhow::Result<Row> {
    let middle = range.start + range.len() / 2;
    let (first, second) = (range.start..middle, middle..range.end);
    let pin = |half: &Range<usize>| (0..LONGER).try_for_each(|_| pin_all(memory, half, count));
    let what = format!("{kind}, by {count}, two threads beside one");
    compared(effort, (&what, "x the time", Want::AtMost(1.25)), || {
        let ours = two_beside_one(|| pin(&first), || pin(&second))?;
        let count = || {
            let counter = AtomicU64::new(0);
            for _ in 0..LONGER * PASSES * PAGES {
                // Relaxed: nobody else looks at it.
                counter.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        };
        Ok((ours, two_beside_one(count, count)?))
    })
}

fn two_beside_one(
    first: impl Fn() -> anyhow::Result<()> + Sync,
    second: impl Fn() -> anyhow::Result<()> + Sync,
) -> anyhow::Result<f64> {
    let one = seconds(|| on_cpus([&|| first().and_then(|()| second())]))?;
    let two = seconds(|| on_cpus([&first, &second]))?;
    Ok(two / one)
}

type Act<'a> = &'a (dyn Fn() -> anyhow::Result<()> + Sync);

/// Does each on a thread and a CPU of its own.
fn on_cpus<const N: usize>(acts: [Act<'_>; N]) -> anyhow::Result<()> {
    let mask = sched_getaffinity(None)?;
    let mut cpus = (0..CpuSet::MAX_CPU).filter(|cpu| mask.is_set(*cpu));
    thread::scope(|scope| {
        let threads = acts.map(|act| {
            let cpu = cpus.next();
            scope.spawn(move || {
                let mut one = CpuSet::new();
                one.set(cpu.context("too few CPUs")?);
                sched_setaffinity(None, &one)?;
                act()
            })
        });
        let mut ended = threads.into_iter().map(thread::ScopedJoinHandle::join);
        ended.try_for_each(|ended| ended.map_err(|_| anyhow!("a thread has failed"))?)
    })
}
