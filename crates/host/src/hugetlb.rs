//! The machine's pools of huge pages: who has too few is told where to ask for more.

use std::path::PathBuf;

/// A pool, as it is at the moment.
#[derive(Clone, PartialEq, Eq, Debug)]
#[doc(alias = "hstate")]
pub struct Pool {
    /// Where its size is changed.
    pub file: PathBuf,
    /// How many pages it has.
    pub pages: u64,
    /// How many of them nobody has, and nobody was promised.
    pub available: u64,
}

/// The pool of pages of this size; none if the machine has no such pages.
#[must_use]
pub fn pool(page_bytes: u64) -> Option<Pool> {
    let kib = page_bytes >> 10;
    let directory = PathBuf::from(format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB"));
    let number = |name: &str| -> Option<u64> {
        let text = std::fs::read_to_string(directory.join(name)).ok()?;
        text.trim().parse().ok()
    };
    Some(Pool {
        file: directory.join("nr_hugepages"),
        pages: number("nr_hugepages")?,
        available: number("free_hugepages")?.saturating_sub(number("resv_hugepages")?),
    })
}
