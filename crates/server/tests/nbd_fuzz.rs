//! What the fuzz targets do, for a bounded time and without nightly: the corpus, changed at random, and random requests.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::large_stack_arrays,
    reason = "a test fails where it should, and knows its numbers"
)]

use std::fs;
use std::path::Path;

use proptest::prelude::*;

#[path = "common/session.rs"]
mod session;

/// The first bytes of a server.
const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/corpus")
        .join(target);
    let files = fs::read_dir(directory).unwrap();
    files
        .map(|file| fs::read(file.unwrap().path()).unwrap())
        .collect()
}

/// The corpus as it is gets through: each of its sessions is answered to its end.
#[test]
fn the_corpus_is_answered() {
    for bytes in corpus("handshake") {
        assert!(session::whole(&bytes).starts_with(GREETING));
    }
    let handshake = session::after_handshake(&[]).len();
    for bytes in corpus("transmission") {
        assert!(session::after_handshake(&bytes).len() > handshake);
    }
}

/// Changes some bytes.
fn changed(mut bytes: Vec<u8>, changes: &[(prop::sample::Index, u8)]) -> Vec<u8> {
    for (at, value) in changes {
        if !bytes.is_empty() {
            let at = at.index(bytes.len());
            bytes[at] = *value;
        }
    }
    bytes
}

/// A request whose fields are mostly sensible, with some payload.
fn requests() -> impl Strategy<Value = Vec<u8>> {
    let offset = prop_oneof![0..1u64 << 20, any::<u64>()];
    let length = prop_oneof![0..70_000u32, 0..2u32 << 20, any::<u32>()];
    let flags = prop_oneof![Just(0u16), 0..32u16];
    let request = (flags, 0..9u16, any::<u64>(), offset, length);
    request.prop_map(|(flags, command, cookie, offset, length)| {
        let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        if command == 1 {
            bytes.resize(bytes.len() + length.min(3 << 20) as usize, 0x25);
        }
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Changed handshakes are answered or refused, and never take the server along.
    #[test]
    fn changed_handshakes_are_survived(
        seed in prop::sample::select(corpus("handshake")),
        changes in prop::collection::vec(any::<(prop::sample::Index, u8)>(), 0..8),
        random in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let bytes = [changed(seed, &changes), random].concat();
        prop_assert!(session::whole(&bytes).starts_with(GREETING));
    }

    /// Any requests are answered or refused, and never take the server along.
    #[test]
    fn any_requests_are_survived(
        requests in prop::collection::vec(requests(), 1..8),
        changes in prop::collection::vec(any::<(prop::sample::Index, u8)>(), 0..2),
    ) {
        let bytes = changed(requests.concat(), &changes);
        prop_assert!(session::after_handshake(&bytes).starts_with(GREETING));
    }
}
