//! Our descriptors are not the program's to close.
//!
//! Only the managed process itself has to be kept from them: a child has its own table of descriptors.

use core::ffi::{c_int, c_uint};

use pgmap_host::fds::{is_ours, lowest_of_ours};

use crate::raw::{fail, syscall_int, word};
use crate::state;

fn is_protected(fd: c_int) -> bool {
    is_ours(fd) && state::space().is_some()
}

/// See close(2). Ours are not open, as far as the program is concerned.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn close(fd: c_int) -> c_int {
    if is_protected(fd) {
        return fail(libc::EBADF);
    }
    // SAFETY: the descriptor is the program's to close.
    unsafe { syscall_int(libc::SYS_close, [word(fd), 0, 0, 0, 0, 0]) }
}

/// See `close_range(2)`. Ours stay open.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    if state::space().is_none() {
        return close_range_raw(first, last, flags);
    }
    let end = c_int::try_from(last).unwrap_or(c_int::MAX);
    let mut next = first;
    while let Ok(from) = c_int::try_from(next)
        && let Some(ours) = lowest_of_ours(from..end.saturating_add(1))
    {
        let fd = ours.cast_unsigned();
        if fd > next && close_range_raw(next, fd - 1, flags) != 0 {
            return -1;
        }
        next = fd + 1;
    }
    if next > last && next != first {
        return 0;
    }
    close_range_raw(next, last, flags)
}

fn close_range_raw(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    let arguments = [first as usize, last as usize, word(flags), 0, 0, 0];
    // SAFETY: the descriptors are the program's to close.
    unsafe { syscall_int(libc::SYS_close_range, arguments) }
}

/// See closefrom(3). Ours stay open.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn closefrom(first: c_int) {
    close_range(c_uint::try_from(first).unwrap_or(0), c_uint::MAX, 0);
}

/// See dup2(2). A number of ours is taken.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn dup2(old: c_int, new: c_int) -> c_int {
    if is_protected(new) {
        return fail(libc::EBUSY);
    }
    // SAFETY: the descriptors are the program's.
    unsafe { syscall_int(libc::SYS_dup2, [word(old), word(new), 0, 0, 0, 0]) }
}

/// See dup3(2). A number of ours is taken.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int {
    if is_protected(new) {
        return fail(libc::EBUSY);
    }
    // SAFETY: the descriptors are the program's.
    unsafe { syscall_int(libc::SYS_dup3, [word(old), word(new), word(flags), 0, 0, 0]) }
}
