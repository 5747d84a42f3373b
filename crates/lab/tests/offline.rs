//! RAM that goes on and off line under a program, step by step.
//!
//! ```text
//! cargo test -p pgmap-lab --test offline
//! ```
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(not(any(loom, shuttle)))]

use core::ops::ControlFlow;
use std::borrow::Cow;
use std::sync::Arc;

use pgmap_core::hotplug::{HotplugError, Obstacle};
use pgmap_core::sparse::{BlockId, SUBSECTION_FRAMES};
use pgmap_core::zone::ZoneChoice;
use pgmap_lab::device::{self, ModelDevice};
use pgmap_lab::machine::{Cpu, Machine, Setup};
use pgmap_lab::model::{self, ModelMmu};
use pgmap_mm::gup::{Pin, PinError, pin_user_pages};
use pgmap_mm::reclaim::Caller;

const PAGES: u32 = 1600;
const SLOTS: u32 = 64;

/// Two blocks of RAM, and a device for `capacity` pages.
fn machine(capacity: usize) -> Arc<Machine> {
    let machine = Machine::new(Setup {
        pages: PAGES,
        frames: 2 * SUBSECTION_FRAMES,
        slots: SLOTS,
        mmu: ModelMmu::new(SLOTS, model::Flaw::None),
        devices: vec![ModelDevice::new(capacity, device::Flaw::None)],
    });
    let machine = machine.unwrap();
    machine.space.map(PAGES, 1).unwrap();
    machine
}

/// Takes a block off line, for as long as that gets anywhere.
fn offline(machine: &Machine, block: u32) -> Result<(), HotplugError> {
    let space = &machine.space;
    space.offline(Caller::Reclaimer, BlockId(block), |round| {
        if round.gone_frames > 0 {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    })
}

/// HOT-5: a running program has less RAM when a block is off line, and more when it is on line again; no store is lost.
#[test]
fn blocks_change_the_budget_of_a_running_program() {
    let machine = machine(1000);
    let ram = machine.space.ram();
    let mut cpu = machine.cpu();
    let touch = |cpu: &mut Cpu, pages: u32| {
        for page in 0..pages {
            assert_eq!(cpu.store(machine.word(page, 0), u64::from(page)), Ok(()));
        }
    };
    touch(&mut cpu, 900);
    assert!(ram.in_use() >= 900);
    for block in [0, 1] {
        offline(&machine, block).unwrap();
        assert_eq!(ram.limit(), SUBSECTION_FRAMES);
        assert!(ram.in_use() <= SUBSECTION_FRAMES);
        assert!(machine.devices[0].pages() > 0, "the rest is on the device");
        touch(&mut cpu, 900);
        assert!(ram.in_use() <= SUBSECTION_FRAMES);
        ram.online(BlockId(block), ZoneChoice::Auto).unwrap();
        touch(&mut cpu, 900);
        assert!(ram.in_use() > SUBSECTION_FRAMES);
    }
    for page in 0..900 {
        assert_eq!(cpu.load(machine.word(page, 0)), Ok(u64::from(page)));
    }
    machine.assert_empty();
}

/// HOT-4: a pin keeps its block on line, by name; when it is dropped, the block goes.
#[test]
fn a_pin_keeps_its_block_on_line_by_name() {
    let machine = machine(1000);
    let ram = machine.space.ram();
    let mut cpu = machine.cpu();
    for page in 0..100 {
        assert_eq!(cpu.store(machine.word(page, 0), 1), Ok(()));
    }
    let (at, label) = (machine.word(40, 0), Cow::Borrowed("rdma-writer"));
    let pin = pin_user_pages(
        &machine.space,
        &mut cpu.worker,
        at,
        2,
        &Pin::WRITE.label(label),
    );
    let before = (ram.limit(), ram.capacity(), ram.in_use());
    let error = offline(&machine, 0).unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("memory0 stays on line: pfn ") && text.contains("held by rdma-writer"),
        "{text}"
    );
    assert_eq!((ram.limit(), ram.capacity(), ram.in_use()), before);
    assert_eq!(
        ram.blocks()
            .iter()
            .map(|block| block.pinned_frames)
            .sum::<u64>(),
        2
    );
    drop(pin);
    offline(&machine, 0).unwrap();
    machine.assert_empty();
}

/// HOT-4: when neither RAM nor devices have room, the block stays on line, and every page is where it was or has moved.
#[test]
fn a_block_stays_on_line_if_its_pages_have_no_other_place() {
    let machine = machine(20);
    let ram = machine.space.ram();
    let mut cpu = machine.cpu();
    for page in 0..900 {
        assert_eq!(cpu.store(machine.word(page, 0), u64::from(page)), Ok(()));
    }
    let error = offline(&machine, 0).unwrap_err();
    assert!(
        matches!(error, HotplugError::Busy(_, Obstacle::NoRoom { .. })),
        "{error}"
    );
    assert_eq!(ram.limit(), 2 * SUBSECTION_FRAMES);
    for page in 0..900 {
        assert_eq!(cpu.load(machine.word(page, 0)), Ok(u64::from(page)));
    }
    machine.assert_empty();
}

/// GUP-2: who pins a page for long makes it leave `ZONE_MOVABLE` first, and its block can go off line while it is pinned; who pins for
/// a transfer leaves it where it is. Without room elsewhere, the pin is refused with that reason.
#[test]
fn a_long_pin_makes_a_page_leave_the_movable_zone() {
    let machine = machine(1000);
    let (space, ram) = (&machine.space, machine.space.ram());
    let mut cpu = machine.cpu();
    offline(&machine, 1).unwrap();
    ram.online(BlockId(1), ZoneChoice::Movable).unwrap();
    for page in 0..100 {
        assert_eq!(cpu.store(machine.word(page, 0), u64::from(page)), Ok(()));
    }
    assert!(ram.used_in(BlockId(1)) >= 100, "MOVABLE is used first");
    let at = machine.word(40, 0);
    let short = pin_user_pages(space, &mut cpu.worker, at, 2, &Pin::READ).unwrap();
    assert_eq!(ram.used_in(BlockId(0)), 0);
    let long = Pin::WRITE.label("registered").long_term();
    let refused = pin_user_pages(space, &mut cpu.worker, at, 2, &long).unwrap_err();
    assert_eq!(
        refused,
        PinError::Movable { at },
        "somebody else has it pinned"
    );
    drop(short);
    let pin = pin_user_pages(space, &mut cpu.worker, at, 2, &long).unwrap();
    assert_eq!(ram.used_in(BlockId(0)), 2);
    offline(&machine, 1).unwrap();
    assert_eq!(cpu.load(at), Ok(40));
    drop(pin);
    machine.assert_empty();
}

/// GUP-2: a page that is on a device comes back before it is pinned, for long or not.
#[test]
fn a_page_on_a_device_comes_back_before_it_is_pinned() {
    let machine = machine(1000);
    let space = &machine.space;
    let mut cpu = machine.cpu();
    let at = machine.word(0, 0);
    assert_eq!(cpu.store(at, 7), Ok(()));
    while machine.devices[0].pages() == 0 {
        cpu.reclaim(1);
    }
    let long = Pin::WRITE.long_term();
    let pin = pin_user_pages(space, &mut cpu.worker, at, 1, &long).unwrap();
    assert_eq!(
        (machine.devices[0].pages(), machine.mmu.load(at)),
        (0, Ok(7))
    );
    drop(pin);
    machine.assert_empty();
}

/// GUP-2: a long pin is refused where all RAM but `ZONE_MOVABLE` is pinned already.
#[test]
fn a_long_pin_is_refused_where_only_movable_ram_is_left() {
    let machine = machine(1000);
    let (space, ram) = (&machine.space, machine.space.ram());
    let mut cpu = machine.cpu();
    let long = Pin::WRITE.long_term();
    let full = u32::try_from(SUBSECTION_FRAMES).unwrap();
    let pin = pin_user_pages(space, &mut cpu.worker, machine.word(0, 0), full, &long).unwrap();
    assert_eq!(ram.used_in(BlockId(0)), SUBSECTION_FRAMES);
    offline(&machine, 1).unwrap();
    ram.online(BlockId(1), ZoneChoice::Movable).unwrap();
    let at = machine.word(full, 0);
    let refused = pin_user_pages(space, &mut cpu.worker, at, 1, &long).unwrap_err();
    assert_eq!(refused, PinError::Movable { at });
    assert!(pin_user_pages(space, &mut cpu.worker, at, 1, &Pin::WRITE).is_ok());
    drop(pin);
    assert!(pin_user_pages(space, &mut cpu.worker, at, 1, &long).is_ok());
    machine.assert_empty();
}
