//! A label: what a region says about itself, as bytes.
//!
//! Everything that is read here may come from anybody: each field is looked at before it is believed, and nothing
//! panics. [`area`](super::area) keeps two of these on the medium.

use core::mem::size_of;
use core::ops::Range;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::badblocks::{BadBlocks, SECTOR_BYTES};
use super::namespace::{
    Activation, Align, LABEL_AREA_BYTES, MAX_NAME_BYTES, MapLocation, Mode, Namespace,
};
use super::uuid::Uuid;

/// Most bytes of a label.
pub const SLOT_BYTES: usize = 512 << 10;
const MAGIC: [u8; 8] = *b"pgmapLBL";
const VERSION: u32 = 1;

/// What a region says about itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Label {
    /// The region's name for machines.
    pub region: Uuid,
    /// How long the medium is.
    pub medium_bytes: u64,
    /// Its namespaces.
    pub namespaces: Vec<Namespace>,
    /// Its lost sectors.
    pub bad: BadBlocks,
}

/// Why bytes are no label.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LabelError {
    /// They do not begin as one.
    #[error("there is no label")]
    None,
    /// They were torn or changed.
    #[error("the checksum does not match")]
    Checksum,
    /// They were written by another version of pgmap.
    #[error("it has version {0}, and this pgmap knows version {VERSION}")]
    Version(u32),
    /// They were written as a label, but what they say cannot be.
    #[error("{0}")]
    Invalid(&'static str),
}

/// More bad blocks than a label has room for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("there are more bad blocks than a label has room for")]
pub struct TooLong;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U32,
    /// CRC-32C of the whole label, with zero here.
    checksum: U32,
    /// The whole label, this included.
    bytes: U32,
    namespaces: U32,
    bad: U32,
    zero: U32,
    /// Higher in each label that follows another.
    sequence: U64,
    medium_bytes: U64,
    region: [u8; 16],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct NamespaceRecord {
    uuid: [u8; 16],
    name: [u8; MAX_NAME_BYTES],
    data_start: U64,
    data_end: U64,
    metadata_start: U64,
    metadata_end: U64,
    index: U32,
    mode: u8,
    align: u8,
    map: u8,
    activation: u8,
    zero: [u8; 8],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct BadRecord {
    start_sector: U64,
    end_sector: U64,
}

const CHECKSUM_AT: Range<usize> = 12..16;
/// A label with one namespace and no bad block is one sector, so that it is whole or not there.
const _: () = assert!(size_of::<Header>() + size_of::<NamespaceRecord>() <= 512);

impl Label {
    /// The label as bytes, whole sectors.
    ///
    /// # Errors
    ///
    /// [`TooLong`].
    pub fn encode(&self, sequence: u64) -> Result<Vec<u8>, TooLong> {
        let count = |len: usize| u32::try_from(len).map_err(|_| TooLong);
        let bytes = size_of::<Header>()
            + self.namespaces.len() * size_of::<NamespaceRecord>()
            + self.bad.ranges().len() * size_of::<BadRecord>();
        if bytes > SLOT_BYTES {
            return Err(TooLong);
        }
        let header = Header {
            magic: MAGIC,
            version: VERSION.into(),
            checksum: 0.into(),
            bytes: count(bytes)?.into(),
            namespaces: count(self.namespaces.len())?.into(),
            bad: count(self.bad.ranges().len())?.into(),
            zero: 0.into(),
            sequence: sequence.into(),
            medium_bytes: self.medium_bytes.into(),
            region: self.region.0,
        };
        let mut label = header.as_bytes().to_vec();
        for namespace in &self.namespaces {
            label.extend_from_slice(NamespaceRecord::of(namespace).as_bytes());
        }
        for range in self.bad.ranges() {
            let record = BadRecord {
                start_sector: range.start.into(),
                end_sector: range.end.into(),
            };
            label.extend_from_slice(record.as_bytes());
        }
        let checksum = crc32c::crc32c(&label);
        label[CHECKSUM_AT].copy_from_slice(&checksum.to_le_bytes());
        let sector = usize::try_from(SECTOR_BYTES).unwrap_or(512);
        label.resize(bytes.next_multiple_of(sector), 0);
        Ok(label)
    }

    /// The label that the bytes begin with, and its sequence number.
    ///
    /// # Errors
    ///
    /// [`LabelError`].
    pub fn decode(bytes: &[u8]) -> Result<(Self, u64), LabelError> {
        let (header, _) = Header::read_from_prefix(bytes).map_err(|_| LabelError::None)?;
        if header.magic != MAGIC {
            return Err(LabelError::None);
        }
        let len = usize::try_from(header.bytes.get()).map_err(|_| LabelError::Checksum)?;
        let label = bytes
            .get(..len)
            .filter(|label| label.len() >= size_of::<Header>());
        let label = label.ok_or(LabelError::Checksum)?;
        if checksum(label) != header.checksum.get() {
            return Err(LabelError::Checksum);
        }
        if header.version.get() != VERSION {
            return Err(LabelError::Version(header.version.get()));
        }
        let read = Self::read(&header, &label[size_of::<Header>()..]);
        let read = read.map_err(LabelError::Invalid)?;
        Ok((read, header.sequence.get()))
    }

    fn read(header: &Header, records: &[u8]) -> Result<Self, &'static str> {
        let torn = "the records do not have the length that is said";
        let count = |count: U32| usize::try_from(count.get()).map_err(|_| torn);
        let (namespaces, rest) =
            <[NamespaceRecord]>::ref_from_prefix_with_elems(records, count(header.namespaces)?)
                .map_err(|_| torn)?;
        let bad = <[BadRecord]>::ref_from_bytes_with_elems(rest, count(header.bad)?);
        let bad = bad.map_err(|_| torn)?;
        let medium_bytes = header.medium_bytes.get();
        let namespaces: Vec<Namespace> = namespaces
            .iter()
            .map(NamespaceRecord::read)
            .collect::<Result<_, _>>()?;
        Namespace::check_all(&namespaces, medium_bytes)?;
        let sectors = LABEL_AREA_BYTES / SECTOR_BYTES..medium_bytes / SECTOR_BYTES;
        let bad = bad
            .iter()
            .map(|record| record.start_sector.get()..record.end_sector.get());
        let bad = BadBlocks::from_ranges(bad.collect());
        let bad = bad.ok_or("the bad blocks are in no order")?;
        let within = bad
            .ranges()
            .iter()
            .all(|range| sectors.start <= range.start && range.end <= sectors.end);
        within
            .then_some(())
            .ok_or("a bad block is not on the medium")?;
        Ok(Self {
            region: Uuid(header.region),
            medium_bytes,
            namespaces,
            bad,
        })
    }
}

fn checksum(label: &[u8]) -> u32 {
    let before = crc32c::crc32c(&label[..CHECKSUM_AT.start]);
    let without = crc32c::crc32c_append(before, &[0; 4]);
    crc32c::crc32c_append(without, &label[CHECKSUM_AT.end..])
}

/// The code of a value: its place among all.
fn code<T: PartialEq>(all: &[T], value: &T) -> u8 {
    let place = all.iter().position(|other| other == value);
    place
        .and_then(|place| u8::try_from(place).ok())
        .unwrap_or(u8::MAX)
}

fn decode<T: Copy>(all: &[T], code: u8) -> Result<T, &'static str> {
    all.get(usize::from(code))
        .copied()
        .ok_or("a namespace has an unknown mode, align or map")
}

impl NamespaceRecord {
    fn of(namespace: &Namespace) -> Self {
        let mut name = [0; MAX_NAME_BYTES];
        let len = namespace.name.len().min(MAX_NAME_BYTES);
        name[..len].copy_from_slice(&namespace.name.as_bytes()[..len]);
        Self {
            uuid: namespace.uuid.0,
            name,
            data_start: namespace.data.start.into(),
            data_end: namespace.data.end.into(),
            metadata_start: namespace.metadata.start.into(),
            metadata_end: namespace.metadata.end.into(),
            index: namespace.index.into(),
            mode: code(Mode::ALL, &namespace.mode),
            align: code(Align::ALL, &namespace.align),
            map: code(MapLocation::ALL, &namespace.map),
            activation: code(Activation::ALL, &namespace.activation),
            zero: [0; 8],
        }
    }

    fn read(&self) -> Result<Namespace, &'static str> {
        let len = self
            .name
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |last| last + 1);
        let name = core::str::from_utf8(&self.name[..len]);
        Ok(Namespace {
            index: self.index.get(),
            uuid: Uuid(self.uuid),
            name: name
                .map_err(|_| "a namespace's name is no text")?
                .to_owned(),
            mode: decode(Mode::ALL, self.mode)?,
            align: decode(Align::ALL, self.align)?,
            map: decode(MapLocation::ALL, self.map)?,
            activation: decode(Activation::ALL, self.activation)?,
            data: self.data_start.get()..self.data_end.get(),
            metadata: self.metadata_start.get()..self.metadata_end.get(),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pmem::namespace::Wanted;

    const MEDIUM_BYTES: u64 = 64 << 20;

    fn label(namespaces: usize, bad: &[Range<u64>]) -> Label {
        let mut label = Label {
            region: Uuid([1; 16]),
            medium_bytes: MEDIUM_BYTES,
            namespaces: Vec::new(),
            bad: BadBlocks::from_ranges(bad.to_vec()).unwrap(),
        };
        for number in 0..namespaces {
            let wanted = Wanted {
                size_bytes: Some(2 << 20),
                name: format!("name {number}"),
                ..Wanted::default()
            };
            let uuid = Uuid([u8::try_from(number).unwrap() + 2; 16]);
            let placed = Namespace::place(&wanted, uuid, MEDIUM_BYTES, &label.namespaces).unwrap();
            label.namespaces.push(placed);
        }
        label
    }

    /// A label is read back as it was written, with its sequence number.
    #[test]
    fn a_label_reads_back() {
        for label in [
            label(0, &[]),
            label(1, &[]),
            label(5, &[4096..4097, 5000..6000]),
        ] {
            let bytes = label.encode(7).unwrap();
            assert_eq!(bytes.len() % 512, 0);
            assert_eq!(Label::decode(&bytes), Ok((label, 7)));
        }
    }

    /// The first label of a region is one sector, which is written whole or not at all.
    #[test]
    fn a_label_with_one_namespace_is_one_sector() {
        assert_eq!(label(1, &[]).encode(1).unwrap().len(), 512);
    }

    /// More bad blocks than there is room for are an error, and not a label that cannot be read.
    #[test]
    fn a_label_that_is_too_long_is_refused() {
        let bad: Vec<_> = (2048..35000).map(|n| n * 2..n * 2 + 1).collect();
        assert_eq!(label(1, &bad).encode(1), Err(TooLong));
    }

    /// A label of a later version is told apart from a broken one.
    #[test]
    fn another_version_is_told_apart() {
        let mut bytes = label(1, &[]).encode(1).unwrap();
        bytes[8] = 9;
        assert_eq!(Label::decode(&bytes), Err(LabelError::Checksum));
        let len = u32::from_le_bytes(bytes[16..20].try_into().unwrap()) as usize;
        let sum = checksum(&bytes[..len]);
        bytes[CHECKSUM_AT].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(Label::decode(&bytes), Err(LabelError::Version(9)));
    }

    /// Changes a label after its checksum was made, and makes the checksum again: what a broken or hostile writer does.
    fn forge(bytes: &mut [u8], at: usize, value: u8) {
        bytes[at] = value;
        let len = u32::from_le_bytes(bytes[16..20].try_into().unwrap()) as usize;
        if (64..=bytes.len()).contains(&len) {
            let sum = checksum(&bytes[..len]);
            bytes[CHECKSUM_AT].copy_from_slice(&sum.to_le_bytes());
        }
    }

    proptest! {
        /// Random bytes never make it panic.
        #[test]
        fn no_bytes_make_it_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..700)) {
            let _ = Label::decode(&bytes);
            if bytes.len() > 8 {
                bytes[..8].copy_from_slice(&MAGIC);
                let _ = Label::decode(&bytes);
            }
        }

        /// A label of which any byte was changed is refused, or says the same.
        #[test]
        fn a_changed_label_is_refused(at in 0_usize..1024, change in 1_u8..) {
            let label = label(4, &[4096..4097, 5000..6000]);
            let mut bytes = label.encode(3).unwrap();
            let at = at % bytes.len();
            bytes[at] ^= change;
            let read = Label::decode(&bytes);
            prop_assert!(read.is_err() || read == Ok((label, 3)));
        }

        /// What a label with a right checksum says is looked at all the same.
        #[test]
        fn a_forged_label_never_panics_and_never_overlaps(
            forgeries in prop::collection::vec((0_usize..700, any::<u8>()), 1..4),
        ) {
            let mut bytes = label(3, &[4096..4097, 5000..6000]).encode(3).unwrap();
            for (at, value) in forgeries {
                let at = at % bytes.len();
                forge(&mut bytes, at, value);
            }
            if let Ok((label, _)) = Label::decode(&bytes) {
                prop_assert_eq!(Namespace::check_all(&label.namespaces, label.medium_bytes), Ok(()));
                prop_assert!(label.encode(4).is_ok());
            }
        }
    }
}
