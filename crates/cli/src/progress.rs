//! What happens during a run, shown while it happens: one line that is written over on a terminal, lines elsewhere.

use core::time::Duration;
use std::io::{IsTerminal, Write};
use std::time::Instant;

use pgmap::Stats;
use pgmap::shared::Region;

use crate::summary::{Bytes, Count};

/// Time between two lines.
const INTERVAL: Duration = Duration::from_millis(250);

#[derive(Debug)]
pub(crate) struct Progress {
    shown: Option<Instant>,
    terminal: bool,
}

impl Progress {
    pub(crate) fn new() -> Self {
        Self {
            shown: None,
            terminal: std::io::stderr().is_terminal(),
        }
    }

    pub(crate) fn show(&mut self, region: &Region, elapsed: Duration) {
        if self.shown.is_some_and(|shown| shown.elapsed() < INTERVAL) {
            return;
        }
        self.shown = Some(Instant::now());
        let stats = region.stats();
        let line = format!(
            "pgmap: {:.1} s, {} resident, {} faults, {} pages stored, {} brought back",
            elapsed.as_secs_f64(),
            Bytes(region.resident()),
            Count(stats.faults()),
            Count(Stats::get(&stats.pages_stored)),
            Count(Stats::get(&stats.pages_brought_back)),
        );
        let mut stderr = std::io::stderr().lock();
        // Whoever closed our stderr does not want to read it.
        let _ = if self.terminal {
            write!(stderr, "\r\x1b[K{line}")
        } else {
            writeln!(stderr, "{line}")
        };
    }

    /// Leaves the line as it is and goes to the next.
    pub(crate) fn end(self) {
        if self.terminal && self.shown.is_some() {
            eprintln!();
        }
    }
}
