//! The host's page tables for one address space: anonymous memory under userfaultfd.
//!
//! Two areas, each with a userfaultfd of its own: the *arena*, which the program uses, and the *staging area*, which nobody
//! but `mm` knows. `UFFDIO_MOVE` takes pages from one to the other without a copy, and refuses those that
//! somebody has pinned (GUP-3). A stray access to an empty staging slot gets SIGBUS instead of waiting for ever.
//!
//! While a fork waits for its event to be read, the kernel answers EAGAIN to copies and moves. Whoever gets that answer
//! reads the messages into a queue himself, so that nobody who holds a lock waits for a thread that wants it.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::ptr::{self, NonNull};

use pgmap_core::addr::{PAGE_SIZE, Page, VirtAddr};
use pgmap_mm::mmu::{Mmu, Progress, Protect, Slot, Stop};
use pgmap_sync::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::event::Event;
use crate::uffd::{
    Done, FEATURE_EVENT_FORK, FEATURE_MOVE, FEATURE_POISON, FEATURE_SIGBUS, FEATURE_THREAD_ID,
    FEATURE_WP, OpenError, RawMessage, Uffd,
};

/// Features without which the pager does not work.
pub(crate) const NEEDED: u64 =
    FEATURE_WP | FEATURE_EVENT_FORK | FEATURE_THREAD_ID | FEATURE_POISON | FEATURE_MOVE;
/// Pages of zeros that one call can install.
const ZEROS: usize = 64;
/// Messages that wait in the queue at most: more than threads can fault at once while one call is retried.
const QUEUE: usize = 4096;
/// Messages read at once.
const BATCH: usize = 16;
/// Our descriptors are moved out of the program's way, above this number.
const LOWEST_FD: RawFd = 700;

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

/// Addresses of anonymous memory.
#[derive(Debug)]
struct Area {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: an area is a range of addresses; what is done to the memory behind them is up to who uses it.
unsafe impl Send for Area {}
// SAFETY: as above.
unsafe impl Sync for Area {}

impl Area {
    fn reserve(len: usize, protection: ProtFlags) -> Result<Self, HostError> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), len, protection, flags) };
        let start = start.map_err(|errno| HostError::Addresses { bytes: len, errno })?;
        let start = NonNull::new(start.cast()).ok_or(HostError::Addresses {
            bytes: len,
            errno: Errno::NOMEM,
        })?;
        let area = Self { start, len };
        // A page at a time is all that the pager deals with. Kernels without huge pages refuse, and need nothing.
        // SAFETY: advice about huge pages changes no contents.
        let _ = unsafe { madvise(start.as_ptr().cast(), len, Advice::LinuxNoHugepage) };
        Ok(area)
    }

    fn address(&self) -> usize {
        self.start.as_ptr() as usize
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the area is ours, and its owner is going away.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// The host's page tables.
///
/// # Invariants
///
/// `arena` and `staging` are registered with `uffd` and `staging_uffd`; `zeros` is never written.
#[derive(Debug)]
pub struct HostMmu {
    uffd: Uffd,
    staging_uffd: Uffd,
    kick: OwnedFd,
    queue: Mutex<Vec<RawMessage>>,
    arena: Area,
    staging: Area,
    zeros: Area,
}

impl HostMmu {
    /// Reserves `bytes` bytes of managed addresses and `slots` staging slots.
    ///
    /// # Errors
    ///
    /// See [`HostError`]; each says what to do.
    pub fn new(bytes: usize, slots: u32) -> Result<Self, HostError> {
        let uffd = open(NEEDED)?;
        let staging_uffd = open(FEATURE_SIGBUS | FEATURE_MOVE)?;
        let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let kick = out_of_the_way(kick.map_err(|errno| other("eventfd", errno))?);
        let read_write = ProtFlags::READ | ProtFlags::WRITE;
        let arena = Area::reserve(bytes, read_write)?;
        let staging = Area::reserve(slots as usize * PAGE_SIZE, read_write)?;
        let zeros = Area::reserve(ZEROS * PAGE_SIZE, ProtFlags::READ)?;
        let registered = uffd.register(arena.address(), arena.len);
        registered.map_err(|errno| other("registering the arena with userfaultfd", errno))?;
        let registered = staging_uffd.register_missing(staging.address(), staging.len);
        registered.map_err(|errno| other("registering the staging area", errno))?;
        let queue = Mutex::new(Vec::with_capacity(QUEUE));
        // INVARIANT: both areas were just registered.
        Ok(Self {
            uffd,
            staging_uffd,
            kick,
            queue,
            arena,
            staging,
            zeros,
        })
    }

    /// The managed addresses, in bytes.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.arena.address()..self.arena.address() + self.arena.len
    }

    /// The descriptors that the program must not close.
    #[must_use]
    pub fn descriptors(&self) -> [RawFd; 3] {
        [
            self.uffd.as_fd().as_raw_fd(),
            self.staging_uffd.as_fd().as_raw_fd(),
            self.kick.as_raw_fd(),
        ]
    }

    /// Makes [`next_events`](Self::next_events) return.
    pub fn kick(&self) {
        // It fails only if the counter is full, and then there is something to read.
        let _ = rustix::io::write(&self.kick, &1u64.to_ne_bytes());
    }

    /// Waits for events, at most `patience_ms` milliseconds if that is given, and answers how many there are. Called by one
    /// thread, the one that serves faults.
    pub fn next_events(&self, out: &mut [Event], patience_ms: Option<u32>) -> usize {
        loop {
            let queued = self.take_queued(out);
            if queued > 0 {
                return queued;
            }
            let mut messages = [RawMessage::default(); BATCH];
            let most = out.len().min(BATCH);
            if let Ok(count) = self.uffd.read(&mut messages[..most])
                && count > 0
            {
                return parse(&messages[..count], out);
            }
            let mut fds = [
                PollFd::new(&self.uffd, PollFlags::IN),
                PollFd::new(&self.kick, PollFlags::IN),
            ];
            let patience = patience_ms.map(|ms| Timespec {
                tv_sec: i64::from(ms / 1000),
                tv_nsec: i64::from(ms % 1000) * 1_000_000,
            });
            match poll(&mut fds, patience.as_ref()) {
                Ok(0) => return 0,
                Ok(_) if !fds[1].revents().is_empty() => {
                    let _ = rustix::io::read(&self.kick, &mut [0; 8]);
                    if let Some(first) = out.first_mut() {
                        *first = Event::Kick;
                    }
                    return self.take_queued(out).max(1);
                }
                // A message, or a signal that got through: look again.
                Ok(_) | Err(_) => {}
            }
        }
    }

    fn take_queued(&self, out: &mut [Event]) -> usize {
        let mut queue = self.queue.lock();
        let take = queue.len().min(out.len());
        let count = parse(&queue[..take], out);
        queue.drain(..take);
        count
    }

    /// Reads the messages that keep the kernel from copying and moving, on whatever thread this is.
    fn drain(&self) {
        let mut queue = self.queue.lock();
        let mut messages = [RawMessage::default(); BATCH];
        let room = (QUEUE - queue.len()).min(BATCH);
        match self.uffd.read(&mut messages[..room]) {
            Ok(count) if count > 0 => {
                queue.extend_from_slice(&messages[..count]);
                drop(queue);
                self.kick();
            }
            // Somebody else has read them and the forking thread has not run on yet.
            Ok(_) | Err(_) => {
                drop(queue);
                std::thread::yield_now();
            }
        }
    }

    /// Repeats an operation over `len` bytes until it is done or stops for good.
    fn repeat(&self, len: usize, mut operation: impl FnMut(usize, usize) -> Done) -> Progress {
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

    fn slot_address(&self, slot: Slot) -> usize {
        let offset = slot.0 as usize * PAGE_SIZE;
        assert!(
            offset < self.staging.len,
            "{slot:?} is outside the staging area"
        );
        self.staging.address() + offset
    }

    fn check(&self, at: VirtAddr, count: usize) {
        let range = self.range();
        let end = at.get().saturating_add(count * PAGE_SIZE);
        assert!(
            at.get() >= range.start && end <= range.end,
            "{at:?} is outside the arena"
        );
    }

    /// Drops pages, whatever they hold.
    ///
    /// # Safety
    ///
    /// The range is in the arena or in the staging area, and its owner wants the bytes gone.
    unsafe fn drop_pages(start: usize, count: usize) {
        let len = count * PAGE_SIZE;
        loop {
            // SAFETY: by this function's contract.
            match unsafe { madvise(start as *mut _, len, Advice::LinuxDontNeed) } {
                Err(Errno::AGAIN | Errno::INTR) => std::thread::yield_now(),
                // It fails for locked memory only, whose pages stay: mm sees them as what they are.
                Ok(()) | Err(_) => return,
            }
        }
    }
}

// SAFETY: `take_out` moves whole pages, so a slot holds the bytes of the moved page, and the staging area's
// addresses are known to nobody outside.
unsafe impl Mmu for HostMmu {
    fn install(&self, at: VirtAddr, pages: &[Page], protect: Protect) -> Progress {
        self.check(at, pages.len());
        let source = pages.as_ptr().cast::<u8>();
        self.repeat(size_of_val(pages), |offset, len| {
            let source = source.wrapping_add(offset);
            // SAFETY: `source` and `len` are the rest of `pages`.
            unsafe {
                self.uffd
                    .copy(at.get() + offset, source, len, protect == Protect::ReadOnly)
            }
        })
    }

    fn install_zero(&self, at: VirtAddr, count: usize) -> Progress {
        self.check(at, count);
        // Copying zeros that stay in the cache is quicker than mapping the zero page and copying on the first write.
        let source = self.zeros.start.as_ptr().cast_const();
        self.repeat(count * PAGE_SIZE, |offset, len| {
            let len = len.min(self.zeros.len);
            // SAFETY: by the type invariant `zeros` is as long, and never written.
            unsafe { self.uffd.copy(at.get() + offset, source, len, false) }
        })
    }

    fn take_out(&self, at: VirtAddr, count: usize, to: Slot) -> Progress {
        self.check(at, count);
        let target = self.slot_address(to);
        self.repeat(count * PAGE_SIZE, |offset, len| {
            self.staging_uffd
                .move_pages(target + offset, at.get() + offset, len)
        })
    }

    fn give_back(&self, from: Slot, count: usize, at: VirtAddr) -> Progress {
        self.check(at, count);
        let source = self.slot_address(from);
        self.repeat(count * PAGE_SIZE, |offset, len| {
            self.uffd
                .move_pages(at.get() + offset, source + offset, len)
        })
    }

    unsafe fn staged(&self, slot: Slot) -> &Page {
        let page = self.slot_address(slot) as *const Page;
        // SAFETY: by this function's contract the slot holds a page that stays there while the reference lives, and
        // nobody writes it; slots are aligned to pages.
        unsafe { &*page }
    }

    fn empty(&self, from: Slot, count: usize) {
        let start = self.slot_address(from);
        // SAFETY: mm owns the slots and is done with their bytes.
        unsafe { Self::drop_pages(start, count) };
    }

    fn unprotect(&self, at: VirtAddr, count: usize) {
        self.check(at, count);
        while self.uffd.unprotect(at.get(), count * PAGE_SIZE) == Err(Errno::AGAIN) {
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
        // SAFETY: mm has emptied the entries of these pages: nobody wants their bytes.
        unsafe { Self::drop_pages(at.get(), count) };
    }

    fn unshare(&self, at: VirtAddr) -> bool {
        self.check(at, 1);
        // SAFETY: touching a page of the arena for writing changes none of its bytes.
        unsafe { madvise(at.get() as *mut _, PAGE_SIZE, Advice::LinuxPopulateWrite) }.is_ok()
    }
}

fn parse(messages: &[RawMessage], out: &mut [Event]) -> usize {
    let mut count = 0;
    for event in messages.iter().filter_map(Event::from_raw) {
        if let Some(place) = out.get_mut(count) {
            *place = event;
            count += 1;
        }
    }
    count
}

fn open(features: u64) -> Result<Uffd, HostError> {
    let uffd = Uffd::open(features).map_err(|error| match error {
        OpenError::Open(errno) => HostError::Forbidden(errno),
        OpenError::Features { .. } => HostError::TooOld,
    })?;
    Ok(uffd.map_fd(out_of_the_way))
}

fn other(what: &'static str, errno: Errno) -> HostError {
    HostError::Other { what, errno }
}

/// Gives a descriptor a high number, so that programs that count on low ones find them.
#[must_use]
pub fn out_of_the_way(fd: OwnedFd) -> OwnedFd {
    // Where the limit is lower the descriptor stays as it is.
    rustix::io::fcntl_dupfd_cloexec(&fd, LOWEST_FD).unwrap_or(fd)
}

const fn stop(errno: Errno) -> Stop {
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
