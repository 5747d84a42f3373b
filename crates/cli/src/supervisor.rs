//! The process that stands by while the program runs: it passes signals on, waits, and leaves as the program left.

use core::sync::atomic::{AtomicI32, Ordering};
use core::time::Duration;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitCode, ExitStatus};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

/// The program's process, for the signal handler; 0 before there is one.
static PROGRAM: AtomicI32 = AtomicI32::new(0);

/// Signals that are meant for the program when they are sent to us.
const PASSED_ON: [i32; 5] = [
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGCONT,
];
/// Signals that a terminal sends to the program, too: it decides what they mean.
const IGNORED: [i32; 2] = [libc::SIGINT, libc::SIGQUIT];

extern "C" fn pass_on(signal: i32) {
    // Relaxed: set once before the handlers are.
    let program = PROGRAM.load(Ordering::Relaxed);
    if program > 0 {
        // SAFETY: `kill` may be called in a handler.
        unsafe { libc::kill(program, signal) };
    }
}

/// Stands by a program that has been started, until it has ended. `look` is called now and then.
pub(crate) fn stand_by(child: &Child, mut look: impl FnMut()) -> std::io::Result<ExitStatus> {
    let pid = i32::try_from(child.id()).unwrap_or(0);
    PROGRAM.store(pid, Ordering::Relaxed);
    for signal in PASSED_ON {
        set_handler(signal, pass_on as *const () as libc::sighandler_t);
    }
    for signal in IGNORED {
        set_handler(signal, libc::SIG_IGN);
    }
    let program = Pid::from_raw(pid);
    loop {
        match waitpid(program, WaitOptions::UNTRACED | WaitOptions::NOHANG) {
            Ok(None) | Err(rustix::io::Errno::INTR) => {
                look();
                wait_a_little(pid);
            }
            Ok(Some((_, status))) if status.stopped() => {
                // A shell that waits for us has to see us stop; when it continues us, we continue the program.
                if let Some(own) = Some(rustix::process::getpid()) {
                    let _ = kill_process(own, Signal::STOP);
                }
                pass_on(libc::SIGCONT);
            }
            Ok(Some((_, status))) => return Ok(ExitStatus::from_raw(status.as_raw())),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Waits until the program changes its state, a tenth of a second at most.
fn wait_a_little(pid: i32) {
    let Some(pid) = Pid::from_raw(pid) else {
        return;
    };
    let flags = rustix::process::PidfdFlags::empty();
    let Ok(program) = rustix::process::pidfd_open(pid, flags) else {
        std::thread::sleep(Duration::from_millis(10));
        return;
    };
    let mut fds = [rustix::event::PollFd::new(
        &program,
        rustix::event::PollFlags::IN,
    )];
    let patience = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 100_000_000,
    };
    // A signal that comes meanwhile ends the wait early.
    let _ = rustix::event::poll(&mut fds, Some(&patience));
}

/// Ends as the program ended.
pub(crate) fn leave_as(status: ExitStatus) -> ExitCode {
    let Some(signal) = status.signal() else {
        return ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1));
    };
    // The program has left its core dump, if it was to; we leave none.
    let none = rustix::process::Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    let _ = rustix::process::setrlimit(rustix::process::Resource::Core, none);
    set_handler(signal, libc::SIG_DFL);
    // SAFETY: sending ourselves a signal touches no memory.
    unsafe { libc::raise(signal) };
    ExitCode::from(128u8.saturating_add(u8::try_from(signal).unwrap_or(0)))
}

fn set_handler(signal: i32, handler: libc::sighandler_t) {
    // SAFETY: the handlers are `pass_on`, which only does what handlers may, and the two constants.
    unsafe { libc::signal(signal, handler) };
}
