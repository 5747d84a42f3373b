//! The RAM of a memory goes off and on line in blocks while it is used.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use core::ptr;
use core::time::Duration;
use std::io::ErrorKind;
use std::os::unix::process::CommandExt;
use std::process::Command;

use pgmap::{BlockState, Device, HotplugError, Mapping, Memory, Pin, ZoneChoice};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

const MIB: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(10);

/// A memory of 64 MiB in blocks of 8 MiB; none where the machine does not allow it.
fn memory() -> Option<Memory> {
    let builder = Memory::builder().ram(64 << 20);
    match builder.device(Device::compressed(1 << 30)).build() {
        Ok(memory) => Some(memory),
        Err(error) => {
            eprintln!("SKIPPED: {error}");
            None
        }
    }
}

fn online(memory: &Memory) -> usize {
    let is_online = |state| matches!(state, BlockState::Online(_));
    let blocks = memory.ram_blocks();
    blocks.iter().filter(|block| is_online(block.state)).count()
}

/// Bytes of RAM in use.
fn resident(memory: &Memory) -> u64 {
    let blocks = memory.ram_blocks();
    blocks.iter().map(|block| block.used_frames).sum::<u64>() * 4096
}

/// HOT-5: the budget of a memory in use follows its blocks, and no byte is lost.
#[test]
fn the_budget_follows_the_blocks() {
    let Some(memory) = memory() else { return };
    let mut map = memory.map(128 * MIB).unwrap();
    number(&mut map);
    let blocks: Vec<_> = memory.ram_blocks().iter().map(|block| block.id).collect();
    assert_eq!((blocks.len(), online(&memory)), (8, 8));
    // Among them those that wait in staging: they were written first.
    for block in &blocks[..4] {
        memory.offline(*block, PATIENCE).unwrap();
    }
    assert_eq!(online(&memory), 4);
    assert!(resident(&memory) <= 32 << 20, "{}", resident(&memory));
    assert_numbered(&map);
    assert!(resident(&memory) <= 32 << 20, "{}", resident(&memory));
    for block in &blocks[..4] {
        memory.online(*block, ZoneChoice::Auto).unwrap();
    }
    assert_eq!(online(&memory), 8);
}

/// HOT-4, HOT-5: where forks are announced, since the machine does not tell of them, there are as many blocks as elsewhere. A child
/// has every page whatever is off line; and while it is being made, nothing goes off line for which pages would have to leave.
#[test]
fn blocks_go_off_line_around_announced_forks() {
    // This thread alone, and the pager's, which it starts.
    let mut sets = capabilities(None).unwrap();
    sets.effective.remove(CapabilitySet::SYS_PTRACE);
    set_capabilities(None, sets).unwrap();
    let Some(memory) = memory() else { return };
    assert!(memory.space().needs_announced_forks());
    let mut map = memory.map(128 * MIB).unwrap();
    number(&mut map);
    let blocks: Vec<_> = memory.ram_blocks().iter().map(|block| block.id).collect();
    assert_eq!((blocks.len(), online(&memory)), (8, 8));
    for block in &blocks[..4] {
        memory.offline(*block, PATIENCE).unwrap();
    }
    assert!(resident(&memory) <= 32 << 20, "{}", resident(&memory));

    memory.space().before_fork();
    let refused = memory.offline(blocks[4], Duration::from_millis(50));
    let child = child_sees(&map);
    memory.space().after_fork();
    assert!(
        matches!(refused, Err(HotplugError::Busy(..))),
        "{refused:?}"
    );
    child.unwrap();
    assert_eq!(online(&memory), 4);

    // What was above the budget leaves, and then the block can.
    memory.offline(blocks[4], PATIENCE).unwrap();
    assert_numbered(&map);
    for block in &blocks[..5] {
        memory.online(*block, ZoneChoice::Auto).unwrap();
    }
    memory.space().before_fork();
    let child = child_sees(&map);
    memory.space().after_fork();
    child.unwrap();
    assert_eq!(online(&memory), 8);
}

/// Whether a child finds all bytes. It executes another program then.
fn child_sees(map: &Mapping<'_>) -> std::io::Result<()> {
    let range = map.range().clone();
    let mut command = Command::new("true");
    let look = move || {
        for (nth, at) in range.clone().step_by(4096).enumerate() {
            // SAFETY: the mapping lives while the child is made, and the child has a copy of its pages; what it has not is
            // a signal that ends it. Nobody writes there.
            let found = unsafe { ptr::with_exposed_provenance::<usize>(at).read_volatile() };
            if found != nth {
                return Err(ErrorKind::InvalidData.into());
            }
        }
        Ok(())
    };
    // SAFETY: it reads memory, and allocates nothing.
    unsafe { command.pre_exec(look) };
    match command.status()? {
        status if status.success() => Ok(()),
        status => Err(std::io::Error::other(status.to_string())),
    }
}

fn number(map: &mut Mapping<'_>) {
    for (nth, page) in map.as_mut_slice().chunks_mut(4096).enumerate() {
        page[..8].copy_from_slice(&nth.to_le_bytes());
    }
}

#[track_caller]
fn assert_numbered(map: &Mapping<'_>) {
    for (nth, page) in map.as_slice().chunks(4096).enumerate() {
        assert_eq!(page[..8], nth.to_le_bytes());
    }
}

/// HOT-4: a pinned page keeps its block on line, and the error says who pins it.
#[test]
fn a_pinned_block_stays_by_name() {
    let Some(memory) = memory() else { return };
    let mut map = memory.map(16 * MIB).unwrap();
    map.as_mut_slice().fill(1);
    let pin = memory
        .space()
        .pin_user_pages(
            map.range().start..map.range().start + 16 * MIB,
            &Pin::READ.label("rx ring"),
        )
        .unwrap();
    let kept: Vec<_> = memory
        .ram_blocks()
        .into_iter()
        .filter(|block| block.pinned_frames > 0)
        .collect();
    assert!(!kept.is_empty());
    for block in &kept {
        let error = memory.offline(block.id, Duration::ZERO).unwrap_err();
        assert!(error.to_string().contains("rx ring"), "{error}");
    }
    assert_eq!(online(&memory), 8);
    drop(pin);
    memory.offline(kept[0].id, PATIENCE).unwrap();
    assert!(map.as_slice().iter().all(|byte| *byte == 1));
}
