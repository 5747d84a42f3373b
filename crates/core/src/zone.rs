//! Zones: what may live in which RAM, and where they lie.
//!
//! NORMAL lies below MOVABLE and they never overlap (HOT-2). Which of them a block may join is asked of the blocks that are on
//! line only, so that adding a block changes nothing for the others.

use core::fmt;

use crate::addr::{Pfn, PfnRange};

/// A zone that RAM can be in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum RamZone {
    /// For anything.
    Normal,
    /// For pages that can always be moved, so that its blocks can be taken off line.
    Movable,
}

/// The zone of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Zone {
    /// RAM on line.
    Ram(RamZone),
    /// A device's: neither on nor off line, whatever the blocks of RAM are.
    Device,
}

/// Which zone a block of RAM is to join when it goes on line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ZoneChoice {
    /// NORMAL where that is possible, MOVABLE otherwise.
    Auto,
    /// NORMAL.
    Kernel,
    /// MOVABLE.
    Movable,
}

/// The block cannot join the zone: NORMAL would not lie below MOVABLE then (HOT-2).
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "{zone} cannot be there: the block {} it, at {in_the_way:?}, is {other}; choose that zone, or take that block off line first",
    match .zone { RamZone::Normal => "below", RamZone::Movable => "above" }
)]
pub struct WrongZone {
    /// The zone that was asked for.
    pub zone: RamZone,
    /// The zone of the block in the way.
    pub other: RamZone,
    /// The first frame of the block in the way.
    pub in_the_way: Pfn,
}

impl fmt::Display for RamZone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Normal => "Normal",
            Self::Movable => "Movable",
        })
    }
}

impl fmt::Display for Zone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ram(zone) => zone.fmt(f),
            Self::Device => f.write_str("Device"),
        }
    }
}

/// The zone that `block` joins, where `online` is in zones already.
pub(crate) fn choose(
    choice: ZoneChoice,
    block: PfnRange,
    online: &(impl Iterator<Item = (PfnRange, RamZone)> + Clone),
) -> Result<RamZone, WrongZone> {
    let joins = |zone: RamZone| {
        let mut online = online.clone();
        let in_the_way = online.find(|(range, other)| match zone {
            RamZone::Normal => *other == RamZone::Movable && range.start() < block.start(),
            RamZone::Movable => *other == RamZone::Normal && range.start() > block.start(),
        });
        match in_the_way {
            Some((range, other)) => Err(WrongZone {
                zone,
                other,
                in_the_way: range.start(),
            }),
            None => Ok(zone),
        }
    };
    match choice {
        ZoneChoice::Auto => joins(RamZone::Normal).or_else(|_| joins(RamZone::Movable)),
        ZoneChoice::Kernel => joins(RamZone::Normal),
        ZoneChoice::Movable => joins(RamZone::Movable),
    }
}
