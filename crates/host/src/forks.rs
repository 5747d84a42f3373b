//! The messages of a userfaultfd, and the children of forks that have not got all their pages yet.
//!
//! A child is a snapshot: it must get the bytes that were outside the address space when the fork happened, even if
//! the parent brings them back, and changes them, before the thread that serves faults comes to give them to the
//! child. So whoever brings a page into the parent holds the read lock here, and gives the page to the waiting
//! children first; messages are read under the write lock, so that no child is unknown while pages come in. (Before
//! its message is read, the kernel itself keeps pages from coming in.)
//!
//! Called by the host's page tables alone. Under the lock there are system calls only: no other lock, no allocation; and
//! no signal handler runs there, as it may touch a page that the thread which serves faults then cannot come to bring.

use core::ops::Range;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use pgmap_core::addr::{PAGE_SIZE, VirtAddr};
use pgmap_mm::fault::Access;
use pgmap_mm::mmu::Protect;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::event::{ChildSpace, Event};
use crate::uffd::{Done, Message, RawMessage, Uffd};

/// Messages, and children, that wait at most. A program whose forks are more than that ahead of the pager waits in fork.
const ROOM: usize = 4096;
/// Parts of the arena whose registration is ended one by one, at most.
const UNREGISTERED: usize = 256;
/// Messages read at once.
const BATCH: usize = 16;

/// What a userfaultfd had to say, and who waits for pages.
#[derive(Debug)]
pub(crate) struct Forks {
    /// The memory that children get pages for, in bytes.
    arena: Range<usize>,
    state: RwLock<State>,
}

#[derive(Debug)]
struct State {
    queue: Vec<Queued>,
    children: Vec<Child>,
    next_id: u64,
}

#[derive(Debug)]
struct Child {
    id: u64,
    uffd: Uffd,
}

#[derive(Clone, Copy, Debug)]
enum Queued {
    Fault {
        at: VirtAddr,
        access: Access,
        tid: u32,
    },
    Fork {
        id: u64,
    },
}

/// Pages may come into the parent while this lives, after the waiting children got them.
#[derive(Debug)]
pub(crate) struct Held<'a> {
    state: RwLockReadGuard<'a, State>,
}

impl Forks {
    pub(crate) fn new(arena: Range<usize>) -> Arc<Self> {
        let state = State {
            queue: Vec::with_capacity(ROOM),
            children: Vec::with_capacity(ROOM),
            next_id: 0,
        };
        Arc::new(Self {
            arena,
            state: RwLock::new(state),
        })
    }

    /// The next events, from the queue or else from the kernel, without waiting.
    pub(crate) fn next(self: &Arc<Self>, uffd: &Uffd, out: &mut [Event]) -> usize {
        let mut state = self.write();
        if state.queue.is_empty() {
            state.read(uffd, out.len());
        }
        let count = state.queue.len().min(out.len());
        for (place, queued) in out.iter_mut().zip(state.queue.drain(..count)) {
            *place = match queued {
                Queued::Fault { at, access, tid } => Event::Fault { at, access, tid },
                Queued::Fork { id } => Event::Fork(ChildSpace::new(Arc::clone(self), id)),
            };
        }
        count
    }

    /// Reads the messages that keep the kernel from copying and moving, on whatever thread this is. Answers whether
    /// there were any.
    pub(crate) fn drain(&self, uffd: &Uffd) -> Drained {
        let mut state = self.write();
        let before = state.queue.len();
        state.read(uffd, BATCH);
        state.read_children();
        if state.queue.len() > before {
            Drained::Some
        } else {
            Drained::Nothing
        }
    }

    /// Lets pages come in.
    pub(crate) fn hold(&self) -> Held<'_> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        Held { state }
    }

    /// Does something to a child, again and again while it forks itself. `None` if its pages have all been given.
    pub(crate) fn in_child(&self, id: u64, operation: impl Fn(&Uffd) -> Done) -> Option<Done> {
        loop {
            let held = self.hold();
            let child = held.state.children.iter().find(|child| child.id == id)?;
            let done = operation(&child.uffd);
            if done.error != Some(Errno::AGAIN) {
                return Some(done);
            }
            drop(held);
            self.write().read_children();
            std::thread::yield_now();
        }
    }

    /// A child whose message is read from now on has this number, or a higher one.
    pub(crate) fn next_id(&self) -> u64 {
        self.hold().state.next_id
    }

    /// The child has all its pages.
    pub(crate) fn finish(&self, id: u64) {
        let mut state = self.write();
        let place = state.children.iter().position(|child| child.id == id);
        let child = place.map(|place| state.children.swap_remove(place));
        if let Some(child) = &child {
            // Closing is not enough: a child that was forked since has a copy of the descriptor.
            unregister(
                &child.uffd,
                self.arena.clone(),
                self.arena.len() / UNREGISTERED,
            );
            // A fork of the child that was under way may still wait to be told of.
            state.read_grandchildren(&child.uffd);
        }
        drop(state);
        // Closing it waits for the child's lock, and that is nobody else's business.
        drop(child);
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What draining found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Drained {
    /// Messages, which are in the queue now.
    Some,
    /// Nothing: somebody else was quicker.
    Nothing,
}

impl Held<'_> {
    /// Whether every child of a fork has its pages.
    pub(crate) fn is_settled(&self) -> bool {
        self.state.children.is_empty()
    }

    /// Gives the pages in `len` bytes from `source` to the children that wait, at `at`, where they lack them.
    ///
    /// # Errors
    ///
    /// `EAGAIN` if a child forks at this moment: [`Forks::drain`], and again.
    ///
    /// # Safety
    ///
    /// `source` is valid for reads of `len` bytes.
    pub(crate) unsafe fn give(
        &self,
        at: usize,
        source: *const u8,
        len: usize,
    ) -> Result<(), Errno> {
        // SAFETY: as the caller vouches.
        unsafe { self.give_since(0, at, source, len) }
    }

    /// As [`give`](Self::give), to children whose messages were read since [`Forks::next_id`] answered `first`.
    ///
    /// # Errors
    ///
    /// As for `give`.
    ///
    /// # Safety
    ///
    /// As for `give`.
    pub(crate) unsafe fn give_since(
        &self,
        first: u64,
        at: usize,
        source: *const u8,
        len: usize,
    ) -> Result<(), Errno> {
        for child in self.state.children.iter().filter(|child| child.id >= first) {
            // SAFETY: as the caller vouches.
            unsafe { child.give(at, source, len) }?;
        }
        Ok(())
    }
}

impl Child {
    /// # Safety
    ///
    /// As for [`Held::give`].
    unsafe fn give(&self, at: usize, source: *const u8, len: usize) -> Result<(), Errno> {
        for offset in (0..len).step_by(PAGE_SIZE) {
            let (at, page) = (at + offset, source.wrapping_add(offset));
            // SAFETY: the page is one of those that the caller vouches for.
            let done = unsafe { self.uffd.copy(at, page, PAGE_SIZE, Protect::ReadWrite) };
            if done.error == Some(Errno::AGAIN) {
                return Err(Errno::AGAIN);
            }
            // Otherwise it has the page now, or had one, or has ended.
        }
        Ok(())
    }
}

impl State {
    fn read(&mut self, uffd: &Uffd, most: usize) {
        let mut messages = [RawMessage::default(); BATCH];
        let room = self.room().min(most);
        let count = read_messages(uffd, &mut messages[..room]);
        for message in &messages[..count] {
            match message.parse() {
                Message::Fork { fd } => self.add_child(fd),
                Message::Fault { at, access, tid } => {
                    self.queue.push(Queued::Fault { at, access, tid });
                }
                Message::Other => {}
            }
        }
    }

    /// Looks for children of children. What a child waits for it gets anyway, so its faults are no news.
    fn read_children(&mut self) {
        let mut index = 0;
        while let Some(child) = self.children.get(index) {
            let mut messages = [RawMessage::default(); BATCH];
            let room = self.room();
            let count = read_messages(&child.uffd, &mut messages[..room]);
            self.add_grandchildren(&messages[..count]);
            index += 1;
        }
    }

    fn read_grandchildren(&mut self, child: &Uffd) {
        let mut messages = [RawMessage::default(); BATCH];
        let room = self.room();
        let count = read_messages(child, &mut messages[..room]);
        self.add_grandchildren(&messages[..count]);
    }

    fn add_grandchildren(&mut self, messages: &[RawMessage]) {
        for message in messages.iter().map(RawMessage::parse) {
            match message {
                Message::Fork { fd } => self.add_child(fd),
                Message::Fault { .. } | Message::Other => {}
            }
        }
    }

    fn room(&self) -> usize {
        let used = self.queue.len().max(self.children.len());
        ROOM.saturating_sub(used).min(BATCH)
    }

    fn add_child(&mut self, fd: RawFd) {
        // SAFETY: the kernel made this descriptor for the reader of its message, and every message is read once and
        // parsed once.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let uffd = Uffd::from_fd(fd);
        let id = self.next_id;
        self.next_id += 1;
        self.children.push(Child { id, uffd });
        self.queue.push(Queued::Fork { id });
    }
}

/// Ends a child's registration. The machine refuses a range with a file in it, which is halved then; what is left in the
/// end, `least` bytes around the file, ends when the last copy of the descriptor is closed.
fn unregister(child: &Uffd, range: Range<usize>, least: usize) {
    if child.unregister(range.start, range.len()) != Err(Errno::INVAL) || range.len() <= least {
        return;
    }
    let half = (range.len() / 2).next_multiple_of(PAGE_SIZE);
    unregister(child, range.start..range.start + half, least);
    unregister(child, range.start + half..range.end, least);
}

/// Reads waiting messages. Answers how many; an error means that there is nothing to read.
fn read_messages(uffd: &Uffd, messages: &mut [RawMessage]) -> usize {
    let read = match uffd.read(messages) {
        // The message of a fork comes with a descriptor, and the program has used up all that it may have.
        Err(Errno::MFILE) => with_more_descriptors(|| uffd.read(messages)),
        read => read,
    };
    read.unwrap_or(0)
}

/// Does something while this process may have more descriptors than the program was allowed. Those that are made
/// meanwhile have numbers that the program cannot have. Where the hard limit is reached and may not be raised, nothing
/// changes: the fork waits until the program closes a descriptor.
fn with_more_descriptors<T>(operation: impl FnOnce() -> T) -> T {
    let before = getrlimit(Resource::Nofile);
    let Some(current) = before.current else {
        return operation();
    };
    let more = current.saturating_add(ROOM as u64);
    let higher = Rlimit {
        current: Some(more),
        maximum: before.maximum.map(|maximum| maximum.max(more)),
    };
    if setrlimit(Resource::Nofile, higher).is_err() {
        // Without the right to raise the hard limit, up to that one.
        let allowed = Rlimit {
            current: before.maximum,
            maximum: before.maximum,
        };
        let _ = setrlimit(Resource::Nofile, allowed);
    }
    let result = operation();
    let _ = setrlimit(Resource::Nofile, before);
    result
}
