//! What happens during a run, shown while it happens: one line that is written over on a terminal, lines elsewhere.

use core::time::Duration;
use std::io::IsTerminal;
use std::time::Instant;

use pgmap::Stats;
use pgmap::shared::Region;

use crate::output::tell;
use crate::summary::{Bytes, Count};

/// Time between two lines.
const INTERVAL: Duration = Duration::from_millis(250);
/// To the line's start, and erase it.
const ERASE: &str = "\r\x1b[K";
/// A line that is longer than the terminal is wide is cut, not wrapped: it could not be written over.
const CUT: &str = "\x1b[?7l";
const WRAP: &str = "\x1b[?7h";

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

    pub(crate) fn show(&mut self, region: Region, elapsed: Duration) {
        if self.shown.is_some_and(|shown| shown.elapsed() < INTERVAL) {
            return;
        }
        self.shown = Some(Instant::now());
        let stats = region.stats();
        let line = format!(
            "pgmap: {:.1} s, {} resident, {} faults, {} pages moved out, {} moved in",
            elapsed.as_secs_f64(),
            Bytes(region.resident()),
            Count(stats.faults()),
            Count(Stats::get(&stats.pages_stored) + Stats::get(&stats.pages_stored_clean)),
            Count(Stats::get(&stats.pages_brought_back)),
        );
        if self.terminal {
            tell(format_args!("{ERASE}{CUT}{line}{WRAP}"));
        } else {
            tell(format_args!("{line}\n"));
        }
    }

    /// Takes the line away: the summary says more.
    pub(crate) fn end(self) {
        if self.terminal && self.shown.is_some() {
            tell(ERASE);
        }
    }
}
