//! The inactive list: pages taken out of the address space that have not gone to a device yet.
//!
//! A ring of slots. Pages enter at the head, in runs, and leave for a device from the tail, oldest first.
//! A page that is touched meanwhile goes back at once (second chance), and its slot stays an empty hole
//! until the tail passes it.
//!
//! What must never happen here: a slot is handed out while somebody still reads it. A slot is
//! `Claimed` by one thread from `reserve`, `claim` or `take_oldest` to `fill` or `release`,
//! whatever becomes of its page.

use alloc::vec::Vec;

use pgmap_sync::Mutex;

use crate::mmu::Slot;
use crate::page_table::PageIndex;

/// What a slot is used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum SlotState {
    /// Nothing is in it.
    Empty,
    /// A page that waits.
    Filled(PageIndex),
    /// Somebody is filling, reading or emptying it, and will release it or fill it again.
    Claimed,
}

#[derive(Debug)]
struct Ring {
    slots: Vec<SlotState>,
    /// Slots ever handed out; the next one is this modulo the ring's length.
    head: u64,
    /// The oldest slot that may still be filled and has not been taken to be stored.
    next: u64,
    /// The oldest slot that is not empty.
    tail: u64,
    /// Slots that wait to be stored.
    waiting: u32,
}

/// The staging area of one address space.
#[derive(Debug)]
pub struct Staging {
    ring: Mutex<Ring>,
}

impl Ring {
    fn index(&self, position: u64) -> usize {
        #[allow(
            clippy::cast_possible_truncation,
            reason = "less than the ring's length"
        )]
        let index = (position % self.slots.len() as u64) as usize;
        index
    }

    /// The position at which a slot in use was handed out.
    fn position(&self, slot: Slot) -> u64 {
        let length = self.slots.len() as u64;
        let behind = (self.index(self.head) as u64 + length - u64::from(slot.0)) % length;
        self.head - if behind == 0 { length } else { behind }
    }

    fn fill(&mut self, slot: Slot, page: PageIndex) {
        self.slots[slot.0 as usize] = SlotState::Filled(page);
        self.waiting += 1;
        // `take_oldest` may have passed the slot while it was reserved.
        self.next = self.next.min(self.position(slot));
    }

    fn advance_tail(&mut self) {
        while self.tail < self.head && self.slots[self.index(self.tail)] == SlotState::Empty {
            self.tail += 1;
        }
        self.next = self.next.max(self.tail);
    }
}

impl Staging {
    /// A staging area of `slots` slots, all empty.
    #[must_use]
    pub fn new(slots: u32) -> Self {
        let slots = alloc::vec![SlotState::Empty; slots as usize];
        let ring = Ring {
            slots,
            head: 0,
            next: 0,
            tail: 0,
            waiting: 0,
        };
        Self {
            ring: Mutex::new(ring),
        }
    }

    /// Pages that wait to be stored.
    pub fn waiting(&self) -> u32 {
        self.ring.lock().waiting
    }

    /// Hands out up to `count` consecutive empty slots, at least one unless there is no room.
    ///
    /// Each is claimed until [`fill`](Self::fill) or [`release`](Self::release).
    pub fn reserve(&self, count: u32) -> Option<(Slot, u32)> {
        let ring = &mut *self.ring.lock();
        let length = ring.slots.len() as u64;
        let index = ring.index(ring.head);
        let room = (length - (ring.head - ring.tail)).min(length - index as u64);
        let count = u32::try_from(room).unwrap_or(u32::MAX).min(count);
        if count == 0 {
            return None;
        }
        ring.slots[index..index + count as usize].fill(SlotState::Claimed);
        ring.head += u64::from(count);
        #[allow(
            clippy::cast_possible_truncation,
            reason = "the ring has at most u32::MAX slots"
        )]
        let slot = Slot(index as u32);
        Some((slot, count))
    }

    /// Notes that a page waits in a slot: one that was reserved for it, or one that could not be stored now.
    pub fn fill(&self, slot: Slot, page: PageIndex) {
        self.ring.lock().fill(slot, page);
    }

    /// Takes the pages that have waited longest, for storing, up to the length of `out`.
    ///
    /// The slots are claimed until [`fill`](Self::fill) or [`release`](Self::release).
    pub fn take_oldest(&self, out: &mut [(Slot, PageIndex)]) -> usize {
        let ring = &mut *self.ring.lock();
        let mut taken = 0;
        while taken < out.len() && ring.next < ring.head {
            let index = ring.index(ring.next);
            ring.next += 1;
            if let SlotState::Filled(page) = ring.slots[index] {
                ring.slots[index] = SlotState::Claimed;
                ring.waiting -= 1;
                #[allow(
                    clippy::cast_possible_truncation,
                    reason = "the ring has at most u32::MAX slots"
                )]
                let slot = Slot(index as u32);
                out[taken] = (slot, page);
                taken += 1;
            }
        }
        taken
    }

    /// Claims a slot whose page is wanted back. False if somebody has claimed it to store its page: then its
    /// bytes may be read under the page's cursor, but the slot is not the caller's to empty.
    pub fn claim(&self, slot: Slot) -> bool {
        let ring = &mut *self.ring.lock();
        let filled = matches!(ring.slots[slot.0 as usize], SlotState::Filled(_));
        if filled {
            ring.slots[slot.0 as usize] = SlotState::Claimed;
            ring.waiting -= 1;
        }
        filled
    }

    /// Gives back a claimed slot that has been emptied.
    pub fn release(&self, slot: Slot) {
        let ring = &mut *self.ring.lock();
        debug_assert_eq!(
            ring.slots[slot.0 as usize],
            SlotState::Claimed,
            "{slot:?} was not claimed"
        );
        ring.slots[slot.0 as usize] = SlotState::Empty;
        ring.advance_tail();
    }
}

#[cfg(test)]
#[cfg(not(any(loom, shuttle)))]
mod tests {
    use super::*;

    fn taken(staging: &Staging, most: usize) -> Vec<u32> {
        let mut out = alloc::vec![(Slot(0), PageIndex(0)); most];
        let count = staging.take_oldest(&mut out);
        out[..count].iter().map(|(_, page)| page.0).collect()
    }

    fn fill_run(staging: &Staging, pages: core::ops::Range<u32>) -> Slot {
        let (slot, count) = staging.reserve(pages.end - pages.start).unwrap();
        assert_eq!(count, pages.end - pages.start);
        for (nth, page) in pages.enumerate() {
            staging.fill(Slot(slot.0 + u32::try_from(nth).unwrap()), PageIndex(page));
        }
        slot
    }

    /// Pages leave oldest first, and a page that was touched meanwhile does not leave.
    #[test]
    fn the_oldest_leave_first_and_the_touched_stay() {
        let staging = Staging::new(16);
        let slot = fill_run(&staging, 100..108);
        assert!(staging.claim(Slot(slot.0 + 1)));
        staging.release(Slot(slot.0 + 1));
        assert_eq!(taken(&staging, 3), [100, 102, 103]);
        assert_eq!(staging.waiting(), 4);
        assert_eq!(taken(&staging, 9), [104, 105, 106, 107]);
    }

    /// A slot is handed out again only after it was released, in the ring's order.
    #[test]
    fn slots_come_back_only_after_release() {
        let staging = Staging::new(8);
        let slot = fill_run(&staging, 0..8);
        assert_eq!(staging.reserve(1), None);
        assert_eq!(taken(&staging, 8).len(), 8);
        staging.release(Slot(slot.0 + 1));
        assert_eq!(staging.reserve(4), None);
        staging.release(slot);
        assert_eq!(staging.reserve(4), Some((slot, 2)));
    }

    /// A slot that is filled after `take_oldest` looked past it is not forgotten.
    #[test]
    fn a_slot_filled_late_is_not_forgotten() {
        let staging = Staging::new(8);
        let (early, _) = staging.reserve(2).unwrap();
        fill_run(&staging, 50..52);
        assert_eq!(taken(&staging, 8), [50, 51]);
        staging.fill(early, PageIndex(7));
        assert_eq!(taken(&staging, 8), [7]);
    }
}
