//! What the host's primitives cost on this machine: `cargo run --release -p pgmap-host --example figures`.
//!
//! Every figure is nanoseconds; compare those of one run only. The budgets of a fault and of a page taken out are
//! ratios to these.
#![allow(
    clippy::unwrap_used,
    reason = "a benchmark ends where something is not as it should be"
)]

use core::hint::black_box;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use pgmap_core::addr::{PAGE_SIZE, Page, VirtAddr};
use pgmap_host::event::Event;
use pgmap_host::mmu::HostMmu;
use pgmap_host::uring::{Read, Ring, Write};
use pgmap_mm::mmu::{Mmu, Protect, Slot};
use pgmap_sync::atomic::{AtomicBool, Ordering};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::thread::{CpuSet, sched_setaffinity};

const PAGES: u32 = 16384;

fn main() {
    let mmu = Arc::new(HostMmu::new(PAGES as usize * PAGE_SIZE, PAGES).unwrap());
    println!("a page, alone");
    on_cpu(0);
    batches(&mmu);
    println!("a fault, from access to access");
    for cpu in [0, 1, 0, 1] {
        faults(&mmu, cpu);
    }
    println!("a page of a file");
    for depth in [0, 32] {
        files(depth);
    }
    println!("a page, while a sibling thread runs on the other CPU");
    thread::spawn(|| {
        on_cpu(1);
        loop {
            black_box(());
        }
    });
    batches(&mmu);
}

fn on_cpu(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    if sched_setaffinity(None, &set).is_err() {
        println!("  (there is no CPU {cpu})");
    }
}

fn at(mmu: &HostMmu, page: u32) -> VirtAddr {
    VirtAddr::new(mmu.range().start + page as usize * PAGE_SIZE)
}

/// Nanoseconds for each page of `run`, which does `batch` pages at a time.
fn per_page(batch: usize, mut run: impl FnMut(u32)) -> u128 {
    let start = Instant::now();
    (0..PAGES).step_by(batch).for_each(&mut run);
    start.elapsed().as_nanos() / u128::from(PAGES)
}

fn batches(mmu: &HostMmu) {
    let pages = vec![Page([7; PAGE_SIZE]); 64];
    for batch in [1, 4, 16, 64] {
        let install = per_page(batch, |page| {
            let progress = mmu.install(at(mmu, page), &pages[..batch], Protect::ReadWrite);
            assert_eq!(progress.done, batch);
        });
        let take_out = per_page(batch, |page| {
            assert_eq!(mmu.take_out(at(mmu, page), batch, Slot(page)).done, batch);
        });
        let give_back = per_page(batch, |page| {
            assert_eq!(mmu.give_back(Slot(page), batch, at(mmu, page)).done, batch);
        });
        let zap = per_page(batch, |page| mmu.zap(at(mmu, page), batch));
        let zero = per_page(batch, |page| {
            assert_eq!(mmu.install_zero(at(mmu, page), batch).done, batch);
        });
        mmu.zap(at(mmu, 0), PAGES as usize);
        println!(
            "  {batch:2} at a time: install {install}, zeros {zero}, take out {take_out}, give back {give_back}, zap {zap}"
        );
    }
}

fn faults(mmu: &Arc<HostMmu>, cpu: usize) {
    let stop = Arc::new(AtomicBool::new(false));
    let server = {
        let (mmu, stop) = (Arc::clone(mmu), Arc::clone(&stop));
        thread::spawn(move || {
            on_cpu(cpu);
            serve(&mmu, &stop);
        })
    };
    let mut times: Vec<u128> = (0..PAGES)
        .map(|page| {
            let byte = at(mmu, page).get() as *const u8;
            let start = Instant::now();
            // SAFETY: the arena is mapped, and nobody else uses it.
            black_box(unsafe { byte.read_volatile() });
            start.elapsed().as_nanos()
        })
        .collect();
    // Release: pairs with the acquire load in `serve`.
    stop.store(true, Ordering::Release);
    mmu.kick();
    server.join().unwrap();
    mmu.zap(at(mmu, 0), PAGES as usize);
    times.sort_unstable();
    let (median, most) = (times[times.len() / 2], times[times.len() * 9 / 10]);
    println!("  served on CPU {cpu}, touched on CPU 0: median {median}, 90% {most}");
}

fn serve(mmu: &HostMmu, stop: &AtomicBool) {
    let page = [Page([1; PAGE_SIZE])];
    let mut events = [const { Event::Kick }; 32];
    // Acquire: pairs with the release store in `faults`.
    while !stop.load(Ordering::Acquire) {
        let count = mmu.next_events(&mut events, None);
        for event in &events[..count] {
            if let Event::Fault { at, .. } = event {
                assert_eq!(mmu.install(*at, &page, Protect::ReadWrite).stop, None);
            }
        }
    }
}

fn files(depth: u32) {
    const BATCH: u64 = 32;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    let Ok(file) = openat(CWD, ".", flags, Mode::RUSR | Mode::WUSR) else {
        println!("  (no direct I/O here)");
        return;
    };
    let mut ring = Ring::new(depth);
    let mut pages = vec![Page::ZERO; 32];
    let offset = |batch: u64, nth: usize| (batch * BATCH + nth as u64) * PAGE_SIZE as u64;
    let start = Instant::now();
    for batch in 0..64 {
        let mut writes: Vec<_> = pages
            .iter()
            .enumerate()
            .map(|(nth, page)| Write {
                offset_bytes: offset(batch, nth),
                page,
                outcome: Ok(()),
            })
            .collect();
        ring.write_batch(&file, &mut writes);
        assert!(writes.iter().all(|write| write.outcome.is_ok()));
    }
    let write = start.elapsed().as_nanos() / u128::from(64 * BATCH);
    let start = Instant::now();
    for batch in 0..64 {
        let mut reads: Vec<_> = pages
            .iter_mut()
            .enumerate()
            .map(|(nth, page)| Read {
                offset_bytes: offset(batch, nth),
                page,
                outcome: Ok(()),
            })
            .collect();
        ring.read_batch(&file, &mut reads);
        assert!(reads.iter().all(|read| read.outcome.is_ok()));
    }
    let read = start.elapsed().as_nanos() / u128::from(64 * BATCH);
    println!("  up to {depth} in flight, 32 at a time: read {read}, write {write}");
}
