//! Children of the test's process: one that looks at memory, and one that is killed; and an end for tests that hang.

use core::time::Duration;
use std::sync::Arc;
use std::time::Instant;

use pgmap_sync::atomic::{AtomicBool, Ordering};

/// Ends the process if it is not dropped in time. A thread that hangs in a fork may have the allocator's locks, and then nothing
/// else can say so.
pub(crate) struct Watchdog(Arc<AtomicBool>);

impl Watchdog {
    pub(crate) fn new(patience: Duration) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let (watched, end) = (Arc::clone(&done), Instant::now() + patience);
        std::thread::spawn(move || watch(&watched, end));
        Self(done)
    }
}

fn watch(done: &AtomicBool, end: Instant) {
    // Relaxed, here and below: a flag that stands alone.
    while !done.load(Ordering::Relaxed) {
        if Instant::now() >= end {
            let message = b"the test hangs\n";
            // SAFETY: the bytes are those of the message.
            unsafe { libc::write(2, message.as_ptr().cast(), message.len()) };
            // SAFETY: it ends the process.
            unsafe { libc::_exit(124) };
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Forks, and answers whether `look` said yes in the child, which does nothing else.
///
/// `look` may run while other threads of the parent held any lock: it takes none, and allocates nothing.
pub(crate) fn in_a_child(look: impl FnOnce() -> bool) -> bool {
    let child = fork(look);
    wait(child) == 0
}

/// Forks; `act`'s answer is the child's exit code.
pub(crate) fn fork(act: impl FnOnce() -> bool) -> libc::pid_t {
    // SAFETY: the child calls `act`, which takes no locks by this function's contract, and ends without running anything else.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "fork: {}", std::io::Error::last_os_error());
    if child == 0 {
        let code = i32::from(!act());
        // SAFETY: it ends the child.
        unsafe { libc::_exit(code) };
    }
    child
}

/// Waits for a child, and answers its status.
pub(crate) fn wait(child: libc::pid_t) -> i32 {
    let mut status = -1;
    // SAFETY: `status` is ours to write.
    let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(waited, child, "{}", std::io::Error::last_os_error());
    status
}
