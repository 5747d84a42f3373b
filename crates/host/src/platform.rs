//! Memory for tables, and the clock.

use core::ptr::{self, NonNull};

use std::os::fd::BorrowedFd;

use pgmap_core::platform::{BackError, DevicePages, OutOfAddressSpace, Platform};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use rustix::thread::{MembarrierCommand, membarrier};
use rustix::time::{ClockId, clock_gettime};

/// This machine.
#[derive(Clone, Copy, Debug)]
pub struct HostPlatform;

const TABLE: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

fn refused(errno: Errno) -> BackError {
    BackError::Refused(errno.raw_os_error())
}

// SAFETY: a fresh anonymous mapping is zeroed, aligned to a page, and nobody else's until it is unmapped. What replaces a part of
// it in `back` and `unback` may be read and written too, and is put there in one step.
unsafe impl Platform for HostPlatform {
    fn reserve_zeroed(&self, bytes: usize) -> Result<NonNull<u8>, OutOfAddressSpace> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), bytes, TABLE, flags) };
        start
            .ok()
            .and_then(|start| NonNull::new(start.cast()))
            .ok_or(OutOfAddressSpace { bytes })
    }

    unsafe fn release(&self, memory: NonNull<u8>, bytes: usize) {
        // SAFETY: by this function's contract the mapping came from `reserve_zeroed` and nobody uses it.
        let _ = unsafe { munmap(memory.as_ptr().cast(), bytes) };
    }

    unsafe fn discard(&self, memory: NonNull<u8>, bytes: usize) -> bool {
        // SAFETY: by this function's contract the pages are a reservation's, and nobody needs what is in them.
        unsafe { madvise(memory.as_ptr().cast(), bytes, Advice::LinuxDontNeed) }.is_ok()
    }

    unsafe fn back(
        &self,
        memory: NonNull<u8>,
        bytes: usize,
        pages: DevicePages,
    ) -> Result<(), BackError> {
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: by this function's contract the device's pages exist, so its descriptor is open.
        let file = unsafe { BorrowedFd::borrow_raw(pages.file.0) };
        let (start, offset) = (memory.as_ptr().cast(), pages.offset_bytes);
        // SAFETY: by this function's contract the pages that are replaced are a reservation's, and nobody needs what is in
        // them.
        let mapped = unsafe { mmap(start, bytes, TABLE, flags, file, offset) };
        mapped.map(drop).map_err(refused)
    }

    unsafe fn unback(&self, memory: NonNull<u8>, bytes: usize) -> Result<(), BackError> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: by this function's contract the pages that are replaced are what `back` mapped into a reservation, and
        // nobody needs what is in them.
        let mapped = unsafe { mmap_anonymous(memory.as_ptr().cast(), bytes, TABLE, flags) };
        mapped.map(drop).map_err(refused)
    }

    fn now_ns(&self) -> u64 {
        // To the machine's tick, a few milliseconds: it is asked for each pin, and the exact time takes four times as long.
        let now = clock_gettime(ClockId::MonotonicCoarse);
        let (seconds, nanos) = (now.tv_sec.cast_unsigned(), now.tv_nsec.cast_unsigned());
        seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
    }
}

/// Lets reference counts use the kernel's asymmetric barrier, if it has one. To be called before other threads start.
pub fn use_membarrier() {
    if membarrier(MembarrierCommand::RegisterPrivateExpedited).is_ok() {
        pgmap_sync::set_heavy_barrier(|| {
            // Registered above, so it cannot fail.
            let _ = membarrier(MembarrierCommand::PrivateExpedited);
        });
    }
}
