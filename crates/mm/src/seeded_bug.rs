//! Bugs on purpose, for the lab: each proves that an exploration of interleavings can fail. Only built with
//! `--cfg shuttle`, and for some `--cfg loom`; a thread's model begins without one.

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
    /// A page that is written still counts as the file's that is mapped there, and is dropped with what was written.
    WriteKeepsTheFile,
    /// Pages leave while a fork is under way, and the child does not inherit them.
    TakeOutIgnoresForks,
    /// A page of a file is claimed whether it is pinned or not (`evict-under-dma`, `wp-bypass`).
    ClaimIgnoresPins,
    /// A page of a file is looked at for pins, and then taken (`unmap-check-then-act`).
    ClaimLooksFirst,
    /// Reclaim takes from a pinned page what it needs to be written (`ext4-1899`).
    ReclaimStripsPinned,
    /// Reclaim forgets a block whose pages it has found pinned (WB-4).
    ReclaimForgetsPinned,
    /// One mapping of a page is protected, and the page counts as clean (`mkclean-two-vmas`).
    MkcleanStopsAtTheFirst,
    /// Writeback in the background waits for pins (`mkclean-wait`).
    BackgroundWaits,
    /// "To the end of the file" is taken for nothing where pins are looked for (`truncate-end-zero`).
    TruncateEndIsNothing,
    /// A pin does not look whether the page is about to be truncated (WB-5).
    PinIgnoresTheBarrier,
    /// A page is read in while the file is cut (`remove-stale-source`).
    ReadIgnoresTheBarrier,
    /// A page is written that somebody else is writing: the older bytes may land last.
    WritebackIgnoresWriteback,
    /// A sync does not wait for what others are writing (WB-2).
    SyncIgnoresWriteback,
    /// A page counts as written before the error is noted.
    ErrorsComeLate,
    /// What lies behind the end of a file stays when the file becomes longer (WB-5).
    ExtendKeepsTheTail,
    /// A fault that has found the old end answers after the file has become longer.
    ExtendIgnoresFaults,
    /// A page that is lost while it is written is forgotten before it has been (WB-6).
    FailureIgnoresWriteback,
    /// A pin takes the lock that is held while all mappings of a page are looked at (WB-7, `mkclean-abba`).
    PinLocksTheMappings,
    /// A truncation waits for pins with its range closed, so that who has them waits for the truncation (WB-7).
    TruncateWaitsClosed,
    /// Who reads ahead looks what is not in RAM, and takes the cursors afterwards: bytes that were stored meanwhile are lost.
    ReadAheadLooksFirst,
    /// Who reads ahead takes the cursors of some groups in another order: two wait for each other.
    ReadersLockBackwards,
    /// What the file could not give is read ahead as zeros.
    ReadAheadTrustsTheFile,
    /// What was charged for pages that are not read ahead after all stays charged (HMM-8).
    ReadAheadKeepsTheCharge,
    /// A fault is answered at an address that shows another page of the file by now: that one is made writable, or SIGBUS.
    FaultTrustsTheAddress,
    /// A page is mapped at addresses that are not the file's any more.
    FaultOutlivesTheMapping,
    /// Mappings that may only be read are left where pages are taken away: they show memory that is somebody else's.
    WalkSkipsReaders,
    /// A mapping's pins are looked for before it is taken out, and one comes in between.
    UnmapLooksForPinsFirst,
    /// A file is written back for the last time before those who have it pinned know that it was: their bytes are lost.
    ReleaseWritesFirst,
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
