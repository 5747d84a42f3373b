//! `mmap`, `munmap`, `mremap`, `mprotect` and `mlockall`.
//!
//! Managed are private anonymous mappings of 128 KiB and more that may be read and written; and those that may not, if
//! they are made with `MAP_NORESERVE`: so virtual machines (Java, JavaScript) reserve the addresses of which they use parts later. So are private
//! mappings of files that may be read and written, if the run manages files of their size: what is changed of them is nobody's but the program's. Whatever is
//! not, and every address that is not among the managed ones, goes to the kernel as it came.

use core::ffi::{c_int, c_void};
use std::os::fd::BorrowedFd;

use pgmap::{AddressSpace, MapError, Place};
use pgmap_host::thread::SignalsBlocked;

use crate::raw::{self, syscall_int, syscall_pointer, word};
use crate::state;

/// Mappings smaller than this are not worth a fault of ours.
const LEAST_BYTES: usize = 128 << 10;
const PAGE: usize = 4096;
const READ_WRITE: c_int = libc::PROT_READ | libc::PROT_WRITE;
/// What a managed mapping may be asked for, besides being private and anonymous.
const HARMLESS: c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Fails as the kernel would for the same reason.
pub(crate) fn fail(error: MapError) -> c_int {
    let errno = match error {
        MapError::OutOfMemory { .. } | MapError::Inherited => libc::ENOMEM,
        MapError::BadRange | MapError::Empty => libc::EINVAL,
        MapError::Pinned(_) => libc::EBUSY,
        MapError::Refused(errno) => errno.raw_os_error(),
    };
    raw::fail(errno)
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
pub(crate) unsafe extern "C" fn mmap(
    address: *mut c_void,
    bytes: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    let is_reservation = flags & libc::MAP_NORESERVE != 0;
    let is_used_now = protection & !libc::PROT_EXEC == READ_WRITE;
    if is_plain(flags)
        && (is_used_now || is_reservation)
        && bytes >= LEAST_BYTES
        && !pgmap::run::is_pager_thread()
        && let Some(space) = state::space()
    {
        let _blocked = SignalsBlocked::new();
        // Without a reservation a program may ask for more than there is, as long as it does not use it.
        let mapped = if is_reservation {
            space.reserve(bytes, PAGE)
        } else {
            space.map(bytes, PAGE)
        };
        if mapped.is_ok() || !is_reservation {
            return answer(mapped.and_then(|at| allow(space, at, bytes, protection)));
        }
    }
    if protection == READ_WRITE
        && is_private_file(flags)
        && let Some(at) = map_private_file(bytes, fd, offset)
    {
        return at as *mut c_void;
    }
    if flags & (libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE) == libc::MAP_FIXED {
        if let Some(space) = managing(address as usize, bytes)
            && is_plain(flags & !libc::MAP_FIXED)
            && space.is_mapped(address as usize, bytes)
        {
            let _blocked = SignalsBlocked::new();
            // SAFETY: by this function's contract.
            let renewed = unsafe { space.renew(address as usize, bytes) };
            return answer(
                renewed.and_then(|()| allow(space, address as usize, bytes, protection)),
            );
        }
        replace(address as usize, bytes);
    }
    let arguments = [
        address as usize,
        bytes,
        word(protection),
        word(flags),
        word(fd),
        usize::try_from(offset).unwrap_or(usize::MAX),
    ];
    // SAFETY: by this function's contract.
    let mapped = unsafe { syscall_pointer(libc::SYS_mmap, arguments) };
    if fd >= 0 && mapped != libc::MAP_FAILED && state::space().is_some() {
        pgmap::run::note_mapped_file(bytes);
    }
    mapped
}

/// Whether flags ask for a file of one's own, and for nothing that we do not know.
const fn is_private_file(flags: c_int) -> bool {
    flags & !(libc::MAP_PRIVATE | libc::MAP_NORESERVE) == 0 && flags & libc::MAP_PRIVATE != 0
}

/// Manages a private mapping of a file, if the run wants such. What cannot be managed is left to the kernel, which says what is wrong
/// with it, if anything is.
fn map_private_file(bytes: usize, fd: c_int, offset: i64) -> Option<usize> {
    if fd < 0 || !pgmap::run::maps_files_of(bytes) || pgmap::run::is_pager_thread() {
        return None;
    }
    let offset = u64::try_from(offset).ok()?;
    let space = state::space()?;
    let _blocked = SignalsBlocked::new();
    // SAFETY: the program vouches for its descriptor, which is used for the time of this call only; of a bad one the kernel says so.
    let file = unsafe { BorrowedFd::borrow_raw(fd) };
    let mapped = space.map_private_file(file, offset, bytes);
    mapped.inspect(|_| pgmap::run::note_mapped_file(bytes)).ok()
}

/// Whether flags ask for private anonymous memory, and for nothing that we do not know.
const fn is_plain(flags: c_int) -> bool {
    flags & !HARMLESS == 0 && flags & libc::MAP_PRIVATE != 0 && flags & libc::MAP_ANONYMOUS != 0
}

/// Gives fresh memory the rights that were asked for, or takes it back.
fn allow(
    space: &AddressSpace,
    at: usize,
    bytes: usize,
    protection: c_int,
) -> Result<usize, MapError> {
    if protection == READ_WRITE {
        return Ok(at);
    }
    // SAFETY: the memory is fresh, and nobody has it yet.
    let allowed = unsafe { space.protect(at, bytes, protection) };
    allowed.map(|()| at).inspect_err(|_| {
        // SAFETY: as above.
        let _ = unsafe { space.unmap(at, bytes) };
    })
}

/// See mmap(2).
///
/// # Safety
///
/// As [`mmap`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mmap64(
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
        // SAFETY: the program maps something else there, and so gives up what it had.
        let _ = unsafe { space.give_away(start, len) };
    }
}

/// See munmap(2).
///
/// # Safety
///
/// As munmap(2): the program gives up what it had there.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn munmap(address: *mut c_void, bytes: usize) -> c_int {
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
        crate::advice::fetch(start, len);
        let arguments = [start, len, word(libc::MADV_DONTNEED), 0, 0, 0];
        // SAFETY: by this function's contract.
        return unsafe { syscall_int(libc::SYS_madvise, arguments) };
    };
    // SAFETY: by this function's contract.
    unsafe { unmap_managed(space, start, len) }
}

/// Unmaps what is ours of a range, and has the kernel unmap what the program has mapped over it. All of it the kernel's
/// way would leave ours with addresses that are not there.
///
/// # Safety
///
/// As [`munmap`].
unsafe fn unmap_managed(space: &AddressSpace, mut start: usize, mut len: usize) -> c_int {
    let _blocked = SignalsBlocked::new();
    while len > 0 {
        let (is_given, run) = space.first_given_away(start, len);
        let answer = if is_given {
            // SAFETY: by this function's contract.
            unsafe { unmap_raw(start, run) }
        } else {
            // SAFETY: by this function's contract.
            unsafe { space.unmap(start, run) }.map_or_else(fail, |()| 0)
        };
        if answer != 0 {
            return answer;
        }
        (start, len) = (start + run, len - run);
    }
    0
}

/// # Safety
///
/// As [`munmap`].
unsafe fn unmap_raw(address: usize, bytes: usize) -> c_int {
    // SAFETY: by this function's contract.
    unsafe { syscall_int(libc::SYS_munmap, [address, bytes, 0, 0, 0, 0]) }
}

/// See mremap(2).
///
/// # Safety
///
/// As mremap(2).
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mremap(
    address: *mut c_void,
    old: usize,
    new: usize,
    flags: c_int,
    target: *mut c_void,
) -> *mut c_void {
    if let Some(space) = managing(address as usize, old) {
        return answer(remap(space, address as usize, (old, new), flags));
    }
    if new > old && state::was_private_file(address as usize, old) {
        // The kernel would put zeros where the file has more.
        return answer(Err(MapError::OutOfMemory { bytes: new }));
    }
    if flags & libc::MREMAP_FIXED != 0 {
        replace(target as usize, new);
    }
    let arguments = [address as usize, old, new, word(flags), target as usize, 0];
    // SAFETY: by this function's contract.
    unsafe { syscall_pointer(libc::SYS_mremap, arguments) }
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
    // SAFETY: the program asks for it, as mremap(2) has it.
    unsafe { space.remap(address, old, new, place) }
}

/// See mprotect(2).
///
/// # Safety
///
/// As mprotect(2).
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mprotect(
    address: *mut c_void,
    bytes: usize,
    protection: c_int,
) -> c_int {
    if bytes > 0
        && let Some(space) = managing(address as usize, bytes)
    {
        let _blocked = SignalsBlocked::new();
        // SAFETY: by this function's contract.
        return unsafe { space.protect(address as usize, bytes, protection) }
            .map_or_else(fail, |()| 0);
    }
    let arguments = [address as usize, bytes, word(protection), 0, 0, 0];
    // SAFETY: by this function's contract.
    unsafe { syscall_int(libc::SYS_mprotect, arguments) }
}

/// See `pkey_mprotect(2)`.
///
/// # Safety
///
/// As `pkey_mprotect(2)`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pkey_mprotect(
    address: *mut c_void,
    bytes: usize,
    protection: c_int,
    key: c_int,
) -> c_int {
    if key < 0 {
        // SAFETY: by this function's contract.
        return unsafe { mprotect(address, bytes, protection) };
    }
    if bytes > 0
        && let Some(space) = managing(address as usize, bytes)
    {
        let _blocked = SignalsBlocked::new();
        // SAFETY: by this function's contract.
        return unsafe { space.protect_with_key(address as usize, bytes, protection, key) }
            .map_or_else(fail, |()| 0);
    }
    let arguments = [address as usize, bytes, word(protection), word(key), 0, 0];
    // SAFETY: by this function's contract.
    unsafe { syscall_int(libc::SYS_pkey_mprotect, arguments) }
}

/// See mlockall(2). Locking all of managed memory would bring all of it into RAM, against what the user has asked for:
/// the call succeeds and does nothing.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn mlockall(flags: c_int) -> c_int {
    if state::space().is_some() {
        return 0;
    }
    let arguments = [word(flags), 0, 0, 0, 0, 0];
    // SAFETY: locking memory changes none.
    unsafe { syscall_int(libc::SYS_mlockall, arguments) }
}

/// What manages the memory of a range that begins at an address, if anything does.
pub(crate) fn managing(address: usize, bytes: usize) -> Option<&'static AddressSpace> {
    let space = if state::contains(address) {
        state::space()
    } else {
        None
    };
    space.filter(|space| !space.is_given_away(address, bytes))
}
