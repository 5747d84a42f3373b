//! A program that uses the library may fork at any time. Alone in its process, and one test at a time: a fork waits for the pager of
//! every memory that there is.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use core::hint::black_box;
use core::mem::ManuallyDrop;
use core::ops::Range;
use core::ptr;
use core::time::Duration;
use std::fs;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use common::fork::{Watchdog, fork, in_a_child, wait};
use common::touch::can_read;
use common::{MIB, PAGE, Scratch, memory};
use pgmap::{
    Backing, BackingError, MapError, MapFileError, Memory, OpenError, OpenOptions, Pin, PinError,
    Prot, SyncError, Transfer, TruncateError,
};

/// How long a test forks.
const LENGTH: Duration = Duration::from_secs(2);
/// How long a test may take that does not hang.
const PATIENCE: Duration = Duration::from_secs(30);

/// No other test runs while this lives, and this one does not hang.
fn alone() -> (MutexGuard<'static, ()>, Watchdog) {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    (alone, Watchdog::new(PATIENCE))
}

/// A memory whose forks somebody has to be told of, so that there is something to test; none, and a word why, where the machine does not tell.
fn served(ram_bytes: usize) -> Option<Memory> {
    let memory = memory(ram_bytes)?;
    if memory.space().needs_announced_forks() {
        eprintln!("SKIPPED: nobody is told of forks here, as that takes CAP_SYS_PTRACE");
        return None;
    }
    Some(memory)
}

/// Forks again and again while other threads do `works` again and again.
fn fork_during(works: &[&(dyn Fn() + Sync)]) {
    let end = Instant::now() + LENGTH;
    let goes_on = || Instant::now() < end;
    let repeat = |work: &(dyn Fn() + Sync)| {
        while goes_on() {
            work();
        }
    };
    thread::scope(|scope| {
        for work in works {
            scope.spawn(|| repeat(work));
        }
        let mut forks = 0;
        while goes_on() {
            assert!(in_a_child(|| true));
            forks += 1;
        }
        assert!(forks >= 10, "{forks} forks in {LENGTH:?}");
    });
}

/// The first byte at an address that is mapped.
fn byte_at(at: usize) -> u8 {
    // SAFETY: the caller has mapped it, and bytes may be anything.
    unsafe { (at as *const u8).read_volatile() }
}

/// WB-2: copies of pinned pages are written while the program forks: whoever forks has the allocator's locks until the pager has
/// listened, and the pager may wait for whoever copies.
#[test]
fn copies_are_made_while_the_program_forks() {
    let _alone = alone();
    let Some(memory) = served(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("forks", 64);
    let file = memory.open(&scratch.0).unwrap();
    let space = memory.space();
    let map = space.map_file(&file, 0..64 * PAGE as u64, Prot::ReadWrite);
    let map = map.unwrap();
    let first = map.range().start..map.range().start + PAGE;
    let pins = space.pin_user_pages(first, &Pin::WRITE).unwrap();
    fork_during(&[&|| file.sync_all().unwrap(), &|| {
        (1..64).for_each(|page| map.write(page * PAGE, &[1]));
    }]);
    drop(pins);
}

/// Files are opened, mapped, touched behind their ends and closed while the program forks.
#[test]
fn files_come_and_go_while_the_program_forks() {
    let _alone = alone();
    let Some(memory) = served(8 * MIB) else {
        return;
    };
    let scratches: Vec<_> = (0..8)
        .map(|nth| Scratch::new(&format!("forks-{nth}"), 4))
        .collect();
    let shared = Scratch::new("forks-shared", 64);
    let shared = memory.open(&shared.0).unwrap();
    let space = memory.space();
    let map = |pages: Range<usize>| {
        let bytes = pages.start as u64 * PAGE as u64..pages.end as u64 * PAGE as u64;
        space.map_file(&shared, bytes, Prot::ReadWrite).unwrap()
    };
    let beyond = map(64..128);
    fork_during(&[
        &|| {
            let files: Vec<_> = scratches
                .iter()
                .map(|scratch| memory.open(&scratch.0).unwrap())
                .collect();
            for file in &files {
                let map = space.map_file(file, 0..PAGE as u64, Prot::ReadWrite);
                map.unwrap().write(0, &[2]);
            }
        },
        &|| {
            // So many that the lists of them grow and shrink.
            let maps: Vec<_> = (0..1024)
                .map(|nth| {
                    let page = nth % 64;
                    let map = map(page..page + 1);
                    map.write(0, &[3]);
                    map
                })
                .collect();
            drop(maps);
        },
        &|| (0..64).for_each(|page| assert!(!can_read(beyond.range().start + page * PAGE))),
    ]);
}

/// Anonymous memory and private mappings of files come and go while the program forks.
#[test]
fn areas_come_and_go_while_the_program_forks() {
    let _alone = alone();
    let Some(memory) = served(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("forks-private", 4);
    let scratch = fs::File::open(&scratch.0).unwrap();
    let space = memory.space();
    fork_during(&[
        &|| {
            let mut maps: Vec<_> = (0..200).map(|_| memory.map(PAGE).unwrap()).collect();
            for map in maps.iter_mut().step_by(2) {
                map.as_mut_slice()[0] = 1;
            }
            // Every second one first, so that areas are split.
            let kept: Vec<_> = maps.into_iter().step_by(2).collect();
            assert!(kept.iter().all(|map| map.as_slice()[0] == 1));
        },
        &|| {
            let maps: Vec<_> = (0..100)
                .map(|_| {
                    let at = space.map_private_file(scratch.as_fd(), 0, 4 * PAGE);
                    at.unwrap()
                })
                .collect();
            for at in maps {
                byte_at(at);
                // SAFETY: nobody else has the mapping.
                unsafe { space.unmap(at, 4 * PAGE) }.unwrap();
            }
        },
    ]);
}

/// Zeros that are read by code which allocates.
#[derive(Debug)]
struct Allocating;

impl Backing for Allocating {
    fn read(&self, _: &mut [Transfer<'_>]) {
        let sizes = (1..100).map(|nth| nth * 100);
        let all: Vec<Vec<u8>> = sizes.map(|size| vec![1; size]).collect();
        black_box(&all);
    }

    fn write(&self, _: &mut [Transfer<'_>]) {}

    fn sync(&self) -> Result<(), BackingError> {
        Ok(())
    }

    fn set_len(&self, _: u64) -> Result<(), BackingError> {
        Ok(())
    }

    fn punch(&self, _: Range<u64>) -> Result<(), BackingError> {
        Ok(())
    }
}

/// Somebody else's code that reads a file for the pager may allocate, while somebody who forks has the allocator's locks.
#[test]
fn a_backing_allocates_while_the_program_forks() {
    let _alone = alone();
    let Some(memory) = served(8 * MIB) else {
        return;
    };
    let bytes = 64 * PAGE as u64;
    let file = memory.open_over("zeros", Arc::new(Allocating), bytes, &OpenOptions::new());
    let file = file.unwrap();
    let map = memory.space().map_file(&file, 0..bytes, Prot::Read);
    let map = map.unwrap();
    fork_during(&[&|| {
        (0..64).for_each(|page| map.read(page * PAGE, &mut [0]));
        file.punch(0..bytes, Duration::ZERO).unwrap();
    }]);
}

/// Each memory hears of each fork, and is in the way of no other.
#[test]
fn two_memories_hear_of_each_fork() {
    let _alone = alone();
    let Some((one, other)) = served(8 * MIB).zip(memory(8 * MIB)) else {
        return;
    };
    let work = |memory: &Memory| {
        let bytes = 64 * PAGE as u64;
        let file = memory.open_over("zeros", Arc::new(Allocating), bytes, &OpenOptions::new());
        let map = memory
            .space()
            .map_file(&file.unwrap(), 0..bytes, Prot::ReadWrite);
        let map = map.unwrap();
        (0..64).for_each(|page| map.write(page * PAGE, &[4]));
    };
    fork_during(&[&|| work(&one), &|| work(&other)]);
}

/// A memory begins and ends while the program forks: a fork finds somebody who hears of it, or nothing of the memory.
#[test]
fn memories_come_and_go_while_the_program_forks() {
    let _alone = alone();
    if memory(MIB).is_none() {
        return;
    }
    fork_during(&[&|| {
        let memory = memory(MIB).unwrap();
        let mut map = memory.map(2 * MIB).unwrap();
        map.as_mut_slice().fill(5);
    }]);
}

/// Whoever has pages pinned keeps the memory, but nobody who would hear of forks.
#[test]
fn forks_go_on_after_the_memory_has_ended() {
    let _alone = alone();
    let Some(memory) = served(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("forks-after", 4);
    let space = Arc::clone(memory.space());
    let file = memory.open(&scratch.0).unwrap();
    let of_file = space.map_file(&file, 0..PAGE as u64, Prot::ReadWrite);
    let of_file = of_file.unwrap();
    let mut map = memory.map(4 * PAGE).unwrap();
    map.as_mut_slice().fill(6);
    let at = map.range().start;
    let pins = [map.range().clone(), of_file.range()]
        .map(|range| space.pin_user_pages(range, &Pin::WRITE).unwrap());
    drop((map, of_file, file));
    drop(memory);
    for _ in 0..10 {
        assert!(in_a_child(|| true));
        assert_eq!(byte_at(at), 6);
    }
    drop(pins);
    assert!(in_a_child(|| true));
}

/// What a child was to have when it was forked it gets, though the memory ends before its turn comes.
#[test]
fn children_get_their_pages_though_the_memory_ends() {
    const PAGES: usize = 64 * MIB / PAGE;
    let _alone = alone();
    let Some(memory) = memory(MIB) else {
        return;
    };
    if memory.space().needs_announced_forks() {
        eprintln!("SKIPPED, because this process may not be told of its forks (CAP_SYS_PTRACE)");
        return;
    }
    let mut map = ManuallyDrop::new(memory.map(PAGES * PAGE).unwrap());
    map.as_mut_slice().fill(9);
    let at = map.range().start;
    let all_there = || {
        // SAFETY: the child ends if it hangs.
        unsafe { libc::alarm(10) };
        (0..PAGES).all(|page| byte_at(at + page * PAGE) == 9)
    };
    let children = [fork(all_there), fork(all_there), fork(all_there)];
    drop(memory);
    assert_eq!(children.map(wait), [0; 3]);
}

/// A child's memory has no pager: ending it there waits for nobody, and takes nothing from the parent.
#[test]
fn a_child_may_end_the_memory() {
    let _alone = alone();
    let Some(memory) = memory(MIB) else {
        return;
    };
    let scratch = Scratch::new("forks-child", 4);
    let file = memory.open(&scratch.0).unwrap();
    let map = memory
        .space()
        .map_file(&file, 0..PAGE as u64, Prot::ReadWrite);
    let map = map.unwrap();
    let mut anonymous = memory.map(4 * MIB).unwrap();
    anonymous.as_mut_slice().fill(7);
    let has_pages = !memory.space().needs_announced_forks();
    for _ in 0..10 {
        let ended = in_a_child(|| {
            // SAFETY: the child ends if it hangs.
            unsafe { libc::alarm(10) };
            let found = !has_pages || anonymous.as_slice().iter().all(|byte| *byte == 7);
            // SAFETY: the child drops what it has once, here, and ends.
            drop(unsafe { ptr::read(&raw const map) });
            // SAFETY: as above.
            drop(unsafe { ptr::read(&raw const anonymous) });
            // SAFETY: as above.
            drop(unsafe { ptr::read(&raw const file) });
            // SAFETY: as above.
            drop(unsafe { ptr::read(&raw const memory) });
            found
        });
        assert!(ended, "the child did not end well");
    }
    map.write(0, &[8]);
    file.sync_all().unwrap();
    assert_eq!(scratch.page(0)[0], 8);
    assert!(anonymous.as_slice().iter().all(|byte| *byte == 7));
}

/// A child's pins are its parent's: ending them there waits for nobody, though other threads of the parent were pinning when it was forked.
#[test]
fn a_child_may_end_pins() {
    let _alone = alone();
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("forks-pins", 64);
    let file = memory.open(&scratch.0).unwrap();
    let (space, whole) = (memory.space(), 0..64 * PAGE as u64);
    let map = space.map_file(&file, whole, Prot::ReadWrite).unwrap();
    let first = map.range().start..map.range().start + PAGE;
    let pins = space.pin_user_pages(first, &Pin::WRITE).unwrap();
    let others = map.range().start + PAGE..map.range().start + 2 * PAGE;
    let end = Instant::now() + LENGTH;
    let pin = |_| space.pin_user_pages(others.clone(), &Pin::READ);
    let pin_many = || {
        while Instant::now() < end {
            drop((0..100).map(pin).collect::<Vec<_>>());
        }
    };
    thread::scope(|scope| {
        // More than the register has parts.
        for _ in 0..20 {
            scope.spawn(pin_many);
        }
        while Instant::now() < end {
            let ended = in_a_child(|| {
                // SAFETY: the child ends if it hangs.
                unsafe { libc::alarm(10) };
                // SAFETY: the child drops what it has once, here, and ends.
                drop(unsafe { ptr::read(&raw const pins) });
                true
            });
            assert!(ended, "the child did not end well");
        }
    });
    drop(pins);
}

/// What a child has inherited is its parent's: it is refused there, and the parent's file stays as it is.
#[test]
fn a_child_may_not_change_what_it_has_inherited() {
    let _alone = alone();
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("forks-inherited", 4);
    let file = memory.open(&scratch.0).unwrap();
    let space = memory.space();
    let map = space.map_file(&file, 0..4 * PAGE as u64, Prot::ReadWrite);
    let map = map.unwrap();
    map.write(PAGE, &[8]);
    let refused = in_a_child(|| {
        let cut = file.set_len(0, Duration::ZERO);
        let punched = file.punch(0..PAGE as u64, Duration::ZERO);
        let mapped = space.map_file(&file, 0..PAGE as u64, Prot::Read);
        let pinned = space.pin_user_pages(map.range(), &Pin::READ);
        matches!(cut, Err(TruncateError::Inherited))
            && matches!(punched, Err(TruncateError::Inherited))
            && matches!(file.sync_all(), Err(SyncError::Inherited))
            && matches!(mapped, Err(MapFileError::Inherited))
            && matches!(pinned, Err(PinError::Inherited))
            && matches!(memory.open(&scratch.0), Err(OpenError::Inherited(_)))
            && matches!(memory.map(PAGE), Err(MapError::Inherited))
    });
    assert!(refused, "a child used what is its parent's");
    file.sync_all().unwrap();
    assert_eq!(file.len_bytes(), 4 * PAGE as u64);
    assert_eq!(scratch.page(1)[0], 8);
}
