//! A page frame and its state word.
//!
//! Everything about a frame that must agree lives in one 64-bit atomic, and every transition is one
//! compare-exchange. `docs/lifecycle.md` draws it.

use pgmap_sync::atomic::{AtomicU32, AtomicU64, Ordering, spin_loop};

use crate::driver::DeviceData;
use crate::vmemmap::Zeroable;

/// What is known about one page frame: 32 bytes, all zero for a frame that nobody uses.
///
/// # Invariants
///
/// `state` holds, from bit 0: references (24 bits), pins (20 bits), `FROZEN`, `POISONED`, zeros.
///
/// | references | pins | flags    | meaning                                                             |
/// |------------|------|----------|---------------------------------------------------------------------|
/// | 0          | 0    | -        | free: nobody maps, holds or pins it (REF-1)                         |
/// | 1..        | any  | -        | live                                                                |
/// | 0          | 1..  | -        | only pinned: its owner has let go, and the last unpin frees it      |
/// | 0          | 0    | `FROZEN` | claimed by one thread, for freeing or migration (REF-6)             |
/// | any        | any  | `POISONED` | as above, and its bytes are lost                                  |
#[derive(Debug, Default)]
#[repr(C)]
pub struct Frame {
    state: AtomicU64,   // A: one compare-exchange per transition
    private: AtomicU64, // O: whoever owns the frame (holds its entry's lock)
    mapping: AtomicU64, // O
    link: AtomicU32,    // O; while the frame is free, its allocator's lock
    _spare: AtomicU32,  // nobody yet
}

#[cfg(not(any(loom, shuttle)))]
const _: () = assert!(size_of::<Frame>() == 32, "a frame is 32 bytes");

// SAFETY: a frame is made of atomic integers; zero is its free state; it needs no drop.
unsafe impl Zeroable for Frame {
    fn zero(&self) {
        self.state.zero();
        self.private.zero();
        self.mapping.zero();
        self.link.zero();
    }
}

const REF: u64 = 1;
const REFS: u64 = (1 << 24) - 1;
const PIN: u64 = 1 << 24;
const PINS: u64 = ((1 << 20) - 1) << 24;
const FROZEN: u64 = 1 << 44;
const POISONED: u64 = 1 << 45;

/// How often a get that finds the frame claimed looks again. A first get claims it for a few stores.
const CLAIM_SPINS: u32 = if cfg!(any(loom, shuttle)) { 4 } else { 10_000 };

/// As many references or pins as can be counted (REF-5): somebody leaks them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the frame has as many references or pins as can be counted")]
pub struct TooMany;

/// Why a frame could not be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GetError {
    /// Nobody uses it, or somebody has claimed it (REF-6).
    #[error("the frame is free or claimed")]
    NotLive,
    /// See [`TooMany`].
    #[error(transparent)]
    TooMany(#[from] TooMany),
}

/// Whether a reference is the only one of its frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "who takes the first reference answers for the frame's device (REF-2)"]
pub enum Got {
    /// The frame was free.
    First,
    /// Others have it too.
    Another,
}

/// Whether a reference was the last hold on a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "who drops the last hold has to free the frame"]
pub enum Put {
    /// Others hold the frame.
    Held,
    /// It is free now, and the caller's to hand back to its allocator (REF-3).
    Last,
}

impl Frame {
    /// Takes a free frame: one reference, and nothing carried over from its last user (REF-4). False if it is not free.
    #[must_use]
    pub fn allocate(&self) -> bool {
        // Acquire: pairs with the release of the last put, so that its owner's stores come before ours.
        let taken = self
            .state
            .compare_exchange(0, REF, Ordering::Acquire, Ordering::Relaxed)
            .is_ok();
        if taken {
            self.forget();
        }
        taken
    }

    /// Takes a reference to a frame that may be free, or in use by others: who comes first finds nothing carried over
    /// (REF-4), and those who come meanwhile wait for that. The frame must be on no allocator's list.
    ///
    /// # Errors
    ///
    /// [`GetError::NotLive`] if it is claimed, only pinned, or its bytes are lost; [`GetError::TooMany`].
    pub fn get_or_allocate(&self) -> Result<Got, GetError> {
        let mut result = Err(GetError::NotLive);
        for _ in 0..CLAIM_SPINS {
            result = self.try_get().map(|()| Got::Another);
            if result != Err(GetError::NotLive) {
                return result;
            }
            if self.freeze(0) {
                self.forget();
                self.unfreeze(1);
                return Ok(Got::First);
            }
            if self.is_stuck() {
                break;
            }
            spin_loop();
        }
        result
    }

    /// Whether waiting makes the frame neither free nor live: it is only pinned, or free and poisoned.
    fn is_stuck(&self) -> bool {
        // Relaxed: a snapshot; who acts on it acts on the state word.
        let state = self.state.load(Ordering::Relaxed);
        state != 0 && state & (REFS | FROZEN) == 0
    }

    /// Forgets what the last user left. The frame is ours alone.
    fn forget(&self) {
        // Relaxed: who gets the frame after us sees this through its state, or the lock under which its number is published.
        self.private.store(0, Ordering::Relaxed);
        self.mapping.store(0, Ordering::Relaxed);
        self.link.store(0, Ordering::Relaxed);
    }

    /// Takes a reference to a live frame.
    ///
    /// # Errors
    ///
    /// [`GetError::NotLive`] for a frame at zero or claimed (REF-6), [`GetError::TooMany`].
    pub fn try_get(&self) -> Result<(), GetError> {
        self.transition(|state| {
            if state & REFS == 0 || state & FROZEN != 0 {
                return Err(GetError::NotLive);
            }
            if state & REFS == REFS {
                Err(TooMany.into())
            } else {
                Ok(state + REF)
            }
        })
        .map(drop)
    }

    /// Drops a reference.
    ///
    /// # Panics
    ///
    /// If there is none: somebody dropped one twice.
    pub fn put(&self) -> Put {
        let state = self.transition::<core::convert::Infallible>(|state| {
            assert!(
                state & REFS != 0,
                "a reference was dropped twice: state {state:#x}"
            );
            Ok(state - REF)
        });
        match state {
            Ok(state) if state & (REFS | PINS) == 0 => Put::Last,
            Ok(_) => Put::Held,
            Err(never) => match never {},
        }
    }

    /// Pins a live frame: it may not move until it is unpinned (GUP-3).
    ///
    /// # Errors
    ///
    /// [`GetError::NotLive`] for a frame at zero or claimed, [`GetError::TooMany`].
    pub fn try_pin(&self) -> Result<(), GetError> {
        self.transition(|state| {
            if state & REFS == 0 || state & FROZEN != 0 {
                return Err(GetError::NotLive);
            }
            if state & PINS == PINS {
                Err(TooMany.into())
            } else {
                Ok(state + PIN)
            }
        })
        .map(drop)
    }

    /// Drops a pin.
    ///
    /// # Panics
    ///
    /// If there is none: somebody dropped one twice.
    pub fn unpin(&self) -> Put {
        let state = self.transition::<core::convert::Infallible>(|state| {
            assert!(
                state & PINS != 0,
                "a pin was dropped twice: state {state:#x}"
            );
            Ok(state - PIN)
        });
        match state {
            Ok(state) if state & (REFS | PINS) == 0 => Put::Last,
            Ok(_) => Put::Held,
            Err(never) => match never {},
        }
    }

    /// Claims a frame that has exactly `refs` references and no pin; others' gets and pins fail until
    /// [`unfreeze`](Self::unfreeze). False if it has others, or its bytes are lost: then back off (REF-6).
    #[must_use]
    pub fn freeze(&self, refs: u32) -> bool {
        if u64::from(refs) > REFS {
            return false;
        }
        // Acquire: pairs with the releases of those who let go. Relaxed on failure: nothing is concluded but "busy".
        self.state
            .compare_exchange(u64::from(refs), FROZEN, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// Ends a claim, leaving `refs` references.
    ///
    /// # Panics
    ///
    /// If the frame is not claimed, or cannot count so many.
    pub fn unfreeze(&self, refs: u32) {
        let refs = u64::from(refs);
        assert!(refs <= REFS, "a frame cannot count {refs} references");
        // Subtracts, so that a poisoning meanwhile is kept. Release: pairs with the acquire of the next get.
        let state = self.state.fetch_sub(FROZEN - refs, Ordering::Release);
        assert!(
            state & !POISONED == FROZEN,
            "the frame was not claimed: state {state:#x}"
        );
    }

    /// Says that the frame's bytes are lost.
    pub fn poison(&self) {
        // Relaxed: a flag that stands alone.
        self.state.fetch_or(POISONED, Ordering::Relaxed);
    }

    /// Whether the frame's bytes are lost.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        // Relaxed: a flag that stands alone.
        self.state.load(Ordering::Relaxed) & POISONED != 0
    }

    /// Says that the frame has good bytes again: whoever had lost them has written new ones (WB-6).
    pub fn heal(&self) {
        // Release: pairs with the acquire of the next get, so that the new bytes are seen.
        self.state.fetch_and(!POISONED, Ordering::Release);
    }

    /// Whether nobody holds, pins or claims the frame.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        // Acquire: pairs with the release of the last put, so that what the last holder wrote is seen.
        self.state.load(Ordering::Acquire) & (REFS | PINS | FROZEN) == 0
    }

    /// Whether somebody has the frame pinned. No false positives (REF-5).
    #[must_use]
    pub fn is_pinned(&self) -> bool {
        // Acquire: pairs with the release of an unpin, so that what the pin's holder wrote is seen.
        self.state.load(Ordering::Acquire) & PINS != 0
    }

    /// References now.
    #[must_use]
    pub fn refs(&self) -> u64 {
        // Relaxed: a snapshot that may be out of date at once.
        self.state.load(Ordering::Relaxed) & REFS
    }

    /// The owner's word: what the driver keeps about a device page, or the device page that holds the same bytes.
    #[must_use]
    pub fn private(&self) -> u64 {
        // Relaxed, here and below: the owner's lock orders these.
        self.private.load(Ordering::Relaxed)
    }

    /// Sets the owner's word.
    pub fn set_private(&self, word: u64) {
        self.private.store(word, Ordering::Relaxed);
    }

    /// The driver's data of a device page.
    #[must_use]
    pub fn data(&self) -> DeviceData {
        DeviceData(self.private())
    }

    /// Where the page is mapped: a word of the address space's choice, 0 for nowhere.
    #[must_use]
    pub fn mapping(&self) -> u64 {
        self.mapping.load(Ordering::Relaxed)
    }

    /// Says where the page is mapped.
    pub fn set_mapping(&self, word: u64) {
        self.mapping.store(word, Ordering::Relaxed);
    }

    /// The frame's place in its owner's list.
    #[must_use]
    pub fn link(&self) -> u32 {
        self.link.load(Ordering::Relaxed)
    }

    /// Puts the frame into its owner's list.
    pub fn set_link(&self, link: u32) {
        self.link.store(link, Ordering::Relaxed);
    }

    /// One transition of the state word: `next` says what follows a state. Answers the new state.
    fn transition<E>(&self, next: impl Fn(u64) -> Result<u64, E>) -> Result<u64, E> {
        // Relaxed: the compare-exchange looks again.
        let mut state = self.state.load(Ordering::Relaxed);
        loop {
            let new = next(state)?;
            // Acquire and release: whoever brings a count to zero sees what every other holder did, and whoever
            // takes a hold sees what the frame's owner did before. Relaxed on failure: the loop looks again.
            match self
                .state
                .compare_exchange_weak(state, new, Ordering::AcqRel, Ordering::Relaxed)
            {
                Ok(_) => return Ok(new),
                Err(seen) => state = seen,
            }
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    /// REF-1, REF-6: a frame at zero cannot be had, and the last put says so once.
    #[test]
    fn a_free_frame_cannot_be_had() {
        let frame = Frame::default();
        assert_eq!(frame.try_get(), Err(GetError::NotLive));
        assert_eq!(frame.try_pin(), Err(GetError::NotLive));
        assert!(frame.allocate());
        assert!(!frame.allocate());
        assert_eq!(frame.try_get(), Ok(()));
        assert_eq!(frame.put(), Put::Held);
        assert_eq!(frame.put(), Put::Last);
        assert_eq!(frame.try_get(), Err(GetError::NotLive));
    }

    /// REF-4: nothing is carried over to the next user.
    #[test]
    fn an_allocated_frame_remembers_nothing() {
        let frame = Frame::default();
        assert!(frame.allocate());
        frame.set_private(1);
        frame.set_mapping(2);
        frame.set_link(3);
        assert_eq!(frame.put(), Put::Last);
        assert!(frame.allocate());
        assert_eq!((frame.private(), frame.mapping(), frame.link()), (0, 0, 0));
    }

    /// REF-5: pins are counted apart; many references make no pin, and the last unpin of a frame that its owner let go frees it.
    #[test]
    fn pins_are_counted_apart() {
        let frame = Frame::default();
        assert!(frame.allocate());
        for _ in 0..5000 {
            frame.try_get().unwrap();
        }
        assert!(!frame.is_pinned());
        frame.try_pin().unwrap();
        assert!(frame.is_pinned());
        for _ in 0..5001 {
            assert_eq!(frame.put(), Put::Held);
        }
        assert!(frame.is_pinned());
        assert_eq!(frame.unpin(), Put::Last);
    }

    /// REF-5: a count that is full is an error and stays as it is.
    #[test]
    fn a_full_count_is_an_error() {
        let frame = Frame::default();
        frame.state.store(REFS | PINS, Ordering::Relaxed);
        assert_eq!(frame.try_get(), Err(GetError::TooMany(TooMany)));
        assert_eq!(frame.try_pin(), Err(GetError::TooMany(TooMany)));
        assert_eq!(frame.state.load(Ordering::Relaxed), REFS | PINS);
    }

    /// REF-6: a claim needs the exact count and no pin, and keeps others out until it ends.
    #[test]
    fn a_claim_is_exact_and_exclusive() {
        let frame = Frame::default();
        assert!(frame.allocate());
        frame.try_pin().unwrap();
        assert!(!frame.freeze(1));
        assert_eq!(frame.unpin(), Put::Held);
        assert!(!frame.freeze(2));
        assert!(frame.freeze(1));
        assert_eq!(frame.try_get(), Err(GetError::NotLive));
        assert!(!frame.freeze(0));
        frame.unfreeze(1);
        assert_eq!(frame.try_get(), Ok(()));
    }

    /// REF-5, REF-6: a count that the field cannot hold is not looked for among the pins.
    #[test]
    fn a_claim_does_not_take_pins_for_references() {
        let frame = Frame::default();
        assert!(frame.allocate());
        frame.try_pin().unwrap();
        assert_eq!(frame.put(), Put::Held);
        assert!(!frame.freeze(1 << 24));
        assert!(frame.is_pinned());
    }

    /// FLT-1: bytes that are lost while a frame is claimed stay lost.
    #[test]
    fn poison_outlives_a_claim() {
        let frame = Frame::default();
        assert!(frame.allocate() && frame.freeze(1));
        frame.poison();
        frame.unfreeze(1);
        assert!(frame.is_poisoned());
        assert_eq!(frame.put(), Put::Last);
        assert!(!frame.allocate());
    }

    /// REF-2, REF-4: the first reference of a given frame says so and finds nothing; a frame that is only pinned is nobody's.
    #[test]
    fn the_first_get_of_a_given_frame_finds_nothing() {
        let frame = Frame::default();
        assert_eq!(frame.get_or_allocate(), Ok(Got::First));
        frame.set_mapping(7);
        frame.try_pin().unwrap();
        assert_eq!(frame.get_or_allocate(), Ok(Got::Another));
        assert_eq!((frame.put(), frame.put()), (Put::Held, Put::Held));
        assert_eq!(frame.get_or_allocate(), Err(GetError::NotLive));
        assert_eq!(frame.unpin(), Put::Last);
        assert_eq!(frame.get_or_allocate(), Ok(Got::First));
        assert_eq!(frame.mapping(), 0);
    }

    /// WB-6: a frame whose bytes were written anew can be had again.
    #[test]
    fn a_healed_frame_can_be_had_again() {
        let frame = Frame::default();
        frame.poison();
        assert_eq!(frame.get_or_allocate(), Err(GetError::NotLive));
        frame.heal();
        assert_eq!(frame.get_or_allocate(), Ok(Got::First));
        assert!(!frame.is_idle() && !frame.is_poisoned());
    }
}
