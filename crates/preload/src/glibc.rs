//! The C library's own allocator: for the pager, and for whatever was allocated before the program was managed.

use core::alloc::{GlobalAlloc, Layout};
use core::ffi::c_void;

unsafe extern "C" {
    /// glibc's `malloc`, whoever interposes the other name.
    pub(crate) fn __libc_malloc(size: usize) -> *mut c_void;
    /// glibc's `free`.
    pub(crate) fn __libc_free(pointer: *mut c_void);
    /// glibc's `calloc`.
    pub(crate) fn __libc_calloc(count: usize, size: usize) -> *mut c_void;
    /// glibc's `realloc`.
    pub(crate) fn __libc_realloc(pointer: *mut c_void, size: usize) -> *mut c_void;
    /// glibc's `memalign`.
    pub(crate) fn __libc_memalign(align: usize, size: usize) -> *mut c_void;
}

/// The global allocator of this library: the pager never depends on what it manages.
#[derive(Debug)]
pub(crate) struct Glibc;

/// The alignment of what `malloc` returns.
const MALLOC_ALIGN: usize = 16;

// SAFETY: glibc's allocator returns memory of the size and alignment asked for, or null, and frees what it gave.
unsafe impl GlobalAlloc for Glibc {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let memory = if layout.align() <= MALLOC_ALIGN {
            // SAFETY: `malloc` takes any size.
            unsafe { __libc_malloc(layout.size()) }
        } else {
            // SAFETY: a layout's alignment is a power of two.
            unsafe { __libc_memalign(layout.align(), layout.size()) }
        };
        memory.cast()
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.align() <= MALLOC_ALIGN {
            // SAFETY: `calloc` takes any size.
            return unsafe { __libc_calloc(1, layout.size()) }.cast();
        }
        // SAFETY: by this function's contract.
        let memory = unsafe { self.alloc(layout) };
        if !memory.is_null() {
            // SAFETY: just allocated, that long.
            unsafe { memory.write_bytes(0, layout.size()) };
        }
        memory
    }

    unsafe fn dealloc(&self, memory: *mut u8, _: Layout) {
        // SAFETY: by this function's contract `memory` came from `alloc`.
        unsafe { __libc_free(memory.cast()) };
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if layout.align() <= MALLOC_ALIGN {
            // SAFETY: by this function's contract `memory` came from `alloc`.
            return unsafe { __libc_realloc(memory.cast(), size) }.cast();
        }
        let Ok(new) = Layout::from_size_align(size, layout.align()) else {
            return core::ptr::null_mut();
        };
        // SAFETY: the size is not zero, by this function's contract.
        let moved = unsafe { self.alloc(new) };
        if !moved.is_null() {
            // SAFETY: both are at least that long, and apart.
            unsafe { moved.copy_from_nonoverlapping(memory, layout.size().min(size)) };
            // SAFETY: by this function's contract.
            unsafe { self.dealloc(memory, layout) };
        }
        moved
    }
}
