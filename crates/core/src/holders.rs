//! Who holds what: the answer to "why is this page busy" (REF-7).
//!
//! Every pin registers here when it is made, once however many pages it has; the count on the frames stays
//! the truth, this is its explanation. Who pins what a program sees registers addresses; who holds a device's pages
//! registers frames.

use alloc::borrow::Cow;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::Range;
use core::panic::Location;

use pgmap_sync::Mutex;

use crate::addr::PfnRange;
use crate::memremap::Hold;

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

/// Who somebody is that holds a device's pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Who {
    /// Code of this process: where in the source the hold was taken.
    Site(&'static Location<'static>),
    /// Another process, by its number.
    Process(u32),
}

/// Somebody who holds pages of a device.
#[derive(Clone, Debug)]
pub struct FrameHolder {
    /// What they say they are.
    pub label: Cow<'static, str>,
    /// Who they are.
    pub who: Who,
    /// How they hold them.
    pub how: Hold,
    /// When the hold was taken, on the platform's clock, in nanoseconds.
    pub since_ns: u64,
    /// The held frames.
    pub frames: PfnRange,
}

#[derive(Debug)]
struct Registry<H> {
    next: u64,
    holders: BTreeMap<u64, H>,
}

impl<H> Default for Registry<H> {
    fn default() -> Self {
        Self {
            next: 0,
            holders: BTreeMap::new(),
        }
    }
}

impl<H: Clone> Registry<H> {
    fn add(&mut self, holder: H) -> u64 {
        self.next += 1;
        self.holders.insert(self.next, holder);
        self.next
    }

    fn of(&self, overlaps: impl Fn(&H) -> bool) -> Vec<H> {
        let found = self.holders.values().filter(|holder| overlaps(holder));
        found.cloned().collect()
    }
}

/// All holders of a memory map.
#[derive(Debug, Default)]
pub struct Holders {
    registry: Mutex<Registry<Holder>>,
    frames: Mutex<Registry<FrameHolder>>,
}

/// A holder's place in the register.
#[derive(Debug)]
#[must_use = "a holder stays registered until `remove`"]
pub struct Ticket(u64);

/// Of which holders somebody has been told: of those up to this one.
#[derive(Debug, Default)]
pub struct Told(u64);

impl Told {
    /// Of none.
    #[must_use]
    pub const fn new() -> Self {
        Self(0)
    }
}

/// The place in the register of somebody who holds a device's pages.
#[derive(Debug)]
#[must_use = "a holder stays registered until `remove_frames`"]
pub struct FrameTicket(u64);

impl Holders {
    /// Registers a holder until [`remove`](Self::remove).
    pub fn add(&self, holder: Holder) -> Ticket {
        Ticket(self.registry.lock().add(holder))
    }

    /// Forgets a holder.
    pub fn remove(&self, ticket: &Ticket) {
        self.registry.lock().holders.remove(&ticket.0);
    }

    /// Who holds any of these addresses, oldest first.
    #[must_use]
    pub fn of(&self, range: &Range<usize>) -> Vec<Holder> {
        self.registry.lock().of(|holder| overlaps(holder, range))
    }

    /// All who hold addresses, oldest first.
    #[must_use]
    pub fn all(&self) -> Vec<Holder> {
        self.registry.lock().of(|_| true)
    }

    /// Those who have held addresses since before `since_ns`, each of them once: `told` is how far the caller has been told.
    #[must_use]
    pub fn older_than(&self, since_ns: u64, told: &mut Told) -> Vec<Holder> {
        let registry = self.registry.lock();
        let newer = registry.holders.range(told.0 + 1..);
        let old = newer.take_while(|(_, holder)| holder.since_ns < since_ns);
        let old = old.map(|(number, holder)| {
            told.0 = *number;
            holder.clone()
        });
        old.collect()
    }

    /// Whether anybody holds any of these addresses.
    #[must_use]
    pub fn has_any_of(&self, range: &Range<usize>) -> bool {
        let registry = self.registry.lock();
        let mut holders = registry.holders.values();
        holders.any(|holder| overlaps(holder, range))
    }

    /// Registers a holder of a device's pages until [`remove_frames`](Self::remove_frames).
    pub fn add_frames(&self, holder: FrameHolder) -> FrameTicket {
        FrameTicket(self.frames.lock().add(holder))
    }

    /// Forgets a holder of a device's pages.
    pub fn remove_frames(&self, ticket: &FrameTicket) {
        self.frames.lock().holders.remove(&ticket.0);
    }

    /// Forgets all who have any of these frames: they were revoked. Their tickets mean nothing from here on.
    pub fn revoke_frames(&self, range: PfnRange) {
        let mut registry = self.frames.lock();
        let kept = |holder: &FrameHolder| !holder.frames.intersects(range);
        registry.holders.retain(|_, holder| kept(holder));
    }

    /// Who holds any of these frames of devices, oldest first.
    #[must_use]
    pub fn of_frames(&self, range: PfnRange) -> Vec<FrameHolder> {
        let overlaps = |holder: &FrameHolder| holder.frames.intersects(range);
        self.frames.lock().of(overlaps)
    }
}

const fn overlaps(holder: &Holder, range: &Range<usize>) -> bool {
    holder.range.start < range.end && range.start < holder.range.end
}
