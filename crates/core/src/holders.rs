//! Who holds what: the answer to "why is this page busy" (REF-7).
//!
//! Every pin registers here when it is made, once however many pages it has; the count on the frames stays
//! the truth, this is its explanation. Who pins what a program sees registers addresses; who holds a device's pages
//! registers frames.
//!
//! Addresses are registered in parts, so that threads pin side by side: each thread has a part to write to, and who asks
//! walks through all. What must never happen here: a holder that is in no part while it holds, as who walks would miss it.

use alloc::borrow::Cow;
use alloc::vec::Vec;
use core::mem;
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
    /// When, on the platform's clock, in nanoseconds, to a few milliseconds: [`MemoryMap::now_ns`](crate::memremap::MemoryMap::now_ns) says what it is now.
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

/// A place in a register, and the number of who was given it.
#[derive(Clone, Copy, Debug)]
struct Place {
    nth: usize,
    number: u64,
}

/// Places that are used again: a pin of one page is to cost no allocation here.
#[derive(Debug)]
struct Registry<H> {
    next: u64,
    places: Vec<Entry<H>>,
    /// The first of the free places.
    free: Option<usize>,
}

#[derive(Debug)]
enum Entry<H> {
    Held(u64, H),
    /// With the next free place.
    Free(Option<usize>),
}

impl<H> Entry<H> {
    const fn held(&self) -> Option<(u64, &H)> {
        match self {
            Self::Held(number, holder) => Some((*number, holder)),
            Self::Free(_) => None,
        }
    }
}

impl<H> Default for Registry<H> {
    fn default() -> Self {
        Self {
            next: 0,
            places: Vec::new(),
            free: None,
        }
    }
}

impl<H: Clone> Registry<H> {
    fn add(&mut self, holder: H) -> Place {
        self.next += 1;
        let number = self.next;
        let held = Entry::Held(number, holder);
        let nth = self.free.unwrap_or(self.places.len());
        match self.places.get_mut(nth) {
            Some(place) => {
                if let Entry::Free(next) = mem::replace(place, held) {
                    self.free = next;
                }
            }
            None => self.places.push(held),
        }
        Place { nth, number }
    }

    /// Nothing if the place is somebody else's by now.
    fn remove(&mut self, place: Place) -> Option<(u64, H)> {
        let given = self.places.get_mut(place.nth)?;
        given.held().filter(|(number, _)| *number == place.number)?;
        match mem::replace(given, Entry::Free(self.free)) {
            Entry::Held(number, holder) => {
                self.free = Some(place.nth);
                Some((number, holder))
            }
            Entry::Free(_) => None,
        }
    }

    fn remove_all(&mut self, gone: impl Fn(&H) -> bool) {
        for (nth, place) in self.places.iter_mut().enumerate() {
            if place.held().is_some_and(|(_, holder)| gone(holder)) {
                *place = Entry::Free(self.free.replace(nth));
            }
        }
    }

    fn all(&self) -> impl Iterator<Item = (u64, &H)> {
        self.places.iter().filter_map(Entry::held)
    }

    /// Those who are wanted, oldest first.
    fn sorted(&self, wanted: impl Fn(&H) -> bool) -> Vec<(u64, &H)> {
        let mut found: Vec<_> = self.all().filter(|(_, holder)| wanted(holder)).collect();
        found.sort_unstable_by_key(|(number, _)| *number);
        found
    }

    fn of(&self, wanted: impl Fn(&H) -> bool) -> Vec<H> {
        let found = self.sorted(wanted).into_iter();
        found.map(|(_, holder)| holder.clone()).collect()
    }
}

/// Parts of the register of addresses; threads beyond this many share.
const PARTS: usize = if cfg!(any(loom, shuttle)) { 2 } else { 16 };

/// A part of the register of addresses, with cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Part(Mutex<Registry<Holder>>);

/// All holders of a memory map.
#[derive(Debug, Default)]
pub struct Holders {
    parts: [Part; PARTS],
    frames: Mutex<Registry<FrameHolder>>,
}

/// A holder's place in the register.
#[derive(Debug)]
#[must_use = "a holder stays registered until `remove`"]
pub struct Ticket {
    part: usize,
    place: Place,
}

/// Of which holders somebody has been told: in each part of the register of those up to this one.
#[derive(Debug, Default)]
pub struct Told([u64; PARTS]);

impl Told {
    /// Of none.
    #[must_use]
    pub const fn new() -> Self {
        Self([0; PARTS])
    }
}

/// The place in the register of somebody who holds a device's pages.
#[derive(Debug)]
#[must_use = "a holder stays registered until `remove_frames`"]
pub struct FrameTicket(Place);

impl Holders {
    /// Registers a holder until [`remove`](Self::remove). When this returns, everybody who asks finds it. `holder` is called under a
    /// lock, so that in each part who comes later says a later time.
    pub fn add(&self, holder: impl FnOnce() -> Holder) -> Ticket {
        let part = pgmap_sync::thread_number() % PARTS;
        let mut registry = self.parts[part].0.lock();
        let place = registry.add(holder());
        drop(registry);
        Ticket { part, place }
    }

    /// Forgets a holder.
    pub fn remove(&self, ticket: &Ticket) {
        let removed = self.parts[ticket.part].0.lock().remove(ticket.place);
        // Not under the lock.
        drop(removed);
    }

    /// Who holds any of these addresses, oldest first.
    #[must_use]
    pub fn of(&self, range: &Range<usize>) -> Vec<Holder> {
        self.sorted(|holder| overlaps(holder, range))
    }

    /// All who hold addresses, oldest first.
    #[must_use]
    pub fn all(&self) -> Vec<Holder> {
        self.sorted(|_| true)
    }

    fn sorted(&self, wanted: impl Fn(&Holder) -> bool) -> Vec<Holder> {
        let of_part = |part: &Part| part.0.lock().of(&wanted);
        oldest_first(self.parts.iter().flat_map(of_part).collect())
    }

    /// Those who have held addresses since before `since_ns`, each of them once: `told` is how far the caller has been told.
    #[must_use]
    pub fn older_than(&self, since_ns: u64, told: &mut Told) -> Vec<Holder> {
        let mut found = Vec::new();
        for (part, told) in self.parts.iter().zip(&mut told.0) {
            let registry = part.0.lock();
            let before = *told;
            let old = registry.sorted(|holder| holder.since_ns < since_ns);
            for (number, holder) in old.into_iter().filter(|(number, _)| *number > before) {
                found.push(holder.clone());
                *told = number;
            }
        }
        oldest_first(found)
    }

    /// Whether anybody holds any of these addresses. Part by part, and still exact about who registered before: nobody changes parts.
    #[must_use]
    pub fn has_any_of(&self, range: &Range<usize>) -> bool {
        self.parts.iter().any(|part| {
            let registry = part.0.lock();
            registry.all().any(|(_, holder)| overlaps(holder, range))
        })
    }

    /// Registers a holder of a device's pages until [`remove_frames`](Self::remove_frames).
    pub fn add_frames(&self, holder: FrameHolder) -> FrameTicket {
        FrameTicket(self.frames.lock().add(holder))
    }

    /// Forgets a holder of a device's pages.
    pub fn remove_frames(&self, ticket: &FrameTicket) {
        let removed = self.frames.lock().remove(ticket.0);
        drop(removed);
    }

    /// Forgets all who have any of these frames: they were revoked. Their tickets mean nothing from here on.
    pub fn revoke_frames(&self, range: PfnRange) {
        let gone = |holder: &FrameHolder| holder.frames.intersects(range);
        self.frames.lock().remove_all(gone);
    }

    /// Who holds any of these frames of devices, oldest first.
    #[must_use]
    pub fn of_frames(&self, range: PfnRange) -> Vec<FrameHolder> {
        let overlaps = |holder: &FrameHolder| holder.frames.intersects(range);
        self.frames.lock().of(overlaps)
    }
}

fn oldest_first(mut holders: Vec<Holder>) -> Vec<Holder> {
    holders.sort_by_key(|holder| holder.since_ns);
    holders
}

const fn overlaps(holder: &Holder, range: &Range<usize>) -> bool {
    holder.range.start < range.end && range.start < holder.range.end
}

#[cfg(test)]
mod tests {
    use super::*;

    /// REF-7: holders are listed oldest first, whatever places they were given; who was revoked takes nobody else's place away.
    #[test]
    fn holders_are_listed_oldest_first() {
        let mut registry = Registry::default();
        let first = registry.add(1);
        let _second = registry.add(2);
        assert_eq!(registry.remove(first), Some((1, 1)));
        let third = registry.add(3);
        assert_eq!(third.nth, first.nth);
        assert_eq!(registry.of(|_| true), [2, 3]);
        assert_eq!(registry.remove(first), None);
        registry.remove_all(|holder| *holder == 2);
        assert_eq!(registry.of(|_| true), [3]);
        registry.add(4);
        assert_eq!(registry.places.len(), 2);
    }

    /// REF-7: whoever registers, on whichever thread, is found by all who ask, oldest first, and told of once; and may go on another
    /// thread than it came.
    #[cfg(not(any(loom, shuttle)))]
    #[test]
    fn holders_of_all_threads_are_found() {
        let holders = Holders::default();
        let add = |since_ns: u64| {
            let start = usize::try_from(since_ns).unwrap() * 10;
            holders.add(|| Holder {
                label: "test".into(),
                site: Location::caller(),
                since_ns,
                range: start..start + 10,
            })
        };
        let since = |found: Vec<Holder>| -> Vec<u64> {
            found.iter().map(|holder| holder.since_ns).collect()
        };
        let mut told = Told::new();
        let tickets: Vec<Ticket> = (0..40)
            .rev()
            .map(|nth| std::thread::scope(|scope| scope.spawn(|| add(nth)).join().unwrap()))
            .collect();
        assert_eq!(since(holders.all()), (0..40).collect::<Vec<u64>>());
        assert_eq!(since(holders.of(&(105..125))), [10, 11, 12]);
        assert!((0..40).all(|nth| holders.has_any_of(&(nth * 10 + 9..nth * 10 + 10))));
        assert_eq!(
            since(holders.older_than(30, &mut told)),
            (0..30).collect::<Vec<u64>>()
        );
        assert_eq!(since(holders.older_than(30, &mut told)), [0; 0]);
        for ticket in &tickets {
            holders.remove(ticket);
        }
        assert!(holders.all().is_empty() && !holders.has_any_of(&(0..400)));
    }
}
