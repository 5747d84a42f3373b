//! The range of managed addresses.

mod common;

use common::arena;
use pgmap_core::addr::PAGE_SIZE;
use pgmap_host::mmu::{HostError, HostMmu};

#[test]
fn blocks_do_not_straddle_the_machines_tables() {
    for pages in [1, 511, 512, 513] {
        let Some(mmu) = arena(pages) else { return };
        let range = mmu.range();
        assert!(range.start.is_multiple_of(2 << 20));
        assert_eq!(range.len(), pages * PAGE_SIZE);
    }
}

#[test]
fn more_addresses_than_there_are_is_an_error() {
    if arena(1).is_none() {
        return;
    }
    for bytes in [usize::MAX, usize::MAX - PAGE_SIZE, 1 << 60] {
        let refused = HostMmu::new(bytes, 1);
        assert!(matches!(refused, Err(HostError::Addresses { .. })));
    }
}

#[test]
fn an_arena_that_is_dropped_leaves_no_descriptor_behind() {
    let descriptors = || std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    let count_with = |rounds| {
        for _ in 0..rounds {
            drop(arena(4));
        }
        descriptors()
    };
    // Other tests of this file open and close some at the same time, but never many.
    let before = count_with(1);
    assert!(count_with(50) < before + 25);
}
