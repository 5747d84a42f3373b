//! Bugs on purpose, for the lab: each proves that an exploration of interleavings can fail. Only built with
//! `--cfg shuttle`; a thread's model begins without one.

use core::cell::Cell;

/// What `core` does wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SeededBug {
    /// A page in use holds no live reference on its mapping, and gives none back (REF-2, rfc-v3-put-many).
    GetKeepsNoReference,
    /// A lookup believes its table, and does not ask the entry for its ranges (MAP-5, section-keyed-lookup).
    LookupIgnoresRanges,
    /// A mapping is removed without waiting for its users (MAP-6, 50f44ee7248a).
    DrainDoesNotWait,
    /// A frozen queue is taken for empty without waiting for the requests under way (PMEM-2).
    FreezeDoesNotWait,
    /// A group's limit is looked at, and then pages are charged: two get the room of one (HMM-8).
    ChargeLooksFirst,
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
