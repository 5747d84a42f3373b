//! The C library's own allocator: for whatever the program allocated before it was managed, and for what the C
//! library allocates on the pager's threads.

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
