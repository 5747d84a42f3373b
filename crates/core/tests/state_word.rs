//! The state word of a frame under every interleaving: who comes last knows it, and nobody comes after.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p pgmap-core --release --test state_word
//! ```
#![allow(
    clippy::excessive_nesting,
    clippy::unwrap_used,
    reason = "a thread's code reads best where it is started; a test fails by panicking"
)]
#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use pgmap_core::page::{Frame, Got, Put};

/// A frame, and the bytes that its state protects: loom panics if they are written while anybody uses them.
struct Framed {
    frame: Frame,
    bytes: UnsafeCell<u64>,
}

fn framed() -> Arc<Framed> {
    let framed = Framed {
        frame: Frame::default(),
        bytes: UnsafeCell::new(0),
    };
    assert!(framed.frame.allocate());
    Arc::new(framed)
}

/// REF-3: of two holders that let go, exactly one is the last, and what the other did comes before what it does.
#[test]
fn exactly_one_put_is_the_last() {
    loom::model(|| {
        let shared = framed();
        shared.frame.try_get().unwrap();
        let put = |shared: &Framed| {
            shared.bytes.with(|_| ());
            let put = shared.frame.put();
            if put == Put::Last {
                shared.bytes.with_mut(|_| ());
            }
            put
        };
        let other = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || put(&shared))
        };
        let puts = [put(&shared), other.join().unwrap()];
        assert_eq!(puts.iter().filter(|put| **put == Put::Last).count(), 1);
    });
}

/// REF-6: a get succeeds before the last put or fails; a frame that is allocated anew meanwhile is its owner's.
#[test]
fn no_get_comes_after_the_last_put() {
    loom::model(|| {
        let shared = framed();
        let getter = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                if shared.frame.try_get().is_err() {
                    return 0;
                }
                shared.bytes.with(|_| ());
                u32::from(shared.frame.put() == Put::Last)
            })
        };
        let last = shared.frame.put() == Put::Last;
        // Nobody holds it: whoever takes it now, as an allocator does, may write to it.
        if last && shared.frame.freeze(0) {
            shared.bytes.with_mut(|_| ());
            shared.frame.unfreeze(0);
        }
        let lasts = u32::from(last) + getter.join().unwrap();
        assert_eq!(lasts, 1, "one put is the last");
        assert!(shared.frame.allocate(), "the frame is free");
    });
}

/// REF-4, REF-6: a frame is allocated by one of two who want it, and clean.
#[test]
fn one_of_two_allocates_a_free_frame() {
    loom::model(|| {
        let shared = framed();
        shared.frame.set_private(7);
        let allocate = |shared: &Framed| {
            let taken = shared.frame.allocate();
            if taken {
                shared.bytes.with_mut(|_| ());
                assert_eq!(shared.frame.private(), 0);
            }
            taken
        };
        let other = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || allocate(&shared))
        };
        shared.bytes.with_mut(|_| ());
        assert_eq!(shared.frame.put(), Put::Last);
        let mine = allocate(&shared);
        let theirs = other.join().unwrap();
        assert!(mine != theirs, "one of them has it");
    });
}

/// GUP-3, RMAP-1: a pin and a claim exclude each other: a claimed page may be moved, a pinned page stays.
#[test]
fn a_pin_and_a_claim_exclude_each_other() {
    loom::model(|| {
        let shared = framed();
        let pinner = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                if shared.frame.try_pin().is_ok() {
                    shared.bytes.with(|_| ());
                    assert_eq!(shared.frame.unpin(), Put::Held);
                }
            })
        };
        if shared.frame.freeze(1) {
            shared.bytes.with_mut(|_| ());
            shared.frame.unfreeze(1);
        }
        pinner.join().unwrap();
        assert_eq!(shared.frame.put(), Put::Last);
    });
}

/// REF-6: of a get and a claim one wins, and the other knows.
#[test]
fn a_get_and_a_claim_exclude_each_other() {
    loom::model(|| {
        let shared = framed();
        let getter = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let got = shared.frame.try_get().is_ok();
                if got {
                    shared.bytes.with(|_| ());
                    assert_eq!(shared.frame.put(), Put::Held);
                }
            })
        };
        if shared.frame.freeze(1) {
            shared.bytes.with_mut(|_| ());
            shared.frame.unfreeze(1);
        }
        getter.join().unwrap();
        assert_eq!(shared.frame.refs(), 1);
    });
}

/// REF-5: the owner lets go of a pinned frame: whoever of owner and pin is last frees it, once.
#[test]
fn the_last_unpin_frees_what_its_owner_let_go() {
    loom::model(|| {
        let shared = framed();
        shared.frame.try_pin().unwrap();
        let pinner = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                shared.bytes.with(|_| ());
                let last = shared.frame.unpin() == Put::Last;
                if last {
                    shared.bytes.with_mut(|_| ());
                }
                last
            })
        };
        let mine = shared.frame.put() == Put::Last;
        if mine {
            shared.bytes.with_mut(|_| ());
        }
        assert!(mine != pinner.join().unwrap(), "one of them frees it");
    });
}

/// REF-2, REF-4: of two who want a free frame by its number one is the first, the other shares it, and what either notes there is kept.
#[test]
fn one_of_two_first_gets_is_the_first() {
    loom::model(|| {
        let shared = framed();
        shared.frame.set_mapping(7);
        assert_eq!(shared.frame.put(), Put::Last);
        let get = |shared: &Framed| {
            let got = shared.frame.get_or_allocate();
            if got.is_ok() {
                assert_ne!(shared.frame.mapping(), 7, "the last user's");
                shared.frame.set_mapping(1);
                assert_eq!(shared.frame.mapping(), 1, "forgotten");
            }
            got
        };
        let other = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || get(&shared))
        };
        let gots = [get(&shared), other.join().unwrap()];
        assert_eq!(shared.frame.mapping(), 1, "forgotten");
        let firsts = gots.iter().filter(|got| **got == Ok(Got::First)).count();
        assert_eq!(firsts, 1, "{gots:?}");
    });
}

/// REF-2: a last put against a get by number: each first has its last, so that the device's references balance.
#[test]
fn every_first_get_has_its_last_put() {
    loom::model(|| {
        let shared = framed();
        let getter = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let got = shared.frame.get_or_allocate();
                let first = u32::from(got == Ok(Got::First));
                let last = u32::from(got.is_ok() && shared.frame.put() == Put::Last);
                (first, last)
            })
        };
        let last = u32::from(shared.frame.put() == Put::Last);
        let theirs = getter.join().unwrap();
        assert_eq!(1 + theirs.0, last + theirs.1, "firsts and lasts");
        assert!(shared.frame.is_idle());
    });
}

/// A count whose get and claim look first and act afterwards.
struct CheckThenAct(AtomicU64);

impl CheckThenAct {
    fn try_get(&self) -> bool {
        let live = self.0.load(Ordering::Acquire) != 0;
        if live {
            self.0.fetch_add(1, Ordering::AcqRel);
        }
        live
    }

    fn put(&self) -> Put {
        match self.0.fetch_sub(1, Ordering::AcqRel) {
            1 => Put::Last,
            _ => Put::Held,
        }
    }
}

/// The seeded bug: a get that looks first and acts afterwards is found to come after the last put.
#[test]
#[should_panic = "one put is the last"]
fn a_get_that_checks_then_acts_is_found() {
    loom::model(|| {
        let count = Arc::new(CheckThenAct(AtomicU64::new(1)));
        let getter = {
            let count = Arc::clone(&count);
            thread::spawn(move || u32::from(count.try_get() && count.put() == Put::Last))
        };
        let last = u32::from(count.put() == Put::Last);
        let lasts = last + getter.join().unwrap();
        assert_eq!(lasts, 1, "one put is the last");
    });
}
