//! The table of slots against a set, alone and shared.

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

fn table(count: usize) -> &'static [AtomicU64] {
    let table: Box<[AtomicU64]> = (0..count).map(|_| AtomicU64::new(0)).collect();
    Box::leak(table)
}

fn owner(number: u8) -> Owner {
    Owner::new(number).unwrap()
}

#[derive(Clone, Debug)]
enum Step {
    Alloc(usize),
    Free(usize),
}

fn step() -> impl Strategy<Value = (bool, Step)> {
    let step = prop_oneof![
        (0_usize..12).prop_map(Step::Alloc),
        (0_usize..40).prop_map(Step::Free)
    ];
    (any::<bool>(), step)
}

proptest! {
    #[test]
    fn two_processes_never_hold_one_slot(steps in prop::collection::vec(step(), 0..200)) {
        let table = table(32);
        let slots = [Slots::shared(table, owner(0)), Slots::shared(table, owner(63))];
        let mut model = [HashSet::new(), HashSet::new()];
        for (second, step) in steps {
            let me = usize::from(second);
            match step {
                Step::Alloc(want) => {
                    let free = 32 - model[0].len() - model[1].len();
                    match slots[me].alloc(want) {
                        None => prop_assert!(want == 0 || free == 0),
                        Some(run) => {
                            prop_assert!(!run.is_empty() && run.len() <= want);
                            for slot in run {
                                prop_assert!(!model[1 - me].contains(&slot));
                                prop_assert!(model[me].insert(slot));
                            }
                        }
                    }
                }
                Step::Free(slot) => {
                    prop_assert_eq!(slots[me].free(slot), model[me].remove(&slot));
                }
            }
            prop_assert_eq!(slots[me].held(), model[me].len() as u64);
        }
        for slot in 0..40 {
            prop_assert_eq!(slots[0].holds(slot), model[0].contains(&slot));
        }
    }
}

#[test]
fn slots_are_given_in_a_row_and_from_where_the_last_search_ended() {
    let slots = Slots::private(16).unwrap();
    assert_eq!(slots.alloc(4), Some(0..4));
    assert_eq!(slots.alloc(4), Some(4..8));
    assert!(slots.free(1));
    assert_eq!(slots.alloc(20), Some(8..16));
    assert_eq!(slots.alloc(4), Some(1..2));
    assert_eq!(slots.alloc(1), None);
}

#[test]
fn a_forks_child_keeps_what_its_parent_frees() {
    let table = table(8);
    let parent = Slots::shared(table, owner(1));
    assert_eq!(parent.alloc(3), Some(0..3));
    // The child's copy of the parent's memory.
    let child = Slots::shared(table, owner(1));
    child.adopt(owner(2));
    assert!(parent.free(0) && !parent.holds(0) && child.holds(0));
    assert_eq!(parent.alloc(8), Some(3..8));
    assert!(child.free(0));
    assert_eq!(parent.alloc(8), Some(0..1));
}

#[test]
fn a_dead_process_gives_back_only_its_own() {
    let table = table(8);
    let (dead, alive) = (
        Slots::shared(table, owner(5)),
        Slots::shared(table, owner(6)),
    );
    assert_eq!(dead.alloc(4), Some(0..4));
    assert_eq!(alive.alloc(8), Some(4..8));
    release_owner(table, owner(5));
    assert!(alive.holds(5) && !dead.holds(0));
    assert_eq!(alive.alloc(8), Some(0..4));
}

#[test]
fn threads_are_never_given_the_same_slot() {
    let table = table(1 << 12);
    let slots = [
        Slots::shared(table, owner(0)),
        Slots::shared(table, owner(1)),
    ];
    let taken: Vec<Vec<usize>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|thread: usize| {
                let slots = &slots[thread % 2];
                scope.spawn(move || core::iter::from_fn(|| slots.alloc(3)).flatten().collect())
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    let mut all: Vec<_> = taken.into_iter().flatten().collect();
    all.sort_unstable();
    assert_eq!(all, (0..1 << 12).collect::<Vec<_>>());
}
