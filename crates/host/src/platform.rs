//! Memory for tables, and the clock.

use core::ptr::{self, NonNull};

use pgmap_core::platform::{OutOfAddressSpace, Platform};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use rustix::thread::{MembarrierCommand, membarrier};
use rustix::time::{ClockId, clock_gettime};

/// This machine.
#[derive(Clone, Copy, Debug)]
pub struct HostPlatform;

// SAFETY: a fresh anonymous mapping is zeroed, aligned to a page, and nobody else's until it is unmapped.
unsafe impl Platform for HostPlatform {
    fn reserve_zeroed(&self, bytes: usize) -> Result<NonNull<u8>, OutOfAddressSpace> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), bytes, protection, flags) };
        start
            .ok()
            .and_then(|start| NonNull::new(start.cast()))
            .ok_or(OutOfAddressSpace { bytes })
    }

    unsafe fn release(&self, memory: NonNull<u8>, bytes: usize) {
        // SAFETY: by this function's contract the mapping came from `reserve_zeroed` and nobody uses it.
        let _ = unsafe { munmap(memory.as_ptr().cast(), bytes) };
    }

    fn now_ns(&self) -> u64 {
        let now = clock_gettime(ClockId::Monotonic);
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
