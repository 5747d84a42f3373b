//! What a program limits for itself. Alone in its process, as limits are the process's.
#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it should be"
)]

mod common;

use common::{arena, at, bytes, install, page};
use pgmap_core::addr::VirtAddr;
use pgmap_host::mmu::HostMmu;
use pgmap_mm::mmu::{Mmu, Protect, Slot, Stop};
use rustix::mm::MprotectFlags;

const READ: MprotectFlags = MprotectFlags::READ;

fn protect(mmu: &HostMmu, at: VirtAddr, count: u32, protection: MprotectFlags) {
    // SAFETY: the arena is the test's.
    unsafe { mmu.protect(at, count, protection) }.unwrap();
}

/// Where the program has limited its writable memory, read-only pages stay, and nothing is lost.
#[test]
fn pages_stay_where_writable_memory_is_limited() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Some(mmu) = arena(16) else { return };
    install(&mmu, 0, 0..2, Protect::ReadWrite);
    for forbidden in [READ, MprotectFlags::empty()] {
        protect(&mmu, at(&mmu, 0), 2, forbidden);
        let before = getrlimit(Resource::Data);
        let current = Some(4096);
        setrlimit(Resource::Data, Rlimit { current, ..before }).unwrap();
        let progress = mmu.take_out(at(&mmu, 0), 2, Slot(0));
        setrlimit(Resource::Data, before).unwrap();
        assert_eq!((progress.done, progress.stop), (0, Some(Stop::Unevictable)));
        protect(&mmu, at(&mmu, 0), 2, READ);
        assert_eq!((bytes(&mmu, 0).0, bytes(&mmu, 1).0), (page(0).0, page(1).0));
    }
}
