//! `madvise` and `posix_madvise`.

use core::ffi::{c_int, c_void};

use pgmap::AddressSpace;
use pgmap_host::thread::SignalsBlocked;

use crate::maps::{fail, managing};
use crate::raw::{errno, syscall_int, word};

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
    if let Some(space) = managing(address as usize)
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
        libc::MADV_DONTNEED | libc::MADV_FREE => {
            let _blocked = SignalsBlocked::new();
            Some(space.discard(address, bytes).map_or_else(fail, |()| 0))
        }
        libc::MADV_POPULATE_READ | libc::MADV_POPULATE_WRITE => {
            Some(space.populate(address, bytes).map_or_else(fail, |()| 0))
        }
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

/// See `posix_madvise(3)`. Its `POSIX_MADV_DONTNEED` keeps the bytes.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn posix_madvise(address: *mut c_void, bytes: usize, advice: c_int) -> c_int {
    if managing(address as usize).is_some() || advice == libc::POSIX_MADV_DONTNEED {
        return 0;
    }
    let arguments = [address as usize, bytes, word(advice), 0, 0, 0];
    // SAFETY: without DONTNEED these are hints, which change no bytes.
    let answer = unsafe { syscall_int(libc::SYS_madvise, arguments) };
    if answer == 0 { 0 } else { errno() }
}
