//! The memory of a file's pages, and its mappings under userfaultfd.
#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it should be"
)]

mod common;

use core::{ptr, slice};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use common::arena;
use pgmap_core::addr::{PAGE_SIZE, Page, VirtAddr};
use pgmap_host::event::Event;
use pgmap_host::file_backing::FileBacking;
use pgmap_host::file_memory::{FileMemory, Prot};
use pgmap_host::mmu::HostMmu;
use pgmap_mm::backing::{Backing, Transfer};
use pgmap_mm::mmu::{Progress, Protect, Stop};
use pgmap_mm::shared_mmu::SharedMmu;
use rustix::mm::{MapFlags, MlockFlags, ProtFlags};

const PAGES: u32 = 4;
const LEN: usize = PAGES as usize * PAGE_SIZE;

/// A fork is told to every arena of the process, and waits until each has listened: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file's memory, of which every page is mapped at an address; none where the machine does not allow it.
fn mapped(protect: Protect) -> Option<(FileMemory, VirtAddr)> {
    Some(mapped_in(&Arc::new(arena(1)?), protect))
}

fn mapped_in(mmu: &Arc<HostMmu>, protect: Protect) -> (FileMemory, VirtAddr) {
    let memory = FileMemory::new(Arc::clone(mmu), PAGES).unwrap();
    let at = memory.map(&(0..PAGES), Prot::ReadWrite).unwrap();
    (0..PAGES).for_each(|page| memory.pages(page, 1).touch(0));
    assert_eq!(map(&memory, at, protect), all());
    (memory, at)
}

fn all() -> Progress {
    Progress::complete(PAGES as usize)
}

fn map(memory: &FileMemory, at: VirtAddr, protect: Protect) -> Progress {
    SharedMmu::map(memory, at, PAGES as usize, protect)
}

/// FLT-1: an address answers with SIGBUS whatever was mapped there before, protected or not.
#[test]
fn what_was_protected_can_be_poisoned() {
    let _alone = alone();
    for protect in [Protect::ReadOnly, Protect::ReadWrite] {
        let Some((memory, at)) = mapped(protect) else {
            return;
        };
        SharedMmu::unmap(&memory, at, PAGES as usize);
        assert_eq!(memory.poison(at, PAGES as usize), all());
        SharedMmu::unmap(&memory, at, PAGES as usize);
        // Protected while nothing is mapped there.
        assert_eq!(memory.protect(at, PAGES as usize), all());
        assert_eq!(memory.poison(at, PAGES as usize), all());
    }
}

/// RMAP-1: pages that the program has locked are unmapped like all others: nobody stores to them unseen.
#[test]
fn locked_pages_are_unmapped() {
    let _alone = alone();
    let Some((memory, at)) = mapped(Protect::ReadWrite) else {
        return;
    };
    // SAFETY: the addresses are mapped.
    unsafe { rustix::mm::mlock_with(at.get() as *mut _, LEN, MlockFlags::ONFAULT) }.unwrap();
    let exists = Progress {
        done: 0,
        stop: Some(Stop::Exists),
    };
    assert_eq!(map(&memory, at, Protect::ReadWrite), exists);
    SharedMmu::unmap(&memory, at, PAGES as usize);
    assert_eq!(map(&memory, at, Protect::ReadWrite), all());
}

/// What `act` says in a fork's child, with memory of its own where the parent has a mapping.
fn in_a_child(at: VirtAddr, act: impl FnOnce(*mut u8) -> bool) -> bool {
    // SAFETY: the child makes system calls and touches its own memory, and then exits.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let (start, flags) = (
            at.get() as *mut _,
            MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE,
        );
        // SAFETY: nothing is there that could be replaced.
        let own = unsafe { rustix::mm::mmap_anonymous(start, LEN, protection, flags) };
        let good = own.is_ok_and(|own| act(own.cast()));
        // SAFETY: it runs nothing of this process any more.
        unsafe { libc::_exit(i32::from(!good)) };
    }
    let mut status = -1;
    // SAFETY: the status lives during the call.
    let waited = unsafe { libc::waitpid(child, ptr::from_mut(&mut status), 0) };
    assert_eq!(waited, child);
    status == 0
}

/// Lets go of all that a child has inherited, and answers whether it has its own memory still, in which it stores.
fn let_go(memory: &FileMemory, at: VirtAddr, own: *mut u8) -> bool {
    // SAFETY: the child has just mapped it.
    unsafe { own.write_volatile(9) };
    memory.free(0, PAGES as usize);
    SharedMmu::unmap(memory, at, PAGES as usize);
    // SAFETY: it does nothing here.
    unsafe { FileMemory::unmap(memory, at, PAGES) };
    // SAFETY: as above, if it is there still.
    memory.is_inherited() && unsafe { own.read_volatile() } == 9
}

/// FLT-3: a fork's child that lets go of what it has inherited takes nothing away, neither from its parent nor from itself: the
/// addresses are not those of the mapping there.
#[test]
fn a_child_takes_nothing_away() {
    let _alone = alone();
    let Some(mmu) = arena(1).map(Arc::new) else {
        return;
    };
    let (memory, at) = mapped_in(&mmu, Protect::ReadWrite);
    let store = at.get() as *mut u8;
    // SAFETY: the address is mapped.
    unsafe { store.write_volatile(7) };
    let good = thread::scope(|scope| {
        let child = scope.spawn(|| in_a_child(at, |own| let_go(&memory, at, own)));
        // The fork waits until somebody has listened.
        while !child.is_finished() {
            mmu.next_events(&mut [Event::Kick], Some(10));
        }
        child.join().unwrap()
    });
    assert!(good, "the child's own memory");
    // SAFETY: the address is mapped.
    assert_eq!(unsafe { store.read_volatile() }, 7, "the parent's memory");
}

/// Bytes of a file come to their pages, and go back, in requests of several buffers' length; behind its end there are zeros.
#[test]
fn a_transfer_longer_than_a_buffer_has_every_byte() {
    let _alone = alone();
    let Some(mmu) = arena(1) else {
        return;
    };
    let (pages, len) = (600, 599 * PAGE_SIZE + 100);
    let mut bytes: Vec<u8> = (0..pages * PAGE_SIZE / 8)
        .flat_map(|word| (word as u64).to_le_bytes())
        .collect();
    bytes.truncate(len);
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&bytes, 0).unwrap();
    let memory = Arc::new(FileMemory::new(Arc::new(mmu), 600).unwrap());
    let backing = FileBacking::new(file.try_clone().unwrap()).with_memory(Arc::clone(&memory));
    let transfer = || Transfer::new(0, memory.pages(0, pages), len as u64);
    let mut read = transfer();
    // Something is there before.
    memory.pages(599, 1).touch(0);
    backing.read(slice::from_mut(&mut read));
    assert_eq!(read.outcome, Ok(()));
    bytes.resize(pages * PAGE_SIZE, 0);
    for (nth, expected) in bytes.chunks(PAGE_SIZE).enumerate() {
        let mut page = Page::ZERO;
        memory.pages(0, pages).copy_page(nth, &mut page);
        assert!(page.0 == expected, "page {nth}");
    }
    backing.punch(0..len as u64).unwrap();
    let mut write = transfer();
    backing.write(slice::from_mut(&mut write));
    assert_eq!(write.outcome, Ok(()));
    let mut written = vec![0; pages * PAGE_SIZE];
    assert_eq!(file.read_at(&mut written, 0).unwrap(), len);
    assert!(written == bytes);
}
