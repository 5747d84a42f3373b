//! Pins that are older than they should be are reported without anybody asking (REF-7).
//!
//! The flusher looks for them, as it may allocate, and is not waited for. What must never happen here: a pin reported twice, or
//! a report made under a lock, as the one who is told may unpin.

use core::fmt;
use core::time::Duration;

use pgmap_core::holders::{Holder, Told};

use crate::space::AddressSpace;

/// What counts as old, and who is told.
pub(crate) struct OldPins {
    limit: Duration,
    report: Box<dyn Fn(&Holder) + Send>,
    told: Told,
}

impl fmt::Debug for OldPins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("OldPins");
        f.field("limit", &self.limit).finish_non_exhaustive()
    }
}

impl OldPins {
    pub(crate) fn new(limit: Duration, report: impl Fn(&Holder) + Send + 'static) -> Self {
        Self {
            limit,
            report: Box::new(report),
            told: Told::new(),
        }
    }

    /// Reports the pins that have become old since the last look.
    pub(crate) fn look(&mut self, space: &AddressSpace) {
        let map = space.inner().map_of_frames();
        let limit_ns = u64::try_from(self.limit.as_nanos()).unwrap_or(u64::MAX);
        let Some(since_ns) = map.now_ns().checked_sub(limit_ns) else {
            return;
        };
        let old = map.holders().older_than(since_ns, &mut self.told);
        old.iter().for_each(&self.report);
    }
}
