//! What is to be done around a fork, by handlers of `pthread_atfork`: so every fork of the C library is covered, those
//! inside `daemon` and `forkpty` too.
//!
//! The child closes the descriptors of ours that it has inherited: they hold on to devices, and to the pages of other children.
//! And where the kernel does not tell the pager of forks, they are announced. `posix_spawn`, `vfork`, `system` and `popen` share
//! memory with their child and need nothing. The child of a raw `clone` or of `_Fork` keeps the descriptors, and where
//! forks have to be announced it gets SIGSEGV if it touches managed memory.

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

/// From here on forks are attended to.
pub(crate) fn attend(space: &AddressSpace) {
    let (before, after): (Option<extern "C" fn()>, Option<extern "C" fn()>) =
        if space.needs_announced_forks() {
            (Some(before), Some(after))
        } else {
            (None, None)
        };
    // SAFETY: the handlers are functions of this library, which is never unloaded.
    if unsafe { pthread_atfork(before, after, Some(in_child)) } != 0 {
        eprintln!("pgmap: forks cannot be attended to: children may not find their memory");
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

extern "C" fn in_child() {
    pgmap_host::fds::close_inherited();
}
