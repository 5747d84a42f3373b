//! What happened, counted.
//!
//! All counters are zero when zeroed and stand alone, so that they can live in memory that several processes share.

use core::fmt;

use pgmap_core::driver::DeviceError;
use pgmap_sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Events since the start. Every counter stands alone: two of them need not agree at any moment.
        #[derive(Debug, Default)]
        #[repr(C)]
        pub struct Stats {
            $($(#[$doc])* pub $name: AtomicU64,)*
            /// Time from the arrival of a fault to its end.
            pub fault_latency: Histogram,
        }

        impl Stats {
            /// Every counter with its name, in the order of the summary.
            pub fn counters(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), Self::get(&self.$name)),)*].into_iter()
            }
        }
    };
}

counters! {
    /// Faults on pages never touched.
    faults_zero_fill,
    /// Faults on pages that were on a device.
    faults_bring_back,
    /// Faults on pages that waited in staging.
    faults_give_back,
    /// First writes to pages whose device copy was kept.
    faults_write_protect,
    /// Faults on pages that were there already.
    faults_spurious,
    /// Pages brought along with a faulting one.
    readahead_pages,
    /// Times that the fault path had to reclaim itself.
    direct_reclaims,
    /// Pages moved out of the address space.
    pages_taken_out,
    /// Pages written to a device.
    pages_stored,
    /// Pages that left without being written, because the device's copy was still good.
    pages_stored_clean,
    /// Pages brought back from a device.
    pages_brought_back,
    /// Pages dropped by the program.
    pages_discarded,
    /// Pages left alone because somebody had them pinned.
    busy_skipped,
    /// Pages left alone because the machine does not move them.
    unevictable_skipped,
    /// Pages that a device could not read back.
    device_errors_read,
    /// Pages that a device could not write.
    device_errors_write,
    /// Pages whose checksum did not match.
    device_errors_corrupt,
    /// Pages that answer with SIGBUS because their bytes are lost.
    poisoned,
    /// Faults that found RAM and every device full for too long.
    out_of_memory,
    /// Forks that were served.
    forks,
    /// Faults on pages of mapped files.
    faults_file,
    /// First writes to clean pages of mapped files.
    faults_file_write,
    /// Pages read from mapped files.
    file_pages_read,
    /// Pages written back to mapped files.
    file_pages_written,
    /// Pages of mapped files that left RAM.
    file_pages_evicted,
    /// Times that a mapped file could not be read.
    file_read_errors,
    /// Times that a mapped file could not be written.
    file_write_errors,
}

impl Stats {
    /// Counts `count` events.
    pub fn add(counter: &AtomicU64, count: u64) {
        if count > 0 {
            // Relaxed: counters stand alone.
            counter.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// A counter's value.
    #[must_use]
    pub fn get(counter: &AtomicU64) -> u64 {
        // Relaxed: counters stand alone.
        counter.load(Ordering::Relaxed)
    }

    /// All faults.
    #[must_use]
    pub fn faults(&self) -> u64 {
        [
            &self.faults_zero_fill,
            &self.faults_bring_back,
            &self.faults_give_back,
            &self.faults_write_protect,
            &self.faults_spurious,
        ]
        .into_iter()
        .map(Self::get)
        .sum()
    }

    pub(crate) fn note_read_error(&self, error: DeviceError) {
        let counter = match error {
            DeviceError::Corrupt => &self.device_errors_corrupt,
            DeviceError::Full | DeviceError::Io(_) | DeviceError::Gone => &self.device_errors_read,
        };
        Self::add(counter, 1);
    }
}

/// Log2 of the sub-buckets of one power of two.
const SUB_BITS: u32 = 3;
const SUB: usize = 1 << SUB_BITS;
/// Powers of two from 2^3 ns on; the last bucket holds all that is longer than about 9 s.
const BUCKETS: usize = SUB * 31;

/// A log-linear histogram of durations, exact to an eighth.
#[repr(C)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    total_ns: AtomicU64,
}

/// Without the buckets, of which there are hundreds.
impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Histogram")
            .field("half_ns", &self.percentile_ns(500))
            .field("total_ns", &self.total_ns())
            .finish_non_exhaustive()
    }
}

impl Default for Histogram {
    fn default() -> Self {
        let buckets = core::array::from_fn(|_| AtomicU64::new(0));
        Self {
            buckets,
            total_ns: AtomicU64::new(0),
        }
    }
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&self, ns: u64) {
        Stats::add(&self.buckets[Self::bucket(ns)], 1);
        Stats::add(&self.total_ns, ns);
    }

    /// How many durations were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(Stats::get).sum()
    }

    /// The sum of all durations.
    #[must_use]
    pub fn total_ns(&self) -> u64 {
        Stats::get(&self.total_ns)
    }

    /// The duration that `per_mille` of 1000 durations do not exceed; 0 if none was counted.
    #[must_use]
    pub fn percentile_ns(&self, per_mille: u64) -> u64 {
        let rank = (self.count() * per_mille).div_ceil(1000);
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += Stats::get(count);
            if seen >= rank && seen > 0 {
                return Self::upper_ns(bucket);
            }
        }
        0
    }

    fn bucket(ns: u64) -> usize {
        let ns = ns.max(SUB as u64);
        let power = ns.ilog2() - SUB_BITS;
        let sub = usize::try_from(ns >> power).unwrap_or(0) & (SUB - 1);
        (power as usize * SUB + sub).min(BUCKETS - 1)
    }

    /// The largest duration of a bucket.
    fn upper_ns(bucket: usize) -> u64 {
        let (power, sub) = (bucket / SUB, bucket % SUB);
        (((SUB + sub + 1) as u64) << power) - 1
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    /// A percentile is at most an eighth too long, and never too short.
    #[test]
    fn percentiles_are_exact_to_an_eighth() {
        let histogram = Histogram::default();
        for ns in 1..=100_000 {
            histogram.record(ns);
        }
        for per_mille in [10, 500, 990, 1000] {
            let exact = 100 * per_mille;
            let got = histogram.percentile_ns(per_mille);
            assert!(
                got >= exact && got <= exact + exact / 8 + 1,
                "{per_mille}: {got} for {exact}"
            );
        }
        assert_eq!(histogram.count(), 100_000);
    }

    /// Durations of any length are counted.
    #[test]
    fn the_longest_duration_is_counted() {
        let histogram = Histogram::default();
        histogram.record(u64::MAX / 2);
        histogram.record(0);
        assert_eq!(histogram.count(), 2);
    }
}
