//! The pager's threads: one serves faults, one reclaims, and one listens.
//!
//! The fault thread follows the CPU of the thread that faults, because waking a thread on the same CPU is
//! several times quicker than on another. The reclaimer frees frames ahead of need, on whatever CPU is idle.
//! Neither ever touches managed memory, and both allocate seldom: a run's heap is its own, and in the library there is a third.
//!
//! Who forks waits until somebody has read of it, and holds the locks of the C library's allocator meanwhile. The fault thread reads
//! it, but it may be waiting for somebody who waits for the allocator, or run code of others that allocates, such as a file's
//! [`Backing`](crate::Backing). So in a program that allocates where we do the *listener* reads what the fault thread has not come
//! to read. What must never happen: that it allocates, or takes a lock but that of the messages.

use core::mem;
use core::ops::ControlFlow;
use core::time::Duration;
use std::process;
use std::sync::Arc;
use std::sync::OnceLock;
use std::thread::{self, JoinHandle, Thread};
use std::time::Instant;

use pgmap_core::addr::{PAGE_SIZE, Page, VirtAddr};
use pgmap_host::affinity::Placement;
use pgmap_host::event::{ChildSpace, Event};
use pgmap_host::mmu::{Children, HostMmu};
use pgmap_mm::fault::{Access, Outcome};
use pgmap_mm::fork::ChildPage;
use pgmap_mm::mmu::Stop;
use pgmap_mm::reclaim::Caller;
use pgmap_mm::space::{AddressSpace, Worker};
use pgmap_mm::stats::Stats;
use pgmap_sync::WaitQueue;
use pgmap_sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Who decides about a full machine: called with a sentence for people when nothing can be freed.
pub(crate) type OnFull = fn(&str) -> !;

/// Events read at once.
const EVENTS: usize = 32;
/// Frames that the reclaimer frees before it looks around.
const STORE: usize = 256;
/// How long the reclaimer waits when nothing can be freed.
const RETRY: Duration = Duration::from_millis(2);
/// Pages that one fault takes out at most, about.
const DEACTIVATE: usize = 64;
/// How long a fault may wait for memory before the machine counts as full.
const PATIENCE: Duration = Duration::from_secs(3);
/// When a fault that waits for memory says so.
const STARVING: Duration = Duration::from_secs(1);
/// How long the reclaimer stays awake after its last work, on two CPUs: longer than the program needs to use up what was
/// freed.
const LINGER: Duration = Duration::from_millis(5);
/// How often the reclaimer looks around when nobody calls it.
const TICK: Duration = Duration::from_millis(100);
/// How often the listener listens: a fork that meets a fault thread which waits for the allocator takes so much longer.
const LISTEN: Duration = Duration::from_millis(10);

/// Where the stacks of the pager's threads are: a byte near the top of each, 0 while it does not run.
///
/// For the preloaded library, which has one pager for the life of the process.
/// Told from the stack pointer because anything else (thread-local storage, a system call) is too dear for every
/// allocation, and too fragile on these threads.
static STACKS: [AtomicUsize; 2] = [const { AtomicUsize::new(0) }; 2];

/// Whether the calling thread is one of the pager's own.
pub(crate) fn is_pager_thread() -> bool {
    let here = stack_pointer();
    // Relaxed: a thread that asks about itself has stored its own address before.
    STACKS.iter().any(|top| {
        let top = top.load(Ordering::Relaxed);
        here <= top && top - here < pgmap_host::thread::STACK_BYTES
    })
}

/// Remembers that the calling thread is one of the pager's own.
fn enter_pager_thread(which: usize) {
    // The callers of the thread's first function are above this frame, within a page or so.
    // Relaxed: see `is_pager_thread`.
    STACKS[which].store(stack_pointer() + PAGE_SIZE, Ordering::Relaxed);
}

#[inline(never)]
fn stack_pointer() -> usize {
    let here = 0u8;
    &raw const here as usize
}

/// What the threads share.
#[derive(Debug)]
pub(crate) struct Pager {
    pub(crate) space: Arc<AddressSpace>,
    pub(crate) mmu: Arc<HostMmu>,
    reclaimer: OnceLock<Thread>,
    /// The reclaimer sleeps, or is about to.
    asleep: AtomicBool,
    stopping: AtomicBool,
    /// Threads that have begun.
    begun: AtomicUsize,
    beginning: WaitQueue,
    /// One more than the CPU on which faults are served; 0 while nobody cares.
    fault_cpu: AtomicUsize,
}

/// Where the pager's threads allocate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Allocator {
    /// Where the program does: who forks has its locks.
    Shared,
    /// Where nobody else does.
    Own,
}

/// What a pager is told about its surroundings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Surroundings {
    pub(crate) allocator: Allocator,
    pub(crate) out_of_memory: OnFull,
    /// Called by the fault thread when frames are short: more may be had by now.
    pub(crate) short_of_frames: fn(),
    /// Called by the fault thread when a fault has found no memory for [`STARVING`]: whether there may be some later, however
    /// long that takes.
    pub(crate) hold_out: fn() -> bool,
    /// Called by the reclaimer every [`TICK`].
    pub(crate) tick: fn(),
    /// Called by the reclaimer between its other work. Answers how soon it wants to be called again.
    pub(crate) follow: fn() -> Duration,
}

impl Pager {
    pub(crate) fn new(space: Arc<AddressSpace>, mmu: Arc<HostMmu>) -> Arc<Self> {
        let (asleep, stopping) = (AtomicBool::new(false), AtomicBool::new(false));
        Arc::new(Self {
            space,
            mmu,
            reclaimer: OnceLock::new(),
            asleep,
            stopping,
            begun: AtomicUsize::new(0),
            beginning: WaitQueue::new(),
            fault_cpu: AtomicUsize::new(0),
        })
    }

    /// Starts the threads. When this returns they are known as the pager's, and have allocated what a thread's start
    /// allocates.
    pub(crate) fn start(
        self: &Arc<Self>,
        surroundings: Surroundings,
    ) -> std::io::Result<Vec<JoinHandle<()>>> {
        let pager = Arc::clone(self);
        let reclaimer =
            pgmap_host::thread::spawn("pgmap-reclaim", move || pager.reclaim(surroundings))?;
        // INVARIANT: set once, here, before anybody may wake it.
        let _ = self.reclaimer.set(reclaimer.thread().clone());
        let pager = Arc::clone(self);
        let faults = pgmap_host::thread::spawn("pgmap-fault", move || pager.serve(surroundings))?;
        let mut threads = vec![reclaimer, faults];
        if surroundings.allocator == Allocator::Shared && self.mmu.children() == Children::Served {
            let pager = Arc::clone(self);
            let listener = pgmap_host::thread::spawn("pgmap-listen", move || pager.listen())?;
            threads.push(listener);
        }
        // Acquire: pairs with the release in `begin`.
        self.beginning
            .wait_until(None, || self.begun.load(Ordering::Acquire) == threads.len());
        Ok(threads)
    }

    /// Says that one of the pager's threads has allocated what it needs: forks may come.
    fn begin(&self) {
        // Release: pairs with the acquire in `start`.
        self.begun.fetch_add(1, Ordering::Release);
        self.beginning.wake_all();
    }

    /// Tells the threads to end.
    pub(crate) fn stop(&self) {
        // Release: pairs with the acquire loads in the threads' loops.
        self.stopping.store(true, Ordering::Release);
        self.mmu.kick();
        self.wake_reclaimer();
    }

    /// Makes the reclaimer look around.
    pub(crate) fn wake_reclaimer(&self) {
        if let Some(reclaimer) = self.reclaimer.get() {
            reclaimer.unpark();
        }
    }

    pub(crate) fn stopping(&self) -> bool {
        // Acquire: pairs with the release store in `stop`.
        self.stopping.load(Ordering::Acquire)
    }

    /// Frames that should be free before the next fault comes.
    fn low_water(&self) -> u64 {
        (self.space.ram().limit() / 32).clamp(32, 1024)
    }

    /// Keeps the reclaimer supplied: pages are taken out here, on the CPU on which the program runs, so that no other CPU has
    /// to be interrupted; storing them, which takes longer, is left to the reclaimer and whatever CPU is idle.
    fn keep_ahead(&self, surroundings: Surroundings) {
        if self.space.ram().free_count() >= self.low_water() {
            return;
        }
        (surroundings.short_of_frames)();
        if self.space.ram().free_count() >= self.low_water() {
            return;
        }
        self.space.deactivate(Caller::FaultHandler, DEACTIVATE);
        // Relaxed is enough for the look: a reclaimer that falls asleep just now wakes at its next tick, and faults
        // reclaim directly meanwhile. The swap makes one waker of many.
        if self.asleep.load(Ordering::Relaxed)
            && self.asleep.swap(false, Ordering::Relaxed)
            && let Some(reclaimer) = self.reclaimer.get()
        {
            reclaimer.unpark();
        }
    }

    /// The reclaimer: keeps frames free.
    fn reclaim(&self, surroundings: Surroundings) {
        enter_pager_thread(0);
        self.begin();
        let mut ticked = Instant::now();
        let mut worked = ticked;
        let mut placement = Placement::new();
        while !self.stopping() {
            // Relaxed: see `handle`.
            if let Some(cpu) = self.fault_cpu.load(Ordering::Relaxed).checked_sub(1) {
                placement.avoid(cpu);
            }
            let nap = self.free_some();
            if ticked.elapsed() >= TICK {
                ticked = Instant::now();
                (surroundings.tick)();
            }
            let again = (surroundings.follow)();
            if again.is_zero() {
                continue;
            }
            let Some(nap) = nap else {
                worked = Instant::now();
                continue;
            };
            if placement.is_one_of_two() {
                self.linger(worked);
            }
            thread::park_timeout(nap.min(again));
            // Relaxed: see `keep_ahead`.
            self.asleep.store(false, Ordering::Relaxed);
        }
    }

    /// Waits awake for a moment after the last work, unless somebody calls.
    ///
    /// A thread whose fault was served on its own CPU moves to another CPU if that is idle when it is woken, and then
    /// every fault wakes threads across CPUs, twice. Where there are only two CPUs, this one keeps the other from being
    /// idle while the program faults; whoever else has work there goes first.
    fn linger(&self, worked: Instant) {
        // Relaxed: see `keep_ahead`.
        while self.asleep.load(Ordering::Relaxed) && worked.elapsed() < LINGER {
            thread::yield_now();
        }
    }

    /// Frees some frames if they are short. Answers how long to sleep if there is nothing more to do.
    fn free_some(&self) -> Option<Duration> {
        let ram = self.space.ram();
        let high = self.low_water() * 2;
        let short = (ram.deficit() + high).saturating_sub(ram.free_count());
        let want = usize::try_from(short).unwrap_or(usize::MAX).min(STORE);
        if want > 0 {
            // What waits already goes first: taking out more interrupts the program.
            let freed = self.space.store(want);
            // If everything is busy or full, trying again at once is not worth a CPU.
            return (freed == 0 && self.space.make_room(Caller::Reclaimer, want) == 0)
                .then_some(RETRY);
        }
        // Relaxed: see `keep_ahead`.
        self.asleep.store(true, Ordering::Relaxed);
        (ram.free_count() >= self.low_water()).then_some(TICK)
    }

    /// The listener.
    fn listen(&self) {
        self.begin();
        while !self.stopping() {
            self.mmu.drain();
            thread::park_timeout(LISTEN);
        }
    }

    /// The fault thread.
    fn serve(&self, surroundings: Surroundings) {
        enter_pager_thread(1);
        let mut worker = Worker::new();
        let mut placement = Placement::new();
        self.begin();
        let mut events = [const { Event::Kick }; EVENTS];
        while !self.stopping() {
            let count = self.mmu.next_events(&mut events, None);
            for event in &mut events[..count] {
                let event = mem::replace(event, Event::Kick);
                self.handle(&mut worker, &mut placement, event, surroundings);
            }
        }
    }

    fn handle(
        &self,
        worker: &mut Worker,
        placement: &mut Placement,
        event: Event,
        surroundings: Surroundings,
    ) {
        match event {
            Event::Kick => {}
            Event::Fork(child) => self.serve_fork(worker, &child),
            Event::Fault { at, access, tid } => {
                placement.follow(tid);
                // Relaxed: a hint to the reclaimer.
                let cpu = placement.current().map_or(0, |cpu| cpu + 1);
                self.fault_cpu.store(cpu, Ordering::Relaxed);
                self.serve_fault(worker, at, access, surroundings);
            }
        }
    }

    fn serve_fault(
        &self,
        worker: &mut Worker,
        at: VirtAddr,
        access: Access,
        surroundings: Surroundings,
    ) {
        let start = Instant::now();
        let stats = self.space.stats();
        let mut waiting = start;
        loop {
            match self.space.fault(worker, at, access) {
                Outcome::Resolved => break,
                Outcome::BadAddress => {
                    // The program touched what it does not own; SIGBUS tells it so.
                    self.space.poison_stray(at);
                    break;
                }
                Outcome::NoMemory if waiting.elapsed() < PATIENCE => {
                    self.note_forks();
                    self.keep_ahead(surroundings);
                    thread::sleep(Duration::from_millis(1));
                    waiting = wait_longer(waiting, surroundings);
                }
                Outcome::NoMemory => {
                    Stats::add(&stats.out_of_memory, 1);
                    (surroundings.out_of_memory)(self.why_full(at));
                }
            }
        }
        stats
            .fault_latency
            .record(start.elapsed().as_nanos().try_into().unwrap_or(u64::MAX));
        self.keep_ahead(surroundings);
    }

    /// While a fault waits for memory the turn of a fork behind it does not come, and perhaps nothing can leave that is not made
    /// private first, as all pages are shared with the child.
    fn note_forks(&self) {
        if self.mmu.has_forked() {
            self.space.note_fork();
        }
    }

    /// Why there is no room for a page, for whoever has to make some.
    fn why_full(&self, at: VirtAddr) -> &'static str {
        let files = self.space.files();
        if files.is_at_limit(at) {
            "the group of a mapped file is at its limit, and none of its pages can leave: they are pinned, or cannot be written (a higher limit of the Memcg would help)"
        } else if files.dirty_pages() > self.space.ram().limit() / 2 {
            "RAM is full of pages of files that are pinned, or cannot be written (room for these files would help, or more RAM)"
        } else {
            "RAM and devices are full, and nothing can be freed (a larger device, or one more, would help)"
        }
    }

    /// A fork's child gets every byte that is not mapped, and then runs on without us.
    fn serve_fork(&self, worker: &mut Worker, child: &ChildSpace) {
        Stats::add(&self.space.stats().forks, 1);
        let given = self.space.for_each_missing(worker, |at, page| match page {
            ChildPage::Bytes(bytes) => give(child, at, bytes),
            ChildPage::Lost => {
                child.poison(at);
                ControlFlow::Continue(())
            }
        });
        // A child that has ended or exec'd needs no more.
        let _ = given;
        // Dropping the child's descriptor ends its registration: what is still missing there reads as zeros, as it
        // should.
    }
}

/// Since when a fault counts as waiting that has waited since `since`: what is being taken away may be given back.
fn wait_longer(since: Instant, surroundings: Surroundings) -> Instant {
    if since.elapsed() >= STARVING && (surroundings.hold_out)() {
        return Instant::now();
    }
    since
}

/// Gives a child a page, or, if the machine has no memory for it for too long, SIGBUS instead of zeros (FLT-3).
fn give(child: &ChildSpace, at: VirtAddr, bytes: &Page) -> ControlFlow<()> {
    let start = Instant::now();
    loop {
        match child.install(at, bytes) {
            Ok(()) => return ControlFlow::Continue(()),
            Err(Stop::Gone) => return ControlFlow::Break(()),
            Err(_) if start.elapsed() < PATIENCE => thread::sleep(RETRY),
            Err(_) => {
                child.poison(at);
                return ControlFlow::Continue(());
            }
        }
    }
}

/// Ends the process as a machine that runs out of memory would.
pub(crate) fn kill_as_out_of_memory(message: &str) -> ! {
    eprintln!("pgmap: out of memory: {message}; the program is killed, as a full machine would do");
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    process::abort()
}
