//! Threads of the pager: no signal of the program is ever handled on one.

use std::io;
use std::thread::{Builder, JoinHandle};

/// Bytes of a pager thread's stack: its buffers are on the heap.
pub const STACK_BYTES: usize = 256 * 1024;

/// Starts a thread on which all signals are blocked.
///
/// # Errors
///
/// What the machine answers if it has no room for another thread.
pub fn spawn<T: Send + 'static>(
    name: &str,
    run: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let _blocked = SignalsBlocked::new();
    Builder::new()
        .name(name.to_owned())
        .stack_size(STACK_BYTES)
        .spawn(run)
}

/// All signals are blocked on this thread while this lives.
///
/// Threads inherit the mask of their creator; and a signal handler must not run while the program's thread holds a
/// lock of the pager, because it may touch a page that the pager then cannot bring.
#[derive(Debug)]
pub struct SignalsBlocked {
    before: libc::sigset_t,
}

impl SignalsBlocked {
    /// Blocks all signals until the value is dropped.
    #[must_use]
    pub fn new() -> Self {
        let mut all = empty();
        let mut before = empty();
        // SAFETY: `all` is a signal set.
        unsafe { libc::sigfillset(&raw mut all) };
        // SAFETY: both pointers are to signal sets that live during the call.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before) };
        Self { before }
    }
}

impl Default for SignalsBlocked {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        let none = core::ptr::null_mut();
        // SAFETY: `before` is the set that `new` got from the same call.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, none) };
    }
}

fn empty() -> libc::sigset_t {
    let mut set = core::mem::MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initialises the set that it is given.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: just initialised.
    unsafe { set.assume_init() }
}
