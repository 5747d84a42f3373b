//! On which CPU a thread runs.
//!
//! Waking a thread on another CPU costs several times what it costs on the same one, so the thread that serves
//! faults follows the thread that faults.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Where the calling thread runs.
#[derive(Debug)]
pub struct Placement {
    allowed: Option<CpuSet>,
    current: Option<u32>,
}

impl Placement {
    /// The calling thread, which may run wherever its process may.
    #[must_use]
    pub fn new() -> Self {
        Self {
            allowed: sched_getaffinity(None).ok(),
            current: None,
        }
    }

    /// Moves the calling thread to a CPU, if it is allowed there and not there already.
    pub fn follow(&mut self, cpu: u32) {
        let allowed = self
            .allowed
            .as_ref()
            .is_some_and(|set| set.is_set(cpu as usize));
        if !allowed || self.current == Some(cpu) {
            return;
        }
        let mut set = CpuSet::new();
        set.set(cpu as usize);
        if sched_setaffinity(None, &set).is_ok() {
            self.current = Some(cpu);
        }
    }
}

impl Default for Placement {
    fn default() -> Self {
        Self::new()
    }
}
