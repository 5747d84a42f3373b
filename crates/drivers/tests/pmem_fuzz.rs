//! What the fuzz target for labels does, for a bounded time and without nightly: the corpus, changed at random.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs;
use std::path::Path;

use pgmap_drivers::pmem::label::Label;
use proptest::prelude::*;

#[path = "common/any_label.rs"]
mod any_label;

fn corpus() -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/label");
    let files = fs::read_dir(directory).unwrap();
    files
        .map(|file| fs::read(file.unwrap().path()).unwrap())
        .collect()
}

/// The corpus as it is can be read: what is changed begins as a label.
#[test]
fn the_corpus_is_read() {
    for bytes in corpus() {
        Label::decode(&bytes).unwrap();
        any_label::look(&bytes);
    }
}

proptest! {
    /// PMEM-4: a label of which bytes are changed, with a right checksum or without, is refused or read as what it says.
    #[test]
    fn a_changed_label_is_refused_or_read(
        mut bytes in prop::sample::select(corpus()),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        cut in any::<prop::sample::Index>(),
    ) {
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        any_label::look(&bytes);
        any_label::look(&bytes[..cut.index(bytes.len())]);
    }
}
