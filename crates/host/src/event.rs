//! What the machine tells the pager: faults and forks.
//!
//! The thread that serves faults gets these from [`HostMmu::next_events`](crate::mmu::HostMmu::next_events).

use std::sync::Arc;

use pgmap_core::addr::{PAGE_SIZE, Page, VirtAddr};
use pgmap_mm::fault::Access;
use pgmap_mm::mmu::{Protect, Stop};
use rustix::io::Errno;

use crate::forks::Forks;
use crate::mmu::stop;

/// Something that the pager has to do.
#[derive(Debug)]
pub enum Event {
    /// Look around: somebody called [`kick`](crate::mmu::HostMmu::kick).
    Kick,
    /// A thread waits for a page.
    Fault {
        /// The page that it touched.
        at: VirtAddr,
        /// What it wanted.
        access: Access,
        /// The kernel's number of the thread.
        tid: u32,
    },
    /// The process has forked, and the child waits for its missing pages.
    Fork(ChildSpace),
}

/// The address space of a fork's child, or of a child's child, while it lacks pages.
///
/// While this lives, a page that is brought into the parent is given to the child first. Dropping it ends the child's
/// registration: what is still missing there reads as zeros from then on.
#[derive(Debug)]
pub struct ChildSpace {
    forks: Arc<Forks>,
    id: u64,
}

impl ChildSpace {
    pub(crate) const fn new(forks: Arc<Forks>, id: u64) -> Self {
        Self { forks, id }
    }

    /// Gives the child a page, if it has none there.
    ///
    /// # Errors
    ///
    /// [`Stop::Gone`]: the child has ended, or runs another program; nothing more need be given. Otherwise it could not be
    /// had now, [`Stop::NoMemory`] before all.
    pub fn install(&self, at: VirtAddr, page: &Page) -> Result<(), Stop> {
        let bytes = page.0.as_ptr();
        let done = self.forks.in_child(self.id, |uffd| {
            // SAFETY: the page is readable, and as long.
            unsafe { uffd.copy(at.get(), bytes, PAGE_SIZE, Protect::ReadWrite) }
        });
        match done.map(|done| done.error) {
            Some(None | Some(Errno::EXIST)) => Ok(()),
            Some(Some(errno)) => Err(stop(errno)),
            None => Err(Stop::Gone),
        }
    }

    /// Makes a page of the child answer with SIGBUS.
    pub fn poison(&self, at: VirtAddr) {
        // Nothing can be done for a child that has ended.
        let _ = self
            .forks
            .in_child(self.id, |uffd| uffd.poison(at.get(), PAGE_SIZE));
    }
}

impl Drop for ChildSpace {
    fn drop(&mut self) {
        self.forks.finish(self.id);
    }
}
