//! Forks are announced to the pager where the kernel does not tell it of them.
//!
//! By handlers of `pthread_atfork`, so that every fork of the C library is covered, those inside `daemon` and `forkpty` too.
//! `posix_spawn`, `vfork`, `system` and `popen` share memory with their child and need nothing. The child of a raw
//! `clone` or of `_Fork` gets SIGSEGV if it touches managed memory.

use pgmap::AddressSpace;
use pgmap_host::thread::SignalsBlocked;

use crate::state;

unsafe extern "C" {
    fn pthread_atfork(
        prepare: Option<extern "C" fn()>,
        parent: Option<extern "C" fn()>,
        child: Option<extern "C" fn()>,
    ) -> i32;
}

/// Announces all forks from here on, if they have to be.
pub(crate) fn announce(space: &AddressSpace) {
    if !space.needs_announced_forks() {
        return;
    }
    // SAFETY: the handlers are functions of this library, which is never unloaded.
    if unsafe { pthread_atfork(Some(before), Some(after), None) } != 0 {
        eprintln!("pgmap: forks cannot be announced: children that touch the heap get SIGSEGV");
    }
}

extern "C" fn before() {
    if let Some(space) = state::space() {
        let _blocked = SignalsBlocked::new();
        space.before_fork();
    }
}

extern "C" fn after() {
    if let Some(space) = state::space() {
        let _blocked = SignalsBlocked::new();
        space.after_fork();
    }
}
