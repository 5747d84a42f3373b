//! `PercpuRef` under every interleaving and every reordering that its orderings allow.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p pgmap-sync --release --test percpu_ref
//! ```
#![allow(
    clippy::excessive_nesting,
    clippy::unwrap_used,
    reason = "a thread's code reads best where it is started; a test fails by panicking"
)]
#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use loom::thread;
use pgmap_sync::PercpuRef;

/// A get that succeeds is seen by who waits for zero after a kill: nobody uses what is being taken away.
#[test]
fn nobody_uses_what_was_killed_and_drained() {
    loom::model(|| {
        let users = Arc::new(PercpuRef::new());
        let treasure = Arc::new(UnsafeCell::new(0u64));
        let user = {
            let (users, treasure) = (Arc::clone(&users), Arc::clone(&treasure));
            thread::spawn(move || {
                if users.try_get_live() {
                    // loom panics if the killer writes at the same time.
                    treasure.with(|_| ());
                    users.put();
                }
            })
        };
        users.kill();
        assert!(users.wait_for_zero(None));
        treasure.with_mut(|_| ());
        assert!(!users.try_get_live());
        user.join().unwrap();
        assert_eq!(users.count(), 0);
    });
}

/// A put may happen on another thread than its get; the drain waits for it, and is woken by it.
#[test]
fn a_put_on_another_thread_ends_the_drain() {
    loom::model(|| {
        let users = Arc::new(PercpuRef::new());
        let treasure = Arc::new(UnsafeCell::new(0u64));
        assert!(users.try_get_live());
        let user = {
            let (users, treasure) = (Arc::clone(&users), Arc::clone(&treasure));
            thread::spawn(move || {
                treasure.with(|_| ());
                users.put();
            })
        };
        users.kill();
        assert!(users.wait_for_zero(None));
        treasure.with_mut(|_| ());
        user.join().unwrap();
    });
}

/// Users that come and go on several threads are all waited for.
#[test]
fn every_user_is_waited_for() {
    let mut model = loom::model::Builder::new();
    // Complete exploration takes more than a minute; three preemptions found every fence and ordering taken away on trial.
    model.preemption_bound = Some(3);
    model.check(|| {
        let users = Arc::new(PercpuRef::new());
        let treasure = Arc::new(UnsafeCell::new(0u64));
        let others = [(); 2].map(|()| {
            let (users, treasure) = (Arc::clone(&users), Arc::clone(&treasure));
            thread::spawn(move || {
                if users.try_get_live() {
                    treasure.with(|_| ());
                    users.put();
                }
            })
        });
        users.kill();
        assert!(users.wait_for_zero(None));
        treasure.with_mut(|_| ());
        for other in others {
            other.join().unwrap();
        }
        assert_eq!(users.count(), 0);
    });
}

/// A count that was given its life back has users again, and lost none.
#[test]
fn a_resurrected_count_lost_no_user() {
    loom::model(|| {
        let users = Arc::new(PercpuRef::new());
        let user = {
            let users = Arc::clone(&users);
            thread::spawn(move || users.try_get_live())
        };
        users.kill();
        users.resurrect();
        let got = user.join().unwrap();
        assert_eq!(users.count(), u64::from(got));
        assert!(users.try_get_live());
    });
}

/// The algorithm of `PercpuRef` for one user, with its fences or without them.
struct Copied {
    dead: AtomicBool,
    users: AtomicU64,
    fence: fn(),
}

impl Copied {
    fn try_get_live(&self) -> bool {
        self.users.fetch_add(1, Ordering::Release);
        (self.fence)();
        !self.dead.load(Ordering::Relaxed)
    }

    fn kill_and_count(&self) -> u64 {
        self.dead.store(true, Ordering::Release);
        (self.fence)();
        self.users.load(Ordering::Acquire)
    }
}

fn get_against_kill(fence: fn()) {
    loom::model(move || {
        let users = Arc::new(Copied {
            dead: AtomicBool::new(false),
            users: AtomicU64::new(0),
            fence,
        });
        let user = {
            let users = Arc::clone(&users);
            thread::spawn(move || users.try_get_live())
        };
        let seen = users.kill_and_count();
        let got = user.join().unwrap();
        assert!(!got || seen == 1, "a user was missed");
    });
}

/// The copy is sound with its fences.
#[test]
fn with_fences_no_user_is_missed() {
    get_against_kill(|| fence(Ordering::SeqCst));
}

/// The seeded bug: without the fences a user that was missed is found.
#[test]
#[should_panic = "a user was missed"]
fn without_fences_a_missed_user_is_found() {
    get_against_kill(|| ());
}

/// REF-2: users that come and go many at once are counted as many, and the last put of several ends the drain.
#[test]
fn the_last_of_two_puts_of_many_ends_the_drain() {
    let mut model = loom::model::Builder::new();
    // As above.
    model.preemption_bound = Some(3);
    model.check(|| {
        let users = Arc::new(PercpuRef::new());
        let treasure = Arc::new(UnsafeCell::new(0u64));
        assert!(users.try_get_live_many(5));
        let others = [2, 3].map(|count| {
            let (users, treasure) = (Arc::clone(&users), Arc::clone(&treasure));
            thread::spawn(move || {
                treasure.with(|_| ());
                users.put_many(count);
            })
        });
        users.kill();
        assert!(!users.try_get_live_many(2));
        assert!(users.wait_for_zero(None));
        treasure.with_mut(|_| ());
        for other in others {
            other.join().unwrap();
        }
    });
}

/// MAP-6: many users that are had while the count dies are all there, or none is.
#[test]
fn many_users_are_had_together_or_not_at_all() {
    loom::model(|| {
        let users = Arc::new(PercpuRef::new());
        let user = {
            let users = Arc::clone(&users);
            thread::spawn(move || users.try_get_live_many(3))
        };
        users.kill();
        let got = user.join().unwrap();
        assert_eq!(users.count(), if got { 3 } else { 0 });
    });
}

/// Two puts of a dying count, each in its own slot, with the fence of `wake_if_drained` or without it. (Under loom every put has the
/// fence that the machine has only while a count is killed, so `PercpuRef` itself would not miss it.)
fn two_last_puts(fence: fn()) {
    loom::model(move || {
        let slots = Arc::new([AtomicU64::new(1), AtomicU64::new(1)]);
        let put = move |slots: &[AtomicU64; 2], mine: usize| {
            slots[mine].store(0, Ordering::Release);
            fence();
            slots.iter().all(|slot| slot.load(Ordering::Acquire) == 0)
        };
        let other = {
            let slots = Arc::clone(&slots);
            thread::spawn(move || put(&slots, 1))
        };
        let woke = put(&slots, 0);
        assert!(other.join().unwrap() || woke, "nobody woke the drain");
    });
}

/// Of two last puts at least one wakes who drains.
#[test]
fn with_a_fence_a_last_put_wakes() {
    two_last_puts(|| fence(Ordering::SeqCst));
}

/// The seeded bug: without the fence a drain that nobody wakes is found.
#[test]
#[should_panic = "nobody woke the drain"]
fn without_a_fence_a_lost_wake_up_is_found() {
    two_last_puts(|| ());
}
