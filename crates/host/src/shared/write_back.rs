//! Writing the CPU's caches back to persistent memory that no system call makes durable: device-dax.
//!
//! Whoever stored does it at once, on the thread that stored: a fence waits for its own CPU's write-backs only.

use core::ptr::NonNull;

/// Writes back the cache lines of so many bytes, and waits until they are on the medium, or in what a power cut spares.
///
/// Its contract: the bytes are mapped. It loads and stores none of them.
pub(super) type WriteBack = unsafe fn(NonNull<u8>, usize);

/// What this CPU has for it: clwb, which leaves the lines in the cache, or clflushopt, or clflush, which every such CPU has.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::unnecessary_wraps, reason = "other CPUs have none")]
pub(super) fn of_this_cpu() -> Option<WriteBack> {
    use core::arch::x86_64::{__cpuid, __cpuid_count};
    /// Structured extended features.
    const LEAF: u32 = 7;
    let has = |bit: u32| __cpuid(0).eax >= LEAF && __cpuid_count(LEAF, 0).ebx & 1 << bit != 0;
    Some(match (has(24), has(23)) {
        (true, _) => x86_64::clwb,
        (false, true) => x86_64::clflushopt,
        (false, false) => x86_64::clflush,
    })
}

/// Not known here: others have such instructions, but no way to learn in user space how far they reach.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn of_this_cpu() -> Option<WriteBack> {
    None
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use core::arch::asm;
    use core::ptr::NonNull;

    /// Bytes of a cache line, on all of these CPUs.
    const LINE: usize = 64;

    macro_rules! write_back {
        ($name:ident) => {
            pub(super) unsafe fn $name(start: NonNull<u8>, len: usize) {
                let start = start.as_ptr();
                let mut line = start.map_addr(|at| at & !(LINE - 1));
                while line.addr() < start.addr() + len {
                    // SAFETY: the line has a byte that the caller says is mapped, so all of its page is; the instruction
                    // changes no byte and no flag.
                    unsafe {
                        asm!(
                            concat!(stringify!($name), " [{}]"),
                            in(reg) line,
                            options(nostack, preserves_flags)
                        );
                    }
                    line = line.wrapping_add(LINE);
                }
                // SAFETY: a fence, which orders the write-backs before whatever follows.
                unsafe { asm!("sfence", options(nostack, preserves_flags)) };
            }
        };
    }

    write_back!(clwb);
    write_back!(clflushopt);
    write_back!(clflush);
}
