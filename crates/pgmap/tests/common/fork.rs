//! Children of the test's process: one that looks at memory, and one that is killed.

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
