//! Whether this process is managed, and by what.
//!
//! A fork's child is not: its parent's pager gave it every byte it lacked, and it has no pager of its own. It finds
//! out by a word in a page that the kernel wipes at a fork.

use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};

use pgmap::AddressSpace;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};

/// The managed addresses; both 0 before there are any. They stay in a fork's child, where they are plain memory.
static START: AtomicUsize = AtomicUsize::new(0);
static END: AtomicUsize = AtomicUsize::new(0);
static SPACE: AtomicPtr<AddressSpace> = AtomicPtr::new(ptr::null_mut());
/// A word that is 1 in the managed process and 0 in a fork's child.
static ALIVE: AtomicPtr<AtomicU32> = AtomicPtr::new(ptr::null_mut());

const PAGE: usize = 4096;

/// From here on the process is managed.
pub(crate) fn manage(space: &'static AddressSpace) {
    let Some(alive) = wiped_on_fork() else {
        eprintln!(
            "pgmap: this process runs in plain memory: the kernel cannot wipe a page at a fork"
        );
        return;
    };
    alive.store(1, Ordering::Relaxed);
    let range = space.range();
    START.store(range.start, Ordering::Relaxed);
    END.store(range.end, Ordering::Relaxed);
    ALIVE.store(ptr::from_ref(alive).cast_mut(), Ordering::Relaxed);
    // Release: pairs with the acquire in `space`; who finds the space finds all of the above.
    SPACE.store(ptr::from_ref(space).cast_mut(), Ordering::Release);
    crate::forks::attend(space);
    crate::alloc::manage(space);
}

/// What manages this process; `None` before the start, without a run, and in a fork's child.
pub(crate) fn space() -> Option<&'static AddressSpace> {
    // Acquire: pairs with the release in `manage`.
    let space = SPACE.load(Ordering::Acquire);
    if space.is_null() {
        return None;
    }
    let alive = ALIVE.load(Ordering::Relaxed);
    // SAFETY: `manage` stored a reference to a page that is never unmapped, before it stored the space.
    let alive = unsafe { &*alive };
    // Relaxed: it changes only at a fork, and a child has one thread.
    if alive.load(Ordering::Relaxed) == 0 {
        return None;
    }
    // SAFETY: `manage` stored a reference that is valid for ever.
    Some(unsafe { &*space })
}

/// Whether this is a fork's child, and its parent had a private mapping of a file there.
pub(crate) fn was_private_file(address: usize, bytes: usize) -> bool {
    if !contains(address) || space().is_some() {
        return false;
    }
    // Acquire: as in `space`.
    let parents = SPACE.load(Ordering::Acquire);
    // SAFETY: null, or a reference that is valid for ever; a child has a copy of what it refers to.
    let parents = unsafe { parents.as_ref() };
    parents.is_some_and(|parents| parents.was_private_file(address, bytes))
}

/// Whether an address is, or in a fork's child was, managed.
pub(crate) fn contains(address: usize) -> bool {
    // Relaxed: both are written once; before that nobody can have such an address.
    address >= START.load(Ordering::Relaxed) && address < END.load(Ordering::Relaxed)
}

/// The part of a range of bytes that is among the managed addresses; empty if there is none.
pub(crate) fn overlap(address: usize, bytes: usize) -> (usize, usize) {
    // Relaxed: as in `contains`.
    let (first, last) = (START.load(Ordering::Relaxed), END.load(Ordering::Relaxed));
    let start = address.max(first);
    let end = address.saturating_add(bytes).min(last);
    (start, end.saturating_sub(start))
}

fn wiped_on_fork() -> Option<&'static AtomicU32> {
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
    let page =
        unsafe { mmap_anonymous(ptr::null_mut(), PAGE, protection, MapFlags::PRIVATE) }.ok()?;
    // SAFETY: the page is ours and empty.
    unsafe { madvise(page, PAGE, Advice::LinuxWipeOnFork) }.ok()?;
    // SAFETY: the page is zeroed, aligned, and never unmapped.
    Some(unsafe { &*page.cast::<AtomicU32>() })
}
