//! What the machine tells the pager: faults and forks.

use std::os::fd::{FromRawFd, OwnedFd};

use pgmap_core::addr::{PAGE_SIZE, Page, VirtAddr};
use pgmap_mm::fault::Access;

use crate::uffd::{Message, RawMessage, Uffd};

/// Something that the pager has to do.
#[derive(Debug)]
pub enum Event {
    /// Look around: somebody called [`kick`](crate::mmu::HostMmu::kick).
    Kick,
    /// A thread waits for a page.
    Fault {
        /// The address that it touched.
        at: VirtAddr,
        /// What it wanted.
        access: Access,
        /// The kernel's number of the thread.
        tid: u32,
    },
    /// The process has forked, and the child waits for its missing pages.
    Fork(ChildSpace),
}

impl Event {
    pub(crate) fn from_raw(message: &RawMessage) -> Option<Self> {
        match message.parse() {
            Message::Fault {
                address,
                write,
                protected,
                tid,
            } => {
                let access = match (protected, write) {
                    (true, _) => Access::WriteProtected,
                    (false, true) => Access::Write,
                    (false, false) => Access::Read,
                };
                let at = VirtAddr::new(usize::try_from(address).ok()?).page_start();
                Some(Self::Fault { at, access, tid })
            }
            Message::Fork { fd } => {
                // SAFETY: the kernel made this descriptor for the reader of the message, which is read once.
                let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                Some(Self::Fork(ChildSpace {
                    uffd: Uffd::from_fd(fd),
                }))
            }
            Message::Other => None,
        }
    }
}

/// The address space of a fork's child, before it has a pager of its own.
///
/// Dropping this ends the child's registration: what is still missing there reads as zeros from then on.
#[derive(Debug)]
pub struct ChildSpace {
    uffd: Uffd,
}

impl ChildSpace {
    /// Gives the child a page. False if it could not be had, which is so if the child has ended, too.
    #[must_use]
    pub fn install(&self, at: VirtAddr, page: &Page) -> bool {
        // SAFETY: the page is readable, and as long.
        let done = unsafe { self.uffd.copy(at.get(), page.0.as_ptr(), PAGE_SIZE, false) };
        done.bytes == PAGE_SIZE || done.error == Some(rustix::io::Errno::EXIST)
    }

    /// Makes a page of the child answer with SIGBUS.
    pub fn poison(&self, at: VirtAddr) {
        // Nothing can be done for a child that has ended.
        let _ = self.uffd.poison(at.get(), PAGE_SIZE);
    }
}
