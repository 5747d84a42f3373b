//! Huge pages for a test, and the machine as it was afterwards.
#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it should be"
)]

use std::fs::{self, File};

use rustix::fs::{FlockOperation, flock};

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Bytes of a huge page.
pub(crate) const HUGE: u64 = 2 << 20;

/// Huge pages of 2 MiB that no other test has. Dropping it gives them back to the machine.
pub(crate) struct HugePages {
    before: u64,
    _turn: File,
}

impl HugePages {
    /// So many more than there were; or a loud skip.
    pub(crate) fn reserve(count: u64) -> Option<Self> {
        let turn = File::open(POOL);
        let Ok(turn) = turn else {
            eprintln!("SKIPPED: this machine has no huge pages of 2 MiB");
            return None;
        };
        // One test of all at a time, those of other programs included.
        flock(&turn, FlockOperation::LockExclusive).unwrap();
        let before = pages();
        let pages_before = Self {
            before,
            _turn: turn,
        };
        let wanted = before + count;
        if fs::write(POOL, wanted.to_string()).is_err() || pages() < wanted {
            eprintln!(
                "SKIPPED: {count} huge pages are needed, which root can reserve if there is memory"
            );
            return None;
        }
        Some(pages_before)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // Refused to who is not root, who has changed nothing.
        let _ = fs::write(POOL, self.before.to_string());
    }
}

fn pages() -> u64 {
    fs::read_to_string(POOL).unwrap().trim().parse().unwrap()
}
