//! The supervisor's side of a run: what its processes share, and how that is changed while they run.
//!
//! The supervisor calls [`Control::look`] ten times a second, about; whoever serves requests begins changes and asks for their
//! outcome, from any thread. One change is under way at a time. What must never happen here: waiting for a dead process, or a
//! change that cannot be made left half made.

use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pgmap_core::addr::PAGE_SIZE;
use pgmap_drivers::spec::DeviceSpec;
use pgmap_mm::stats::Stats;
use pgmap_sync::atomic::{AtomicU64, Ordering};

use crate::device::open_backing;
use crate::memory::{MIN_RAM_BYTES, machine_frames};
use crate::run::DeviceConfig;
use crate::shared::{Answer, DEVICES, Process, Region, TABLE_WORDS, Wish};
pub use error::{ControlError, Failed, Held, Refused};
use seat::Seat;
pub use view::{DeviceState, DeviceView, ProcessView, RamView};

mod error;
mod seat;
mod view;

/// The least budget of a run, in bytes: below it the pager's own batches do not fit.
pub const LEAST_RAM_BYTES: u64 = 4 << 20;
/// Bytes of pages that frames have numbers for, with room to align each device.
const MOST_BYTES: u64 = 15 << 40;
/// Bytes of pages that are numbered for each byte of a pool, at most.
const PAGES_OF_A_POOL: u64 = 8;
/// How long processes may take to find a device that was added. One that is stopped finds it when it goes on.
const ADD_PATIENCE: Duration = Duration::from_secs(2);

/// A run, as its supervisor has it.
#[derive(Debug)]
pub struct Control {
    region: Region,
    file: OwnedFd,
    state: Mutex<State>,
}

/// A change that was begun.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change(u64);

#[derive(Debug)]
struct State {
    seats: [Option<Seat>; DEVICES],
    next_number: u32,
    next_change: u64,
    under_way: Option<(Change, UnderWay)>,
    /// Outcomes that nobody has asked for yet.
    outcomes: Vec<(Change, Result<(), Failed>)>,
    unplugged: Vec<DeviceView>,
    highest_ram_bytes: u64,
}

/// A change that processes have to follow.
#[derive(Debug)]
enum UnderWay {
    Add { nth: usize, until: Instant },
    Leave { nth: usize, until: Instant },
    Remove { nth: usize, until: Instant },
    Lower { until: Instant },
}

impl Control {
    /// A run with a budget of `ram_bytes` and these devices, and no processes yet.
    ///
    /// # Errors
    ///
    /// [`ControlError`], which says what to do.
    pub fn new(ram_bytes: u64, devices: &[DeviceSpec]) -> Result<Self, ControlError> {
        let (region, file) = Region::create(ram_bytes, super::pid_namespace())?;
        let state = State {
            seats: [const { None }; DEVICES],
            next_number: 0,
            next_change: 0,
            under_way: None,
            outcomes: Vec::new(),
            unplugged: Vec::new(),
            highest_ram_bytes: ram_bytes,
        };
        let control = Self {
            region,
            file,
            state: Mutex::new(state),
        };
        for spec in devices {
            control.seat(&mut control.state(), spec)?;
        }
        Ok(control)
    }

    /// What the processes share.
    #[must_use]
    pub const fn region(&self) -> &Region {
        &self.region
    }

    /// What [`RUN_VARIABLE`](super::RUN_VARIABLE) is to be in the environment of the program.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        path_of(&self.file)
    }

    /// Gives back what dead processes held, and carries on with what is under way. To be called often.
    pub fn look(&self) {
        let mut state = self.state();
        super::leave(&self.region, is_dead);
        self.region.note_peaks(0);
        self.clear_seats(&mut state);
        self.carry_on(&mut state);
    }

    /// Adds a device, to be tried after the others. Answers its name, too.
    ///
    /// # Errors
    ///
    /// [`Refused`]: nothing has changed.
    pub fn add(&self, spec: &DeviceSpec) -> Result<(String, Change), Refused> {
        let mut state = self.state();
        state.refuse_if_busy()?;
        let nth = self.seat(&mut state, spec)?;
        let name = state.name(nth);
        let until = Instant::now() + ADD_PATIENCE;
        Ok((name, state.begin(UnderWay::Add { nth, until })))
    }

    /// Begins to take a device away: its pages go elsewhere. If they cannot within `patience`, it stays.
    ///
    /// # Errors
    ///
    /// [`Refused`]: nothing has changed.
    pub fn unplug(&self, name: &str, patience: Duration) -> Result<Change, Refused> {
        let mut state = self.state();
        state.refuse_if_busy()?;
        let nth = state.find(name)?;
        self.region.devices()[nth].set_wish(Wish::Leaving);
        let until = Instant::now() + patience;
        Ok(state.begin(UnderWay::Leave { nth, until }))
    }

    /// Begins to change the budget. A lower one is kept as fast as pages can leave; if they cannot within `patience`, it stays
    /// what it was.
    ///
    /// # Errors
    ///
    /// [`Refused`]: nothing has changed.
    pub fn set_ram(&self, bytes: u64, patience: Duration) -> Result<Change, Refused> {
        let mut state = self.state();
        state.refuse_if_busy()?;
        let least = LEAST_RAM_BYTES.max(self.region.alive() * MIN_RAM_BYTES);
        let most = self.most_ram_bytes(&state);
        if bytes < least {
            return Err(Refused::TooLittleRam { least });
        }
        if bytes > most {
            return Err(Refused::TooMuchRam { most });
        }
        // Relaxed, both: processes look at them now and then.
        let before = self.region.ram_bytes().load(Ordering::Relaxed);
        self.region
            .ram_before()
            .store(if bytes < before { before } else { 0 }, Ordering::Relaxed);
        self.region.ram_bytes().store(bytes, Ordering::Relaxed);
        state.highest_ram_bytes = state.highest_ram_bytes.max(bytes);
        let until = Instant::now() + patience;
        Ok(state.begin(UnderWay::Lower { until }))
    }

    /// What became of a change; `None` while it is under way. An outcome is told once.
    pub fn outcome(&self, change: Change) -> Option<Result<(), Failed>> {
        self.look();
        let mut state = self.state();
        let nth = state
            .outcomes
            .iter()
            .position(|(other, _)| *other == change)?;
        Some(state.outcomes.swap_remove(nth).1)
    }

    /// Waits for the outcome of a change.
    ///
    /// # Errors
    ///
    /// [`Failed`].
    pub fn wait(&self, change: Change) -> Result<(), Failed> {
        loop {
            if let Some(outcome) = self.outcome(change) {
                return outcome;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the budget can be raised to. A run that began with more than the machine has may have that again.
    fn most_ram_bytes(&self, state: &State) -> u64 {
        state
            .highest_ram_bytes
            .max(machine_frames() * PAGE_SIZE as u64)
    }

    /// The processes, dead ones that nobody has buried yet included.
    fn processes(&self) -> impl Iterator<Item = &'static Process> {
        let all = self.region.processes().iter();
        all.filter(|process| process.pid() != 0)
    }

    /// The processes that have not done what is wanted of a slot, and what they have done.
    fn missing(&self, nth: usize) -> Vec<(u32, Answer)> {
        let generation = self.region.devices()[nth].order().generation;
        let answers = self
            .processes()
            .map(|process| (process.pid(), process.answers[nth].get(generation)));
        answers
            .filter(|(_, answer)| *answer != Answer::Done)
            .collect()
    }

    /// Whether a program has waited for memory for long: what is taken away has to be given back.
    fn is_starved(&self) -> bool {
        // Relaxed: a hint.
        self.processes()
            .any(|process| process.starved.load(Ordering::Relaxed))
    }

    /// Carries on with what is under way, if it is time.
    fn carry_on(&self, state: &mut State) {
        let Some((change, under_way)) = state.under_way.take() else {
            return;
        };
        let outcome = match under_way {
            UnderWay::Add { nth, until } => self.adding(nth, until),
            UnderWay::Leave { nth, until } => match self.leaving(state, nth, until) {
                Some(Ok(())) => {
                    let under_way = UnderWay::Remove { nth, until };
                    state.under_way = Some((change, under_way));
                    return;
                }
                other => other,
            },
            UnderWay::Remove { nth, until } => {
                // Nothing is there any more: who does not answer only keeps the slot.
                self.clear_seats(state);
                let gone = state.seats[nth].is_none() || Instant::now() >= until;
                gone.then_some(Ok(()))
            }
            UnderWay::Lower { until } => self.lowering(until),
        };
        match outcome {
            Some(outcome) => state.outcomes.push((change, outcome)),
            None => state.under_way = Some((change, under_way)),
        }
    }

    fn adding(&self, nth: usize, until: Instant) -> Option<Result<(), Failed>> {
        let missing = self.missing(nth);
        let failed = |(pid, answer): &(u32, Answer)| (*answer == Answer::Failed).then_some(*pid);
        let pids: Vec<u32> = missing.iter().filter_map(failed).collect();
        if pids.len() < missing.len() && Instant::now() < until {
            return None;
        }
        Some(if pids.is_empty() {
            Ok(())
        } else {
            Err(Failed::CannotUse { pids })
        })
    }

    fn leaving(&self, state: &mut State, nth: usize, until: Instant) -> Option<Result<(), Failed>> {
        let slot = &self.region.devices()[nth];
        let missing = self.missing(nth);
        if missing.is_empty() {
            slot.set_wish(Wish::Absent);
            let view = self.view(state, nth, DeviceState::Gone);
            state.unplugged.extend(view);
            state.seats[nth].iter_mut().for_each(Seat::go);
            return Some(Ok(()));
        }
        let starved = self.is_starved();
        if !starved && Instant::now() < until {
            return None;
        }
        slot.set_wish(Wish::Live);
        let holders = missing.into_iter().map(|(pid, answer)| Held {
            pid,
            pages: match answer {
                Answer::Left(pages) => Some(u64::from(pages)),
                Answer::None | Answer::Done | Answer::Failed => None,
            },
        });
        Some(Err(Failed::StillHeld {
            name: state.name(nth),
            holders: holders.collect(),
        }))
    }

    fn lowering(&self, until: Instant) -> Option<Result<(), Failed>> {
        // Relaxed, all: numbers that change now and then.
        let (budget, before) = (self.region.ram_bytes(), self.region.ram_before());
        let wanted = budget.load(Ordering::Relaxed);
        let granted = || self.processes().map(|process| Stats::get(&process.granted));
        if granted().sum::<u64>() <= wanted || before.load(Ordering::Relaxed) == 0 {
            before.store(0, Ordering::Relaxed);
            return Some(Ok(()));
        }
        if !self.is_starved() && Instant::now() < until {
            return None;
        }
        let used_bytes = granted().sum();
        let restored_bytes = before.swap(0, Ordering::Relaxed);
        budget.store(restored_bytes, Ordering::Relaxed);
        Some(Err(Failed::NoRoomForRam {
            used_bytes,
            restored_bytes,
        }))
    }
}

impl State {
    fn refuse_if_busy(&self) -> Result<(), Refused> {
        match self.under_way {
            Some(_) => Err(Refused::Busy),
            None => Ok(()),
        }
    }

    fn begin(&mut self, under_way: UnderWay) -> Change {
        let change = Change(self.next_change);
        self.next_change += 1;
        self.under_way = Some((change, under_way));
        change
    }

    fn name(&self, nth: usize) -> String {
        let seat = self.seats[nth].as_ref();
        seat.map_or_else(String::new, |seat| seat.config.name())
    }

    fn find(&self, name: &str) -> Result<usize, Refused> {
        let named = |seat: &Option<Seat>| {
            let seat = seat.as_ref().filter(|seat| !seat.is_gone());
            seat.is_some_and(|seat| seat.config.name() == name)
        };
        self.seats.iter().position(named).ok_or_else(|| {
            let seats = self.seats.iter().flatten().filter(|seat| !seat.is_gone());
            let names: Vec<String> = seats.map(|seat| seat.config.name()).collect();
            Refused::NoSuchDevice {
                name: name.to_owned(),
                known: names.join(", "),
            }
        })
    }
}

/// Whether a process has ended, even if its parent has not asked for its status yet.
fn is_dead(pid: u32) -> bool {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw);
    let Some(pid) = pid else { return true };
    let flags = rustix::process::PidfdFlags::empty();
    match rustix::process::pidfd_open(pid, flags) {
        Ok(process) => {
            let readable = rustix::event::PollFlags::IN;
            let mut fds = [rustix::event::PollFd::new(&process, readable)];
            let now = rustix::event::Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|ended| ended > 0)
        }
        Err(errno) => errno == rustix::io::Errno::SRCH,
    }
}

fn path_of(file: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        file.as_raw_fd()
    ))
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "change {}", self.0)
    }
}
