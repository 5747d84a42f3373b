//! What scenarios with a mapped file have in common.
#![allow(dead_code, reason = "no test uses all of it")]

use std::sync::Arc;

use pgmap_core::addr::{PAGE_SIZE, VirtAddr};
use pgmap_core::memcg::Memcg;
use pgmap_lab::disk::{Flaw, ModelFile};
use pgmap_lab::file_machine::{FileCpu, FileMachine, FileSetup};
use pgmap_lab::shared_memory::{self, ModelSharedMmu};
use pgmap_mm::gup::{Pin, PinError, PinnedPages};
use pgmap_mm::page_cache::FileVma;
use pgmap_mm::page_table::BLOCK_PAGES;
use shuttle::thread;

/// Bytes in a page.
pub(crate) const PAGE: usize = PAGE_SIZE;
/// A word of a file whose bytes are all 9.
pub(crate) const NINES: u64 = u64::from_ne_bytes([9; 8]);
/// A disk that does what it says.
pub(crate) const SOUND: Flaw = Flaw::None;
/// The first page of the file's second block.
pub(crate) const NEXT_BLOCK: u32 = BLOCK_PAGES;
/// Pages of a group that is read ahead: four blocks.
pub(crate) const GROUP: u32 = 4 * BLOCK_PAGES;
/// Pages that the file may have. The last group is no whole one, and has the same locks as the first.
pub(crate) const MOST_PAGES: u32 = 2 * GROUP + BLOCK_PAGES + 2;

/// A machine whose file has `bytes` bytes, all of them 0, and is mapped as a whole.
pub(crate) fn machine(frames: u64, bytes: usize, flaw: Flaw) -> (Arc<FileMachine>, FileVma) {
    machine_of(frames, ModelFile::new(vec![0; bytes], flaw), None)
}

/// The same, with bytes that are all 9.
pub(crate) fn full_machine(frames: u64, bytes: usize) -> (Arc<FileMachine>, FileVma) {
    machine_of(frames, ModelFile::new(vec![9; bytes], SOUND), None)
}

/// The same, with pages that are charged to a group.
pub(crate) fn charged_machine(
    frames: u64,
    bytes: usize,
    memcg: &Arc<Memcg>,
) -> (Arc<FileMachine>, FileVma) {
    let disk = ModelFile::new(vec![9; bytes], SOUND);
    machine_of(frames, disk, Some(Arc::clone(memcg)))
}

fn machine_of(
    frames: u64,
    disk: Arc<ModelFile>,
    memcg: Option<Arc<Memcg>>,
) -> (Arc<FileMachine>, FileVma) {
    let machine = FileMachine::new(FileSetup {
        frames,
        most_pages: MOST_PAGES,
        memory: ModelSharedMmu::new(MOST_PAGES, shared_memory::Flaw::None),
        disk,
        memcg,
    });
    let machine = machine.unwrap();
    let vma = machine.map(0, &(0..MOST_PAGES));
    (machine, vma)
}

/// Another thread of the scenario.
pub(crate) fn spawn<R: Send + 'static>(
    machine: &Arc<FileMachine>,
    run: impl FnOnce(&Arc<FileMachine>) -> R + Send + 'static,
) -> thread::JoinHandle<R> {
    let machine = Arc::clone(machine);
    thread::spawn(move || run(&machine))
}

/// Pins a page, as soon as there is memory.
pub(crate) fn pin(cpu: &mut FileCpu, at: VirtAddr, pin: &Pin) -> PinnedPages {
    loop {
        match cpu.pin(at, 1, pin) {
            Ok(pinned) => return pinned,
            Err(PinError::NoMemory { .. }) => thread::yield_now(),
            Err(error) => panic!("{error}"),
        }
    }
}

/// A word of a file's bytes.
pub(crate) fn word_of(bytes: &[u8], page: usize, nth: usize) -> u64 {
    let start = page * PAGE_SIZE + nth * 8;
    u64::from_ne_bytes(bytes[start..start + 8].try_into().unwrap())
}
