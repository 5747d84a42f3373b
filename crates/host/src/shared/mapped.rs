//! Moving bytes between a mapping and a buffer or a socket without touching the mapping ourselves.
//!
//! Files that have no `read` and `write`, as those of hugetlbfs and of device-dax, are used through this. The kernel copies: where
//! a load of ours would be a SIGBUS, its copy ends early or with [`Errno::FAULT`]. The mapping is always the caller's side
//! of the copy, the buffer the other process's, which is us, too: the pages of a mapping need not be such as can be pinned then,
//! and a memory error under a copy from it is one that the kernel survives.

use core::ptr::NonNull;
use std::os::fd::{AsRawFd, BorrowedFd};

use pgmap_core::addr::{PAGE_SIZE, Page};
use rustix::io::Errno;

use super::last_errno;

/// Whether the copies can be had: a machine may forbid their system calls.
///
/// # Errors
///
/// [`Errno::NOSYS`] if not.
pub(crate) fn check() -> Result<(), Errno> {
    let none = core::ptr::null();
    // SAFETY: no part of memory is named.
    let load = unsafe { libc::process_vm_writev(own_tid(), none, 0, none, 0, 0) };
    // SAFETY: as above.
    let store = unsafe { libc::process_vm_readv(own_tid(), none, 0, none, 0, 0) };
    counted(load)
        .and(counted(store))
        .map_or(Err(Errno::NOSYS), |_| Ok(()))
}

/// Copies bytes from a mapping. Says how many, which are fewer where the mapping has none any more.
///
/// # Safety
///
/// `from` is the start of `to.len()` bytes of a shared mapping of which nobody has a reference.
pub(super) unsafe fn load(from: NonNull<u8>, to: &mut [u8]) -> Result<usize, Errno> {
    let (here, there) = (
        part(from.as_ptr(), to.len()),
        part(to.as_mut_ptr(), to.len()),
    );
    // SAFETY: both parts are as long as they say, ours to be read and written for the time of the call, and bad ones
    // are an error; nobody has a reference to the mapping, and `to` is borrowed by us alone.
    let copied =
        unsafe { libc::process_vm_writev(own_tid(), &raw const here, 1, &raw const there, 1, 0) };
    counted(copied)
}

/// Copies whole pages from a mapping. Says how many, which are fewer where the mapping has none any more.
///
/// # Safety
///
/// `from` is the start of as many pages of a mapping of which nobody has a reference.
pub(crate) unsafe fn load_pages(from: NonNull<u8>, to: &mut [Page]) -> Result<usize, Errno> {
    let (here, there) = (
        part(from.as_ptr(), size_of_val(to)),
        part(to.as_mut_ptr().cast(), size_of_val(to)),
    );
    // SAFETY: as in `load`; a page is bytes, and has any.
    let copied =
        unsafe { libc::process_vm_writev(own_tid(), &raw const here, 1, &raw const there, 1, 0) };
    Ok(counted(copied)? / PAGE_SIZE)
}

/// Copies bytes into a mapping. Says how many, which are fewer where the mapping has none any more.
///
/// # Safety
///
/// `to` is the start of `from.len()` bytes of a shared mapping of which nobody has a reference.
pub(super) unsafe fn store(to: NonNull<u8>, from: &[u8]) -> Result<usize, Errno> {
    let (here, there) = (
        part(to.as_ptr(), from.len()),
        part(from.as_ptr().cast_mut(), from.len()),
    );
    // SAFETY: as above; `there` is read only.
    let copied =
        unsafe { libc::process_vm_readv(own_tid(), &raw const here, 1, &raw const there, 1, 0) };
    counted(copied)
}

/// Sends bytes from memory to a socket: as many as it takes without waiting.
///
/// # Safety
///
/// `from` is the start of `len` bytes of memory that stay mapped during the call.
pub(super) unsafe fn send(
    from: NonNull<u8>,
    len: usize,
    socket: BorrowedFd<'_>,
) -> Result<usize, Errno> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the caller keeps these bytes mapped; the kernel only reads them, and a bad one is an error.
    counted(unsafe { libc::send(socket.as_raw_fd(), from.as_ptr().cast(), len, flags) })
}

/// Receives bytes from a socket to a mapping: as many as there are without waiting.
///
/// # Safety
///
/// `to` is the start of `len` bytes of a mapping of which nobody has a reference.
pub(super) unsafe fn receive(
    to: NonNull<u8>,
    len: usize,
    socket: BorrowedFd<'_>,
) -> Result<usize, Errno> {
    // SAFETY: the caller keeps these bytes mapped and free of references; a bad one is an error.
    counted(unsafe {
        libc::recv(
            socket.as_raw_fd(),
            to.as_ptr().cast(),
            len,
            libc::MSG_DONTWAIT,
        )
    })
}

const fn part(start: *mut u8, len: usize) -> libc::iovec {
    libc::iovec {
        iov_base: start.cast(),
        iov_len: len,
    }
}

/// Not the process's number: that is its first thread's, and when that one has ended it has no memory.
fn own_tid() -> libc::pid_t {
    rustix::thread::gettid().as_raw_pid()
}

fn counted(answer: libc::ssize_t) -> Result<usize, Errno> {
    usize::try_from(answer).map_err(|_| last_errno())
}
