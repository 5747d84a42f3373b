//! Who holds what: the answer to "why is this page busy" (REF-7).
//!
//! Every pin registers here when it is made, once however many pages it has; the count on the frames stays
//! the truth, this is its explanation.

use alloc::borrow::Cow;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::Range;
use core::panic::Location;

use pgmap_sync::Mutex;

/// Somebody who holds pages.
#[derive(Clone, Debug)]
pub struct Holder {
    /// What they say they are.
    pub label: Cow<'static, str>,
    /// Where in the source the hold was taken.
    pub site: &'static Location<'static>,
    /// When, on the platform's clock, in nanoseconds.
    pub since_ns: u64,
    /// The held addresses, in bytes.
    pub range: Range<usize>,
}

#[derive(Debug, Default)]
struct Registry {
    next: u64,
    holders: BTreeMap<u64, Holder>,
}

/// All holders of a memory map.
#[derive(Debug, Default)]
pub struct Holders {
    registry: Mutex<Registry>,
}

/// A holder's place in the register.
#[derive(Debug)]
#[must_use = "a holder stays registered until `remove`"]
pub struct Ticket(u64);

impl Holders {
    /// Registers a holder until [`remove`](Self::remove).
    pub fn add(&self, holder: Holder) -> Ticket {
        let mut registry = self.registry.lock();
        registry.next += 1;
        let ticket = registry.next;
        registry.holders.insert(ticket, holder);
        Ticket(ticket)
    }

    /// Forgets a holder.
    pub fn remove(&self, ticket: &Ticket) {
        self.registry.lock().holders.remove(&ticket.0);
    }

    /// Who holds any of these addresses, oldest first.
    #[must_use]
    pub fn of(&self, range: &Range<usize>) -> Vec<Holder> {
        let overlaps =
            |holder: &&Holder| holder.range.start < range.end && range.start < holder.range.end;
        self.registry
            .lock()
            .holders
            .values()
            .filter(overlaps)
            .cloned()
            .collect()
    }
}
