//! A client's mapping of a device.

use core::ptr::{self, NonNull};
use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::mm::{MapFlags, ProtFlags, mmap};

/// Bytes that are mapped until the process ends.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

impl Mapping {
    pub(crate) fn new(file: &File, offset: u64, len: usize) -> Self {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe {
            mmap(
                ptr::null_mut(),
                len,
                protection,
                MapFlags::SHARED,
                file,
                offset,
            )
        };
        let start = NonNull::new(start.unwrap().cast()).unwrap();
        Self { start, len }
    }

    fn at(&self, at: usize) -> NonNull<u8> {
        assert!(at < self.len);
        // SAFETY: just checked that it is inside of the mapping.
        unsafe { self.start.add(at) }
    }

    /// Loads a byte; SIGBUS if it was taken away.
    pub(crate) fn load(&self, at: usize) -> u8 {
        // SAFETY: the byte is mapped and readable, and nobody has a reference to it.
        unsafe { self.at(at).as_ptr().read_volatile() }
    }

    /// Stores a byte; SIGBUS if it was taken away.
    pub(crate) fn store(&self, at: usize, byte: u8) {
        // SAFETY: the byte is mapped and writable, and nobody has a reference to it.
        unsafe { self.at(at).as_ptr().write_volatile(byte) }
    }

    /// Whether our page table still has the first page: not if the file's page has been replaced.
    pub(crate) fn is_in_page_table(&self) -> bool {
        let mut entry = [0; 8];
        let pages = File::open("/proc/self/pagemap").unwrap();
        let nth = self.start.addr().get() / 4096;
        pages.read_exact_at(&mut entry, nth as u64 * 8).unwrap();
        u64::from_ne_bytes(entry) >> 63 == 1
    }
}
