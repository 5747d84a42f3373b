//! Mappings of a device's memory.
#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it should be"
)]

use core::ptr;

use pgmap_core::addr::PAGE_SIZE;
use pgmap_host::dax::DaxMapping;
use pgmap_host::file_memory::Prot;
use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

/// A fork's child does not have the mapping: it can map something else at its addresses, and keeps that when it drops what it has
/// inherited.
#[test]
fn a_child_that_drops_a_mapping_unmaps_nothing() {
    let device = rustix::fs::memfd_create("device", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&device, PAGE_SIZE as u64).unwrap();
    let mapping = DaxMapping::new(&device, 0, PAGE_SIZE, PAGE_SIZE, Prot::ReadWrite).unwrap();
    let start = mapping.start().get() as *mut core::ffi::c_void;
    // SAFETY: the child makes system calls and touches its own memory, and then exits.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let (read_write, flags) = (
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE,
        );
        // SAFETY: nothing is there that could be replaced.
        let own = unsafe { mmap_anonymous(start, PAGE_SIZE, read_write, flags) };
        drop(mapping);
        let good = own.is_ok_and(|own| {
            // SAFETY: the child has just mapped it. If it is gone, the child dies.
            unsafe { own.cast::<u64>().write_volatile(9) };
            true
        });
        // SAFETY: it runs nothing of this process any more.
        unsafe { libc::_exit(i32::from(!good)) };
    }
    let mut status = -1;
    // SAFETY: the status lives during the call.
    let waited = unsafe { libc::waitpid(child, ptr::from_mut(&mut status), 0) };
    assert_eq!((waited, status), (child, 0));
}
