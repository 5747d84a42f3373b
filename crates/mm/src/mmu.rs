//! What `mm` asks of the machine's page tables: the host's userfaultfd, or the lab's model.
//!
//! The software page table is the truth and the machine's is its TLB: `mm` calls these with the lock
//! of the block held, and never relies on a mapping that it did not install. Memory taken out of the
//! address space waits in *staging slots*, which nobody but `mm` can reach.

use core::fmt;
use core::slice;

use pgmap_core::addr::{Page, VirtAddr};

/// A page-sized place in the staging area, by index.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Slot(pub u32);

/// What an installed page allows without a further fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protect {
    /// The first write faults: the page is a clean copy of what the device holds.
    ReadOnly,
    /// Reads and writes.
    ReadWrite,
}

/// Why an operation stopped at a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// Somebody has the page pinned, or it is shared with a fork's child: it stays (GUP-3).
    Busy,
    /// The machine does not move this page: it is locked.
    Unevictable,
    /// There is no page at that address.
    Hole,
    /// There is a page already.
    Exists,
    /// The machine has no memory for this now.
    NoMemory,
    /// The address space is going away.
    Gone,
    /// The machine answered with an errno that `mm` has no plan for.
    Other(i32),
}

/// How far an operation over several pages came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub struct Progress {
    /// Pages done, counted from the first.
    pub done: usize,
    /// Why the page after those was not done; `None` if all were.
    pub stop: Option<Stop>,
}

impl Progress {
    /// All `count` pages were done.
    pub const fn complete(count: usize) -> Self {
        Self {
            done: count,
            stop: None,
        }
    }
}

/// The machine's page tables for one address space.
///
/// Addresses are page aligned and inside the address space; counts are at least 1. An operation that
/// stops early has done the pages before, and nothing to those after. Every method may be called from
/// several threads, and none waits for a fault to be served.
///
/// # Safety
///
/// After `take_out` moved a page into a slot, the bytes of the slot are those of the page at that
/// moment, and nothing outside `mm` reads or writes them.
pub unsafe trait Mmu: Send + Sync + fmt::Debug {
    /// Copies `pages` to consecutive missing addresses from `at`, and wakes who waits there.
    fn install(&self, at: VirtAddr, pages: &[Page], protect: Protect) -> Progress;

    /// As [`install`](Self::install) of one page that may be written, where there may be a page already ([`Stop::Exists`]).
    fn install_if_missing(&self, at: VirtAddr, page: &Page) -> Progress {
        self.install(at, slice::from_ref(page), Protect::ReadWrite)
    }

    /// Fills `count` missing addresses from `at` with writable zeros, and wakes who waits there.
    fn install_zero(&self, at: VirtAddr, count: usize) -> Progress;

    /// Moves the pages from `at` into the slots from `to`, which are empty. The addresses are missing
    /// afterwards. A pinned page is refused with [`Stop::Busy`] (GUP-3).
    fn take_out(&self, at: VirtAddr, count: usize, to: Slot) -> Progress;

    /// Moves the pages in the slots from `from` to consecutive missing addresses from `at`, writable,
    /// and wakes who waits there. The slots are empty afterwards.
    fn give_back(&self, from: Slot, count: usize, at: VirtAddr) -> Progress;

    /// The bytes in a slot.
    ///
    /// # Safety
    ///
    /// `take_out` has filled the slot, and neither `give_back` nor `empty` is called on it while the
    /// reference lives.
    unsafe fn staged(&self, slot: Slot) -> &Page;

    /// Drops the pages in `count` slots from `from`; they are empty afterwards.
    fn empty(&self, from: Slot, count: usize);

    /// Lets pages that were installed [`Protect::ReadOnly`] be written, and wakes who waits there.
    fn unprotect(&self, at: VirtAddr, count: usize);

    /// Wakes who waits for these addresses: they look again, and fault again if they must.
    fn wake(&self, at: VirtAddr, count: usize);

    /// Makes missing pages answer with SIGBUS (FLT-1), and wakes who waits there.
    fn poison(&self, at: VirtAddr, count: usize) -> Progress;

    /// As [`poison`](Self::poison) of one page, where there may be a page already ([`Stop::Exists`]).
    fn poison_if_missing(&self, at: VirtAddr) -> Progress {
        self.poison(at, 1)
    }

    /// Drops the pages at these addresses, poison too. They are missing afterwards.
    fn zap(&self, at: VirtAddr, count: usize);

    /// Whether this is a fork's child, which has a copy of all that its parent knew, and no say in the parent's pages.
    fn is_inherited(&self) -> bool {
        false
    }

    /// Breaks the sharing of a page with a fork's child, so that it can be moved again. Called under the cursor, for a
    /// page that is mapped and not protected. Never called by the thread that serves faults. False if the page could not
    /// be made private.
    fn unshare(&self, at: VirtAddr) -> bool;
}
