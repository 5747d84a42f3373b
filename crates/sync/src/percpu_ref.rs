//! `PercpuRef`: a reference count that is taken often and killed once.
//!
//! Every thread counts in a slot of its own, so that get and put are two plain additions. Only who kills the count
//! pays: it forces a barrier on every thread (`membarrier`), and from then on gets fail and the sum of all
//! slots goes down to zero.
//!
//! ```
//! let users = pgmap_sync::PercpuRef::new();
//! assert!(users.try_get_live());
//! users.kill();
//! assert!(!users.try_get_live());
//! users.put();
//! assert!(users.wait_for_zero(None));
//! ```
//!
//! A put may happen on another thread than its get: slots wrap, and only their sum means something.

use core::time::Duration;

use crate::WaitQueue;
use crate::atomic::{AtomicBool, AtomicU64, Ordering, fence};

/// Slots; threads beyond this many share.
#[cfg(not(any(loom, shuttle)))]
const SLOTS: usize = 32;
#[cfg(any(loom, shuttle))]
const SLOTS: usize = 2;

#[derive(Debug, Default)]
#[repr(align(64))]
struct Slot(AtomicU64);

/// A count of users that can be told to end.
///
/// # Invariants
///
/// The wrapping sum of all slots is the number of gets that succeeded less the number of puts, except that a get
/// which finds the count dead adds and subtracts as many within itself, in one slot.
///
/// Hence [`count`](Self::count), which reads the slots one after the other, is never too low once the count is dead: no get
/// succeeds any more, so that a slot read early misses puts only. (To count users up without looking at `dead` would
/// break that: one taken in a slot already read, and put in one still to be read, would cancel another that is held.)
#[derive(Debug)]
pub struct PercpuRef {
    dead: AtomicBool,
    slots: [Slot; SLOTS],
    drained: WaitQueue,
}

impl Default for PercpuRef {
    fn default() -> Self {
        Self::new()
    }
}

impl PercpuRef {
    /// A live count without users.
    #[must_use]
    pub fn new() -> Self {
        Self {
            dead: AtomicBool::new(false),
            slots: core::array::from_fn(|_| Slot::default()),
            drained: WaitQueue::new(),
        }
    }

    /// A count that has been killed already, for users that will come later.
    #[must_use]
    pub fn new_dead() -> Self {
        Self {
            dead: AtomicBool::new(true),
            ..Self::new()
        }
    }

    /// Adds a user, unless the count has been killed.
    #[must_use]
    pub fn try_get_live(&self) -> bool {
        self.try_get_live_many(1)
    }

    /// Adds `count` users at once, unless the count has been killed: all of them or none.
    #[must_use]
    pub fn try_get_live_many(&self, count: u64) -> bool {
        self.add(count);
        barrier::light();
        // Ordered after the addition by the barrier, which pairs with the heavy one in `kill`: either we see `dead`, or
        // `kill` sees our addition. Acquire: pairs with the release in `resurrect`.
        if !self.dead.load(Ordering::Acquire) {
            return true;
        }
        self.put_many(count);
        false
    }

    /// Takes a user away.
    pub fn put(&self) {
        self.put_many(1);
    }

    /// Takes `count` users away at once.
    pub fn put_many(&self, count: u64) {
        self.add(count.wrapping_neg());
        barrier::light();
        // Relaxed: the barrier orders it as in `try_get_live_many`; what is read after it comes after a fence.
        if self.dead.load(Ordering::Relaxed) {
            self.wake_if_drained();
        }
    }

    /// Wakes who waits for zero, if this was the last put. A drain of many users wakes once, not once a user.
    #[cold]
    fn wake_if_drained(&self) {
        // Pairs with itself in every other put of the dying count, and with the fence in `kill`: of two puts that are the
        // last, each in its own slot, at least one sees both.
        fence(Ordering::SeqCst);
        if self.count() == 0 {
            self.drained.wake_all();
        }
    }

    /// Makes every later [`try_get_live`](Self::try_get_live) fail. Users that there are stay.
    pub fn kill(&self) {
        // Release: what the killer did before is seen by who finds the count dead and asks why.
        self.dead.store(true, Ordering::Release);
        barrier::heavy();
    }

    /// Makes the count live again.
    pub fn resurrect(&self) {
        // Release: pairs with the acquire in `try_get_live`, so that who gets a user sees what was made ready for them.
        // A late get may still fail.
        self.dead.store(false, Ordering::Release);
    }

    /// Whether the count has been killed.
    #[must_use]
    pub fn is_dying(&self) -> bool {
        // Acquire: pairs with the release in `kill`.
        self.dead.load(Ordering::Acquire)
    }

    /// Users now, if the count is dead; otherwise a guess.
    #[must_use]
    pub fn count(&self) -> u64 {
        // Acquire: pairs with the release in `add`, so that who sees zero sees what the users did.
        self.slots.iter().fold(0, |sum, slot| {
            sum.wrapping_add(slot.0.load(Ordering::Acquire))
        })
    }

    /// Waits until a dead count has no users, at most `patience`. Says whether it has none.
    #[must_use]
    pub fn wait_for_zero(&self, patience: Option<Duration>) -> bool {
        debug_assert!(self.is_dying(), "a live count may get users at any time");
        self.drained.wait_until(patience, || self.count() == 0)
    }

    fn add(&self, count: u64) {
        let (slot, own) = slot::mine();
        let slot = &self.slots[slot].0;
        if own {
            // Relaxed load: nobody else writes this slot. Release store: pairs with `count`.
            let sum = slot.load(Ordering::Relaxed).wrapping_add(count);
            slot.store(sum, Ordering::Release);
        } else {
            // Release: pairs with `count`.
            slot.fetch_add(count, Ordering::Release);
        }
    }
}

/// The asymmetric barrier: nearly free for users, dear for who kills.
mod barrier {
    #[cfg(not(any(loom, shuttle)))]
    use core::sync::atomic::AtomicPtr;

    use crate::atomic::{Ordering, compiler_fence, fence};

    #[cfg(not(any(loom, shuttle)))]
    static HEAVY: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());

    /// Installs the barrier that [`heavy`] issues; see [`set_heavy_barrier`](super::set_heavy_barrier).
    #[cfg(not(any(loom, shuttle)))]
    pub(super) fn install(barrier: fn()) {
        // Release: pairs with the acquire in `heavy`. From here on light barriers may be light.
        HEAVY.store(barrier as *mut (), Ordering::Release);
    }

    /// Orders this thread's earlier stores before its later loads, as seen by who issues `heavy`.
    pub(super) fn light() {
        #[cfg(not(any(loom, shuttle)))]
        // Relaxed: the pointer is set once; until a thread sees it, it uses the stronger fence.
        if !HEAVY.load(Ordering::Relaxed).is_null() {
            compiler_fence(Ordering::SeqCst);
            return;
        }
        #[cfg(any(loom, shuttle))]
        let _ = compiler_fence;
        // Pairs with the fence in `heavy`.
        fence(Ordering::SeqCst);
    }

    /// Makes every thread's `light` a full fence.
    pub(super) fn heavy() {
        // Pairs with the fence in `light`.
        fence(Ordering::SeqCst);
        #[cfg(not(any(loom, shuttle)))]
        {
            // Acquire: pairs with the release in `install`.
            let barrier = HEAVY.load(Ordering::Acquire);
            if !barrier.is_null() {
                // SAFETY: `install` stored a `fn()`, and function pointers and data pointers have the same
                // size and validity on every supported machine.
                let barrier = unsafe { core::mem::transmute::<*mut (), fn()>(barrier) };
                barrier();
            }
        }
    }
}

/// Installs a barrier that makes every running thread of the process execute a full fence (`membarrier`). Until then
/// every get and put executes one itself.
///
/// Call it before other threads use a [`PercpuRef`].
#[cfg(not(any(loom, shuttle)))]
pub fn set_heavy_barrier(barrier: fn()) {
    barrier::install(barrier);
}

/// The models have no asymmetric barrier: both sides use a fence.
#[cfg(any(loom, shuttle))]
pub fn set_heavy_barrier(_: fn()) {}

/// A number of this thread's own, from 0 on, in the order in which threads ask first. Where nobody can tell threads apart, and in the
/// models, several threads may have one.
///
/// It says where a thread counts or notes something without meeting others, and nothing else.
#[must_use]
pub fn thread_number() -> usize {
    slot::number()
}

mod slot {
    use super::SLOTS;

    /// This thread's slot, and whether no other thread uses it.
    #[cfg(all(feature = "std", not(any(loom, shuttle))))]
    pub(super) fn mine() -> (usize, bool) {
        let number = number();
        // Slots of threads that have ended are not handed out again: the count in them may not be zero, and their owner would have
        // to be known to be gone.
        (number.min(SLOTS - 1), number < SLOTS - 1)
    }

    /// See [`thread_number`](super::thread_number).
    #[cfg(all(feature = "std", not(any(loom, shuttle))))]
    pub(super) fn number() -> usize {
        use core::sync::atomic::{AtomicUsize, Ordering};

        static NEXT: AtomicUsize = AtomicUsize::new(1);
        // One more than the number; 0 while the thread has none.
        let mut word = local::get();
        if word == 0 {
            // Relaxed: only uniqueness matters.
            word = NEXT.fetch_add(1, Ordering::Relaxed);
            local::set(word);
        }
        word - 1
    }

    #[cfg(any(loom, shuttle, not(feature = "std")))]
    pub(super) fn number() -> usize {
        mine().0
    }

    /// A word of each thread's own, in *initial-exec* thread-local storage.
    ///
    /// The compiler's thread-locals in a shared library go through a table that the loader allocates with `malloc`,
    /// which may be managed memory: looking there under one of the pager's locks would wait for the pager for ever.
    /// This word is reached from the thread pointer alone.
    #[cfg(all(feature = "std", target_arch = "x86_64", not(any(loom, shuttle))))]
    mod local {
        use core::arch::{asm, global_asm};

        global_asm!(
            ".pushsection .tbss.pgmap_percpu_slot,\"awT\",@nobits",
            ".globl __pgmap_percpu_slot",
            ".hidden __pgmap_percpu_slot",
            ".type __pgmap_percpu_slot, @object",
            ".size __pgmap_percpu_slot, 8",
            ".p2align 3",
            "__pgmap_percpu_slot:",
            ".zero 8",
            ".popsection",
        );

        pub(super) fn get() -> usize {
            let word: usize;
            // SAFETY: the linker puts the word's distance from the thread pointer where the first instruction looks; the
            // second reads this thread's own word, which is zero until `set`.
            unsafe {
                asm!(
                    "mov {word}, qword ptr [rip + __pgmap_percpu_slot@GOTTPOFF]",
                    "mov {word}, qword ptr fs:[{word}]",
                    word = out(reg) word,
                    options(nostack, preserves_flags, readonly),
                );
            }
            word
        }

        pub(super) fn set(word: usize) {
            // SAFETY: as in `get`; nobody else has this thread's word.
            unsafe {
                asm!(
                    "mov {place}, qword ptr [rip + __pgmap_percpu_slot@GOTTPOFF]",
                    "mov qword ptr fs:[{place}], {word}",
                    place = out(reg) _,
                    word = in(reg) word,
                    options(nostack, preserves_flags),
                );
            }
        }
    }

    #[cfg(all(feature = "std", not(target_arch = "x86_64"), not(any(loom, shuttle))))]
    mod local {
        use core::cell::Cell;

        std::thread_local! {
            // No destructor and a constant start: nothing is allocated or registered at first use.
            static MINE: Cell<usize> = const { Cell::new(0) };
        }

        pub(super) fn get() -> usize {
            MINE.get()
        }

        pub(super) fn set(word: usize) {
            MINE.set(word);
        }
    }

    #[cfg(loom)]
    pub(super) fn mine() -> (usize, bool) {
        use core::sync::atomic::{AtomicUsize, Ordering};

        loom::thread_local! {
            static MINE: core::cell::Cell<usize> = core::cell::Cell::new(usize::MAX);
        }
        loom::lazy_static! {
            // Counts from 0 in every execution of a model, so that each is the same when it is repeated.
            static ref NEXT: AtomicUsize = AtomicUsize::new(0);
        }
        MINE.with(|mine| {
            if mine.get() == usize::MAX {
                // Relaxed: loom runs one thread at a time, and this is not part of what it explores.
                mine.set(NEXT.fetch_add(1, Ordering::Relaxed).min(SLOTS - 1));
            }
            // As on the machine: the last slot is everybody else's.
            (mine.get(), mine.get() < SLOTS - 1)
        })
    }

    #[cfg(all(not(loom), any(shuttle, not(feature = "std"))))]
    pub(super) fn mine() -> (usize, bool) {
        (SLOTS - 1, false)
    }
}
