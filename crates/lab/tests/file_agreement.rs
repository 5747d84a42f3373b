//! A mapped file agrees with a vector of bytes, whatever happens to its pages meanwhile.
//!
//! One thread, random steps, every one checked: loads and stores through several mappings, pins and DMA, writeback that skips,
//! copies or waits, reclaim, truncation, holes, extension, lost memory, a disk that fails, a machine that refuses.
//!
//! ```text
//! cargo test -p pgmap-lab --release --test file_agreement
//! PROPTEST_CASES=20000 cargo test -p pgmap-lab --release --test file_agreement
//! ```
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(not(any(loom, shuttle)))]

mod file_history;

use std::sync::Arc;

use file_history::{FileHistory, MAPPED, Mode, Step};
use pgmap_core::addr::PAGE_SIZE;
use pgmap_lab::disk::{self, ModelFile};
use pgmap_lab::file_machine::{FileMachine, FileSetup};
use pgmap_lab::shared_memory::{self, ModelSharedMmu};
use pgmap_mm::backing::BackingError;
use pgmap_mm::gup::PinAccess;
use pgmap_mm::mmu::Stop;
use proptest::prelude::*;

/// Pages that the file may have: three blocks.
const PAGES: u32 = 192;
const MOST_BYTES: u64 = PAGES as u64 * PAGE_SIZE as u64;

fn machine(frames: u64, memory: shared_memory::Flaw, disk: disk::Flaw) -> Arc<FileMachine> {
    // Longer than a whole number of pages.
    let bytes = (0..130 * PAGE_SIZE + 700).map(|at| at.to_le_bytes()[at % 3]);
    let machine = FileMachine::new(FileSetup {
        // For those that lose their bytes.
        frames: frames + 4096,
        most_pages: PAGES,
        memcg: None,
        memory: ModelSharedMmu::new(PAGES, memory),
        disk: ModelFile::new(bytes.collect(), disk),
    });
    let machine = machine.unwrap();
    machine.machine.space.ram().set_limit(frames);
    machine
}

fn any_step() -> impl Strategy<Value = Step> {
    let page = || 0..PAGES;
    let word = || prop_oneof![Just(0usize), Just(87), Just(511), 0usize..512];
    let vma = || 0..MAPPED.len();
    let run = || (page(), 1u32..60).prop_map(|(page, len)| page..(page + len).min(PAGES));
    let few = || (page(), 1u32..4).prop_map(|(page, len)| page..(page + len).min(PAGES));
    let bytes = || {
        prop_oneof![
            (0u64..=u64::from(PAGES)).prop_map(|page| page * PAGE_SIZE as u64),
            0u64..=MOST_BYTES,
        ]
    };
    let access = prop_oneof![Just(PinAccess::Read), Just(PinAccess::Write)];
    let mode = prop_oneof![
        Just(Mode::Skip),
        Just(Mode::Bounce),
        (1u32..4).prop_map(Mode::Wait)
    ];
    let failure = prop_oneof![
        Just(disk::Operation::Read),
        Just(disk::Operation::Write),
        Just(disk::Operation::Sync),
        Just(disk::Operation::SetLen),
        Just(disk::Operation::Punch),
    ];
    let error = prop_oneof![Just(BackingError::Io(5)), Just(BackingError::NoSpace(28))];
    let refusal = prop_oneof![
        Just((shared_memory::Operation::Map, Stop::NoMemory)),
        Just((shared_memory::Operation::Protect, Stop::Other(12))),
    ];
    prop_oneof![
        12 => (vma(), page(), word()).prop_map(|(vma, page, nth)| Step::Store(vma, page, nth)),
        12 => (vma(), page(), word()).prop_map(|(vma, page, nth)| Step::Load(vma, page, nth)),
        4 => (vma(), run()).prop_map(|(vma, run)| Step::StoreRun(vma, run)),
        4 => (vma(), run()).prop_map(|(vma, run)| Step::LoadRun(vma, run)),
        4 => (vma(), few(), access).prop_map(|(vma, run, access)| Step::Pin(vma, run, access)),
        4 => any::<usize>().prop_map(Step::Unpin),
        4 => (any::<usize>(), word()).prop_map(|(nth, word)| Step::Dma(nth, word)),
        4 => (run(), mode).prop_map(|(run, mode)| Step::WriteBack(run, mode)),
        1 => (1u32..4).prop_map(Step::WriteSome),
        2 => Just(Step::Sync),
        4 => (1usize..40).prop_map(Step::Shrink),
        3 => bytes().prop_map(Step::SetLen),
        3 => (bytes(), 1u64..40_000).prop_map(|(start, len)| Step::Punch(start..start + len)),
        1 => page().prop_map(Step::MemoryFailure),
        2 => vma().prop_map(Step::Map),
        1 => vma().prop_map(Step::Unmap),
        1 => (failure, error).prop_map(|(operation, error)| Step::Fail(operation, error)),
        1 => refusal.prop_map(|(operation, stop)| Step::Refuse(operation, stop)),
    ]
}

fn run(machine: Arc<FileMachine>, steps: Vec<Step>) {
    let mut history = FileHistory::new(machine);
    for step in steps {
        history.step(&step);
    }
    history.end();
}

proptest! {
    /// FLT-2, FLT-4, GUP-4, WB-1 to WB-6: with RAM for a part of the file every load, every sync and every count agrees.
    #[test]
    fn a_file_agrees_with_its_bytes(steps in prop::collection::vec(any_step(), 1..300)) {
        run(machine(48, shared_memory::Flaw::None, disk::Flaw::None), steps);
    }

    /// The same with RAM for all of it: nothing leaves but by truncation.
    #[test]
    fn a_file_in_ram_agrees_with_its_bytes(steps in prop::collection::vec(any_step(), 1..200)) {
        run(machine(400, shared_memory::Flaw::None, disk::Flaw::None), steps);
    }
}

/// A cheap generator for the tests that a flaw must fail: the same steps every time.
fn many_steps() -> Vec<Step> {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let steps = prop::collection::vec(any_step(), 5_000);
    steps.new_tree(&mut runner).unwrap().current()
}

/// The same checks find a machine whose write protection does nothing.
#[test]
#[should_panic = "agrees"]
fn a_machine_that_never_protects_is_found() {
    run(
        machine(48, shared_memory::Flaw::NeverProtects, disk::Flaw::None),
        many_steps(),
    );
}

/// The same checks find a machine that leaves pages mapped whose memory is given back.
#[test]
#[should_panic = "agrees"]
fn a_machine_that_never_unmaps_is_found() {
    run(
        machine(48, shared_memory::Flaw::NeverUnmaps, disk::Flaw::None),
        many_steps(),
    );
}

/// The same checks find a disk that promises bytes before it has them.
#[test]
#[should_panic = "agrees"]
fn a_disk_that_never_syncs_is_found() {
    run(
        machine(48, shared_memory::Flaw::None, disk::Flaw::NeverSyncs),
        many_steps(),
    );
}
