//! What `pgmap serve` says, without being asked, of pins that are older than they should be (REF-7).
//!
//! Clients pin bytes for a transfer, or for a while; one that has forgotten to let go shows when its device is to go, which is too
//! late. What must never happen here: a pin told of twice, or a client that fills the disk on which the messages are kept.

use core::time::Duration;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;

use anyhow::Context;
use pgmap_server::service::{OldPin, Service};

use crate::output;

/// Between two looks, unless pins are old before that.
const LOOK: Duration = Duration::from_secs(10);
const SHORTEST_LOOK: Duration = Duration::from_millis(10);
/// Lines for one look.
const MOST_LINES: usize = 10;

/// Looks for old pins until it is dropped.
#[derive(Debug)]
pub(super) struct OldPins {
    /// Nothing is ever sent: it is dropped, and the thread ends.
    going_on: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl OldPins {
    /// Tells of pins that are older than `limit`.
    pub(super) fn watch(service: &Arc<Service>, limit: Duration) -> anyhow::Result<Self> {
        let (going_on, end) = channel();
        let service = Arc::clone(service);
        let pause = (limit / 2).clamp(SHORTEST_LOOK, LOOK);
        let thread = std::thread::Builder::new().name("pgmap-old-pins".into());
        let thread = thread.spawn(move || {
            let mut told = HashSet::new();
            while end.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                told = tell(service.pins_older_than(limit), &told, limit);
            }
        });
        Ok(Self {
            going_on: Some(going_on),
            thread: Some(thread.context("old pins cannot be looked for")?),
        })
    }
}

impl Drop for OldPins {
    fn drop(&mut self) {
        drop(self.going_on.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Tells of those who were not told of before. Answers all who have been told of and are still there.
fn tell(old: Vec<OldPin>, told: &HashSet<OldPin>, limit: Duration) -> HashSet<OldPin> {
    let limit = humantime::format_duration(limit);
    let new: Vec<_> = old.iter().filter(|pin| !told.contains(pin)).collect();
    for pin in new.iter().take(MOST_LINES) {
        let OldPin { device, hold } = pin;
        // Some of it is the client's own words.
        let hold = hold.to_string();
        output::tell(format_args!(
            "pgmap: {device}: {} for longer than {limit}\n",
            hold.escape_debug()
        ));
    }
    if let Some(more @ 1..) = new.len().checked_sub(MOST_LINES) {
        output::tell(format_args!(
            "pgmap: {more} more pins have become old: see `pgmap holders`\n"
        ));
    }
    old.into_iter().collect()
}
