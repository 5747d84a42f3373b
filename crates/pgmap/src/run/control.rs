//! The supervisor's side of a run: what its processes share, and how that is changed while they run.
//!
//! The supervisor calls [`Control::look`] ten times a second, about; whoever serves requests begins changes and asks for their
//! outcome, from any thread. One change is under way at a time. What must never happen here: waiting for a dead process, or a
//! change that cannot be made left half made.

use core::fmt;
use core::time::Duration;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use pgmap_core::addr::PAGE_SIZE;
use pgmap_drivers::spec::DeviceSpec;
use pgmap_sync::atomic::Ordering;

use crate::memory::{MIN_RAM_BYTES, machine_frames};
use crate::shared::{Answer, BURYING, DEVICES, Process, REGION_NAME, Region, Wish};
pub use error::{ControlError, Failed, Held, Refused};
use seat::Seat;
pub use view::{DeviceState, DeviceView, ProcessView, RamView};

mod error;
mod iomem;
mod progress;
mod seat;
mod view;

/// The least budget of a run, in bytes: below it the pager's own batches do not fit.
pub const LEAST_RAM_BYTES: u64 = 4 << 20;
/// How long processes may take to find a device that was added. One that is stopped finds it when it goes on.
const ADD_PATIENCE: Duration = Duration::from_secs(2);

/// How often processes that a change waits for are looked at closely, as that holds them up for a moment.
const CLOSE_LOOK: Duration = Duration::from_millis(300);

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
    /// When processes were last looked at closely.
    looked: Instant,
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
            looked: Instant::now(),
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

    /// Keeps the program's own mappings of files that have at least so many bytes within the budget, too. To be called before the
    /// program starts.
    pub fn map_files(&self, least_bytes: u64) {
        // Relaxed: the start of the program comes after it.
        self.region
            .map_files()
            .store(least_bytes, Ordering::Relaxed);
    }

    /// Whether [`map_files`](Self::map_files) was called.
    #[must_use]
    pub fn keeps_mapped_files(&self) -> bool {
        // Relaxed: a number that stands alone.
        self.region.map_files().load(Ordering::Relaxed) > 0
    }

    /// What the processes share.
    #[must_use]
    pub const fn region(&self) -> Region {
        self.region
    }

    /// What [`RUN_VARIABLE`](super::RUN_VARIABLE) is to be in the environment of the program.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        path_of(&self.file)
    }

    /// Gives back what dead processes held, and carries on with what is under way. To be called often.
    pub fn look(&self) {
        let mut state = self.state();
        let looks_closely = state.looks_closely();
        super::leave(&self.region, |word| {
            let pid = word & !BURYING;
            is_dead(pid) || looks_closely && pid == word && runs_something_else(pid)
        });
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
        self.forget_hunger();
        self.want(&mut state, nth, Wish::Leaving);
        let until = from_now(patience);
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
        let most = state.most_ram_bytes();
        if bytes < least {
            return Err(Refused::TooLittleRam { least });
        }
        if bytes > most {
            return Err(Refused::TooMuchRam { most });
        }
        self.forget_hunger();
        // Relaxed, both: processes look at them now and then.
        let before = self.region.ram_bytes().load(Ordering::Relaxed);
        self.region
            .ram_before()
            .store(if bytes < before { before } else { 0 }, Ordering::Relaxed);
        self.region.ram_bytes().store(bytes, Ordering::Relaxed);
        state.highest_ram_bytes = state.highest_ram_bytes.max(bytes);
        let until = from_now(patience);
        Ok(state.begin(UnderWay::Lower { until }))
    }

    /// Ends the patience of a change: if it is not made at the next look, it is taken back.
    pub fn give_up(&self, change: Change) {
        let mut state = self.state();
        let under_way = state.under_way.as_mut();
        if let Some((_, under_way)) = under_way.filter(|(other, _)| *other == change) {
            match under_way {
                UnderWay::Add { until, .. }
                | UnderWay::Leave { until, .. }
                | UnderWay::Remove { until, .. }
                | UnderWay::Lower { until } => *until = Instant::now(),
            }
        }
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

    /// The processes, dead ones that nobody has buried yet included.
    fn processes(&self) -> impl Iterator<Item = &'static Process> {
        let all = self.region.processes().iter();
        all.filter(|process| process.pid() != 0)
    }

    /// Wants something new of a slot's device. Who starts later finds it so; the processes that there are have to follow.
    fn want(&self, state: &mut State, nth: usize, wish: Wish) {
        self.region.devices()[nth].set_wish(wish);
        if let Some(seat) = &mut state.seats[nth] {
            seat.followers = self.processes().map(Process::pid).collect();
        }
    }

    /// Only who waits for memory from now on waits because of a change that begins.
    fn forget_hunger(&self) {
        for process in self.processes() {
            // Relaxed: a hint. Who starves says so again.
            process.starved.store(false, Ordering::Relaxed);
        }
    }

    /// The processes that have not done what is wanted of a slot, and what they have done.
    fn missing(&self, state: &State, nth: usize) -> Vec<(u32, Answer)> {
        let followers = state.seats[nth].as_ref().map(|seat| &seat.followers);
        let generation = self.region.devices()[nth].order().generation;
        let following = self
            .processes()
            .filter(|process| followers.is_some_and(|pids| pids.contains(&process.pid())));
        let answers =
            following.map(|process| (process.pid(), process.answers[nth].get(generation)));
        answers
            .filter(|(_, answer)| *answer != Answer::Done)
            .collect()
    }
}

impl State {
    /// What the budget can be raised to. A run that began with more than the machine has may have that again.
    fn most_ram_bytes(&self) -> u64 {
        self.highest_ram_bytes
            .max(machine_frames() * PAGE_SIZE as u64)
    }

    fn refuse_if_busy(&self) -> Result<(), Refused> {
        match self.under_way {
            Some(_) => Err(Refused::Busy),
            None => Ok(()),
        }
    }

    /// Whether to look at processes closely now, while a change waits for them.
    fn looks_closely(&mut self) -> bool {
        let closely = self.under_way.is_some() && self.looked.elapsed() >= CLOSE_LOOK;
        if closely {
            self.looked = Instant::now();
        }
        closely
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
            let known: Vec<String> = seats.map(|seat| seat.config.name()).collect();
            Refused::NoSuchDevice {
                name: name.to_owned(),
                known: known.join(", "),
            }
        })
    }
}

/// The end of somebody's patience; what no clock can tell is as long as nobody lives.
fn from_now(patience: Duration) -> Instant {
    const LONG: Duration = Duration::from_secs(1 << 30);
    let now = Instant::now();
    now.checked_add(patience).unwrap_or(now + LONG)
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

/// Whether a process that took part has executed a program that cannot be managed: it has not mapped what we share, which was
/// mapped before it had its place. One that will take part again leaves its old place itself.
fn runs_something_else(pid: u32) -> bool {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"));
    maps.is_ok_and(|maps| !maps.is_empty() && !maps.contains(REGION_NAME))
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
