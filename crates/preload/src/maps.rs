//! `mmap`, `munmap`, `mremap`, `mprotect` and `mlockall`.
//!
//! Managed are private anonymous mappings of 128 KiB and more that may be read and written. Whatever is not, and every
//! address that is not among the managed ones, goes to the kernel as it came.

use core::ffi::{c_int, c_void};

use pgmap::{AddressSpace, MapError, Place};
use pgmap_host::thread::SignalsBlocked;

use crate::state;

/// Mappings smaller than this are not worth a fault of ours.
const LEAST_BYTES: usize = 128 << 10;
const PAGE: usize = 4096;
const READ_WRITE: c_int = libc::PROT_READ | libc::PROT_WRITE;
/// What a managed mapping may be asked for, besides being private and anonymous.
const HARMLESS: c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// A system call that may fail.
///
/// # Safety
///
/// What the call does to memory is what the program asked for.
unsafe fn raw(number: i64, arguments: [usize; 6]) -> usize {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: by this function's contract. The C library's `syscall` sets errno.
    unsafe { libc::syscall(number, a, b, c, d, e, f) as usize }
}

const FAILED: usize = usize::MAX;

pub(crate) fn fail(error: MapError) -> c_int {
    let errno = match error {
        MapError::OutOfMemory { .. } => libc::ENOMEM,
        MapError::BadRange => libc::EINVAL,
        MapError::Pinned(_) => libc::EBUSY,
        MapError::Refused(errno) => errno.raw_os_error(),
    };
    // SAFETY: the C library's errno of this thread can always be written.
    unsafe { *libc::__errno_location() = errno };
    -1
}

fn answer(result: Result<usize, MapError>) -> *mut c_void {
    match result {
        Ok(address) => address as *mut c_void,
        Err(error) => {
            fail(error);
            libc::MAP_FAILED
        }
    }
}

/// See mmap(2).
///
/// # Safety
///
/// As mmap(2) with `MAP_FIXED`: the program gives up what it had there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap(
    address: *mut c_void,
    bytes: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    let plain = flags & !HARMLESS == 0
        && flags & libc::MAP_PRIVATE != 0
        && flags & libc::MAP_ANONYMOUS != 0
        && protection & !libc::PROT_EXEC == READ_WRITE;
    if plain
        && bytes >= LEAST_BYTES
        && !pgmap::run::is_pager_thread()
        && let Some(space) = state::space()
    {
        let _blocked = SignalsBlocked::new();
        match space.map(bytes, PAGE) {
            Ok(at) if protection == READ_WRITE => return at as *mut c_void,
            Ok(at) => return answer(space.protect(at, bytes, protection).map(|()| at)),
            Err(error) => return answer(Err(error)),
        }
    }
    if flags & (libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE) == libc::MAP_FIXED {
        replace(address as usize, bytes);
    }
    #[allow(clippy::cast_sign_loss, reason = "the kernel takes the same bits")]
    let arguments = [
        address as usize,
        bytes,
        protection as usize,
        flags as usize,
        fd as usize,
        offset as usize,
    ];
    // SAFETY: by this function's contract.
    (unsafe { raw(libc::SYS_mmap, arguments) }) as *mut c_void
}

/// See mmap(2).
///
/// # Safety
///
/// As [`mmap`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap64(
    address: *mut c_void,
    bytes: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    // SAFETY: by this function's contract.
    unsafe { mmap(address, bytes, protection, flags, fd, offset) }
}

/// The program maps something over managed addresses: they are not ours any more.
fn replace(address: usize, bytes: usize) {
    let (start, len) = state::overlap(address, bytes);
    if len > 0
        && let Some(space) = state::space()
    {
        let _blocked = SignalsBlocked::new();
        // A range that is not whole pages is refused by the kernel just after.
        let _ = space.give_away(start, len);
    }
}

/// See munmap(2).
///
/// # Safety
///
/// As munmap(2): the program gives up what it had there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn munmap(address: *mut c_void, bytes: usize) -> c_int {
    let address = address as usize;
    let (start, len) = state::overlap(address, bytes);
    if len == 0 {
        // SAFETY: by this function's contract.
        return unsafe { unmap_raw(address, bytes) };
    }
    if start > address {
        // SAFETY: by this function's contract.
        unsafe { unmap_raw(address, start - address) };
    }
    let end = address.saturating_add(bytes);
    if start + len < end {
        // SAFETY: by this function's contract.
        unsafe { unmap_raw(start + len, end - start - len) };
    }
    let Some(space) = state::space() else {
        // A fork's child: the addresses stay, the pages go.
        #[allow(clippy::cast_sign_loss, reason = "a small positive constant")]
        let arguments = [start, len, libc::MADV_DONTNEED as usize, 0, 0, 0];
        // SAFETY: by this function's contract.
        return if unsafe { raw(libc::SYS_madvise, arguments) } == FAILED {
            -1
        } else {
            0
        };
    };
    let _blocked = SignalsBlocked::new();
    space.unmap(start, len).map_or_else(fail, |()| 0)
}

/// # Safety
///
/// As [`munmap`].
unsafe fn unmap_raw(address: usize, bytes: usize) -> c_int {
    // SAFETY: by this function's contract.
    if unsafe { raw(libc::SYS_munmap, [address, bytes, 0, 0, 0, 0]) } == FAILED {
        -1
    } else {
        0
    }
}

/// See mremap(2).
///
/// # Safety
///
/// As mremap(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mremap(
    address: *mut c_void,
    old: usize,
    new: usize,
    flags: c_int,
    target: *mut c_void,
) -> *mut c_void {
    if let Some(space) = managing(address as usize) {
        return answer(remap(space, address as usize, (old, new), flags));
    }
    if flags & libc::MREMAP_FIXED != 0 {
        replace(target as usize, new);
    }
    #[allow(clippy::cast_sign_loss, reason = "the kernel takes the same bits")]
    let arguments = [
        address as usize,
        old,
        new,
        flags as usize,
        target as usize,
        0,
    ];
    // SAFETY: by this function's contract.
    (unsafe { raw(libc::SYS_mremap, arguments) }) as *mut c_void
}

fn remap(
    space: &AddressSpace,
    address: usize,
    (old, new): (usize, usize),
    flags: c_int,
) -> Result<usize, MapError> {
    let place = match flags {
        0 => Place::Fixed,
        libc::MREMAP_MAYMOVE => Place::Anywhere,
        // To a place of the program's choice, or leaving the old one: no allocator does that.
        _ => return Err(MapError::BadRange),
    };
    let _blocked = SignalsBlocked::new();
    space.remap(address, old, new, place)
}

/// See mprotect(2).
///
/// # Safety
///
/// As mprotect(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mprotect(address: *mut c_void, bytes: usize, protection: c_int) -> c_int {
    if bytes > 0
        && let Some(space) = managing(address as usize)
    {
        let _blocked = SignalsBlocked::new();
        return space
            .protect(address as usize, bytes, protection)
            .map_or_else(fail, |()| 0);
    }
    #[allow(clippy::cast_sign_loss, reason = "the kernel takes the same bits")]
    let arguments = [address as usize, bytes, protection as usize, 0, 0, 0];
    // SAFETY: by this function's contract.
    if unsafe { raw(libc::SYS_mprotect, arguments) } == FAILED {
        -1
    } else {
        0
    }
}

/// See mlockall(2). Locking all of managed memory would bring all of it into RAM, against what the user has asked for:
/// the call succeeds and does nothing.
#[unsafe(no_mangle)]
pub extern "C" fn mlockall(flags: c_int) -> c_int {
    if state::space().is_some() {
        return 0;
    }
    #[allow(clippy::cast_sign_loss, reason = "the kernel takes the same bits")]
    let arguments = [flags as usize, 0, 0, 0, 0, 0];
    // SAFETY: locking memory changes none.
    if unsafe { raw(libc::SYS_mlockall, arguments) } == FAILED {
        -1
    } else {
        0
    }
}

/// What manages the memory at an address, if anything does.
pub(crate) fn managing(address: usize) -> Option<&'static AddressSpace> {
    if state::contains(address) {
        state::space()
    } else {
        None
    }
}
