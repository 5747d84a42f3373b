//! A label of any bytes: what the fuzz target and the ordinary test do with them.

use pgmap_drivers::pmem::Uuid;
use pgmap_drivers::pmem::badblocks::BadBlocks;
use pgmap_drivers::pmem::label::Label;

/// Magic, version, checksum and length, which the writer of a forged label gets right.
const HEAD: usize = 20;

/// Reads the bytes as a label, as they are and with a head that is right. What is read can be written, and is read as the same.
pub(crate) fn look(bytes: &[u8]) {
    read(bytes);
    let Ok(len) = u32::try_from(bytes.len()) else {
        return;
    };
    if bytes.len() < HEAD {
        return;
    }
    let mut forged = bytes.to_vec();
    let nothing = Label {
        region: Uuid([0; 16]),
        medium_bytes: 0,
        namespaces: Vec::new(),
        bad: BadBlocks::default(),
    };
    let model = nothing.encode(1).expect("nothing is not too long");
    forged[..12].copy_from_slice(&model[..12]);
    forged[12..16].fill(0);
    forged[16..HEAD].copy_from_slice(&len.to_le_bytes());
    let checksum = crc32c::crc32c(&forged);
    forged[12..16].copy_from_slice(&checksum.to_le_bytes());
    read(&forged);
}

fn read(bytes: &[u8]) {
    if let Ok((label, sequence)) = Label::decode(bytes) {
        let again = label
            .encode(sequence)
            .expect("it was no longer than a slot");
        assert_eq!(Label::decode(&again), Ok((label, sequence)));
    }
}
