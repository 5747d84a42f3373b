//! Persistent memory: what it costs to take a namespace away, and to read and write it, beside the bare memory file.

use core::hint::black_box;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use anyhow::{Context, anyhow};
use pgmap_core::addr::{MAX_PFN, PAGE_SIZE, PfnRange};
use pgmap_core::memremap::MemoryMap;
use pgmap_drivers::block::BlockDevice;
use pgmap_drivers::pmem::{Afterwards, Client, Patience, Pmem, Region, Sharing};
use pgmap_host::platform::HostPlatform;
use pgmap_host::shared::SharedFrames;
use pgmap_sync::atomic::{AtomicBool, Ordering};

use super::Effort;
use super::floor::Mapped;
use super::table::{Row, Table, Want, median};

const GIB: u64 = 1 << 30;
/// Bytes that are read and written.
const AREA: u64 = 512 << 20;
/// References that are dropped while a device is taken away.
const REFERENCES: u64 = 100_000;
/// Requests of a round.
const REQUESTS: u32 = 100_000;

static PLATFORM: HostPlatform = HostPlatform;

pub(crate) fn measure(effort: Effort) -> anyhow::Result<Vec<Table>> {
    pgmap_host::platform::use_membarrier();
    let map = MemoryMap::new(&PLATFORM, MAX_PFN)?;
    let mut rows = vec![
        unplug("unplug of an idle 1 GiB", effort, || idle(&map))?,
        unplug("the same, 100,000 references dropped", effort, || {
            busy(&map)
        })?,
    ];
    rows.push(mapped(&map, effort)?);
    rows.extend(requests(&map, effort)?);
    Ok(vec![Table {
        title: "Persistent memory".to_owned(),
        against: "floor",
        rows,
        notes: vec![format!(
            "Medians of {} rounds. The floors: `ftruncate` to 0 of a memory file of 1 GiB that was written in full; a mapping of a \
             plain memory file; `pread` and `pwrite` of one.",
            effort.rounds
        )],
    }])
}

/// A volatile namespace in use, and its region.
fn namespace(map: &Arc<MemoryMap>, bytes: u64) -> anyhow::Result<(Arc<Region>, Arc<Pmem>)> {
    let spec = format!("memory,size={bytes},align=4K");
    let spec = spec.parse().map_err(|error| anyhow!("{spec}: {error}"))?;
    let region = Region::open(&spec, 0)?;
    let pmem = region.bind(map, 0)?;
    Ok((region, pmem))
}

/// Writes every byte.
fn fill(bytes: u64, write: impl Fn(u64, &[u8]) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let some = vec![0x5a; 1 << 20];
    let mut steps = (0..bytes).step_by(some.len());
    steps.try_for_each(|offset| write(offset, &some))
}

fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

fn unplug(
    what: &str,
    effort: Effort,
    ours: impl Fn() -> anyhow::Result<f64>,
) -> anyhow::Result<Row> {
    let (mut all, mut floors) = (Vec::new(), Vec::new());
    for _ in 0..effort.rounds {
        all.push(ours()?);
        floors.push(truncate()?);
    }
    Ok(Row {
        what: what.to_owned(),
        ours: median(all),
        theirs: Some(median(floors)),
        unit: "ms",
        want: Want::AtMost(1.2),
    })
}

fn truncate() -> anyhow::Result<f64> {
    let file = SharedFrames::memory("floor", GIB)?;
    fill(GIB, |offset, some| Ok(file.write(offset, some)?))?;
    let start = Instant::now();
    file.revoke()?;
    Ok(milliseconds(start))
}

fn idle(map: &Arc<MemoryMap>) -> anyhow::Result<f64> {
    let (_region, pmem) = namespace(map, GIB)?;
    fill(GIB, |offset, some| Ok(pmem.write(offset, some)?))?;
    let start = Instant::now();
    pmem.unbind(&Patience::new(None), Afterwards::Forget, |_| ())?;
    Ok(milliseconds(start))
}

/// Another thread drops references, one by one, from the moment on at which nobody can get new ones.
fn busy(map: &Arc<MemoryMap>) -> anyhow::Result<f64> {
    let (_region, pmem) = namespace(map, GIB)?;
    fill(GIB, |offset, some| Ok(pmem.write(offset, some)?))?;
    let device = pmem.pagemap().context("no frames")?;
    let first = device.ranges()[0].start();
    let held = PfnRange::new(first, REFERENCES).context("too few frames")?;
    device.get_pages(held)?;
    let dying = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            // Acquire: pairs with the release below, so that what is dropped is dropped while it drains.
            while !dying.load(Ordering::Acquire) {
                core::hint::spin_loop();
            }
            let pages = (0..REFERENCES).filter_map(|nth| first.checked_add(nth));
            pages.for_each(|pfn| device.put_page(pfn));
        });
        let start = Instant::now();
        // Release: pairs with the acquire above.
        let killed = |_: &_| dying.store(true, Ordering::Release);
        let unbound = pmem.unbind(&Patience::new(None), Afterwards::Forget, |holds| {
            killed(holds);
        });
        let taken = milliseconds(start);
        // If it failed before anybody was asked.
        dying.store(true, Ordering::Release);
        unbound?;
        Ok(taken)
    })
}

/// Reads through a mapping.
fn mapped(map: &Arc<MemoryMap>, effort: Effort) -> anyhow::Result<Row> {
    let (_region, pmem) = namespace(map, AREA)?;
    fill(AREA, |offset, some| Ok(pmem.write(offset, some)?))?;
    let plain = SharedFrames::memory("floor", AREA)?;
    fill(AREA, |offset, some| Ok(plain.write(offset, some)?))?;
    let client = Client {
        label: "bench".into(),
        pid: std::process::id(),
    };
    let guard = pmem.map(0..AREA, Sharing::Shared, client)?;
    let ours = Mapped::new(guard.fd().context("no file")?, guard.offset(), AREA)?;
    let theirs = Mapped::new(plain.fd(), 0, AREA)?;
    let read = |mapped: &Mapped| {
        let start = Instant::now();
        black_box(mapped.sum());
        milliseconds(start)
    };
    // The first pass brings the pages in.
    read(&ours);
    read(&theirs);
    let rounds = (0..effort.rounds).map(|_| (read(&ours), read(&theirs)));
    let (ours, theirs) = rounds.unzip();
    Ok(Row {
        what: "512 MiB read through a mapping".to_owned(),
        ours: median(ours),
        theirs: Some(median(theirs)),
        unit: "ms",
        want: Want::AtMost(1.1),
    })
}

/// Requests of 4 KiB, at scattered places.
fn requests(map: &Arc<MemoryMap>, effort: Effort) -> anyhow::Result<[Row; 2]> {
    let (_region, pmem) = namespace(map, AREA)?;
    let plain = SharedFrames::memory("floor", AREA)?;
    fill(AREA, |offset, some| Ok(pmem.write(offset, some)?))?;
    fill(AREA, |offset, some| Ok(plain.write(offset, some)?))?;
    let mut page = vec![0; PAGE_SIZE];
    let mut read = (Vec::new(), Vec::new());
    let mut write = (Vec::new(), Vec::new());
    for _ in 0..effort.rounds {
        read.0
            .push(each(|offset| Ok(pmem.read(offset, &mut page)?))?);
        let file = plain.fd();
        read.1.push(each(|offset| {
            rustix::io::pread(file, &mut *page, offset)?;
            Ok(())
        })?);
        write.0.push(each(|offset| Ok(pmem.write(offset, &page)?))?);
        write.1.push(each(|offset| {
            rustix::io::pwrite(file, &page, offset)?;
            Ok(())
        })?);
    }
    let row = |what: &str, (ours, theirs)| Row {
        what: what.to_owned(),
        ours: median(ours),
        theirs: Some(median(theirs)),
        unit: "ns",
        want: Want::AtMost(1.2),
    };
    Ok([row("4 KiB read", read), row("4 KiB written", write)])
}

/// Nanoseconds for each request.
fn each(mut request: impl FnMut(u64) -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let pages = AREA / PAGE_SIZE as u64;
    let start = Instant::now();
    for nth in 0..u64::from(REQUESTS) {
        // A large prime goes round all pages.
        request(nth * 7_919 % pages * PAGE_SIZE as u64)?;
    }
    Ok(start.elapsed().as_secs_f64() * 1e9 / f64::from(REQUESTS))
}
