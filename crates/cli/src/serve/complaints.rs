//! What `pgmap serve` says of NBD sessions that went wrong, so that a wrong certificate is found from the server's side, too.
//!
//! What must never happen here: a client that fails again and again fills the disk on which the messages are kept.

use core::fmt;
use core::time::Duration;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use pgmap_server::nbd::{Client, End};

use crate::output;

/// Lines that are said at once, after a calm.
const BURST: u32 = 10;
/// How often there is one more.
const REFILL: Duration = Duration::from_secs(10);

/// Hears how sessions end, and tells of those that should not end so.
#[derive(Debug)]
pub(super) struct Complaints(Mutex<Allowance>);

impl Complaints {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Allowance::new(Instant::now()))))
    }

    /// A session has ended.
    pub(super) fn hear(&self, client: &Client, end: &End) {
        if !is_wrong(end) {
            return;
        }
        // Nobody who speaks holds up who only counts.
        let silent = {
            let mut allowance = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            allowance.take(Instant::now())
        };
        if let Some(silent) = silent {
            // Some of it is the client's own words.
            let end = end.to_string();
            let (who, end) = (Who(client), end.escape_debug());
            output::tell(format_args!("{}pgmap: {who}: {end}\n", Silent(silent)));
        }
    }

    /// There are no more sessions.
    pub(super) fn finish(&self) {
        let allowance = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        output::tell(Silent(allowance.silent));
    }
}

/// Whether somebody should look at it. Clients come and go, vanish and stall.
const fn is_wrong(end: &End) -> bool {
    match end {
        End::Garbage(_) | End::Tls(_) | End::Truncated => true,
        End::Disconnected | End::Refused | End::Stalled | End::Broken(_) => false,
    }
}

/// What may be said.
#[derive(Debug)]
struct Allowance {
    left: u32,
    /// Up to when lines were added to `left`.
    filled: Instant,
    /// Sessions of which nothing was said since the last line.
    silent: u64,
}

impl Allowance {
    const fn new(now: Instant) -> Self {
        Self {
            left: BURST,
            filled: now,
            silent: 0,
        }
    }

    /// Whether a line may be said now, and how many were not since the last.
    fn take(&mut self, now: Instant) -> Option<u64> {
        while self.left < BURST && now.saturating_duration_since(self.filled) >= REFILL {
            self.filled += REFILL;
            self.left += 1;
        }
        if self.left == BURST {
            // The time of calm is not saved up.
            self.filled = now;
        }
        if self.left == 0 {
            self.silent += 1;
            return None;
        }
        self.left -= 1;
        Some(core::mem::take(&mut self.silent))
    }
}

/// A client, as people find it.
struct Who<'a>(&'a Client);

impl fmt::Display for Who<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an NBD client")?;
        let client = self.0;
        if let Some(address) = client.address {
            write!(f, " at {address}")?;
        }
        if let Some(pid) = client.pid {
            write!(f, ", process {pid}")?;
        }
        if let Some(process) = &client.process {
            write!(f, " ({})", process.escape_debug())?;
        }
        if let Some(export) = &client.export {
            write!(f, ", of {export}")?;
        }
        Ok(())
    }
}

/// A line for those of which nothing was said, if there are any.
struct Silent(u64);

impl fmt::Display for Silent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            count => writeln!(f, "pgmap: {count} more NBD sessions went wrong"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client that hammers gets a few lines, then one now and then, which counts the others.
    #[test]
    fn what_is_said_is_bounded() {
        let begin = Instant::now();
        let mut allowance = Allowance::new(begin);
        let mut said = 0;
        let mut counted = 0;
        for tick in 0..100_000 {
            let now = begin + Duration::from_millis(tick);
            if let Some(silent) = allowance.take(now) {
                said += 1;
                counted += silent;
            }
        }
        assert_eq!(said, 10 + 9);
        assert_eq!(said + counted + allowance.silent, 100_000);
        // An hour later there are as many as in the beginning, not more.
        let later = begin + Duration::from_hours(1);
        let burst = (0..100).filter(|_| allowance.take(later).is_some());
        assert_eq!(burst.count(), 10);
    }
}
