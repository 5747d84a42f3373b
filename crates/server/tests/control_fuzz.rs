//! What the fuzz target of the control socket does, for a bounded time and without nightly.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "most requests are passed on"
)]

use std::fs;
use std::path::Path;

use proptest::prelude::*;

#[path = "common/conversation.rs"]
mod conversation;

const GREETING: &[u8] = b"{\"protocol\":1,\"manager\":";

fn corpus() -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/control");
    let files = fs::read_dir(directory).unwrap();
    files
        .map(|file| fs::read(file.unwrap().path()).unwrap())
        .collect()
}

fn lines(bytes: &[u8]) -> usize {
    bytes.split(|byte| *byte == b'\n').count() - 1
}

/// Every request of the corpus is answered, once.
#[test]
fn the_corpus_is_answered() {
    for bytes in corpus() {
        let answers = conversation::whole(&bytes);
        assert!(answers.starts_with(GREETING));
        assert_eq!(lines(&answers), 1 + lines(&bytes));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Changed requests are answered or refused, and the next client is answered.
    #[test]
    fn changed_requests_are_survived(
        seed in prop::sample::select(corpus()),
        changes in prop::collection::vec(any::<(prop::sample::Index, u8)>(), 0..8),
    ) {
        let mut bytes = seed;
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        prop_assert!(conversation::whole(&bytes).starts_with(GREETING));
    }

    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        prop_assert!(conversation::whole(&bytes).starts_with(GREETING));
    }
}
