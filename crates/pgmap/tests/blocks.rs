//! The RAM of a memory goes off and on line in blocks while it is used.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use core::time::Duration;

use pgmap::{BlockState, Device, Memory, Pin, ZoneChoice};

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
    for (nth, page) in map.as_mut_slice().chunks_mut(4096).enumerate() {
        page[..8].copy_from_slice(&nth.to_le_bytes());
    }
    let blocks: Vec<_> = memory.ram_blocks().iter().map(|block| block.id).collect();
    assert_eq!((blocks.len(), online(&memory)), (8, 8));
    for block in &blocks[2..6] {
        memory.offline(*block, PATIENCE).unwrap();
    }
    assert_eq!(online(&memory), 4);
    assert!(resident(&memory) <= 32 << 20, "{}", resident(&memory));
    for (nth, page) in map.as_slice().chunks(4096).enumerate() {
        assert_eq!(page[..8], nth.to_le_bytes());
    }
    assert!(resident(&memory) <= 32 << 20, "{}", resident(&memory));
    for block in &blocks[2..6] {
        memory.online(*block, ZoneChoice::Auto).unwrap();
    }
    assert_eq!(online(&memory), 8);
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
