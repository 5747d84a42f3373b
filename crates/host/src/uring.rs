//! Pages to and from a file, many at once: `io_uring`, or one system call a page where that is forbidden.
//!
//! File drivers use this. What must never happen here: a return while the kernel may still write to a page, or still
//! read one; and a ring that a fork's child and its parent both use.

use core::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, RawFd};

use io_uring::{IoUring, opcode, squeue, types};
use pgmap_core::addr::{PAGE_SIZE, Page};
use rustix::io::Errno;

use crate::area::ForkMark;
use crate::fds::{Mark, out_of_the_way};

/// One page to be read.
#[derive(Debug)]
pub struct Read<'a> {
    /// Where in the file, in bytes.
    pub offset_bytes: u64,
    /// Where the bytes go; they mean nothing unless `outcome` is `Ok`.
    pub page: &'a mut Page,
    /// What became of it. `ENODATA`: the file ends before the page does.
    pub outcome: Result<(), Errno>,
}

/// One page to be written.
#[derive(Debug)]
pub struct Write<'a> {
    /// Where in the file, in bytes.
    pub offset_bytes: u64,
    /// The bytes, which nobody changes meanwhile.
    pub page: &'a Page,
    /// What became of it.
    pub outcome: Result<(), Errno>,
}

/// A queue of requests to the kernel, for one thread at a time.
pub struct Ring {
    ring: Option<MarkedRing>,
    made_here: Option<ForkMark>,
}

/// A queue that the program cannot close.
pub(crate) struct MarkedRing {
    // Dropped first: fields are dropped in this order.
    _mark: Mark,
    pub(crate) ring: IoUring,
}

impl MarkedRing {
    pub(crate) fn new(depth: u32) -> io::Result<Self> {
        let low = IoUring::new(depth)?;
        // SAFETY: the descriptor is open for as long as `low` is.
        let fd = unsafe { BorrowedFd::borrow_raw(low.as_raw_fd()) };
        let high = out_of_the_way(fd.try_clone_to_owned()?);
        let mark = Mark::new(&high);
        // SAFETY: the descriptor is a copy of `low`'s, whose parameters these are, and nobody else's.
        let ring = unsafe { IoUring::from_fd(high.into_raw_fd(), low.params().clone()) }?;
        Ok(Self { _mark: mark, ring })
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("io_uring", &self.ring.is_some())
            .finish_non_exhaustive()
    }
}

/// A request that knows how to be queued, and how to be done without a queue.
trait Request {
    fn entry(&mut self, fd: RawFd) -> squeue::Entry;
    /// Does the bytes of the page from `done` on. Answers how many; 0 at the end of the file.
    fn transfer(&mut self, fd: BorrowedFd<'_>, done: usize) -> Result<usize, Errno>;
    fn outcome(&mut self) -> &mut Result<(), Errno>;
}

/// The page's length, as requests have it.
const LEN: u32 = 4096;

impl Request for Read<'_> {
    fn entry(&mut self, fd: RawFd) -> squeue::Entry {
        opcode::Read::new(types::Fd(fd), self.page.0.as_mut_ptr(), LEN)
            .offset(self.offset_bytes)
            .build()
    }

    fn transfer(&mut self, fd: BorrowedFd<'_>, done: usize) -> Result<usize, Errno> {
        let rest = &mut self.page.0[done..];
        rustix::io::pread(fd, rest, self.offset_bytes + done as u64)
    }

    fn outcome(&mut self) -> &mut Result<(), Errno> {
        &mut self.outcome
    }
}

impl Request for Write<'_> {
    fn entry(&mut self, fd: RawFd) -> squeue::Entry {
        opcode::Write::new(types::Fd(fd), self.page.0.as_ptr(), LEN)
            .offset(self.offset_bytes)
            .build()
    }

    fn transfer(&mut self, fd: BorrowedFd<'_>, done: usize) -> Result<usize, Errno> {
        let rest = &self.page.0[done..];
        rustix::io::pwrite(fd, rest, self.offset_bytes + done as u64)
    }

    fn outcome(&mut self) -> &mut Result<(), Errno> {
        &mut self.outcome
    }
}

impl Ring {
    /// A ring that keeps up to `depth` requests in flight. If that is 0, or the machine forbids `io_uring`, everything works a
    /// page at a time.
    #[must_use]
    pub fn new(depth: u32) -> Self {
        let made_here = ForkMark::new().ok();
        let ring = made_here.as_ref().and_then(|_| MarkedRing::new(depth).ok());
        Self { ring, made_here }
    }

    /// Whether requests are queued, or done one by one.
    #[must_use]
    pub const fn is_queued(&self) -> bool {
        self.ring.is_some()
    }

    /// Reads pages and fills in the outcome of each. Allocates nothing.
    pub fn read_batch(&mut self, fd: impl AsFd, batch: &mut [Read<'_>]) {
        self.run(fd.as_fd(), batch);
    }

    /// Writes pages and fills in the outcome of each. Allocates nothing.
    pub fn write_batch(&mut self, fd: impl AsFd, batch: &mut [Write<'_>]) {
        self.run(fd.as_fd(), batch);
    }

    fn run<R: Request>(&mut self, fd: BorrowedFd<'_>, batch: &mut [R]) {
        if self.made_here.as_ref().is_some_and(ForkMark::is_forked) {
            // This is the child: the queue is the parent's.
            self.ring = None;
        }
        for request in &mut *batch {
            *request.outcome() = Err(Errno::INPROGRESS);
        }
        if let Some(ring) = &mut self.ring {
            let entry = |request: &mut R| request.entry(fd.as_raw_fd());
            let end = |request: &mut R, result| {
                *request.outcome() = conclude(request, fd, result);
            };
            // SAFETY: each entry names the page of its request, which is borrowed for as long as the batch.
            let ran = unsafe { run_queued(&mut ring.ring, batch, &entry, &end) };
            if let Err(Broken) = ran {
                // What it never took is still in the queue, so nobody may enter it again.
                self.ring = None;
            }
        }
        for request in batch {
            if *request.outcome() == Err(Errno::INPROGRESS) {
                *request.outcome() = finish(request, fd, 0);
            }
        }
    }
}

/// The ring answers errors, and has nothing of ours any more.
pub(crate) struct Broken;

/// Queues every request as `entry` makes it, and waits for all that the kernel took: `end` is called with the answer to each.
///
/// # Safety
///
/// The memory that an entry names may be read and written by the kernel for as long as the batch is borrowed.
pub(crate) unsafe fn run_queued<R>(
    ring: &mut IoUring,
    batch: &mut [R],
    entry: &impl Fn(&mut R) -> squeue::Entry,
    end: &impl Fn(&mut R, i32),
) -> Result<(), Broken> {
    let (mut queued, mut completed) = (0, 0);
    while completed < batch.len() {
        // SAFETY: by this function's contract; and nobody returns before the kernel is done with what it took.
        queued = unsafe { fill(ring, batch, entry, queued, completed) };
        let entered = ring.submit_and_wait(1);
        completed += reap(ring, batch, end);
        match entered {
            Ok(_) => {}
            Err(error) if is_passing(&error) => std::thread::yield_now(),
            Err(_) => {
                drain(ring, batch, end, queued - completed);
                return Err(Broken);
            }
        }
    }
    Ok(())
}

/// Queues as many requests as there is room for. Answers how many have been queued in all.
///
/// # Safety
///
/// What the entries name may be used until their completions have been taken.
unsafe fn fill<R>(
    ring: &mut IoUring,
    batch: &mut [R],
    entry: &impl Fn(&mut R) -> squeue::Entry,
    mut queued: usize,
    completed: usize,
) -> usize {
    // One completion for each entry, so no more in flight than the completion queue holds.
    let depth = ring.params().cq_entries() as usize;
    let mut queue = ring.submission();
    while let Some(request) = batch.get_mut(queued)
        && queued - completed < depth
    {
        let entry = entry(request).user_data(queued as u64);
        // SAFETY: by this function's contract.
        if unsafe { queue.push(&entry) }.is_err() {
            break;
        }
        queued += 1;
    }
    queued
}

/// Takes completions. Answers how many.
fn reap<R>(ring: &mut IoUring, batch: &mut [R], end: &impl Fn(&mut R, i32)) -> usize {
    let mut count = 0;
    for completion in ring.completion() {
        count += 1;
        // The number is our own, but it has been in memory that the kernel shares.
        let index = usize::try_from(completion.user_data()).unwrap_or(usize::MAX);
        if let Some(request) = batch.get_mut(index) {
            end(request, completion.result());
        }
    }
    count
}

/// Waits for what the kernel took without entering it, as that fails. It does not return before.
fn drain<R>(ring: &mut IoUring, batch: &mut [R], end: &impl Fn(&mut R, i32), queued: usize) {
    let mut in_flight = queued - ring.submission().len();
    while in_flight > 0 {
        in_flight -= reap(ring, batch, end);
        std::thread::sleep(core::time::Duration::from_millis(1));
    }
}

/// Whether the same call will work later.
fn is_passing(error: &io::Error) -> bool {
    [Errno::INTR, Errno::AGAIN, Errno::BUSY]
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// What the answer to a queued request means; a short transfer is carried on with.
fn conclude<R: Request>(request: &mut R, fd: BorrowedFd<'_>, result: i32) -> Result<(), Errno> {
    match usize::try_from(result) {
        Ok(PAGE_SIZE) => Ok(()),
        Ok(done) => finish(request, fd, done),
        Err(_) => match Errno::from_raw_os_error(-result) {
            Errno::INTR | Errno::AGAIN => finish(request, fd, 0),
            errno => Err(errno),
        },
    }
}

/// Does what is left of a page, without the queue.
fn finish<R: Request>(request: &mut R, fd: BorrowedFd<'_>, mut done: usize) -> Result<(), Errno> {
    while done < PAGE_SIZE {
        match request.transfer(fd, done) {
            Ok(0) => return Err(Errno::NODATA),
            Ok(more) => done += more,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
