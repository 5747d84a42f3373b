//! The host's page tables for one address space: anonymous memory under userfaultfd.
//!
//! Two areas, each with a userfaultfd of its own: the *arena*, which the program uses, and the *staging area*, which nobody
//! but `mm` knows. `UFFDIO_MOVE` takes pages from one to the other without a copy, and refuses those that
//! somebody has pinned (GUP-3); those that the program may not read and write leave by a detour (`restricted`). A stray access
//! to an empty staging slot gets SIGBUS instead of waiting for ever.
//!
//! While a fork waits for its event to be read, the kernel answers EAGAIN to copies and moves. Whoever gets that answer
//! reads the messages into a queue himself, so that nobody who holds a lock waits for a thread that wants it.

use core::ops::Range;
use core::time::Duration;
use std::sync::Arc;

use pgmap_core::addr::{PAGE_SIZE, Page, VirtAddr};
use pgmap_mm::mmu::{Mmu, Progress, Protect, Slot, Stop};
use pgmap_sync::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::mm::{Advice, ProtFlags, madvise};

use crate::area::{Area, ForkMark, OnFork};
use crate::buffers::Buffers;
use crate::event::Event;
use crate::fds::OurFd;
use crate::forks::{Drained, Forks};
use crate::restricted::Restricted;
use crate::thread::SignalsBlocked;
use crate::uffd::{
    Done, FEATURE_EVENT_FORK, FEATURE_MINOR_SHMEM, FEATURE_MISSING_SHMEM, FEATURE_MOVE,
    FEATURE_POISON, FEATURE_SIGBUS, FEATURE_THREAD_ID, FEATURE_WP, FEATURE_WP_SHMEM, Uffd,
};

/// Features without which the pager does not work.
const NEEDED: u64 = FEATURE_WP
    | FEATURE_THREAD_ID
    | FEATURE_POISON
    | FEATURE_MOVE
    | FEATURE_MISSING_SHMEM
    | FEATURE_MINOR_SHMEM
    | FEATURE_WP_SHMEM;
/// Pages of zeros that one call can install.
const ZEROS: usize = 64;
/// Between two looks at whether children still wait.
const SETTLING: Duration = Duration::from_micros(100);
/// Between two tries to read a message that is there, but cannot be had.
const UNREADABLE: Duration = Duration::from_micros(50);

/// Why the host's page tables cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// Nobody may use userfaultfd for system calls' faults here.
    #[error(
        "userfaultfd is not allowed here ({0}): run as root, or `sysctl vm.unprivileged_userfaultfd=1`, \
         or allow your user to open /dev/userfaultfd"
    )]
    Forbidden(Errno),
    /// The kernel is too old.
    #[error("this kernel's userfaultfd cannot move pages: Linux 6.8 or later is needed")]
    TooOld,
    /// There are not enough addresses.
    #[error(
        "{bytes} bytes of addresses could not be reserved ({errno}): raise `ulimit -v`, or set vm.overcommit_memory to 0 or 1"
    )]
    Addresses {
        /// How many were wanted.
        bytes: usize,
        /// What the machine answered.
        errno: Errno,
    },
    /// Something else failed that should not.
    #[error("{what} failed: {errno}")]
    Other {
        /// What was tried.
        what: &'static str,
        /// What the machine answered.
        errno: Errno,
    },
}

/// The host's page tables.
///
/// # Invariants
///
/// `arena` and `staging` are registered with `uffd` and `staging_uffd`, which belong to the process that `made_here` marks;
/// `zeros` is never written.
#[derive(Debug)]
pub struct HostMmu {
    pub(crate) uffd: Uffd,
    pub(crate) staging_uffd: Uffd,
    kick: OurFd,
    pub(crate) forks: Arc<Forks>,
    children: Children,
    pub(crate) made_here: Arc<ForkMark>,
    pub(crate) arena: Area,
    staging: Area,
    zeros: Area,
    pub(crate) restricted: Mutex<Restricted>,
    pub(crate) buffers: Buffers,
}

/// What a fork's child has of the managed memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Children {
    /// All of it, as children should, while somebody serves faults.
    Served,
    /// Nothing, and an access there is a SIGSEGV, unless the fork is announced: see [`HostMmu::let_children_inherit`]. This
    /// process may not be told of its forks (that takes `CAP_SYS_PTRACE`), and a child that reads zeros instead of its
    /// bytes would be worse.
    Announced,
}

/// What the child of a fork finds in a part of the arena.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Inherit {
    /// The pages of its parent.
    Pages,
    /// No memory at all.
    Nothing,
}

impl HostMmu {
    /// Reserves `bytes` bytes of managed addresses and `slots` staging slots. The children of forks have none of the addresses until
    /// [`let_children_inherit`](Self::let_children_inherit) says so.
    ///
    /// # Errors
    ///
    /// See [`HostError`]; each says what to do.
    pub fn new(bytes: usize, slots: u32) -> Result<Self, HostError> {
        let (uffd, children) = open_arena()?;
        let staging_uffd = open(FEATURE_SIGBUS | FEATURE_MOVE)?;
        let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let kick = OurFd::new(kick.map_err(|errno| other("eventfd", errno))?);
        let read_write = ProtFlags::READ | ProtFlags::WRITE;
        // Until somebody serves faults nobody would hear of forks either.
        let arena = reserve(bytes, read_write, OnFork::Leave)?;
        // A child has no use for slots; and pages that it does not share are never refused on their way back.
        let staging = reserve(slots as usize * PAGE_SIZE, read_write, OnFork::Wipe)?;
        let made_here = ForkMark::new().map_err(|errno| other("marking a page", errno))?;
        let made_here = Arc::new(made_here);
        let zeros = reserve(ZEROS * PAGE_SIZE, ProtFlags::READ, OnFork::Inherit)?;
        let restricted =
            Restricted::new(&staging_uffd).map_err(|errno| other("reserving memory", errno))?;
        let buffers = Buffers::new().map_err(|errno| other("reserving memory", errno))?;
        let registered = uffd.register(arena.address(), arena.len());
        registered.map_err(|errno| other("registering the arena with userfaultfd", errno))?;
        let registered = staging_uffd.register_missing(staging.address(), staging.len());
        registered.map_err(|errno| other("registering the staging area", errno))?;
        // INVARIANT: both areas were just registered.
        Ok(Self {
            uffd,
            staging_uffd,
            kick,
            forks: Forks::new(arena.address()..arena.address() + arena.len()),
            children,
            made_here,
            arena,
            staging,
            zeros,
            restricted: Mutex::new(restricted),
            buffers,
        })
    }

    /// What the children of forks have of the arena.
    #[must_use]
    pub const fn children(&self) -> Children {
        self.children
    }

    /// Lets the children of forks inherit a part of the arena, or not. Where forks are [announced](Children::Announced), they may
    /// while all pages are there; where they are [served](Children::Served), while somebody reads of them, as each fork waits for that.
    ///
    /// # Errors
    ///
    /// What the machine answers if it has no room for another mapping.
    ///
    /// # Panics
    ///
    /// If the range is not in the arena.
    pub fn let_children_inherit(&self, range: Range<usize>, inherit: Inherit) -> Result<(), Errno> {
        self.check(VirtAddr::new(range.start), range.len() / PAGE_SIZE);
        let advice = match inherit {
            Inherit::Pages => Advice::LinuxDoFork,
            Inherit::Nothing => Advice::LinuxDontFork,
        };
        // Pages that are on a detour would come back with the old advice.
        let _restricted = self.restricted.lock();
        // SAFETY: the advice changes no contents.
        unsafe { madvise(range.start as *mut _, range.len(), advice) }
    }

    /// The managed addresses, in bytes.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.arena.address()..self.arena.address() + self.arena.len()
    }

    /// Makes [`next_events`](Self::next_events) return.
    pub fn kick(&self) {
        // It fails only if the counter is full, and then there is something to read.
        let _ = rustix::io::write(&self.kick, &1u64.to_ne_bytes());
    }

    /// Waits for events, at most `patience_ms` milliseconds if that is given, and answers how many there are. Called by one
    /// thread, the one that serves faults.
    ///
    /// # Panics
    ///
    /// If `out` is empty.
    pub fn next_events(&self, out: &mut [Event], patience_ms: Option<u32>) -> usize {
        assert!(!out.is_empty(), "there must be room for an event");
        let patience = patience_ms.map(|ms| Timespec {
            tv_sec: i64::from(ms / 1000),
            tv_nsec: i64::from(ms % 1000) * 1_000_000,
        });
        let mut readable = false;
        loop {
            // Looking before waiting is quicker: after a wake-up the next fault is often there already.
            let count = self.forks.next(&self.uffd, out);
            if count > 0 {
                return count;
            }
            if readable {
                // A fork that this process has no descriptor left for: it waits, and others must not wait with it.
                std::thread::sleep(UNREADABLE);
            }
            let mut fds = [
                PollFd::new(&self.uffd, PollFlags::IN),
                PollFd::new(&self.kick, PollFlags::IN),
            ];
            match poll(&mut fds, patience.as_ref()) {
                Ok(0) => return 0,
                Ok(_) if !fds[1].revents().is_empty() => {
                    let _ = rustix::io::read(&self.kick, &mut [0; 8]);
                    out[0] = Event::Kick;
                    return self.forks.next(&self.uffd, out).max(1);
                }
                // A message, or a signal that got through: look again.
                Ok(_) | Err(_) => readable = !fds[0].revents().is_empty(),
            }
        }
    }

    /// Waits until the children of all forks so far have all their pages.
    ///
    /// Whoever is about to discard bytes that are outside the address space calls this first, without a lock: a child
    /// may still be owed them. Never called by the thread that serves faults, which would wait for itself. In a child
    /// it has nothing to wait for.
    pub fn settle_forks(&self) {
        while !self.is_settled() {
            std::thread::sleep(SETTLING);
        }
    }

    fn is_settled(&self) -> bool {
        // A signal handler that touches a missing page would wait for the thread that waits for our lock.
        let _blocked = SignalsBlocked::new();
        self.is_foreign() || self.forks.hold().is_settled()
    }

    /// Waits until every fork that has begun has been told of, and its child has all its pages: those of forks that begin meanwhile
    /// may [inherit nothing](Self::let_children_inherit). Not for the thread that serves faults.
    pub fn finish_forks(&self) {
        let (at, zeros) = (self.arena.address(), self.zeros.as_ptr());
        // While the message of a fork is unread the kernel refuses to copy, before it looks how much is to be copied.
        // SAFETY: none of the zeros is read, and nothing is written.
        let copy_nothing = || unsafe { self.uffd.copy(at, zeros, 0, Protect::ReadWrite) };
        while !self.is_foreign() && copy_nothing().error == Some(Errno::AGAIN) {
            self.drain();
        }
        self.settle_forks();
    }

    /// Whether this process has forked since the memory is there, as far as anybody has read of it.
    #[must_use]
    pub fn has_forked(&self) -> bool {
        self.forks.next_id() > 0
    }

    /// Whether this is a fork's child, where the descriptors still mean the parent's memory.
    #[must_use]
    pub fn is_foreign(&self) -> bool {
        self.made_here.is_forked()
    }

    /// Reads the messages that keep the kernel from copying and moving, and forks from ending, and leaves them to the thread that
    /// serves faults. Takes no lock but that of the messages, and allocates nothing.
    pub fn drain(&self) {
        match self.forks.drain(&self.uffd) {
            Drained::Some => self.kick(),
            // Somebody else has read them, or the forking thread has not come to send them.
            Drained::Nothing => std::thread::yield_now(),
        }
    }

    /// Repeats an operation that brings in the `len` bytes at `source`, giving them to waiting children first.
    ///
    /// # Safety
    ///
    /// `source` is valid for reads of `len` bytes until the operation has been done.
    pub(crate) unsafe fn bring(
        &self,
        at: VirtAddr,
        source: *const u8,
        len: usize,
        mut operation: impl FnMut(usize, usize) -> Done,
    ) -> Progress {
        self.repeat(len, |offset, len| {
            let held = self.forks.hold();
            let source = source.wrapping_add(offset);
            // SAFETY: these are the last `len` of the bytes that the caller vouches for.
            match unsafe { held.give(at.get() + offset, source, len) } {
                Ok(()) => operation(offset, len),
                Err(errno) => Done {
                    bytes: 0,
                    error: Some(errno),
                },
            }
        })
    }

    /// Repeats an operation over `len` bytes until it is done or stops for good. A child may not touch its parent's pages.
    pub(crate) fn repeat(
        &self,
        len: usize,
        mut operation: impl FnMut(usize, usize) -> Done,
    ) -> Progress {
        if self.is_foreign() {
            return Progress {
                done: 0,
                stop: Some(Stop::Gone),
            };
        }
        let mut bytes = 0;
        while bytes < len {
            let done = operation(bytes, len - bytes);
            bytes += done.bytes;
            match done.error {
                None => {}
                Some(Errno::AGAIN) if done.bytes > 0 => {}
                Some(Errno::AGAIN) => self.drain(),
                Some(errno) => {
                    return Progress {
                        done: bytes / PAGE_SIZE,
                        stop: Some(stop(errno)),
                    };
                }
            }
        }
        Progress::complete(len / PAGE_SIZE)
    }

    /// Moves pages that may be read and written from the arena to staging.
    pub(crate) fn move_out(&self, at: usize, len: usize, target: usize) -> Progress {
        self.repeat(len, |offset, len| {
            self.staging_uffd
                .move_pages(target + offset, at + offset, len)
        })
    }

    fn slot_address(&self, slot: Slot) -> usize {
        let offset = slot.0 as usize * PAGE_SIZE;
        assert!(
            offset < self.staging.len(),
            "{slot:?} is outside the staging area"
        );
        self.staging.address() + offset
    }

    pub(crate) fn check(&self, at: VirtAddr, count: usize) {
        let range = self.range();
        let end = at.get().saturating_add(count * PAGE_SIZE);
        assert!(
            at.get() >= range.start && end <= range.end,
            "{at:?} is outside the arena"
        );
    }
}

// SAFETY: `take_out` moves whole pages, so a slot holds the bytes of the moved page, and the staging area's
// addresses are known to nobody outside.
unsafe impl Mmu for HostMmu {
    fn install(&self, at: VirtAddr, pages: &[Page], protect: Protect) -> Progress {
        self.check(at, pages.len());
        let (source, len) = (pages.as_ptr().cast::<u8>(), size_of_val(pages));
        let copy = |offset: usize, len| {
            let source = source.wrapping_add(offset);
            // SAFETY: `source` and `len` are the rest of `pages`.
            unsafe { self.uffd.copy(at.get() + offset, source, len, protect) }
        };
        // SAFETY: these are the bytes of `pages`.
        unsafe { self.bring(at, source, len, copy) }
    }

    fn install_zero(&self, at: VirtAddr, count: usize) -> Progress {
        self.check(at, count);
        // Copying zeros that stay in the cache is quicker than mapping the zero page and copying on the first write. What
        // was never there before is zero in a fork's child anyway.
        self.repeat(count * PAGE_SIZE, |offset, len| {
            let (at, len) = (at.get() + offset, len.min(self.zeros.len()));
            let zeros = self.zeros.as_ptr();
            // SAFETY: by the type invariant `zeros` is as long, and never written.
            unsafe { self.uffd.copy(at, zeros, len, Protect::ReadWrite) }
        })
    }

    fn take_out(&self, at: VirtAddr, count: usize, to: Slot) -> Progress {
        self.check(at, count);
        let target = self.slot_address(to);
        let progress = self.move_out(at.get(), count * PAGE_SIZE, target);
        match progress.stop {
            // The machine refuses a run as a whole that has a page which may not be written.
            Some(Stop::Unevictable) if progress.done == 0 => {
                self.take_out_restricted(at, count, target)
            }
            _ => progress,
        }
    }

    fn give_back(&self, from: Slot, count: usize, at: VirtAddr) -> Progress {
        self.check(at, count);
        let source = self.slot_address(from);
        let bring = |offset, len| {
            self.uffd
                .move_pages(at.get() + offset, source + offset, len)
        };
        // SAFETY: by `Mmu`'s contract the slots are filled, and nobody else touches them meanwhile.
        unsafe { self.bring(at, source as *const u8, count * PAGE_SIZE, bring) }
    }

    unsafe fn staged(&self, slot: Slot) -> &Page {
        let page = self.slot_address(slot) as *const Page;
        // SAFETY: by this function's contract the slot holds a page that stays there while the reference lives, and
        // nobody writes it; slots are aligned to pages.
        unsafe { &*page }
    }

    fn empty(&self, from: Slot, count: usize) {
        let offset = self.slot_address(from) - self.staging.address();
        // SAFETY: mm owns the slots and is done with their bytes.
        unsafe { self.staging.drop_pages(offset, count) };
    }

    fn unprotect(&self, at: VirtAddr, count: usize) {
        self.check(at, count);
        let len = count * PAGE_SIZE;
        while !self.is_foreign() && self.uffd.unprotect(at.get(), len) == Err(Errno::AGAIN) {
            self.drain();
        }
    }

    fn wake(&self, at: VirtAddr, count: usize) {
        self.check(at, count);
        // It cannot fail for a range of the arena.
        let _ = self.uffd.wake(at.get(), count * PAGE_SIZE);
    }

    fn poison(&self, at: VirtAddr, count: usize) -> Progress {
        self.check(at, count);
        self.repeat(count * PAGE_SIZE, |offset, len| {
            self.uffd.poison(at.get() + offset, len)
        })
    }

    fn zap(&self, at: VirtAddr, count: usize) {
        self.check(at, count);
        // SAFETY: mm has emptied the entries of these pages, or this is a child whose owner of the range has dropped it: nobody wants
        // their bytes.
        unsafe {
            self.arena
                .drop_pages(at.get() - self.arena.address(), count);
        };
    }

    fn is_inherited(&self) -> bool {
        self.is_foreign()
    }

    fn unshare(&self, at: VirtAddr) -> bool {
        self.check(at, 1);
        // SAFETY: touching a page of the arena for writing changes none of its bytes.
        unsafe { madvise(at.get() as *mut _, PAGE_SIZE, Advice::LinuxPopulateWrite) }.is_ok()
    }
}

fn open_arena() -> Result<(Uffd, Children), HostError> {
    match open(NEEDED | FEATURE_EVENT_FORK) {
        // The kernel tells a process of its forks only if it may trace others.
        Err(HostError::Forbidden(_)) => Ok((open(NEEDED)?, Children::Announced)),
        served => Ok((served?, Children::Served)),
    }
}

fn open(features: u64) -> Result<Uffd, HostError> {
    let uffd = Uffd::open().map_err(HostError::Forbidden)?;
    match uffd.handshake(features) {
        Ok(_) => Ok(uffd),
        Err(Errno::PERM) => Err(HostError::Forbidden(Errno::PERM)),
        Err(_) => Err(HostError::TooOld),
    }
}

fn reserve(bytes: usize, protection: ProtFlags, fork: OnFork) -> Result<Area, HostError> {
    Area::reserve(bytes, protection, fork).map_err(|errno| HostError::Addresses { bytes, errno })
}

fn other(what: &'static str, errno: Errno) -> HostError {
    HostError::Other { what, errno }
}

/// What an errno of a page operation means.
pub(crate) const fn stop(errno: Errno) -> Stop {
    match errno {
        Errno::BUSY => Stop::Busy,
        Errno::INVAL => Stop::Unevictable,
        Errno::NOENT => Stop::Hole,
        Errno::EXIST => Stop::Exists,
        Errno::NOMEM => Stop::NoMemory,
        Errno::SRCH => Stop::Gone,
        errno => Stop::Other(errno.raw_os_error()),
    }
}
