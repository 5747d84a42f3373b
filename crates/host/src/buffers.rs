//! Buffers that the bytes of files go through, between their device and the memory file.
//!
//! The pages of a memory file lie anywhere in the machine's memory, and a device that is given each of them by itself takes two
//! to three times as long as with one long piece. So a buffer is a part of a huge page, where the machine has some. The copy is
//! cheap: to read, it takes the place of filling a new page with zeros; and the same few buffers are used again and again, as they are in
//! the CPU's cache. What must never happen here: waiting for a buffer, or allocating.

use core::slice;

use pgmap_sync::atomic::{AtomicU32, Ordering};
use rustix::io::Errno;
use rustix::mm::ProtFlags;

use crate::area::{Area, OnFork};

/// Bytes of a buffer: as many as are read ahead at once.
const BYTES: usize = 1 << 20;
/// Threads that have one at a time: three that read ahead, three that write, one that serves faults, and one that pins. Who finds none, as others sync or
/// pin, makes its transfer without.
const COUNT: u32 = 8;

/// Buffers of one address space.
///
/// # Invariants
///
/// The bytes of a buffer whose bit is set in `taken` are used through the [`Buffer`] that took it, and no others are used.
#[derive(Debug)]
pub(crate) struct Buffers {
    memory: Area,
    taken: AtomicU32,
}

impl Buffers {
    /// They cost RAM only from their first use on.
    ///
    /// # Errors
    ///
    /// What the machine answers if it has not that many addresses.
    pub(crate) fn new() -> Result<Self, Errno> {
        let read_write = ProtFlags::READ | ProtFlags::WRITE;
        let memory = Area::reserve(COUNT as usize * BYTES, read_write, OnFork::Wipe)?;
        memory.prefer_huge_pages();
        Ok(Self {
            memory,
            taken: AtomicU32::new(0),
        })
    }

    /// A buffer, if one is free.
    pub(crate) fn take(&self) -> Option<Buffer<'_>> {
        // Acquire: pairs with the release in `Buffer::drop`, after which nobody uses the bytes.
        let taken = self
            .taken
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, |taken| {
                let free = taken.trailing_ones();
                (free < COUNT).then_some(taken | 1 << free)
            });
        let nth = taken.ok()?.trailing_ones();
        // INVARIANT: nobody else has set this bit.
        Some(Buffer { all: self, nth })
    }
}

/// A buffer, until this is dropped.
#[derive(Debug)]
pub(crate) struct Buffer<'a> {
    all: &'a Buffers,
    nth: u32,
}

impl Buffer<'_> {
    /// Its bytes, with whatever was there last.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        let area = self.all.memory.as_mut_ptr();
        let start = area.wrapping_add(self.nth as usize * BYTES);
        // SAFETY: the bytes are in the area, which is zeros at first, and lives as long as the borrow; by the type invariant they are this
        // buffer's alone.
        unsafe { slice::from_raw_parts_mut(start, BYTES) }
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        // Release: pairs with the acquire in `take`.
        let bit = 1 << self.nth;
        self.all.taken.fetch_and(!bit, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    /// No two who have buffers have the same, and one that is given back is the next that is given.
    #[test]
    fn every_buffer_is_somebodys_alone() {
        let buffers = Buffers::new().unwrap();
        let mut all: Vec<_> = core::iter::from_fn(|| buffers.take()).collect();
        for (buffer, nth) in all.iter_mut().zip(1..) {
            buffer.bytes().fill(nth);
        }
        for (buffer, nth) in all.iter_mut().zip(1..) {
            assert!(buffer.bytes().iter().all(|byte| *byte == nth));
        }
        assert_eq!(all.len(), COUNT as usize);
        drop(all.swap_remove(3));
        assert_eq!(buffers.take().unwrap().bytes()[0], 4);
    }
}
