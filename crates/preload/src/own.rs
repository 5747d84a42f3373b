//! The allocator of this library's own data: the pager never depends on what it manages, nor on the C library.
//!
//! Not glibc's: a thread that forks holds glibc's locks while it waits for the pager to read of the fork, so the pager
//! must not wait for those. Nobody forks while holding the lock here.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr;

use dlmalloc::{Allocator, Dlmalloc};
use pgmap_sync::Mutex;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Taken from the kernel at a time. The pool's superblocks are cut from it: with little more than one in each, what is left
/// over would be a twentieth of the pool.
const SEGMENT_BYTES: usize = 4 << 20;

/// Memory straight from the kernel.
struct Kernel;

// SAFETY: `alloc` answers fresh, zeroed memory of the size asked for, or null; pages are as the kernel has them.
unsafe impl Allocator for Kernel {
    fn alloc(&self, size: usize) -> (*mut u8, usize, u32) {
        let size = size.next_multiple_of(SEGMENT_BYTES);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
        let memory =
            unsafe { mmap_anonymous(ptr::null_mut(), size, protection, MapFlags::PRIVATE) };
        memory.map_or((ptr::null_mut(), 0, 0), |memory| (memory.cast(), size, 0))
    }

    fn remap(&self, _: *mut u8, _: usize, _: usize, _: bool) -> *mut u8 {
        ptr::null_mut()
    }

    fn free_part(&self, memory: *mut u8, old: usize, new: usize) -> bool {
        // SAFETY: the allocator owns the memory, and is done with its end.
        unsafe { munmap(memory.wrapping_add(new).cast(), old - new) }.is_ok()
    }

    fn free(&self, memory: *mut u8, size: usize) -> bool {
        // SAFETY: the allocator owns the memory, and is done with it.
        unsafe { munmap(memory.cast(), size) }.is_ok()
    }

    fn can_release_part(&self, _: u32) -> bool {
        true
    }

    fn allocates_zeros(&self) -> bool {
        true
    }

    fn page_size(&self) -> usize {
        4096
    }
}

/// The global allocator of this library.
pub(crate) struct Own {
    heap: Mutex<Dlmalloc<Kernel>>,
}

impl Own {
    pub(crate) const fn new() -> Self {
        Self {
            heap: Mutex::new(Dlmalloc::new_with_allocator(Kernel)),
        }
    }
}

// SAFETY: dlmalloc answers memory of the size and alignment asked for, or null, and the lock keeps its calls apart.
unsafe impl GlobalAlloc for Own {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: by this function's contract.
        unsafe { self.heap.lock().malloc(layout.size(), layout.align()) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: by this function's contract.
        unsafe { self.heap.lock().calloc(layout.size(), layout.align()) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: by this function's contract.
        unsafe { self.heap.lock().free(memory, layout.size(), layout.align()) };
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: by this function's contract.
        unsafe {
            self.heap
                .lock()
                .realloc(memory, layout.size(), layout.align(), size)
        }
    }
}
