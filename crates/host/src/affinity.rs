//! On which CPUs the pager's threads run.
//!
//! Waking a thread on another CPU costs several times what it costs on the same one, so the thread that serves
//! faults follows the thread that faults. Where that one ran last is in `/proc`; looking there costs as much as
//! serving a fault, so it is done for one fault of many.

use std::io::Write;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Faults between two looks.
const INTERVAL: u32 = 64;
/// The field of `/proc/.../stat` that has the CPU, counted from the one after the name.
const PROCESSOR_FIELD: usize = 36;

/// What a thread is confined to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Near {
    On(usize),
    Off(usize),
}

/// Where the calling thread runs.
#[derive(Debug)]
pub struct Placement {
    allowed: Option<CpuSet>,
    /// Where the thread was confined to.
    current: Option<Near>,
    followed: u32,
    faults: u32,
}

impl Placement {
    /// The calling thread, which may run wherever its process may.
    #[must_use]
    pub fn new() -> Self {
        // With one CPU there is nothing to follow.
        let allowed = sched_getaffinity(None)
            .ok()
            .filter(|allowed| allowed.count() > 1);
        Self {
            allowed,
            current: None,
            followed: 0,
            faults: 0,
        }
    }

    /// Notes a fault of a thread, and now and then moves the calling thread to that thread's CPU.
    pub fn follow(&mut self, tid: u32) {
        if !self.has_choice() {
            return;
        }
        self.faults += 1;
        if self.faults < INTERVAL && self.followed == tid {
            return;
        }
        if self.faults < INTERVAL / 8 {
            // Several threads fault by turns: do not run after each of them.
            return;
        }
        (self.faults, self.followed) = (0, tid);
        if let Some(cpu) = cpu_of(tid) {
            self.confine(Near::On(cpu));
        }
    }

    /// Notes a request of another process, and now and then moves the calling thread to the CPU of that process's first
    /// thread.
    pub fn follow_process(&mut self, pid: u32) {
        if let Some(cpu) = self.look(pid) {
            self.confine(Near::On(cpu));
        }
    }

    /// Notes a request of another process that goes on meanwhile, and now and then moves the calling thread off the CPU of
    /// that process's first thread.
    pub fn avoid_process(&mut self, pid: u32) {
        if let Some(cpu) = self.look(pid) {
            self.confine(Near::Off(cpu));
        }
    }

    /// The CPU of a process's first thread, if it is time to look.
    fn look(&mut self, pid: u32) -> Option<usize> {
        self.faults += 1;
        if self.faults < INTERVAL || !self.has_choice() {
            return None;
        }
        self.faults = 0;
        cpu_in(format_args!("/proc/{pid}/stat\0"))
    }

    fn confine(&mut self, to: Near) {
        let Some(allowed) = &self.allowed else { return };
        let set = match to {
            Near::On(cpu) if !allowed.is_set(cpu) => return,
            Near::On(cpu) => {
                let mut set = CpuSet::new();
                set.set(cpu);
                set
            }
            Near::Off(cpu) => {
                let mut set = *allowed;
                set.unset(cpu);
                set
            }
        };
        if self.current != Some(to) {
            self.current = sched_setaffinity(None, &set).ok().map(|()| to);
        }
    }

    /// Lets the calling thread run wherever its process may.
    pub fn release(&mut self) {
        self.faults = 0;
        if let (Some(_), Some(allowed)) = (self.current.take(), &self.allowed) {
            // It was allowed when we began; if it is not any more, the thread stays where it is.
            let _ = sched_setaffinity(None, allowed);
        }
    }

    /// Whether there is more than one CPU to run on.
    #[must_use]
    pub const fn has_choice(&self) -> bool {
        self.allowed.is_some()
    }

    /// Whether the thread keeps off one of two CPUs that its process has.
    #[must_use]
    pub fn is_one_of_two(&self) -> bool {
        matches!(self.current, Some(Near::Off(_)))
            && self.allowed.is_some_and(|allowed| allowed.count() == 2)
    }

    /// The CPU to which [`follow`](Self::follow) has moved the thread, if it has.
    #[must_use]
    pub const fn current(&self) -> Option<usize> {
        match self.current {
            Some(Near::On(cpu)) => Some(cpu),
            Some(Near::Off(_)) | None => None,
        }
    }

    /// Keeps the calling thread off a CPU, where another thread is busier.
    pub fn avoid(&mut self, cpu: usize) {
        self.confine(Near::Off(cpu));
    }
}

impl Default for Placement {
    fn default() -> Self {
        Self::new()
    }
}

/// The CPU on which a thread of this process ran last. Allocates nothing.
fn cpu_of(tid: u32) -> Option<usize> {
    cpu_in(format_args!("/proc/self/task/{tid}/stat\0"))
}

fn cpu_in(file: core::fmt::Arguments<'_>) -> Option<usize> {
    let mut path = [0u8; 40];
    let mut rest = &mut path[..];
    rest.write_fmt(file).ok()?;
    let path = core::ffi::CStr::from_bytes_until_nul(&path).ok()?;
    let file = openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let mut text = [0u8; 512];
    let len = rustix::io::read(&file, &mut text).ok()?;
    parse_cpu(&text[..len])
}

/// The CPU in the text of a `stat` file. The name before it may contain anything.
fn parse_cpu(text: &[u8]) -> Option<usize> {
    let name_end = text.iter().rposition(|byte| *byte == b')')?;
    let mut fields = text[name_end + 1..]
        .split(|byte| *byte == b' ')
        .filter(|f| !f.is_empty());
    str::from_utf8(fields.nth(PROCESSOR_FIELD)?)
        .ok()?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The CPU is found whatever the thread is called.
    #[test]
    fn the_cpu_is_found_behind_any_name() {
        let text =
            b"42 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 \
            26 27 28 29 30 31 32 33 34 35 7 0 0 0\n";
        assert_eq!(parse_cpu(text), Some(7));
    }

    /// A thread that is confined to a CPU is found there.
    #[test]
    fn this_thread_is_where_it_is_confined() {
        let allowed = sched_getaffinity(None).unwrap();
        let cpu = (0..CpuSet::MAX_CPU)
            .find(|cpu| allowed.is_set(*cpu))
            .unwrap();
        std::thread::spawn(move || {
            let mut set = CpuSet::new();
            set.set(cpu);
            sched_setaffinity(None, &set).unwrap();
            let tid = rustix::thread::gettid()
                .as_raw_nonzero()
                .get()
                .cast_unsigned();
            assert_eq!(cpu_of(tid), Some(cpu));
        })
        .join()
        .unwrap();
    }
}
