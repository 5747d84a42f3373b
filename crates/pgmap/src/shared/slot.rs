//! A place for one device of a run: what the supervisor wants of it, and what each process has done about that.
//!
//! Only the supervisor writes wishes. Each change has a generation, and a process answers to a generation: so an answer to an
//! older wish is never taken for one to the newest. A wish can be read at any time, also by a process that starts
//! just then: it does what is wanted now, whatever was wanted before.

use pgmap_sync::atomic::{AtomicU64, Ordering, fence};

use crate::shared::DeviceUse;

/// Bytes of a device's description: a path, and options.
pub(crate) const TEXT_BYTES: usize = 4352;

/// What is wanted of a slot's device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wish {
    /// That nobody has it: the slot is free, or nearly.
    Absent,
    /// That everybody uses it.
    Live,
    /// That nothing goes there any more, and that what is there comes back. Everybody can still take it up again.
    Leaving,
}

/// A wish, and which one it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Order {
    /// Differs from that of the slot's other wishes.
    pub generation: u32,
    /// What is wanted.
    pub wish: Wish,
}

/// What a process has done about an order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// Nothing yet.
    None,
    /// What was wanted.
    Done,
    /// A part: so many pages are still on the device, at least.
    Left(u32),
    /// It cannot use the device, and goes on without it.
    Failed,
}

/// A place for one device.
#[derive(Debug)]
#[repr(C)]
pub struct DeviceSlot {
    order: AtomicU64, // the supervisor writes
    /// The length of the text in the low half, 0 while it is being written; how many there have been in the high one.
    text_head: AtomicU64,
    /// Written while the wish is `Absent` and everybody has answered to that. Who gives back what a process held may read it
    /// all the same.
    text: [AtomicU64; TEXT_BYTES / 8],
    /// The most that the device has held, and what is taken of its capacity now.
    pub usage: DeviceUse,
}

impl DeviceSlot {
    /// What is wanted now.
    #[must_use]
    pub fn order(&self) -> Order {
        // SeqCst: pairs with the store in `set_order`. A process that starts has claimed its place before: either it sees the
        // new wish, or the supervisor sees the process.
        let word = self.order.load(Ordering::SeqCst);
        let wish = match word & 3 {
            1 => Wish::Live,
            2 => Wish::Leaving,
            _ => Wish::Absent,
        };
        #[allow(clippy::cast_possible_truncation, reason = "32 bits were stored")]
        let generation = (word >> 8) as u32;
        Order { generation, wish }
    }

    /// Wants something new. Answers the order.
    pub(crate) fn set_wish(&self, wish: Wish) -> Order {
        let generation = self.order().generation.wrapping_add(1);
        let code = match wish {
            Wish::Absent => 0,
            Wish::Live => 1,
            Wish::Leaving => 2,
        };
        // SeqCst: see `order`; it also releases the text.
        let word = u64::from(generation) << 8 | code;
        self.order.store(word, Ordering::SeqCst);
        Order { generation, wish }
    }

    /// Describes the next device. False if there is no room for so long a text.
    #[must_use]
    pub(crate) fn describe(&self, text: &str) -> bool {
        if text.len() > TEXT_BYTES {
            return false;
        }
        // Relaxed, both: only the supervisor writes, and the fence orders the store before those of the words.
        let next = (self.text_head.load(Ordering::Relaxed) >> 32).wrapping_add(1) << 32;
        self.text_head.store(next, Ordering::Relaxed);
        // Pairs with the fence in `description`: who reads a new word finds a new head afterwards.
        fence(Ordering::Release);
        for (word, bytes) in self.text.iter().zip(text.as_bytes().chunks(8)) {
            let mut all = [0; 8];
            all[..bytes.len()].copy_from_slice(bytes);
            // Relaxed: the head that is stored next releases them.
            word.store(u64::from_le_bytes(all), Ordering::Relaxed);
        }
        // Release: pairs with the acquire in `description`.
        let len = text.len() as u64;
        self.text_head.store(next | len, Ordering::Release);
        true
    }

    /// The description of the device that is wanted, or was last; empty if it is being rewritten.
    #[must_use]
    pub fn description(&self) -> String {
        // Acquire: pairs with the release in `describe`. Relaxed for the words: the head tells whether they are its own.
        let head = self.text_head.load(Ordering::Acquire);
        #[allow(clippy::cast_possible_truncation, reason = "the low half")]
        let len = head as u32 as usize;
        let words = self.text.iter().take(len.div_ceil(8));
        let mut bytes: Vec<u8> = words
            .flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes())
            .collect();
        // Pairs with the fence in `describe`.
        fence(Ordering::Acquire);
        if self.text_head.load(Ordering::Relaxed) != head {
            return String::new();
        }
        bytes.truncate(len);
        String::from_utf8(bytes).unwrap_or_default()
    }
}

/// What a process says about a slot: one word, so that the parts of it agree.
#[derive(Debug, Default)]
#[repr(C)]
pub struct AnswerWord(AtomicU64); // the process writes, and its reaper when it is dead

impl AnswerWord {
    /// Answers to an order.
    pub(crate) fn set(&self, generation: u32, answer: Answer) {
        let (code, left) = match answer {
            Answer::None => (0, 0),
            Answer::Done => (1, 0),
            Answer::Left(pages) => (2, pages),
            Answer::Failed => (3, 0),
        };
        // Release: pairs with the acquire in `get`: what was done is done when the supervisor hears of it. A generation has
        // 30 bits here, which nobody can mistake.
        let word = u64::from(left) << 32 | u64::from(generation << 2) | code;
        self.0.store(word, Ordering::Release);
    }

    /// The answer to an order.
    pub(crate) fn get(&self, generation: u32) -> Answer {
        // Acquire: pairs with the release in `set`.
        let word = self.0.load(Ordering::Acquire);
        #[allow(clippy::cast_possible_truncation, reason = "the word is two halves")]
        let (left, low) = ((word >> 32) as u32, word as u32);
        if low >> 2 != (generation << 2) >> 2 {
            return Answer::None;
        }
        match low & 3 {
            1 => Answer::Done,
            2 => Answer::Left(left),
            3 => Answer::Failed,
            _ => Answer::None,
        }
    }

    /// Forgets what a dead process said.
    pub(crate) fn clear(&self) {
        // Relaxed: the place is given back after this, with a release.
        self.0.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::Region;

    /// What is described and wanted is read as it was written, at any length that fits.
    #[test]
    fn a_slot_says_what_is_wanted() {
        let (region, _file) = Region::create(1 << 30, 0).unwrap();
        let slot = &region.devices()[3];
        assert_eq!(slot.order().wish, Wish::Absent);
        for len in [0, 1, 8, 9, TEXT_BYTES] {
            let text = "x".repeat(len);
            assert!(slot.describe(&text));
            assert_eq!(slot.description(), text);
        }
        assert!(!slot.describe(&"x".repeat(TEXT_BYTES + 1)));
        for wish in [Wish::Live, Wish::Leaving, Wish::Live, Wish::Absent] {
            let before = slot.order().generation;
            assert_eq!(slot.set_wish(wish), slot.order());
            assert_eq!(
                (slot.order().wish, slot.order().generation),
                (wish, before + 1)
            );
        }
    }

    /// Who reads a description while it is rewritten reads the old one, the new one, or none.
    #[test]
    fn a_description_is_read_whole_or_not_at_all() {
        let (region, _file) = Region::create(1 << 30, 0).unwrap();
        let slot = &region.devices()[0];
        let texts = ["x".repeat(TEXT_BYTES), "y".repeat(TEXT_BYTES)];
        let rewrite = || assert!((0..20_000).all(|nth| slot.describe(&texts[nth % 2])));
        std::thread::scope(|scope| {
            let writer = scope.spawn(rewrite);
            while !writer.is_finished() {
                let read = slot.description();
                let whole = read.is_empty() || texts.contains(&read);
                assert!(whole, "{} bytes, mixed", read.len());
            }
        });
        assert_eq!(slot.description(), texts[1]);
    }

    /// An answer to another order is none.
    #[test]
    fn an_answer_is_to_one_order() {
        let word = AnswerWord::default();
        for answer in [Answer::Done, Answer::Left(u32::MAX), Answer::Failed] {
            for generation in [1, 2, 1 << 29, u32::MAX] {
                word.set(generation, answer);
                assert_eq!(word.get(generation), answer);
                assert_eq!(word.get(generation.wrapping_add(1)), Answer::None);
                assert_eq!(word.get(generation - 1), Answer::None);
            }
        }
        word.clear();
        assert_eq!(word.get(u32::MAX), Answer::None);
    }
}
