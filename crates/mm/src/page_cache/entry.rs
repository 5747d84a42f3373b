//! One entry of a page cache: whether a page of the file is in RAM, and what is to be done with it.

use pgmap_core::addr::Pfn;

use crate::page_table::Entry;

/// A page of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CachePage {
    /// Only the file has it.
    Absent,
    /// It is in RAM.
    Cached(Cached),
    /// The RAM has lost bytes that the file does not have: accesses get SIGBUS until it is dropped.
    Poisoned,
}

/// A page of a file that is in RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cached {
    /// The frame that accounts for it.
    pub frame: Pfn,
    /// Whether any mapping may have it: the active list. Who is not mapped is on the inactive one.
    pub mapping: Mapping,
    /// Whether RAM has bytes that the file has not.
    pub state: State,
    /// Whether its bytes are on their way to the file.
    pub writeback: Writeback,
}

/// Whether a page is mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mapping {
    /// Nowhere.
    Unmapped,
    /// Perhaps.
    Mapped,
}

/// Whether a page has been written since it was last like the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// It is like the file, and every mapping of it is write-protected.
    Clean,
    /// It is not, or may become so without a fault.
    Dirty,
}

/// Whether a page is being written to the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Writeback {
    /// No.
    Idle,
    /// Somebody writes it; nobody else does meanwhile, and it is not dropped.
    UnderWay,
}

// The word: bit 0 cached, bit 1 poisoned, bit 2 mapped, bit 3 dirty, bit 4 under writeback, bits 32..64 the frame.
const CACHED: u64 = 1;
const POISONED: u64 = 1 << 1;
const MAPPED: u64 = 1 << 2;
const DIRTY: u64 = 1 << 3;
const WRITEBACK: u64 = 1 << 4;
const PFN_SHIFT: u32 = 32;

impl Entry for CachePage {
    const EMPTY: Self = Self::Absent;

    fn to_word(self) -> u64 {
        match self {
            Self::Absent => 0,
            Self::Poisoned => POISONED,
            Self::Cached(page) => {
                let mapped = match page.mapping {
                    Mapping::Unmapped => 0,
                    Mapping::Mapped => MAPPED,
                };
                let dirty = match page.state {
                    State::Clean => 0,
                    State::Dirty => DIRTY,
                };
                let writeback = match page.writeback {
                    Writeback::Idle => 0,
                    Writeback::UnderWay => WRITEBACK,
                };
                page.frame.get() << PFN_SHIFT | CACHED | mapped | dirty | writeback
            }
        }
    }

    fn from_word(word: u64) -> Self {
        let has = |bit| word & bit != 0;
        if has(POISONED) {
            return Self::Poisoned;
        }
        if !has(CACHED) {
            return Self::Absent;
        }
        #[allow(
            clippy::cast_possible_truncation,
            reason = "the upper half of the word"
        )]
        let frame = Pfn::from_u32((word >> PFN_SHIFT) as u32);
        Self::Cached(Cached {
            frame,
            mapping: if has(MAPPED) {
                Mapping::Mapped
            } else {
                Mapping::Unmapped
            },
            state: if has(DIRTY) {
                State::Dirty
            } else {
                State::Clean
            },
            writeback: if has(WRITEBACK) {
                Writeback::UnderWay
            } else {
                Writeback::Idle
            },
        })
    }
}

impl CachePage {
    /// The page, if it is in RAM.
    #[must_use]
    pub const fn cached(self) -> Option<Cached> {
        match self {
            Self::Cached(page) => Some(page),
            Self::Absent | Self::Poisoned => None,
        }
    }
}

impl Cached {
    /// A page that was just read.
    #[must_use]
    pub const fn fresh(frame: Pfn) -> Self {
        Self {
            frame,
            mapping: Mapping::Unmapped,
            state: State::Clean,
            writeback: Writeback::Idle,
        }
    }

    /// Whether RAM has bytes that the file has not.
    #[must_use]
    pub const fn is_dirty(self) -> bool {
        matches!(self.state, State::Dirty)
    }

    /// Whether any mapping may have it.
    #[must_use]
    pub const fn is_mapped(self) -> bool {
        matches!(self.mapping, Mapping::Mapped)
    }

    /// Whether it is being written to the file.
    #[must_use]
    pub const fn is_under_writeback(self) -> bool {
        matches!(self.writeback, Writeback::UnderWay)
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Every entry survives the way into the table and back.
        #[test]
        fn entries_are_words(pfn in any::<u32>(), flags in 0u8..8) {
            let page = Cached {
                frame: Pfn::from_u32(pfn),
                mapping: if flags & 1 == 0 { Mapping::Unmapped } else { Mapping::Mapped },
                state: if flags & 2 == 0 { State::Clean } else { State::Dirty },
                writeback: if flags & 4 == 0 { Writeback::Idle } else { Writeback::UnderWay },
            };
            for entry in [CachePage::Cached(page), CachePage::Absent, CachePage::Poisoned] {
                prop_assert_eq!(CachePage::from_word(entry.to_word()), entry);
            }
        }
    }

    /// A page that was never used needs no initialising.
    #[test]
    fn zero_is_absent() {
        assert_eq!(CachePage::from_word(0), CachePage::Absent);
    }
}
