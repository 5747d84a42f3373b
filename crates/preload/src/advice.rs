//! `madvise` and `posix_madvise`.

use core::ffi::{c_int, c_void};

use pgmap::AddressSpace;
use pgmap_host::thread::SignalsBlocked;

use crate::maps::{fail, managing};
use crate::raw::{errno, syscall_int, word};
use crate::state;

/// As [`libc::MADV_DONTNEED`], for locked pages too.
const MADV_DONTNEED_LOCKED: c_int = 24;
const MADV_GUARD_INSTALL: c_int = 102;
const MADV_GUARD_REMOVE: c_int = 103;

/// See madvise(2).
///
/// # Safety
///
/// As madvise(2): some advice drops what is there.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn madvise(
    address: *mut c_void,
    bytes: usize,
    advice: c_int,
) -> c_int {
    if state::contains(address as usize) && state::space().is_none() && drops(advice) {
        if state::was_private_file(address as usize, bytes) {
            // Nobody would bring the file's bytes back: the child keeps what it has.
            return crate::raw::fail(libc::EINVAL);
        }
        fetch(address as usize, bytes);
    }
    if let Some(space) = managing(address as usize, bytes)
        && let Some(answer) = managed(space, address as usize, bytes, advice)
    {
        return answer;
    }
    // SAFETY: by this function's contract.
    unsafe {
        syscall_int(
            libc::SYS_madvise,
            [address as usize, bytes, word(advice), 0, 0, 0],
        )
    }
}

/// Follows advice about managed memory; `None` for what the kernel can follow itself.
fn managed(space: &AddressSpace, address: usize, bytes: usize, advice: c_int) -> Option<c_int> {
    if bytes == 0 {
        return Some(0);
    }
    match advice {
        // Of files there is nothing to free, as the kernel has it.
        libc::MADV_FREE if space.is_private_file(address, bytes) => {
            Some(crate::raw::fail(libc::EINVAL))
        }
        advice if drops(advice) => {
            let _blocked = SignalsBlocked::new();
            // SAFETY: the program gives up the bytes.
            Some(unsafe { space.discard(address, bytes) }.map_or_else(fail, |()| 0))
        }
        // Guard pages would hide pages of which the kernel knows nothing: as on kernels that do not have them.
        MADV_GUARD_INSTALL | MADV_GUARD_REMOVE => Some(crate::raw::fail(libc::EINVAL)),
        // Hints: our own policies decide.
        libc::MADV_NORMAL
        | libc::MADV_RANDOM
        | libc::MADV_SEQUENTIAL
        | libc::MADV_WILLNEED
        | libc::MADV_COLD
        | libc::MADV_PAGEOUT
        | libc::MADV_HUGEPAGE
        | libc::MADV_NOHUGEPAGE
        | libc::MADV_COLLAPSE
        | libc::MADV_MERGEABLE
        | libc::MADV_UNMERGEABLE => Some(0),
        _ => None,
    }
}

/// Whether advice drops the bytes.
const fn drops(advice: c_int) -> bool {
    matches!(
        advice,
        libc::MADV_DONTNEED | libc::MADV_FREE | MADV_DONTNEED_LOCKED
    )
}

/// In a fork's child: has the parent's pager bring what it still owes us, before it is dropped. Otherwise it would come
/// afterwards.
pub(crate) fn fetch(address: usize, bytes: usize) {
    let arguments = [address, bytes, word(libc::MADV_POPULATE_READ), 0, 0, 0];
    // SAFETY: reading pages changes none.
    unsafe { syscall_int(libc::SYS_madvise, arguments) };
}

/// See `posix_madvise(3)`. Its `POSIX_MADV_DONTNEED` keeps the bytes.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn posix_madvise(address: *mut c_void, bytes: usize, advice: c_int) -> c_int {
    if managing(address as usize, bytes).is_some() || advice == libc::POSIX_MADV_DONTNEED {
        return 0;
    }
    let arguments = [address as usize, bytes, word(advice), 0, 0, 0];
    // SAFETY: without DONTNEED these are hints, which change no bytes.
    let answer = unsafe { syscall_int(libc::SYS_madvise, arguments) };
    if answer == 0 { 0 } else { errno() }
}
