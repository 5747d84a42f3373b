//! One entry of the software page table: where a page's bytes are.
//!
//! The page table is the truth (the machine's page tables are its TLB), so a page is in exactly one of
//! these states, and only a [`Cursor`](crate::page_table::Cursor) changes it.

use pgmap_core::addr::Pfn;

use crate::page_table::Entry;

/// Whether the page was used since reclaim last looked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Heat {
    /// Reclaim may take it.
    Cold,
    /// It was touched while it waited in staging: reclaim spares it once.
    Hot,
}

/// Whether somebody else still has the very bytes of a page in RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Copy {
    /// Only RAM has the bytes.
    None,
    /// The frame's `private` word is the device page with the same bytes; the page is write-protected.
    Kept,
    /// The file that is mapped there has the page, which nobody has changed; the page is write-protected.
    File,
}

/// One page of an address space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pte {
    /// Never touched, or discarded, or dropped as a file has it: the next access finds the file's bytes, or zeros if none is mapped there.
    None,
    /// In RAM and mapped.
    Present {
        /// The frame that accounts for it.
        frame: Pfn,
        /// Second chance.
        heat: Heat,
        /// Who else has the bytes.
        copy: Copy,
    },
    /// In RAM, taken out of the address space: the inactive list. The frame's `link` is the slot.
    Staged {
        /// The frame that accounts for it.
        frame: Pfn,
        /// Who else has the bytes.
        copy: Copy,
    },
    /// On a device only.
    Device {
        /// The device page.
        page: Pfn,
        /// When it went there, see [`Age`](crate::policy::Age).
        stamp: Stamp,
    },
    /// Its bytes are lost: every access gets SIGBUS until it is discarded.
    Poisoned,
}

/// A moment, as a 24-bit count of evictions that wraps.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stamp(u32);

impl Stamp {
    const BITS: u32 = 24;
    const MASK: u32 = (1 << Self::BITS) - 1;

    /// The moment after `ticks` ticks.
    #[must_use]
    pub const fn new(ticks: u32) -> Self {
        Self(ticks & Self::MASK)
    }

    /// Ticks from `earlier` to this moment, if that is less than one wrap.
    #[must_use]
    pub const fn since(self, earlier: Self) -> u32 {
        self.0.wrapping_sub(earlier.0) & Self::MASK
    }
}

// The word: bits 0..3 the state, bit 3 hot, bit 4 copy kept, bit 5 the file's, bits 8..32 the stamp, bits 32..64
// the frame or device page. All zero is `None`, so a fresh page table needs no initialising.
const STATE: u64 = 0b111;
const PRESENT: u64 = 1;
const STAGED: u64 = 2;
const DEVICE: u64 = 3;
const POISONED: u64 = 4;
const HOT: u64 = 1 << 3;
const KEPT: u64 = 1 << 4;
const FILE: u64 = 1 << 5;
const STAMP_SHIFT: u32 = 8;
const PFN_SHIFT: u32 = 32;

impl Entry for Pte {
    const EMPTY: Self = Self::None;

    fn to_word(self) -> u64 {
        Self::to_word(self)
    }

    fn from_word(word: u64) -> Self {
        Self::from_word(word)
    }
}

impl Pte {
    /// The frame of RAM that accounts for the page, if it is in RAM.
    #[must_use]
    pub const fn frame(self) -> Option<Pfn> {
        match self {
            Self::Present { frame, .. } | Self::Staged { frame, .. } => Some(frame),
            Self::None | Self::Device { .. } | Self::Poisoned => None,
        }
    }

    /// The entry as the page table stores it.
    #[must_use]
    pub const fn to_word(self) -> u64 {
        match self {
            Self::None => 0,
            Self::Present { frame, heat, copy } => {
                let hot = if matches!(heat, Heat::Hot) { HOT } else { 0 };
                frame.get() << PFN_SHIFT | PRESENT | hot | copy.to_word()
            }
            Self::Staged { frame, copy } => frame.get() << PFN_SHIFT | STAGED | copy.to_word(),
            Self::Device { page, stamp } => {
                page.get() << PFN_SHIFT | (stamp.0 as u64) << STAMP_SHIFT | DEVICE
            }
            Self::Poisoned => POISONED,
        }
    }

    /// The entry in a word that [`to_word`](Self::to_word) made.
    #[must_use]
    pub const fn from_word(word: u64) -> Self {
        #[allow(
            clippy::cast_possible_truncation,
            reason = "the upper half of the word"
        )]
        let pfn = Pfn::from_u32((word >> PFN_SHIFT) as u32);
        let copy = if word & KEPT != 0 {
            Copy::Kept
        } else if word & FILE != 0 {
            Copy::File
        } else {
            Copy::None
        };
        match word & STATE {
            PRESENT => {
                let heat = if word & HOT != 0 {
                    Heat::Hot
                } else {
                    Heat::Cold
                };
                Self::Present {
                    frame: pfn,
                    heat,
                    copy,
                }
            }
            STAGED => Self::Staged { frame: pfn, copy },
            DEVICE => {
                #[allow(clippy::cast_possible_truncation, reason = "24 bits after the mask")]
                let stamp = Stamp::new((word >> STAMP_SHIFT) as u32);
                Self::Device { page: pfn, stamp }
            }
            POISONED => Self::Poisoned,
            _ => Self::None,
        }
    }
}

impl Copy {
    const fn to_word(self) -> u64 {
        match self {
            Self::None => 0,
            Self::Kept => KEPT,
            Self::File => FILE,
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_pte() -> impl Strategy<Value = Pte> {
        let copy = || prop_oneof![Just(Copy::None), Just(Copy::Kept), Just(Copy::File)];
        let pfn = || any::<u32>().prop_map(Pfn::from_u32);
        prop_oneof![
            Just(Pte::None),
            Just(Pte::Poisoned),
            (pfn(), any::<u32>()).prop_map(|(page, stamp)| Pte::Device {
                page,
                stamp: Stamp::new(stamp)
            }),
            (
                pfn(),
                copy(),
                prop_oneof![Just(Heat::Cold), Just(Heat::Hot)]
            )
                .prop_map(|(frame, copy, heat)| Pte::Present { frame, heat, copy }),
            (pfn(), copy()).prop_map(|(frame, copy)| Pte::Staged { frame, copy }),
        ]
    }

    proptest! {
        /// Every entry survives the page table's word, and only `None` is zero.
        #[test]
        fn an_entry_survives_its_word(pte in any_pte()) {
            prop_assert_eq!(Pte::from_word(pte.to_word()), pte);
            prop_assert_eq!(pte.to_word() == 0, pte == Pte::None);
        }

        /// Distances between moments survive the wrap.
        #[test]
        fn stamps_count_across_the_wrap(start in any::<u32>(), ticks in 0u32..1 << 24) {
            prop_assert_eq!(Stamp::new(start.wrapping_add(ticks)).since(Stamp::new(start)), ticks);
        }
    }
}
