//! The process that stands by while the program runs: it passes signals on, waits, and leaves as the program left.
//!
//! `run` calls it. What must never happen here: a signal that kills us and leaves the program alone.

use core::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use core::{mem, ptr};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitCode, ExitStatus};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

/// The program's process, for the signal handler; 0 while there is none.
static PROGRAM: AtomicI32 = AtomicI32::new(0);
/// Signals that came before there was a program, a bit each.
static EARLY: AtomicU32 = AtomicU32::new(0);

/// Signals that are meant for the program when a process sends them to us.
const PASSED_ON: [i32; 6] = [
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGTSTP,
    libc::SIGCONT,
];
/// Signals that a terminal sends to the program, too: it decides what they mean.
const LEFT_TO_THE_PROGRAM: [i32; 2] = [libc::SIGINT, libc::SIGQUIT];

type Handler = extern "C" fn(i32, *const libc::siginfo_t, *const libc::c_void);

extern "C" fn pass_on(signal: i32, info: *const libc::siginfo_t, _: *const libc::c_void) {
    // SAFETY: the kernel hands a valid description to a handler that was set with SA_SIGINFO.
    let code = unsafe { (*info).si_code };
    // What the kernel sends comes from the terminal, which has sent it to the program, too.
    if code <= 0 {
        send(signal);
    }
}

extern "C" fn leave_it(_: i32, _: *const libc::siginfo_t, _: *const libc::c_void) {}

fn send(signal: i32) {
    // SeqCst, both: pairs with `stand_by`. Either we see the program, or it sees what came early.
    let program = PROGRAM.load(Ordering::SeqCst);
    if program > 0 {
        // SAFETY: `kill` may be called in a handler, and touches no memory.
        unsafe { libc::kill(program, signal) };
    } else {
        EARLY.fetch_or(1 << signal, Ordering::SeqCst);
    }
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
        for signal in PASSED_ON {
            set_handler(signal, pass_on);
        }
        for signal in LEFT_TO_THE_PROGRAM {
            set_handler(signal, leave_it);
        }
        // INVARIANT: just set.
        Self(())
    }

    /// Stands by the program until it has ended. `look` is called ten times a second, about.
    #[allow(
        clippy::unused_self,
        reason = "the value proves that the handlers are set"
    )]
    pub(crate) fn stand_by(self, child: &Child, look: impl FnMut()) -> std::io::Result<ExitStatus> {
        let pid = i32::try_from(child.id()).unwrap_or(0);
        // SeqCst, both: pairs with `send`.
        PROGRAM.store(pid, Ordering::SeqCst);
        let early = EARLY.swap(0, Ordering::SeqCst);
        PASSED_ON
            .into_iter()
            .filter(|signal| early & 1 << signal != 0)
            .for_each(send);
        let status = wait(Pid::from_raw(pid), look);
        // The number may soon be another process's. SeqCst: as above.
        PROGRAM.store(0, Ordering::SeqCst);
        status
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

/// Sets a handler, unless the signal is ignored: then the program ignores it as well (nohup, jobs of a script).
fn set_handler(signal: i32, handler: Handler) {
    // SAFETY: all-zero bytes are a valid description of an action: default, no flags, an empty mask.
    let mut before: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: `before` can be written, and nothing is changed.
    let asked = unsafe { libc::sigaction(signal, ptr::null(), &raw mut before) };
    if asked != 0 || before.sa_sigaction == libc::SIG_IGN {
        return;
    }
    // SAFETY: as above.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = handler as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
    // SAFETY: the action is complete; the handlers take what SA_SIGINFO gives and do only what handlers may.
    unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) };
}
