//! `malloc` and its family: mimalloc over managed memory, once there is some; the C library's before that.
//!
//! Who allocated a block is told from its address. The pager's own threads are always served by the C library: what
//! the loader and the C library allocate on their behalf must not be managed.

use core::ffi::{c_int, c_void};
use core::ptr;
use core::sync::atomic::{AtomicBool, Ordering};

use libmimalloc_sys as mi;
use pgmap::AddressSpace;

use crate::glibc::{__libc_calloc, __libc_free, __libc_malloc, __libc_memalign, __libc_realloc};
use crate::raw::set_errno;
use crate::state;

/// Addresses that the allocator may use, in bytes: half of the managed ones.
const HEAP_BYTES: usize = 128 << 30;
/// mimalloc's arenas begin at multiples of this.
const HEAP_ALIGN: usize = 64 << 20;
const PAGE: usize = 4096;

/// Flags in the size of one of the C library's chunks.
const CHUNK_FLAGS: usize = 7;
const MAPPED_ALONE: usize = 2;

const OPTION_PURGE_DELAY: mi::mi_option_t = 15;

unsafe extern "C" {
    fn mi_manage_os_memory_ex(
        start: *mut c_void,
        size: usize,
        is_committed: bool,
        is_large: bool,
        is_zero: bool,
        numa_node: c_int,
        exclusive: bool,
        arena: *mut c_int,
    ) -> bool;
}

/// Whether blocks come from managed memory.
static MANAGED: AtomicBool = AtomicBool::new(false);

/// Gives mimalloc its memory; from here on blocks are managed.
pub(crate) fn manage(space: &AddressSpace) {
    let Ok(start) = space.reserve(HEAP_BYTES, HEAP_ALIGN) else {
        return;
    };
    let (start, mut arena) = (start as *mut c_void, 0);
    // SAFETY: options may be set at any time.
    unsafe { mi::mi_option_set(mi::mi_option_limit_os_alloc, 1) };
    // SAFETY: as above. Purging would drop pages one segment at a time, while other threads wait.
    unsafe { mi::mi_option_set(OPTION_PURGE_DELAY, -1) };
    // SAFETY: the range is fresh, zeroed, readable and writable, and nobody else's for ever.
    let managed = unsafe {
        mi_manage_os_memory_ex(
            start,
            HEAP_BYTES,
            true,
            false,
            true,
            -1,
            false,
            &raw mut arena,
        )
    };
    // Release: pairs with the acquire in `managed`.
    MANAGED.store(managed, Ordering::Release);
}

/// Whether a new block comes from managed memory.
fn managed() -> bool {
    // Acquire: pairs with the release in `manage`.
    MANAGED.load(Ordering::Acquire) && !pgmap::run::is_pager_thread()
}

fn is_ours(pointer: *const c_void) -> bool {
    state::contains(pointer as usize)
}

/// Says so if there is no memory, as the C library does.
fn checked(pointer: *mut c_void) -> *mut c_void {
    if pointer.is_null() {
        set_errno(libc::ENOMEM);
    }
    pointer
}

/// See malloc(3).
#[unsafe(no_mangle)]
pub(crate) extern "C" fn malloc(size: usize) -> *mut c_void {
    if managed() {
        // SAFETY: mimalloc has its memory, and takes any size.
        return checked(unsafe { mi::mi_malloc(size) });
    }
    // SAFETY: `malloc` takes any size.
    unsafe { __libc_malloc(size) }
}

/// See malloc(3).
///
/// # Safety
///
/// `pointer` is null or a block that was not freed.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn free(pointer: *mut c_void) {
    if is_ours(pointer) {
        // SAFETY: a block among the managed addresses came from mimalloc; by this function's contract it is live.
        unsafe { mi::mi_free(pointer) };
    } else {
        // SAFETY: every other block came from the C library.
        unsafe { __libc_free(pointer) };
    }
}

/// See malloc(3).
#[unsafe(no_mangle)]
pub(crate) extern "C" fn calloc(count: usize, size: usize) -> *mut c_void {
    if managed() {
        // SAFETY: mimalloc has its memory, and checks the product.
        return checked(unsafe { mi::mi_calloc(count, size) });
    }
    // SAFETY: `calloc` takes any sizes.
    unsafe { __libc_calloc(count, size) }
}

/// See malloc(3).
///
/// # Safety
///
/// `pointer` is null or a block that was not freed.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn realloc(pointer: *mut c_void, size: usize) -> *mut c_void {
    if pointer.is_null() {
        return malloc(size);
    }
    if !is_ours(pointer) {
        // SAFETY: the block came from the C library, and stays there.
        return unsafe { __libc_realloc(pointer, size) };
    }
    if size == 0 {
        // SAFETY: by this function's contract.
        unsafe { mi::mi_free(pointer) };
        return ptr::null_mut();
    }
    // SAFETY: the block came from mimalloc and is live.
    checked(unsafe { mi::mi_realloc(pointer, size) })
}

/// See malloc(3).
///
/// # Safety
///
/// `pointer` is null or a block that was not freed.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn reallocarray(
    pointer: *mut c_void,
    count: usize,
    size: usize,
) -> *mut c_void {
    match count.checked_mul(size) {
        // SAFETY: by this function's contract.
        Some(bytes) => unsafe { realloc(pointer, bytes) },
        None => checked(ptr::null_mut()),
    }
}

/// See memalign(3).
#[unsafe(no_mangle)]
pub(crate) extern "C" fn memalign(align: usize, size: usize) -> *mut c_void {
    let Some(align) = align.max(size_of::<usize>()).checked_next_power_of_two() else {
        set_errno(libc::EINVAL);
        return ptr::null_mut();
    };
    if managed() {
        // SAFETY: mimalloc has its memory; the alignment is a power of two.
        return checked(unsafe { mi::mi_malloc_aligned(size, align) });
    }
    // SAFETY: the alignment is a power of two.
    unsafe { __libc_memalign(align, size) }
}

/// See `aligned_alloc(3)`.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn aligned_alloc(align: usize, size: usize) -> *mut c_void {
    memalign(align, size)
}

/// See `posix_memalign(3)`.
///
/// # Safety
///
/// `place` can be written.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn posix_memalign(
    place: *mut *mut c_void,
    align: usize,
    size: usize,
) -> c_int {
    if !align.is_power_of_two() || !align.is_multiple_of(size_of::<*mut c_void>()) {
        return libc::EINVAL;
    }
    let block = memalign(align, size);
    if block.is_null() {
        return libc::ENOMEM;
    }
    // SAFETY: by this function's contract.
    unsafe { *place = block };
    0
}

/// See valloc(3).
#[unsafe(no_mangle)]
pub(crate) extern "C" fn valloc(size: usize) -> *mut c_void {
    memalign(PAGE, size)
}

/// See pvalloc(3).
#[unsafe(no_mangle)]
pub(crate) extern "C" fn pvalloc(size: usize) -> *mut c_void {
    match size.checked_next_multiple_of(PAGE) {
        Some(size) => memalign(PAGE, size),
        None => checked(ptr::null_mut()),
    }
}

/// See `malloc_usable_size(3)`.
///
/// # Safety
///
/// `pointer` is null or a block that was not freed.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn malloc_usable_size(pointer: *mut c_void) -> usize {
    if pointer.is_null() {
        return 0;
    }
    if is_ours(pointer) {
        // SAFETY: the block came from mimalloc and is live.
        return unsafe { mi::mi_usable_size(pointer) };
    }
    let block = pointer.cast::<usize>();
    // SAFETY: the word before a block of the C library belongs to it.
    let size = unsafe { block.sub(1) };
    // SAFETY: that word is the chunk's size; its lowest three bits are flags.
    let size = unsafe { *size };
    // A chunk has one word of its own, or two if it was mapped alone.
    let words = if size & MAPPED_ALONE == 0 { 1 } else { 2 };
    (size & !CHUNK_FLAGS).saturating_sub(words * size_of::<usize>())
}
