//! Whole files read and written, and what pins cost an `fsync`.

use core::hint::black_box;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use pgmap::{FileMapping, Memory, Pin, Prot, Writeback};
use pgmap_core::addr::PAGE_SIZE;
use rustix::fs::{MemfdFlags, memfd_create};

use super::{MIB, REQUEST, Scratch, compared, memory, seconds};
use crate::bench::Effort;
use crate::bench::floor::{Mapped, sum};
use crate::bench::table::{Row, Table, Want};

/// Bytes of the file.
const BYTES: u64 = 256 * MIB;
/// Dirty pages that are made durable.
const SYNCED: usize = 1000;

pub(super) fn measure(directory: &Path, effort: Effort) -> anyhow::Result<Table> {
    let scratch = Scratch::new(directory, BYTES)?;
    // So large that the flusher leaves the pages alone that are to be written.
    let large = memory(16 * BYTES)?;
    let small = memory(BYTES / 4)?;
    let whole = usize::try_from(BYTES)?;
    let one = "the same, beside one buffer of 1 MiB";
    let rows = vec![
        cold(&large, "read, cold", whole, &scratch, effort)?,
        cold(&large, one, REQUEST, &scratch, effort)?,
        kernel_cold(&large, &scratch, effort)?,
        cold(
            &small,
            "read, cold, 4 x the budget",
            whole / 4,
            &scratch,
            effort,
        )?,
        warm(&large, &scratch, effort)?,
        writeback(&large, "dirty pages written back", whole, &scratch, effort)?,
        writeback(&large, one, REQUEST, &scratch, effort)?,
        writer(&small, whole / 4, &scratch, effort)?,
        pinned_sync(&large, &scratch, effort)?,
    ];
    Ok(Table {
        title: "Streams".to_owned(),
        against: "peer",
        rows,
        notes: vec![format!(
            "A file of {} MiB; medians of {} rounds. The peers: `O_DIRECT` requests of 1 MiB, one at a time, for what is cold or \
             written, into or from as much fresh memory as is used here, if nothing else is said; the kernel's mapping of the cached \
             file for what is warm; the same `fsync` without pins.",
            BYTES / MIB,
            effort.rounds
        )],
    })
}

/// Milliseconds.
fn milliseconds(act: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    Ok(seconds(act)? * 1e3)
}

/// So many bytes from a page's beginning on. Fresh memory is that of the zeros that nobody has touched.
fn aligned(memory: &mut [u8], len: usize) -> &mut [u8] {
    let skip = memory.as_ptr().align_offset(PAGE_SIZE);
    &mut memory[skip..skip + len]
}

/// Reads the file, into as much memory, again and again.
fn read_direct(file: &File, into: usize) -> anyhow::Result<f64> {
    let mut memory = vec![0; into + PAGE_SIZE];
    let buffer = aligned(&mut memory, into);
    milliseconds(|| {
        for (offset, nth) in (0..BYTES).step_by(REQUEST).zip(0..) {
            let at = nth * REQUEST % into;
            file.read_exact_at(&mut buffer[at..at + REQUEST], offset)?;
        }
        Ok(())
    })
}

/// Writes the file, from so many bytes of a memory file, again and again. A word of each of its pages was written just before, as of
/// the pages that are written back.
fn write_direct(file: &File, from: usize) -> anyhow::Result<f64> {
    let bytes = File::from(memfd_create("bench", MemfdFlags::CLOEXEC)?);
    bytes.write_all_at(&vec![1; from], 0)?;
    let memory = Mapped::new(bytes.as_fd(), 0, from as u64)?;
    black_box(memory.sum());
    for offset in (0..from as u64).step_by(PAGE_SIZE) {
        bytes.write_all_at(&offset.to_le_bytes(), offset)?;
    }
    milliseconds(|| {
        for (offset, nth) in (0..BYTES).step_by(REQUEST).zip(0..) {
            let at = nth * REQUEST % from;
            memory.write_to(file.as_fd(), at..at + REQUEST, offset)?;
        }
        Ok(())
    })
}

/// Reads every word of a mapping.
fn read_all(map: &FileMapping<'_>) -> anyhow::Result<f64> {
    milliseconds(|| {
        // SAFETY: the mapping lives during the call, and its bytes are read and nothing else.
        black_box(unsafe { sum(map.range()) });
        Ok(())
    })
}

/// Writes a word of every page.
fn dirty(map: &FileMapping<'_>, pages: usize) {
    for page in 0..pages {
        map.write(page * PAGE_SIZE, &(page as u64).to_le_bytes());
    }
}

/// Beside requests into so many bytes of memory.
fn cold(
    memory: &Memory,
    what: &str,
    into: usize,
    scratch: &Scratch,
    effort: Effort,
) -> anyhow::Result<Row> {
    let direct = scratch.open_direct()?;
    compared(effort, (what, "ms", Want::AtMost(1.3)), || {
        let file = memory.open(&scratch.0)?;
        let map = memory.space().map_file(&file, 0..BYTES, Prot::ReadWrite)?;
        Ok((read_all(&map)?, read_direct(&direct, into)?))
    })
}

/// Beside the kernel's mapping of the file, of which nothing is cached either.
fn kernel_cold(memory: &Memory, scratch: &Scratch, effort: Effort) -> anyhow::Result<Row> {
    let what = "the same, beside the kernel's mapping";
    compared(effort, (what, "ms", Want::AtMost(1.3)), || {
        let file = memory.open(&scratch.0)?;
        let map = memory.space().map_file(&file, 0..BYTES, Prot::ReadWrite)?;
        let ours = read_all(&map)?;
        drop(map);
        drop(file);
        scratch.drop_cache()?;
        let plain = scratch.open()?;
        let theirs = Mapped::new(plain.as_fd(), 0, BYTES)?;
        let theirs = milliseconds(|| {
            black_box(theirs.sum());
            Ok(())
        })?;
        scratch.drop_cache()?;
        Ok((ours, theirs))
    })
}

fn warm(memory: &Memory, scratch: &Scratch, effort: Effort) -> anyhow::Result<Row> {
    let file = memory.open(&scratch.0)?;
    let ours = memory.space().map_file(&file, 0..BYTES, Prot::ReadWrite)?;
    let plain = scratch.open()?;
    let theirs = Mapped::new(plain.as_fd(), 0, BYTES)?;
    read_all(&ours)?;
    theirs.sum();
    let row = compared(effort, ("read, warm", "ms", Want::AtMost(1.3)), || {
        let theirs = milliseconds(|| {
            black_box(theirs.sum());
            Ok(())
        })?;
        Ok((read_all(&ours)?, theirs))
    });
    drop(theirs);
    scratch.drop_cache()?;
    row
}

/// Dirty pages of the whole file, written by who asks for it; beside requests from so many bytes of memory.
fn writeback(
    memory: &Memory,
    what: &str,
    from: usize,
    scratch: &Scratch,
    effort: Effort,
) -> anyhow::Result<Row> {
    let direct = scratch.open_direct()?;
    let file = memory.open(&scratch.0)?;
    let map = memory.space().map_file(&file, 0..BYTES, Prot::ReadWrite)?;
    let want = (what, "ms", Want::AtMost(1.11));
    compared(effort, want, || {
        dirty(&map, map.len_bytes() / PAGE_SIZE);
        let ours = milliseconds(|| {
            file.sync_range(0..BYTES, Writeback::Background)?;
            Ok(())
        })?;
        Ok((ours, write_direct(&direct, from)?))
    })
}

/// A program that writes to every page of a file that is larger than the budget, until all of it is in the file.
fn writer(memory: &Memory, bytes: usize, scratch: &Scratch, effort: Effort) -> anyhow::Result<Row> {
    let direct = scratch.open_direct()?;
    let want = ("read and written, 4 x the budget", "ms", Want::AtMost(1.3));
    compared(effort, want, || {
        let file = memory.open(&scratch.0)?;
        let map = memory.space().map_file(&file, 0..BYTES, Prot::ReadWrite)?;
        let ours = milliseconds(|| {
            dirty(&map, map.len_bytes() / PAGE_SIZE);
            Ok(file.sync_all()?)
        })?;
        let theirs = read_direct(&direct, bytes)? + write_direct(&direct, bytes)?;
        Ok((ours, theirs + milliseconds(|| Ok(direct.sync_data()?))?))
    })
}

fn pinned_sync(memory: &Memory, scratch: &Scratch, effort: Effort) -> anyhow::Result<Row> {
    let file = memory.open(&scratch.0)?;
    let map = memory.space().map_file(&file, 0..BYTES, Prot::ReadWrite)?;
    let start = map.range().start;
    let want = ("fsync, 1,000 dirty pages pinned", "ms", Want::AtMost(2.0));
    compared(effort, want, || {
        dirty(&map, SYNCED);
        let theirs = milliseconds(|| Ok(file.sync_all()?))?;
        dirty(&map, SYNCED);
        let pages = start..start + SYNCED * PAGE_SIZE;
        let pins = memory.space().pin_user_pages(pages, &Pin::WRITE)?;
        let ours = milliseconds(|| Ok(file.sync_all()?))?;
        drop(pins);
        Ok((ours, theirs))
    })
}
