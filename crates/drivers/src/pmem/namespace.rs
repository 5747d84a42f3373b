//! Namespaces: parts of a region that are used on their own.
//!
//! Here is what a namespace is, as its label says, and where a new one finds room. What it does while it is in use is
//! [`Pmem`](super::Pmem).

use core::fmt;
use core::ops::Range;
use core::str::FromStr;

use super::uuid::Uuid;
use crate::size::ExactSize;

/// Bytes at the start of a labelled medium that belong to its label: two slots, and the rest of a sub-section.
pub const LABEL_AREA_BYTES: u64 = 2 << 20;
/// Namespaces begin at multiples of this: two never share a sub-section (MAP-4).
const GRANULE_BYTES: u64 = 2 << 20;
/// Bytes of the frames' metadata of one sub-section, 32 for each frame (MAP-8).
const METADATA_BYTES: u64 = 16 << 10;
/// Most namespaces of a region.
pub const MAX_NAMESPACES: usize = 255;
/// Most bytes of a namespace's name.
pub(super) const MAX_NAME_BYTES: usize = 64;

/// What a namespace is for; the words are ndctl's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// A block device that can be mapped directly.
    Fsdax,
    /// Memory that is mapped directly, without a block device in mind.
    Devdax,
    /// A block device without frames: nothing can be mapped or pinned.
    Raw,
}

/// The unit in which a namespace is mapped: mappings begin and end at multiples of it (DAX-1).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Align {
    /// 4 KiB.
    Page,
    /// 2 MiB.
    Pmd,
    /// 1 GiB.
    Pud,
}

/// The size of the pages that volatile memory is made of, if it is to be of huge ones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HugePage {
    /// 2 MiB.
    Pmd,
    /// 1 GiB.
    Pud,
}

/// Where the metadata of a namespace's frames lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MapLocation {
    /// In RAM.
    Mem,
    /// On the device itself (MAP-8).
    Dev,
}

/// Whether a namespace is to be used when its region is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Activation {
    /// It is.
    Enabled,
    /// It keeps its bytes, and is left alone.
    Disabled,
}

macro_rules! words {
    ($type:ident, $what:literal, $($variant:ident = $word:literal),+) => {
        impl $type {
            /// The word for it.
            #[must_use]
            pub const fn word(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)+
                }
            }

            /// All of them, in the order of their codes in a label.
            pub(crate) const ALL: &[Self] = &[$(Self::$variant),+];
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.word())
            }
        }

        impl FromStr for $type {
            type Err = UnknownWord;

            fn from_str(text: &str) -> Result<Self, UnknownWord> {
                let found = Self::ALL.iter().find(|known| known.word().eq_ignore_ascii_case(text));
                found.copied().ok_or(UnknownWord { known: $what })
            }
        }
    };
}

words!(
    Mode,
    "fsdax, devdax or raw",
    Fsdax = "fsdax",
    Devdax = "devdax",
    Raw = "raw"
);
words!(Align, "4K, 2M or 1G", Page = "4K", Pmd = "2M", Pud = "1G");
words!(HugePage, "2M or 1G", Pmd = "2M", Pud = "1G");
words!(MapLocation, "mem or dev", Mem = "mem", Dev = "dev");
words!(
    Activation,
    "enabled or disabled",
    Enabled = "enabled",
    Disabled = "disabled"
);

/// A word that means nothing here.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("use {known}")]
pub struct UnknownWord {
    /// What there is.
    pub known: &'static str,
}

impl Align {
    /// How many bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Page => 4 << 10,
            Self::Pmd => 2 << 20,
            Self::Pud => 1 << 30,
        }
    }
}

impl HugePage {
    /// The unit in which such pages can be mapped.
    #[must_use]
    pub const fn align(self) -> Align {
        match self {
            Self::Pmd => Align::Pmd,
            Self::Pud => Align::Pud,
        }
    }
}

/// A namespace, as its label says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Namespace {
    /// Its number in the region: the `1` of `namespace0.1`.
    pub index: u32,
    /// Its name for machines, which it keeps.
    pub uuid: Uuid,
    /// What its owner calls it; may be empty.
    pub name: String,
    /// What it is for.
    pub mode: Mode,
    /// The unit in which it is mapped.
    pub align: Align,
    /// Where its frames' metadata lives.
    pub map: MapLocation,
    /// Whether it is used when the region is opened.
    pub activation: Activation,
    /// Its bytes, in the region.
    pub data: Range<u64>,
    /// The bytes of the region that are set aside for its frames' metadata; empty if that lives in RAM.
    pub metadata: Range<u64>,
}

/// A namespace that somebody wants.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// How many bytes; as many as there are in one piece if that is not said.
    pub size_bytes: Option<u64>,
    /// What it is for.
    pub mode: Mode,
    /// The unit in which it is mapped.
    pub align: Align,
    /// Where its frames' metadata lives.
    pub map: MapLocation,
    /// What its owner calls it.
    pub name: String,
}

impl Default for Wanted {
    fn default() -> Self {
        Self {
            size_bytes: None,
            mode: Mode::Fsdax,
            align: Align::Pmd,
            map: MapLocation::Mem,
            name: String::new(),
        }
    }
}

fn no_room(most_bytes: u64) -> String {
    if most_bytes == 0 {
        return "the region has no room in one piece for this: destroy a namespace, or use another region".into();
    }
    let most = ExactSize(most_bytes);
    format!("the region has at most {most} in one piece for this: ask for that or less")
}

/// Why there can be no such namespace.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoNamespace {
    /// The size is not a multiple of the alignment.
    #[error("a namespace of align {align} has a size that is a multiple of {align}")]
    Size {
        /// The alignment.
        align: Align,
    },
    /// The region has no such room in one piece.
    #[error("{}", no_room(*most_bytes))]
    NoRoom {
        /// The most that it has.
        most_bytes: u64,
    },
    /// The name is too long, or has characters that are not shown.
    #[error("a name has at most {MAX_NAME_BYTES} bytes, and no control characters")]
    Name,
    /// The region has as many as it can have.
    #[error("the region has {MAX_NAMESPACES} namespaces, which is all that it can have")]
    TooMany,
}

impl Namespace {
    /// How many bytes it has.
    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.data.end - self.data.start
    }

    /// Finds a place among `others` on a medium of so many bytes for what is wanted.
    ///
    /// # Errors
    ///
    /// [`NoNamespace`].
    pub fn place(
        wanted: &Wanted,
        uuid: Uuid,
        medium_bytes: u64,
        others: &[Self],
    ) -> Result<Self, NoNamespace> {
        let align = wanted.align;
        if !is_name(&wanted.name) {
            return Err(NoNamespace::Name);
        }
        let sized = |bytes: u64| bytes != 0 && bytes.is_multiple_of(align.bytes());
        if !wanted.size_bytes.is_none_or(sized) {
            return Err(NoNamespace::Size { align });
        }
        let index =
            (0_u32..=u32::MAX).find(|index| !others.iter().any(|other| other.index == *index));
        let index = index.filter(|_| others.len() < MAX_NAMESPACES);
        let index = index.ok_or(NoNamespace::TooMany)?;
        let space = Space {
            medium_bytes,
            others,
        };
        let map = effective(wanted.mode, align, wanted.map);
        let fit = |room: &Range<u64>| fit(room, align, map);
        let fits = |room: &Range<u64>| {
            let bytes = fit(room);
            bytes != 0 && wanted.size_bytes.is_none_or(|wanted| wanted <= bytes)
        };
        let gaps = space.gaps(align);
        let most_bytes = gaps.iter().map(fit).max();
        let most_bytes = most_bytes.unwrap_or(0);
        let best = match wanted.size_bytes {
            Some(_) => gaps.into_iter().find(fits),
            None => gaps.into_iter().filter(fits).max_by_key(fit),
        };
        let room = best.ok_or(NoNamespace::NoRoom { most_bytes })?;
        let size = wanted.size_bytes.unwrap_or(fit(&room));
        let end = room.start + size;
        let metadata = match metadata_bytes(size, map) {
            0 => 0..0,
            bytes => end..end + bytes,
        };
        Ok(Self {
            index,
            uuid,
            name: wanted.name.clone(),
            mode: wanted.mode,
            align,
            map,
            activation: Activation::Enabled,
            data: room.start..end,
            metadata,
        })
    }

    /// What is wrong with a list of namespaces on a medium of so many bytes.
    pub(crate) fn check_all(all: &[Self], medium_bytes: u64) -> Result<(), &'static str> {
        if all.len() > MAX_NAMESPACES {
            return Err("there are too many namespaces");
        }
        let mut taken: Vec<&Range<u64>> = Vec::new();
        for (nth, one) in all.iter().enumerate() {
            one.check(medium_bytes)?;
            let mut before = all[..nth].iter();
            if before.any(|other| other.index == one.index || other.uuid == one.uuid) {
                return Err("two namespaces have the same number or uuid");
            }
            taken.extend([&one.data, &one.metadata]);
        }
        taken.retain(|range| !range.is_empty());
        taken.sort_by_key(|range| range.start);
        let apart = taken.windows(2).all(|pair| pair[0].end <= pair[1].start);
        apart.then_some(()).ok_or("two namespaces overlap")
    }

    fn check(&self, medium_bytes: u64) -> Result<(), &'static str> {
        let (data, metadata) = (&self.data, &self.metadata);
        if data.start < LABEL_AREA_BYTES || data.end > medium_bytes || data.is_empty() {
            return Err("a namespace is not on the medium");
        }
        let unit = self.align.bytes();
        let whole = self.size_bytes().is_multiple_of(unit);
        if !data.start.is_multiple_of(unit.max(GRANULE_BYTES)) || !whole {
            return Err("a namespace is not aligned");
        }
        if metadata.start > metadata.end || metadata.end > medium_bytes {
            return Err("a namespace's metadata is not on the medium");
        }
        if self.map != effective(self.mode, self.align, self.map) {
            return Err("a namespace has metadata on the medium that it does not need");
        }
        let needed = metadata_bytes(self.size_bytes(), self.map);
        let placed = metadata.is_empty() || metadata.start == data.end;
        if metadata.end - metadata.start != needed || !placed {
            return Err("a namespace's metadata has the wrong size or place");
        }
        is_name(&self.name)
            .then_some(())
            .ok_or("a namespace has no proper name")
    }
}

fn is_name(name: &str) -> bool {
    name.len() <= MAX_NAME_BYTES && !name.chars().any(char::is_control)
}

/// Where metadata really goes: of compound pages only the heads' is used, too little to spend the device on.
const fn effective(mode: Mode, align: Align, map: MapLocation) -> MapLocation {
    match (mode, align) {
        (Mode::Fsdax | Mode::Devdax, Align::Page) => map,
        (Mode::Raw, _) | (Mode::Fsdax | Mode::Devdax, Align::Pmd | Align::Pud) => MapLocation::Mem,
    }
}

/// Bytes of the device that the metadata of so many bytes takes, behind them: that of all sub-sections that both touch.
const fn metadata_bytes(size_bytes: u64, map: MapLocation) -> u64 {
    match map {
        MapLocation::Mem => 0,
        MapLocation::Dev => size_bytes.div_ceil(GRANULE_BYTES - METADATA_BYTES) * METADATA_BYTES,
    }
}

/// What is free of a medium.
struct Space<'a> {
    medium_bytes: u64,
    others: &'a [Namespace],
}

impl Space<'_> {
    /// The free parts after the label area, as far as a namespace of this alignment can begin and end there.
    fn gaps(&self, align: Align) -> Vec<Range<u64>> {
        let unit = align.bytes().max(GRANULE_BYTES);
        let taken = self
            .others
            .iter()
            .flat_map(|other| [&other.data, &other.metadata]);
        let mut taken: Vec<_> = taken.filter(|range| !range.is_empty()).cloned().collect();
        taken.push(self.medium_bytes..self.medium_bytes);
        taken.sort_by_key(|range| range.start);
        let (mut gaps, mut at) = (Vec::new(), LABEL_AREA_BYTES);
        for range in taken {
            let start = at.next_multiple_of(unit);
            if start < range.start {
                gaps.push(start..range.start);
            }
            at = at.max(range.end);
        }
        gaps
    }
}

/// How large a namespace the room has place for, metadata included.
fn fit(room: &Range<u64>, align: Align, map: MapLocation) -> u64 {
    let all = room.end - room.start;
    let metadata = match map {
        MapLocation::Mem => 0,
        MapLocation::Dev => all.div_ceil(GRANULE_BYTES) * METADATA_BYTES,
    };
    let size = all.saturating_sub(metadata);
    size - size % align.bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn place(wanted: &Wanted, medium: u64, others: &[Namespace]) -> Result<Namespace, NoNamespace> {
        Namespace::place(wanted, Uuid::random().unwrap(), medium, others)
    }

    /// A namespace that nobody gave a size fills its region. Of base pages, the metadata is on the device behind it (MAP-8); of
    /// compound pages it is too little for that.
    #[test]
    fn one_namespace_fills_a_region() {
        let one = place(&Wanted::default(), 1024 * MIB, &[]).unwrap();
        assert_eq!((one.size_bytes(), one.index), (1022 * MIB, 0));
        assert_eq!((one.map, one.metadata), (MapLocation::Mem, 0..0));
        let wanted = Wanted {
            align: Align::Page,
            map: MapLocation::Dev,
            ..Wanted::default()
        };
        let one = place(&wanted, 1024 * MIB, &[]).unwrap();
        assert_eq!(one.metadata, one.data.end..1024 * MIB);
        assert_eq!(one.size_bytes(), 1022 * MIB - 511 * METADATA_BYTES);
    }

    /// What cannot be had says how much can.
    #[test]
    fn a_namespace_that_does_not_fit_is_refused() {
        let wanted = |size| Wanted {
            size_bytes: Some(size),
            ..Wanted::default()
        };
        let most_bytes = 6 * MIB;
        assert_eq!(
            place(&wanted(8 * MIB), 8 * MIB, &[]),
            Err(NoNamespace::NoRoom { most_bytes })
        );
        let refused = |most_bytes| NoNamespace::NoRoom { most_bytes }.to_string();
        assert!(refused(6 * MIB).contains("at most 6M in one piece"));
        assert!(refused(0).contains("no room in one piece"));
        let align = Align::Pmd;
        assert_eq!(
            place(&wanted(MIB), 8 * MIB, &[]),
            Err(NoNamespace::Size { align })
        );
        let named = Wanted {
            name: "a\nb".into(),
            ..Wanted::default()
        };
        assert_eq!(place(&named, 8 * MIB, &[]), Err(NoNamespace::Name));
    }

    fn wanted() -> impl Strategy<Value = Wanted> {
        let modes = prop::sample::select(Mode::ALL);
        let aligns = prop::sample::select(&Align::ALL[..2]);
        let maps = prop::sample::select(MapLocation::ALL);
        (modes, aligns, maps, prop::option::of(1_u64..6)).prop_map(|(mode, align, map, units)| {
            Wanted {
                size_bytes: units.map(|units| units * align.bytes()),
                mode,
                align,
                map,
                name: String::new(),
            }
        })
    }

    proptest! {
        /// However namespaces come and go, none overlaps another, and each is where it may be.
        #[test]
        fn namespaces_never_overlap(
            medium in 0_u64..40,
            steps in prop::collection::vec((wanted(), any::<prop::sample::Index>()), 1..20),
        ) {
            let medium = medium * MIB + 4096;
            let mut all: Vec<Namespace> = Vec::new();
            for (wanted, gone) in steps {
                if let Ok(one) = place(&wanted, medium, &all) {
                    all.push(one);
                } else if !all.is_empty() {
                    all.remove(gone.index(all.len()));
                }
                prop_assert_eq!(Namespace::check_all(&all, medium), Ok(()));
            }
        }
    }
}
