//! System calls and errno, as the C library's callers know them.

use core::ffi::{c_int, c_long, c_void};

/// A system call, with errno set if it fails.
///
/// # Safety
///
/// What the call does to memory is what the program asked for.
unsafe fn syscall(number: c_long, arguments: [usize; 6]) -> c_long {
    let [first, second, third, fourth, fifth, sixth] = arguments;
    // SAFETY: by this function's contract; calls take six words at most.
    unsafe { libc::syscall(number, first, second, third, fourth, fifth, sixth) }
}

/// As [`syscall`], for calls that answer 0 or a descriptor.
///
/// # Safety
///
/// As [`syscall`].
pub(crate) unsafe fn syscall_int(number: c_long, arguments: [usize; 6]) -> c_int {
    // SAFETY: by this function's contract.
    let answer = unsafe { syscall(number, arguments) };
    c_int::try_from(answer).unwrap_or(-1)
}

/// As [`syscall`], for calls that answer an address.
///
/// # Safety
///
/// As [`syscall`].
pub(crate) unsafe fn syscall_pointer(number: c_long, arguments: [usize; 6]) -> *mut c_void {
    // SAFETY: by this function's contract.
    let answer = unsafe { syscall(number, arguments) };
    usize::try_from(answer).map_or(libc::MAP_FAILED, |address| address as *mut c_void)
}

/// An argument of a system call: the kernel takes the same bits.
pub(crate) const fn word(argument: c_int) -> usize {
    #[allow(
        clippy::cast_sign_loss,
        reason = "the kernel reads as many bits as it wants"
    )]
    let word = argument as isize as usize;
    word
}

pub(crate) fn set_errno(errno: c_int) {
    // SAFETY: the C library answers where this thread's errno is.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: it can be written for as long as the thread lives.
    unsafe { *place = errno };
}

pub(crate) fn errno() -> c_int {
    // SAFETY: the C library answers where this thread's errno is.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: it can be read for as long as the thread lives.
    unsafe { *place }
}

/// Fails with an errno, as a system call does.
pub(crate) fn fail(errno: c_int) -> c_int {
    set_errno(errno);
    -1
}
