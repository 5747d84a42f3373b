//! An arena for a test, and ways to touch it.
#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it should be"
)]
#![allow(dead_code, reason = "every test file uses some of these")]

use pgmap_core::addr::{PAGE_SIZE, Page, VirtAddr};
use pgmap_host::mmu::{Children, HostError, HostMmu, Inherit};
use pgmap_mm::mmu::{Mmu, Protect};

/// An arena of some pages with as many slots, or a loud skip. Children of forks have it, if somebody is told of them.
pub(crate) fn arena(pages: usize) -> Option<HostMmu> {
    let slots = u32::try_from(pages).unwrap();
    match HostMmu::new(pages * PAGE_SIZE, slots) {
        Ok(mmu) => {
            if mmu.children() == Children::Served {
                mmu.let_children_inherit(mmu.range(), Inherit::Pages)
                    .unwrap();
            }
            Some(mmu)
        }
        Err(error @ (HostError::Forbidden(_) | HostError::TooOld)) => {
            eprintln!("SKIPPED, because this machine lacks what the test needs: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// The address of the arena's page with this number.
pub(crate) fn at(mmu: &HostMmu, page: usize) -> VirtAddr {
    VirtAddr::new(mmu.range().start + page * PAGE_SIZE)
}

/// A page that differs from all others in its first bytes and its last.
pub(crate) fn page(number: u8) -> Page {
    let mut page = Page([number; PAGE_SIZE]);
    page.0[0] = number.wrapping_add(100);
    page.0[PAGE_SIZE - 1] = number.wrapping_add(200);
    page
}

/// Installs `page(first)..` at `start`.
pub(crate) fn install(
    mmu: &HostMmu,
    start: usize,
    numbers: core::ops::Range<u8>,
    protect: Protect,
) {
    let pages: Vec<Page> = numbers.map(page).collect();
    let progress = mmu.install(at(mmu, start), &pages, protect);
    assert_eq!(progress.stop, None);
    assert_eq!(progress.done, pages.len());
}

/// The bytes of the arena's page, which may have to wait for them.
pub(crate) fn bytes(mmu: &HostMmu, number: usize) -> Page {
    let page = at(mmu, number).get() as *const Page;
    // SAFETY: the arena is mapped, and the test lets nobody write this page meanwhile.
    unsafe { page.read_volatile() }
}

/// Writes one byte of the arena.
pub(crate) fn poke(mmu: &HostMmu, number: usize, value: u8) {
    let byte = at(mmu, number).get() as *mut u8;
    // SAFETY: the arena is mapped and writable, and the test lets nobody else use this page meanwhile.
    unsafe { byte.write_volatile(value) };
}

/// What a system call answers that reads the page: its length, or an error.
pub(crate) fn syscall_reads(mmu: &HostMmu, number: usize) -> std::io::Result<usize> {
    let (_reader, writer) = rustix::pipe::pipe().unwrap();
    let start = at(mmu, number).get() as *const u8;
    // SAFETY: the arena is mapped; an unreadable page is the kernel's to report.
    let bytes = unsafe { core::slice::from_raw_parts(start, PAGE_SIZE) };
    Ok(rustix::io::write(&writer, bytes)?)
}

/// What a system call answers that writes the first byte of the page: its length, or an error.
pub(crate) fn syscall_writes(mmu: &HostMmu, number: usize) -> std::io::Result<usize> {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    rustix::io::write(&writer, &[0xee])?;
    let start = at(mmu, number).get() as *mut u8;
    // SAFETY: the arena is mapped; an unwritable page is the kernel's to report.
    let bytes = unsafe { core::slice::from_raw_parts_mut(start, 1) };
    Ok(rustix::io::read(&reader, bytes)?)
}
