//! The process that stands by while the program runs: it passes signals on, waits, and leaves as the program left.
//!
//! `run` calls it. Signals mean what they would mean without us: the program decides, however often they come. What ends
//! us in spite of that, SIGKILL above all, ends the program (`tie`). What must never happen here: a signal that ends us
//! and leaves the program alone.

use core::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use core::{mem, ptr};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitCode, ExitStatus};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

/// The program's process, for the signal handler; 0 while there is none, and in the program until it is executed.
static PROGRAM: AtomicI32 = AtomicI32::new(0);
/// Signals that came before there was a program, a bit each.
static EARLY: AtomicU32 = AtomicU32::new(0);

/// Signals that are meant for the program when a process sends them to us, and that end it unless it wants otherwise.
const ENDING: [i32; 6] = [
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
];
/// Those that stop it, or let it go on.
const STOPPING: [i32; 2] = [libc::SIGTSTP, libc::SIGCONT];

type Handler = extern "C" fn(i32, *const libc::siginfo_t, *const libc::c_void);

extern "C" fn pass_on(signal: i32, info: *const libc::siginfo_t, _: *const libc::c_void) {
    // SAFETY: the kernel hands a valid description to a handler that was set with SA_SIGINFO.
    let code = unsafe { (*info).si_code };
    // SeqCst, both: pairs with `stand_by`. Either we see the program, or it sees what came early.
    let program = PROGRAM.load(Ordering::SeqCst);
    if program <= 0 {
        EARLY.fetch_or(1 << signal, Ordering::SeqCst);
    } else if code <= 0 || is_for_the_leader_alone(signal) {
        // What else the kernel sends comes from the terminal, which has sent it to the program, too.
        send(program, signal);
    }
}

/// Whether a signal from the terminal reaches us and not the program: when it hangs up, only the session's leader is told.
fn is_for_the_leader_alone(signal: i32) -> bool {
    // SAFETY: `getsid` may be called in a handler, and touches no memory.
    let session = unsafe { libc::getsid(0) };
    // SAFETY: so may `getpid`.
    let ours = unsafe { libc::getpid() };
    (signal == libc::SIGHUP || signal == libc::SIGCONT) && session == ours
}

fn send(program: i32, signal: i32) {
    // SAFETY: `kill` may be called in a handler, and touches no memory.
    unsafe { libc::kill(program, signal) };
}

/// Our signals are the program's from here on, even if it has not started yet.
///
/// # Invariants
///
/// The handlers are set.
#[derive(Debug)]
pub(crate) struct Supervisor(());

impl Supervisor {
    /// To be called before the program is started: an exec forgets handlers, so the program finds its signals as we
    /// found ours.
    pub(crate) fn new() -> Self {
        for signal in ENDING.into_iter().chain(STOPPING) {
            set_handler(signal, pass_on);
        }
        // INVARIANT: just set.
        Self(())
    }

    /// Lets the program that a command starts end with us, even if we are killed.
    #[allow(
        clippy::unused_self,
        reason = "the value proves that the handlers are set"
    )]
    pub(crate) fn tie(&self, command: &mut Command) {
        let supervisor = rustix::process::getpid();
        let before_exec = move || {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            if rustix::process::getppid() != Some(supervisor) {
                // Too late: we are gone already.
                return Err(rustix::io::Errno::SRCH.into());
            }
            take_what_came();
            Ok(())
        };
        // SAFETY: between fork and exec it makes system calls and uses atomics; it takes no lock and allocates nothing.
        unsafe { command.pre_exec(before_exec) };
    }

    /// Stands by the program until it has ended. `look` is called ten times a second, about.
    #[allow(
        clippy::unused_self,
        reason = "the value proves that the handlers are set"
    )]
    pub(crate) fn stand_by(self, child: &Child, look: impl FnMut()) -> std::io::Result<ExitStatus> {
        let pid = i32::try_from(child.id()).unwrap_or(0);
        // SeqCst, both: pairs with `pass_on`.
        PROGRAM.store(pid, Ordering::SeqCst);
        let early = EARLY.swap(0, Ordering::SeqCst);
        ENDING
            .into_iter()
            .chain(STOPPING)
            .filter(|signal| early & 1 << signal != 0)
            .for_each(|signal| send(pid, signal));
        let status = wait(Pid::from_raw(pid), look);
        // The number may soon be another process's. SeqCst: as above.
        PROGRAM.store(0, Ordering::SeqCst);
        status
    }
}

/// In the program's process, before it is executed: our handlers know no program there. A signal of the terminal that
/// they took would be lost.
fn take_what_came() {
    for signal in ENDING {
        if handler(signal) != libc::SIG_IGN {
            // SAFETY: the default action is no code of ours.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
    }
    // SeqCst: our own handlers ran in this thread.
    let early = EARLY.swap(0, Ordering::SeqCst);
    for signal in ENDING {
        if early & 1 << signal != 0 {
            // SAFETY: sending ourselves a signal touches no memory.
            unsafe { libc::raise(signal) };
        }
    }
}

fn wait(program: Option<Pid>, mut look: impl FnMut()) -> std::io::Result<ExitStatus> {
    loop {
        match waitpid(program, WaitOptions::UNTRACED | WaitOptions::NOHANG) {
            Ok(None) | Err(rustix::io::Errno::INTR) => {
                look();
                wait_a_little(program);
            }
            Ok(Some((_, status))) if status.stopped() => {
                // A shell that waits for us has to see us stop. Its SIGCONT is passed on like any other.
                kill_process(rustix::process::getpid(), Signal::STOP)?;
            }
            Ok(Some((_, status))) => return Ok(ExitStatus::from_raw(status.as_raw())),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Waits until the program ends or a signal comes, a tenth of a second at most.
fn wait_a_little(program: Option<Pid>) {
    let flags = rustix::process::PidfdFlags::empty();
    let program = program.and_then(|pid| rustix::process::pidfd_open(pid, flags).ok());
    let readable = rustix::event::PollFlags::IN;
    let mut fds: Vec<_> = program
        .iter()
        .map(|program| rustix::event::PollFd::new(program, readable))
        .collect();
    let patience = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 100_000_000,
    };
    let _ = rustix::event::poll(&mut fds, Some(&patience));
}

/// Ends as the program ended.
pub(crate) fn leave_as(status: ExitStatus) -> ExitCode {
    let Some(signal) = status.signal() else {
        return ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1));
    };
    // The program has left its core dump, if it was to; we leave none, not even to a collector.
    let none = rustix::process::Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    let _ = rustix::process::setrlimit(rustix::process::Resource::Core, none);
    let undumpable = rustix::process::DumpableBehavior::NotDumpable;
    let _ = rustix::process::set_dumpable_behavior(undumpable);
    // SAFETY: the default action is no code of ours.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
    // SAFETY: sending ourselves a signal touches no memory.
    unsafe { libc::raise(signal) };
    ExitCode::from(128u8.saturating_add(u8::try_from(signal).unwrap_or(0)))
}

/// What happens at a signal now.
fn handler(signal: i32) -> libc::sighandler_t {
    // SAFETY: all-zero bytes are a valid description of an action: default, no flags, an empty mask.
    let mut now: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: `now` can be written, and nothing is changed. If the kernel refuses, it stays the default.
    unsafe { libc::sigaction(signal, ptr::null(), &raw mut now) };
    now.sa_sigaction
}

/// Sets a handler, unless the signal is ignored: then the program ignores it as well (nohup, jobs of a script).
fn set_handler(signal: i32, new: Handler) {
    if handler(signal) == libc::SIG_IGN {
        return;
    }
    // SAFETY: all-zero bytes are a valid description of an action: default, no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = new as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
    // SAFETY: the action is complete; the handlers take what SA_SIGINFO gives and do only what handlers may.
    unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) };
}
