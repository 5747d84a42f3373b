//! Who maps and who pins which bytes of a namespace (REF-7).
//!
//! The counts on the frames are the truth; this says whose they are. It also keeps holes from being punched under
//! somebody's mapping or DMA.

use core::fmt;
use core::ops::Range;
use core::time::Duration;
use std::collections::BTreeMap;

use pgmap_core::holders::Holder;
use pgmap_sync::Mutex;
use rustix::io::Errno;

/// How somebody holds bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HoldKind {
    /// They are mapped in a client's address space.
    Mapped,
    /// They may not move or go: somebody reads or writes them directly.
    Pinned,
}

/// Somebody who holds bytes of a namespace.
#[derive(Clone, Debug)]
pub struct Hold {
    /// How.
    pub kind: HoldKind,
    /// The client's process.
    pub pid: u32,
    /// Who, since when, and which bytes, counted from the namespace's start.
    pub holder: Holder,
}

impl Hold {
    /// How long they have held it, at this time of the platform's clock.
    #[must_use]
    pub const fn age(&self, now_ns: u64) -> Duration {
        Duration::from_nanos(now_ns.saturating_sub(self.holder.since_ns))
    }

    fn overlaps(&self, bytes: &Range<u64>) -> bool {
        let held = &self.holder.range;
        (held.start as u64) < bytes.end && bytes.start < held.end as u64
    }
}

impl fmt::Display for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Holder { label, range, .. } = &self.holder;
        let verb = match self.kind {
            HoldKind::Mapped => "maps",
            HoldKind::Pinned => "pins",
        };
        write!(
            f,
            "{label} (pid {}) {verb} bytes {:#x}-{:#x}",
            self.pid, range.start, range.end
        )
    }
}

#[derive(Debug, Default)]
struct Holds {
    next: u64,
    all: BTreeMap<u64, Hold>,
    mapped_ever: Mapped,
}

/// Whether anybody was ever given the file to map.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Mapped {
    /// Nobody outside has it.
    #[default]
    Never,
    /// Somebody may map it still, whatever they say.
    Once,
}

/// All holds on a namespace.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    holds: Mutex<Holds>,
}

/// A hold's place in the ledger.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry(u64);

impl Ledger {
    /// Enters a hold; from here on no hole is punched there.
    pub(super) fn add(&self, hold: Hold) -> Entry {
        let mut holds = self.holds.lock();
        if hold.kind == HoldKind::Mapped {
            holds.mapped_ever = Mapped::Once;
        }
        holds.next += 1;
        let entry = holds.next;
        holds.all.insert(entry, hold);
        Entry(entry)
    }

    pub(super) fn remove(&self, entry: Entry) {
        self.holds.lock().all.remove(&entry.0);
    }

    /// All holds, oldest first.
    pub(super) fn all(&self) -> Vec<Hold> {
        self.holds.lock().all.values().cloned().collect()
    }

    pub(super) fn mapped_ever(&self) -> Mapped {
        self.holds.lock().mapped_ever
    }

    /// Does something to bytes, unless somebody holds them; nobody begins to meanwhile.
    pub(super) fn unless_held(
        &self,
        bytes: &Range<u64>,
        punch: impl FnOnce() -> Result<(), Errno>,
    ) -> Option<Result<(), Errno>> {
        let holds = self.holds.lock();
        let held = holds.all.values().any(|hold| hold.overlaps(bytes));
        (!held).then(punch)
    }
}
