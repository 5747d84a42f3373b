//! Groups with a limit of their own, whose files are read, read ahead, stored to and pinned with their threads interleaved in
//! random orders; and for each a bug that must be found.
//!
//! ```text
//! RUSTFLAGS="--cfg shuttle" cargo test -p pgmap-lab --release --test file_groups
//! ```
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(shuttle)]

mod explore;
mod files;

use core::ops::ControlFlow;
use std::sync::Arc;

use explore::explore;
use files::{GROUP, NEXT_BLOCK, NINES, PAGE, charged_machine, pin, spawn};
use pgmap_core::memcg::Memcg;
use pgmap_core::seeded_bug as core_bug;
use pgmap_lab::file_machine::word;
use pgmap_mm::gup::Pin;
use pgmap_mm::page_cache::Group;
use pgmap_mm::page_table::PageIndex;
use pgmap_mm::seeded_bug::{SeededBug, seed};
use pgmap_mm::space::Worker;

/// Frames for all pages.
const FRAMES: u64 = 2 * GROUP as u64;

/// A group of two pages has a file of which three are stored to, one is pinned, all are wanted ahead, and the last is punched.
fn everybody_against_limit() {
    let memcg = Arc::new(Memcg::new(2));
    let (machine, vma) = charged_machine(FRAMES, 3 * NEXT_BLOCK as usize * PAGE, &memcg);
    let reader = spawn(&machine, |machine| {
        let first = Group::of(PageIndex(0));
        machine.cache.read_group(&mut Worker::new(), first);
    });
    let pinner = spawn(&machine, move |machine| {
        let mut cpu = machine.cpu();
        for round in 1..3 {
            let at = word(&vma, NEXT_BLOCK, 0);
            let pinned = pin(&mut cpu, at, &Pin::WRITE);
            machine.memory.dma(NEXT_BLOCK).store(at, round);
            drop(pinned);
            assert_eq!(cpu.load(at), Ok(round), "the last word stored");
        }
    });
    let mut cpu = machine.cpu();
    for round in 1..3 {
        for page in [0, 2 * NEXT_BLOCK] {
            let at = word(&vma, page, 0);
            assert_eq!(cpu.store(at, round), Ok(()), "a group at its limit goes on");
            assert_eq!(cpu.load(at), Ok(round), "the last word stored");
        }
    }
    let end = u64::from(2 * NEXT_BLOCK) * PAGE as u64;
    let punched = machine
        .cache
        .punch(end..end + PAGE as u64, |_| ControlFlow::Break(()));
    assert_eq!(punched, Ok(()));
    reader.join().unwrap();
    pinner.join().unwrap();
    let charged = (memcg.charged_pages(), memcg.peak_pages());
    let cached = machine.cache.cached_pages();
    assert_eq!(charged.0, cached, "each page in RAM is charged once");
    assert!(charged.1 <= 2, "no more than the limit: {charged:?}");
    let other = cpu.load(word(&vma, 0, 1));
    assert_eq!(other, Ok(NINES), "the file's bytes");
    drop(cpu);
    machine.assert_empty();
}

/// HMM-8: pages are charged once, uncharged once, and never above the limit; who wants more waits for no other group.
#[test]
fn a_group_keeps_its_limit() {
    explore(everybody_against_limit);
}

/// HMM-8: two get the room of one.
#[test]
#[should_panic = "no more than the limit"]
fn a_charge_that_looks_first_is_found() {
    core_bug::seed(core_bug::SeededBug::ChargeLooksFirst);
    explore(everybody_against_limit);
}

/// HMM-8: charges without pages, until nothing is left of the limit.
#[test]
#[should_panic = "a group at its limit goes on"]
fn a_reader_that_keeps_its_charge_is_found() {
    seed(SeededBug::ReadAheadKeepsTheCharge);
    explore(everybody_against_limit);
}
