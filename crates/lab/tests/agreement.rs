//! Managed memory agrees with a map from addresses to words, whatever happens to it meanwhile.
//!
//! One thread, random steps, every one checked: loads and stores, `madvise`, `munmap` and `mmap`, reclaim, pins that
//! `mm` knows of and pins that it does not, DMA, devices that fail, are full, or are taken away, RAM that goes on and off line.
//!
//! ```text
//! cargo test -p pgmap-lab --release --test agreement
//! PROPTEST_CASES=20000 cargo test -p pgmap-lab --release --test agreement
//! ```
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(not(any(loom, shuttle)))]

mod history;

use std::sync::Arc;

use history::{History, Step};
use pgmap_core::sparse::{BlockId, SUBSECTION_FRAMES};
use pgmap_lab::device::{self, Failure, ModelDevice};
use pgmap_lab::machine::{Machine, Setup};
use pgmap_lab::model::{self, ModelMmu, Operation};
use pgmap_mm::gup::PinAccess;
use pgmap_mm::mmu::Stop;
use proptest::prelude::*;

/// Pages of address space: three blocks.
const PAGES: u32 = 192;

fn machine(
    frames: u64,
    slots: u32,
    capacities: &[usize],
    mmu: model::Flaw,
    device: device::Flaw,
) -> Arc<Machine> {
    let devices = capacities
        .iter()
        .map(|capacity| ModelDevice::new(*capacity, device));
    let machine = Machine::new(Setup {
        pages: PAGES,
        // For forks, which need all pages at once; and a block that may go off line.
        frames: SUBSECTION_FRAMES + frames + u64::from(PAGES),
        slots,
        mmu: ModelMmu::new(slots, mmu),
        devices: devices.collect(),
    })
    .unwrap();
    machine.space.ram().set_limit(frames);
    machine
}

fn any_step() -> impl Strategy<Value = Step> {
    let page = || 0..PAGES;
    let word = || prop_oneof![Just(0usize), Just(511), 0usize..512];
    let len = || prop_oneof![1u32..4, 1u32..80];
    let failure = prop_oneof![
        Just(Failure::Write),
        Just(Failure::Read),
        Just(Failure::Corrupt)
    ];
    let refusal = prop_oneof![
        Just((Operation::Install, Stop::NoMemory)),
        Just((Operation::Install, Stop::Other(12))),
        Just((Operation::TakeOut, Stop::Unevictable)),
        Just((Operation::TakeOut, Stop::Busy)),
        Just((Operation::TakeOut, Stop::Gone)),
        Just((Operation::GiveBack, Stop::NoMemory)),
    ];
    prop_oneof![
        12 => (page(), word()).prop_map(|(page, nth)| Step::Store(page, nth)),
        12 => (page(), word()).prop_map(|(page, nth)| Step::Load(page, nth)),
        4 => (page(), 1u32..80).prop_map(|(page, len)| Step::StoreRun(page..page + len)),
        4 => (page(), 1u32..80).prop_map(|(page, len)| Step::LoadRun(page..page + len)),
        2 => (page(), 2u32..9).prop_map(|(page, step)| Step::LoadStride(page, step)),
        3 => (page(), len()).prop_map(|(page, len)| Step::Discard(page..page + len)),
        2 => (page(), len()).prop_map(|(page, len)| Step::Unmap(page..page + len)),
        3 => len().prop_map(Step::Map),
        4 => (1usize..40).prop_map(Step::Reclaim),
        3 => (1usize..40).prop_map(Step::Deactivate),
        3 => (1usize..40).prop_map(Step::SendAway),
        3 => (page(), 1u32..4, prop_oneof![Just(PinAccess::Read), Just(PinAccess::Write)])
            .prop_map(|(page, len, access)| Step::Pin(page..page + len, access)),
        3 => any::<usize>().prop_map(Step::Unpin),
        3 => (any::<usize>(), word()).prop_map(|(nth, word)| Step::DmaStore(nth, word)),
        2 => page().prop_map(Step::PinUnseen),
        2 => any::<usize>().prop_map(Step::UnpinUnseen),
        1 => page().prop_map(Step::DropUnseen),
        1 => Just(Step::Fork),
        1 => (8u64..40).prop_map(Step::SetLimit),
        1 => (0usize..2).prop_map(Step::Unplug),
        2 => (0u32..2).prop_map(|block| Step::Toggle(BlockId(block))),
        1 => (0usize..2, failure).prop_map(|(device, failure)| Step::Fail(device, failure)),
        1 => refusal.prop_map(|(operation, stop)| Step::Refuse(operation, stop)),
    ]
}

fn run(machine: Arc<Machine>, steps: Vec<Step>) {
    let mut history = History::new(machine);
    for step in steps {
        history.step(&step);
    }
    history.end();
}

proptest! {
    /// With room for everything on the devices no access ever fails, unless a device lost its bytes. What comes by DMA through a pin
    /// is found afterwards: a copy that a device keeps is given up before a page is pinned to be written (GUP-1, GUP-4).
    #[test]
    fn memory_agrees_with_a_map(steps in prop::collection::vec(any_step(), 1..300)) {
        run(machine(40, 32, &[20, 300], model::Flaw::None, device::Flaw::None), steps);
    }

    /// When RAM and device are full, accesses wait for memory, and nothing else goes wrong.
    #[test]
    fn memory_agrees_with_a_map_when_all_is_full(steps in prop::collection::vec(any_step(), 1..200)) {
        run(machine(16, 8, &[40], model::Flaw::None, device::Flaw::None), steps);
    }
}

/// A cheap generator for the tests that a flaw must fail: the same steps every time.
fn many_steps() -> Vec<Step> {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let steps = prop::collection::vec(any_step(), 30_000);
    steps.new_tree(&mut runner).unwrap().current()
}

/// The same checks find a machine that moves pinned pages.
#[test]
#[should_panic = "agrees"]
fn a_machine_that_moves_pinned_pages_is_found() {
    run(
        machine(
            40,
            32,
            &[20, 300],
            model::Flaw::TakesPinned,
            device::Flaw::None,
        ),
        many_steps(),
    );
}

/// The same checks find a machine whose write protection does nothing.
#[test]
#[should_panic = "agrees"]
fn a_machine_that_never_protects_is_found() {
    run(
        machine(
            40,
            32,
            &[20, 300],
            model::Flaw::NeverProtects,
            device::Flaw::None,
        ),
        many_steps(),
    );
}

/// The same checks find a device that promises bytes before it has them.
#[test]
#[should_panic = "agrees"]
fn a_device_that_completes_early_is_found() {
    run(
        machine(
            40,
            32,
            &[20, 300],
            model::Flaw::None,
            device::Flaw::CompletesEarly,
        ),
        many_steps(),
    );
}
