//! Bugs on purpose, for the lab: each proves that an exploration of interleavings can fail. Only built with
//! `--cfg shuttle`; a thread's model begins without one.

use core::cell::Cell;

/// What `mm` does wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SeededBug {
    /// A page that was touched or dropped while it was being stored still goes to the device (FLT-2).
    CommitIgnoresTheSlot,
    /// A page may be had at addresses that nobody has mapped.
    FaultIgnoresTheArea,
    /// A page that was being stored goes to a device that has been evacuated meanwhile (MAP-6).
    CommitIgnoresTheKill,
    /// A page's pins are not looked at before it is taken out (GUP-3).
    TakeOutIgnoresPins,
    /// A page's pins are looked at before it is taken out, and its frame is not claimed (RMAP-1, `unmap-check-then-act`).
    TakeOutClaimsNothing,
    /// A page's pins are looked at before it is discarded, and its frame is not claimed (RMAP-1).
    DiscardClaimsNothing,
    /// A pin without the lock does not look at the entry again (RMAP-1).
    PinLooksOnce,
    /// A pinned page's frame is replaced, and the pin holds the old one (HOT-4).
    ReplaceIgnoresPins,
    /// A staged page whose frame is replaced loses its slot (HOT-4).
    ReplaceForgetsTheSlot,
    /// Pages leave while a fork is under way, and the child does not inherit them.
    TakeOutIgnoresForks,
}

std::thread_local! {
    // The models run all their threads on one of the machine's, so this belongs to one model.
    static SEEDED: Cell<Option<SeededBug>> = const { Cell::new(None) };
}

/// Seeds a bug for what this thread models from now on.
pub fn seed(bug: SeededBug) {
    SEEDED.set(Some(bug));
}

pub(crate) fn has(bug: SeededBug) -> bool {
    SEEDED.get() == Some(bug)
}
