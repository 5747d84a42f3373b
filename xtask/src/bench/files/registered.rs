//! The peer of a pin: buffers that are registered with `io_uring`.

use core::ptr;
use std::os::fd::AsFd;

use anyhow::ensure;
use io_uring::IoUring;
use pgmap_core::addr::PAGE_SIZE;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::pwrite;

use crate::bench::floor::Mapped;

/// A memory file that is there as a whole, and a ring to register its pages with.
pub(super) struct Registered {
    ring: IoUring,
    memory: Mapped,
    pages: usize,
}

impl Registered {
    pub(super) fn new(pages: usize) -> anyhow::Result<Self> {
        let file = memfd_create("bench", MemfdFlags::CLOEXEC)?;
        for page in 0..pages {
            pwrite(&file, &[1; PAGE_SIZE], (page * PAGE_SIZE) as u64)?;
        }
        let memory = Mapped::to_write(file.as_fd(), (pages * PAGE_SIZE) as u64)?;
        // Every page is mapped, too.
        memory.sum();
        Ok(Self {
            ring: IoUring::new(4)?,
            memory,
            pages,
        })
    }

    /// Registers and unregisters `count` pages from `first` on.
    pub(super) fn pin(&self, first: usize, count: usize) -> anyhow::Result<()> {
        ensure!(
            first + count <= self.pages,
            "there are {} pages",
            self.pages
        );
        let start = self.memory.address() + first * PAGE_SIZE;
        let buffer = libc::iovec {
            iov_base: ptr::with_exposed_provenance_mut(start),
            iov_len: count * PAGE_SIZE,
        };
        let submitter = self.ring.submitter();
        // SAFETY: the buffer is a part of our mapping, which lives as long as the ring, and nobody has a reference to its bytes.
        unsafe { submitter.register_buffers(&[buffer]) }?;
        submitter.unregister_buffers()?;
        Ok(())
    }
}
