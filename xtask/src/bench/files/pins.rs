//! What it costs to pin a page and to let go of it again.

use core::ops::Range;
use std::path::Path;
use std::thread;

use anyhow::anyhow;
use pgmap::{Memory, Pin, Prot};
use pgmap_core::addr::PAGE_SIZE;

use super::registered::Registered;
use super::{MIB, Scratch, compared, memory, seconds};
use crate::bench::Effort;
use crate::bench::table::{Row, Table, Want};

/// Pages that are pinned in a round, and how often.
const PAGES: usize = 8_192;
const PASSES: usize = 8;
/// How many of them at once.
const RANGES: [usize; 3] = [1, 16, 512];

pub(super) fn measure(directory: &Path, effort: Effort) -> anyhow::Result<Table> {
    let memory = memory(256 * MIB)?;
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
    for (kind, range) in [("a mapped file", mapped.range()), ("anonymous memory", anonymous)] {
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
             `io_uring` buffers of as many pages of a memory file, registered and unregistered; of two threads: one.",
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

/// Two threads that pin half of the range each, beside one that pins all of it.
fn by_two(
    memory: &Memory,
    kind: &str,
    range: &Range<usize>,
    count: usize,
    effort: Effort,
) -> anyhow::Result<Row> {
    let middle = range.start + range.len() / 2;
    let halves = [range.start..middle, middle..range.end];
    let what = format!("{kind}, by {count}, two threads");
    compared(effort, (&what, "ns", Want::AtMost(0.625)), || {
        let two = per_page(|| {
            thread::scope(|scope| {
                let pin = |half| move || pin_all(memory, half, count);
                let threads = halves.each_ref().map(|half| scope.spawn(pin(half)));
                let ended = threads.map(thread::ScopedJoinHandle::join);
                ended
                    .into_iter()
                    .try_for_each(|ended| ended.map_err(|_| anyhow!("a thread has failed"))?)
            })
        })?;
        Ok((two, per_page(|| pin_all(memory, range, count))?))
    })
}
