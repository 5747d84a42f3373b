//! The pool against a map from handle to bytes.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::quota::Quota;

fn pool(capacity_bytes: u64) -> Pool {
    Pool::new(capacity_bytes, Quota::private(u64::MAX))
}

#[derive(Clone, Debug)]
enum Step {
    Alloc {
        len: usize,
        seed: u8,
    },
    /// Frees the piece at this place among those held, modulo their number.
    Free(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (1..=PAGE_SIZE, any::<u8>()).prop_map(|(len, seed)| Step::Alloc { len, seed }),
        2 => any::<usize>().prop_map(Step::Free),
    ]
}

fn bytes(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| seed.wrapping_add(u8::try_from(i % 251).unwrap()))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn behaves_like_a_map(steps in prop::collection::vec(step(), 1..600)) {
        let pool = pool(u64::MAX);
        let mut model: HashMap<Handle, Vec<u8>> = HashMap::new();
        let mut order = Vec::new();
        for step in steps {
            match step {
                Step::Alloc { len, seed } => {
                    let piece = bytes(len, seed);
                    let handle = pool.alloc(&piece).unwrap();
                    prop_assert_eq!(Handle::from_u64(handle.as_u64()), Some(handle));
                    prop_assert!(model.insert(handle, piece).is_none(), "a handle given twice");
                    order.push(handle);
                }
                Step::Free(_) if order.is_empty() => {}
                Step::Free(place) => {
                    let handle = order.swap_remove(place % order.len());
                    model.remove(&handle);
                    prop_assert!(pool.free(handle));
                    prop_assert!(!pool.free(handle), "freed twice");
                    prop_assert!(pool.read(handle, |_| ()).is_none());
                }
            }
        }
        for (handle, piece) in &model {
            prop_assert!(pool.read(*handle, |bytes| bytes == piece).unwrap());
        }
        let stored: usize = model.values().map(Vec::len).sum();
        prop_assert_eq!(pool.usage().stored_bytes, stored as u64);
        for handle in order {
            prop_assert!(pool.free(handle));
        }
        let usage = pool.usage();
        prop_assert_eq!((usage.physical_bytes, usage.stored_bytes), (0, 0));
    }
}

/// A small generator, so that the figures below are the same in each run.
fn next(state: &mut u64) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    usize::try_from(*state >> 11).unwrap()
}

#[test]
fn wastes_little_even_after_random_frees() {
    let pool = pool(u64::MAX);
    let mut state = 88_172_645_463_325_252;
    let mut held: Vec<Handle> = Vec::new();
    let piece = |state: &mut u64| bytes(200 + next(state) % 2900, 1);
    for _ in 0..40_000 {
        held.push(pool.alloc(&piece(&mut state)).unwrap());
    }
    let filled = pool.usage();
    // Half of all pieces, in random order, are replaced by others four times over.
    for _ in 0..80_000 {
        let place = next(&mut state) % held.len();
        assert!(pool.free(held[place]));
        held[place] = pool.alloc(&piece(&mut state)).unwrap();
    }
    let churned = pool.usage();
    for (when, usage, percent) in [("filled", filled, 106), ("churned", churned, 112)] {
        println!("{when}: {usage:?}");
        assert!(
            usage.physical_bytes * 100 < usage.stored_bytes * percent,
            "{when}: {usage:?}"
        );
        assert!(
            usage.metadata_bytes * 1000 < usage.stored_bytes * 4,
            "{when}: {usage:?}"
        );
    }
}

#[test]
fn superblocks_come_back_when_a_generation_of_pieces_dies() {
    let pool = pool(u64::MAX);
    let mut state = 1;
    let mut held: Vec<Handle> = (0..20_000)
        .map(|_| {
            pool.alloc(&bytes(500 + next(&mut state) % 2000, 2))
                .unwrap()
        })
        .collect();
    let full = pool.usage();
    for handle in held.drain(..18_000) {
        assert!(pool.free(handle));
    }
    let rest = pool.usage();
    assert!(
        rest.physical_bytes < full.physical_bytes / 5,
        "{full:?} -> {rest:?}"
    );
}

#[test]
fn new_pieces_go_where_it_is_fullest() {
    let pool = pool(u64::MAX);
    let mut held: Vec<Handle> = (0..48)
        .map(|_| pool.alloc(&[1; PAGE_SIZE]).unwrap())
        .collect();
    // The first superblock keeps 1 piece of 16, the second 15, the third all.
    let emptiest = held[0];
    for handle in held.drain(1..17) {
        assert!(pool.free(handle));
    }
    let piece = pool.alloc(&[2; PAGE_SIZE]).unwrap();
    assert_ne!(piece.block(), emptiest.block());
    assert!(pool.free(emptiest));
    assert_eq!(pool.usage().physical_bytes, 2 * SUPERBLOCK_BYTES as u64);
}

#[test]
fn a_full_pool_still_uses_the_room_of_larger_classes() {
    let pool = pool(SUPERBLOCK_BYTES as u64);
    pool.alloc(&[1; PAGE_SIZE]).unwrap();
    let small = pool.alloc(&[2; 100]).unwrap();
    assert!(pool.read(small, |bytes| bytes == [2; 100]).unwrap());
    assert_eq!(pool.usage().physical_bytes, SUPERBLOCK_BYTES as u64);
}

#[test]
fn a_full_pool_says_so_and_takes_pieces_again_after_a_free() {
    let pool = pool(2 * SUPERBLOCK_BYTES as u64);
    let mut held = Vec::new();
    while let Ok(handle) = pool.alloc(&[7; PAGE_SIZE]) {
        held.push(handle);
    }
    assert_eq!(held.len(), 32);
    assert_eq!(pool.usage().physical_bytes, 2 * SUPERBLOCK_BYTES as u64);
    assert!(pool.free(held[5]));
    assert!(pool.alloc(&[8; PAGE_SIZE]).is_ok());
    assert_eq!(pool.alloc(&[9; 10]), Err(PoolFull));
}

#[test]
fn a_quota_is_shared_and_given_back() {
    let quota = Quota::private(3 * SUPERBLOCK_BYTES as u64);
    let (one, two) = (Pool::new(u64::MAX, quota), Pool::new(u64::MAX, quota));
    let first = one.alloc(&[1; 100]).unwrap();
    two.alloc(&[1; 100]).unwrap();
    two.alloc(&[1; 1000]).unwrap();
    assert_eq!(one.alloc(&[1; 2000]), Err(PoolFull));
    assert!(one.free(first));
    assert!(two.alloc(&[1; 2000]).is_ok());
    assert_eq!(
        quota.used.load(Ordering::Relaxed),
        3 * SUPERBLOCK_BYTES as u64
    );
    drop((one, two));
    assert_eq!(quota.used.load(Ordering::Relaxed), 0);
    assert_eq!(quota.mine.load(Ordering::Relaxed), 0);
}

#[test]
fn a_forks_child_counts_what_it_inherits() {
    let parent = Quota::private(u64::MAX);
    let pool = Pool::new(u64::MAX, parent);
    pool.alloc(&[1; 100]).unwrap();
    let child = Quota {
        mine: Quota::private(0).mine,
        ..parent
    };
    pool.adopt(child);
    assert_eq!(
        parent.used.load(Ordering::Relaxed),
        2 * SUPERBLOCK_BYTES as u64
    );
    assert_eq!(parent.mine.load(Ordering::Relaxed), SUPERBLOCK_BYTES as u64);
    assert_eq!(child.mine.load(Ordering::Relaxed), SUPERBLOCK_BYTES as u64);
}

#[test]
fn handles_from_nowhere_are_refused() {
    let pool = pool(u64::MAX);
    pool.alloc(&[1; 64]).unwrap();
    for number in [
        0,
        1,
        64,
        4097,
        u64::MAX >> 8,
        5 << LEN_BITS | 64,
        1 << 40 | 64,
    ] {
        let handle = Handle::from_u64(number).unwrap();
        assert!(pool.read(handle, |_| ()).is_none(), "{number:#x}");
        assert!(!pool.free(handle), "{number:#x}");
    }
    assert_eq!(Handle::from_u64(u64::MAX), None);
}

fn alloc_read_and_free(pool: &Pool, seed: u8) {
    let mut state = u64::from(seed) + 1;
    let mut held = Vec::new();
    for round in 0..4_000 {
        let piece = bytes(1900 + next(&mut state) % 200, seed);
        held.push((pool.alloc(&piece).unwrap(), piece));
        let (handle, piece) = &held[next(&mut state) % held.len()];
        assert!(pool.read(*handle, |bytes| bytes == piece).unwrap());
        if round % 3 == 0 {
            let (handle, _) = held.swap_remove(next(&mut state) % held.len());
            assert!(pool.free(handle));
        }
    }
}

#[test]
fn threads_that_allocate_free_and_read_at_once_see_their_own_bytes() {
    let pool = &pool(u64::MAX);
    std::thread::scope(|scope| {
        for seed in 0..3 {
            scope.spawn(move || alloc_read_and_free(pool, seed));
        }
    });
}
