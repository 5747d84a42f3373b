//! Private mappings of files, with the threads that use them interleaved in random orders; and a bug that must be found.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(
    clippy::excessive_nesting,
    reason = "a thread's code reads best where it is started"
)]
#![cfg(shuttle)]

mod explore;
mod small;

use core::ops::ControlFlow;
use std::sync::Arc;

use explore::explore;
use pgmap_core::addr::VirtAddr;
use pgmap_lab::machine::{Machine, Signal};
use pgmap_lab::model::Fault;
use pgmap_lab::private_file::ModelPrivateFile;
use pgmap_mm::fork::ChildPage;
use pgmap_mm::seeded_bug::{SeededBug, seed};
use shuttle::thread;
use small::{SOUND, machine, reclaimer};

/// A file of so many pages, one more of which is mapped, on a machine with two frames.
fn mapped(pages: u32) -> (Arc<Machine>, impl Fn(u32, usize) -> VirtAddr + Clone) {
    mapped_file(Arc::new(ModelPrivateFile::new(pages)), pages)
}

fn mapped_file(
    file: Arc<ModelPrivateFile>,
    pages: u32,
) -> (Arc<Machine>, impl Fn(u32, usize) -> VirtAddr + Clone) {
    let machine = machine(1, SOUND);
    let start = machine.space.map_private_file(pages + 1, file).unwrap();
    let word = move |page: u32, nth: usize| {
        let offset = page as usize * pgmap_core::addr::PAGE_SIZE + nth * 8;
        start.checked_add(offset).unwrap()
    };
    (machine, word)
}

/// Pages have the file's bytes until they are changed, and what was stored last from then on, however they come and go; a
/// discard brings the file's back (FLT-2, FLT-4).
fn faults_against_reclaim() {
    let (machine, word) = mapped(3);
    let reclaimer = reclaimer(&machine);
    let programs = [0u32, 1].map(|page| {
        let (machine, word) = (Arc::clone(&machine), word.clone());
        thread::spawn(move || {
            let mut cpu = machine.cpu();
            let files = Ok(ModelPrivateFile::word(page));
            assert_eq!(cpu.load(word(page, 1)), files, "the file's bytes");
            for round in 1..3 {
                assert_eq!(cpu.store(word(page, 0), round), Ok(()));
                // The other program touches this page, too: it is never changed.
                let shared = cpu.load(word(2, 0));
                assert_eq!(shared, Ok(ModelPrivateFile::word(2)), "the file's bytes");
                assert_eq!(cpu.load(word(page, 0)), Ok(round), "the last word stored");
                assert_eq!(cpu.load(word(page, 1)), files, "the file's bytes");
            }
            assert_eq!(machine.space.discard(word(page, 0), 1), Ok(()));
            assert_eq!(cpu.load(word(page, 0)), files, "the file's bytes");
        })
    });
    let mut cpu = machine.cpu();
    assert_eq!(cpu.load(word(3, 0)), Err(Signal::Bus));
    drop(cpu);
    for program in programs {
        program.join().unwrap();
    }
    reclaimer.join().unwrap();
    machine.assert_empty();
}

#[test]
fn faults_and_reclaim_mix_no_bytes() {
    explore(faults_against_reclaim);
}

#[test]
#[should_panic = "the last word stored"]
fn a_changed_page_that_counts_as_the_files_is_found() {
    seed(SeededBug::WriteKeepsTheFile);
    explore(faults_against_reclaim);
}

/// Whoever gets the addresses finds zeros; and who replaces the mapping, too (FLT-2).
fn faults_against_forgetting() {
    let (machine, word) = mapped(3);
    let reclaimer = reclaimer(&machine);
    let late = {
        let (machine, word) = (Arc::clone(&machine), word.clone());
        thread::spawn(move || {
            let mut cpu = machine.cpu();
            let word = cpu.load(word(0, 0)).unwrap();
            assert!([0, ModelPrivateFile::word(0)].contains(&word));
        })
    };
    let mut cpu = machine.cpu();
    assert_eq!(cpu.store(word(1, 0), 1), Ok(()));
    machine.space.forget_file(word(0, 0), 2);
    assert_eq!(machine.space.discard(word(0, 0), 2), Ok(()));
    for page in [0, 1] {
        assert_eq!(cpu.load(word(page, 0)), Ok(0), "the file is not there");
    }
    let behind = cpu.load(word(2, 0));
    assert_eq!(behind, Ok(ModelPrivateFile::word(2)), "the file's bytes");
    late.join().unwrap();
    assert_eq!(cpu.load(word(0, 0)), Ok(0), "the file is not there");
    drop(cpu);
    reclaimer.join().unwrap();
    machine.assert_empty();
}

#[test]
fn faults_and_forgetting_leave_nothing_of_the_file() {
    explore(faults_against_forgetting);
}

/// FLT-1: a page that the program has dropped without our knowledge, and that the file has no more, is SIGBUS, whether it was
/// changed or not, and its frame is free again.
fn unseen_drops_of_a_file_that_is_cut() {
    let file = Arc::new(ModelPrivateFile::new(2));
    let (machine, word) = mapped_file(Arc::clone(&file), 2);
    let mut cpu = machine.cpu();
    assert_eq!(cpu.load(word(0, 0)), Ok(ModelPrivateFile::word(0)));
    assert_eq!(cpu.store(word(1, 0), 1), Ok(()));
    file.cut(0);
    let reclaimer = reclaimer(&machine);
    for page in [0, 1] {
        if machine.mmu.drop_unseen(word(page, 0)) {
            assert_eq!(cpu.load(word(page, 0)), Err(Signal::Bus), "no bytes");
        }
    }
    reclaimer.join().unwrap();
    for page in [0, 1] {
        if machine.mmu.load(word(page, 0)) == Err(Fault::Poisoned) {
            file.cut(2);
            assert_eq!(cpu.load(word(page, 0)), Err(Signal::Bus), "no bytes");
            assert_eq!(machine.space.discard(word(page, 0), 1), Ok(()));
            let again = cpu.load(word(page, 0));
            assert_eq!(again, Ok(ModelPrivateFile::word(page)), "the file's bytes");
        }
    }
    drop(cpu);
    machine.assert_empty();
}

#[test]
fn an_unseen_drop_of_what_the_file_has_no_more_is_a_signal() {
    explore(unseen_drops_of_a_file_that_is_cut);
}

/// A fault that comes too late finds a page that is mapped, and leaves it there, although the file has it no more.
fn late_faults_against_a_cut() {
    let file = Arc::new(ModelPrivateFile::new(1));
    let (machine, word) = mapped_file(Arc::clone(&file), 1);
    let files = Ok(ModelPrivateFile::word(0));
    let late = {
        let (machine, word) = (Arc::clone(&machine), word.clone());
        thread::spawn(move || assert_eq!(machine.cpu().load(word(0, 0)), files))
    };
    let mut cpu = machine.cpu();
    assert_eq!(cpu.load(word(0, 0)), files, "the file's bytes");
    file.cut(0);
    late.join().unwrap();
    assert_eq!(cpu.load(word(0, 0)), files, "the file's bytes");
    drop(cpu);
    machine.assert_empty();
}

#[test]
fn a_late_fault_leaves_the_page_of_a_file_that_is_cut() {
    explore(late_faults_against_a_cut);
}

/// What cannot be read when it is touched is read later, whether it was there before or not; and a fork knows that its child would
/// not have it.
fn reads_that_are_not_possible_now() {
    let file = Arc::new(ModelPrivateFile::new(2));
    let (machine, word) = mapped_file(Arc::clone(&file), 2);
    let reclaimer = reclaimer(&machine);
    let mut cpu = machine.cpu();
    for page in [0, 1] {
        let files = Ok(ModelPrivateFile::word(page));
        file.refuse(1);
        assert!(!machine.space.before_fork(&mut cpu.worker));
        machine.space.after_fork();
        file.refuse(3);
        assert_eq!(cpu.load(word(page, 0)), files, "the file's bytes");
        file.refuse(3);
        machine.mmu.drop_unseen(word(page, 0));
        assert_eq!(cpu.load(word(page, 0)), files, "the file's bytes");
        for page in [0, 1] {
            assert_eq!(machine.space.discard(word(page, 0), 1), Ok(()));
        }
    }
    reclaimer.join().unwrap();
    drop(cpu);
    machine.assert_empty();
}

#[test]
fn a_read_that_is_not_possible_now_is_tried_again() {
    explore(reads_that_are_not_possible_now);
}

/// A fork's child is given every page of the file that its parent has not touched, or not changed and dropped.
fn forks_against_reclaim() {
    let (machine, word) = mapped(3);
    let mut cpu = machine.cpu();
    assert_eq!(cpu.store(word(0, 0), 1), Ok(()));
    assert_eq!(cpu.load(word(1, 0)), Ok(ModelPrivateFile::word(1)));
    // What is mapped now the child inherits.
    let inherited = [0, 1, 2, 3].map(|page| machine.mmu.load(word(page, 0)).is_ok());
    let reclaimer = reclaimer(&machine);
    let mut given = [false; 4];
    let done = machine.space.for_each_missing(&mut cpu.worker, |at, page| {
        let nth = (0..4u32).find(|nth| word(*nth, 0) == at).unwrap();
        let first = match page {
            ChildPage::Bytes(page) => u64::from_le_bytes(page.0[..8].try_into().unwrap()),
            ChildPage::Lost => 0,
        };
        let expected = [1, ModelPrivateFile::word(1), ModelPrivateFile::word(2), 0];
        assert_eq!(first, expected[nth as usize], "the parent's bytes");
        given[nth as usize] = true;
        ControlFlow::Continue(())
    });
    assert_eq!(done, ControlFlow::Continue(()));
    for (given, inherited) in given.into_iter().zip(inherited) {
        assert!(given || inherited, "a page is missing in the child");
    }
    reclaimer.join().unwrap();
    drop(cpu);
    machine.assert_empty();
}

#[test]
fn forks_have_every_page_of_the_file() {
    explore(forks_against_reclaim);
}

/// FLT-3: from its announcement until it is done, a fork finds the file's page where the child inherits it, also if it was on its way
/// out.
fn announced_forks_against_reclaim() {
    let (machine, word) = mapped(1);
    let files = ModelPrivateFile::word(0);
    let mut cpu = machine.cpu();
    for _ in 0..2 {
        assert_eq!(cpu.load(word(0, 0)), Ok(files), "the file's bytes");
        let reclaimer = reclaimer(&machine);
        assert!(machine.space.before_fork(&mut cpu.worker));
        for _ in 0..2 {
            thread::yield_now();
            let inherited = machine.mmu.load(word(0, 0));
            assert_eq!(inherited, Ok(files), "a child inherits every page");
        }
        assert_eq!(machine.mmu.load(word(1, 0)), Err(Fault::Poisoned));
        machine.space.after_fork();
        reclaimer.join().unwrap();
    }
    drop(cpu);
    machine.assert_empty();
}

#[test]
fn announced_forks_have_every_page_of_the_file() {
    explore(announced_forks_against_reclaim);
}

#[test]
#[should_panic = "a child inherits every page"]
fn a_page_of_the_file_that_leaves_during_a_fork_is_found() {
    seed(SeededBug::TakeOutIgnoresForks);
    explore(announced_forks_against_reclaim);
}

/// What somebody else unmaps while a fork is announced is nothing that the child would miss.
fn announced_forks_against_unmap() {
    let (machine, word) = mapped(1);
    let mut cpu = machine.cpu();
    assert_eq!(cpu.store(machine.word(0, 0), 1), Ok(()));
    let other = {
        let (machine, word) = (Arc::clone(&machine), word.clone());
        thread::spawn(move || assert_eq!(machine.space.unmap(word(0, 0), 2), Ok(())))
    };
    let complete = machine.space.before_fork(&mut cpu.worker);
    assert!(complete, "the child has every page that is left");
    assert_eq!(machine.mmu.load(machine.word(0, 0)), Ok(1));
    other.join().unwrap();
    machine.space.after_fork();
    drop(cpu);
    machine.assert_empty();
}

#[test]
fn announced_forks_do_not_miss_what_is_unmapped() {
    explore(announced_forks_against_unmap);
}
