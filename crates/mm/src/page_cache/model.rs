//! Pins against those who take a page away, in every order that the machine's memory allows (loom).
//!
//! The real page cache, with as little below it as it can do with: a memory that knows whether its page was given back, and a
//! file. The lab explores longer scenarios; there every atomic access is sequentially consistent, here none is.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p pgmap-mm --release --lib
//! ```
#![allow(
    clippy::excessive_nesting,
    reason = "a thread's code reads best where it is started"
)]

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::fmt;
use core::ops::{ControlFlow, Range};

use loom::cell::UnsafeCell;
use loom::thread;
use pgmap_core::addr::{PAGE_SIZE, VirtAddr};
use pgmap_core::memremap::MemoryMap;
use pgmap_core::platform::HeapPlatform;
use pgmap_sync::atomic::{AtomicBool, Ordering};

use super::{CacheParts, FileNumber, FileVma, NotPinned, OnPinned, PageCache, VmaAccess};
use crate::backing::{Backing, BackingError, Transfer};
use crate::fault::{Access, Outcome};
use crate::gup::PinAccess;
use crate::mmu::{Progress, Protect};
use crate::page_table::PageIndex;
use crate::seeded_bug::{SeededBug, seed};
use crate::shared_mmu::{Bounce, SharedMmu, SharedPages};
use crate::space::Worker;

/// Pages of the file.
const PAGES: usize = 2;

/// The memory of the pages of a file that nobody maps.
struct Memory {
    bytes: Bounce,
    /// Stand for the bytes of each page: loom panics if they are given back while somebody uses them.
    uses: [UnsafeCell<()>; PAGES],
    /// Whether the first page's bytes have been given back.
    removed: AtomicBool,
}

// SAFETY: nobody looks at the bytes but through `SharedPages`; the rest are the model's own shared cells.
unsafe impl Sync for Memory {}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Memory")
    }
}

// SAFETY: nothing is ever mapped.
unsafe impl SharedMmu for Memory {
    fn pages(&self, first: u32, count: usize) -> SharedPages<'_> {
        let first = first as usize;
        self.bytes.pages(first..first + count)
    }

    fn map(&self, _: VirtAddr, count: usize, _: Protect) -> Progress {
        Progress {
            done: count,
            stop: None,
        }
    }

    fn protect(&self, _: VirtAddr, count: usize) -> Progress {
        Progress {
            done: count,
            stop: None,
        }
    }

    fn unprotect(&self, _: VirtAddr, _: usize) {}

    fn unmap(&self, _: VirtAddr, _: usize) {}

    fn poison(&self, _: VirtAddr, count: usize) -> Progress {
        Progress {
            done: count,
            stop: None,
        }
    }

    fn wake(&self, _: VirtAddr, _: usize) {}

    fn free(&self, first: u32, count: usize) {
        for page in (first as usize..).take(count) {
            self.uses[page].with_mut(|_| ());
            // Relaxed: who looks is to find it as early as the orders of others allow.
            if page == 0 {
                self.removed.store(true, Ordering::Relaxed);
            }
        }
    }
}

/// A file that knows whether it was punched, whether what was read last was read before, and whether it was written.
#[derive(Debug, Default)]
struct File {
    // Relaxed, all: a cursor or a closed range is to order them.
    punched: AtomicBool,
    read_old: AtomicBool,
    written: AtomicBool,
}

impl Backing for File {
    fn read(&self, _: &mut [Transfer<'_>]) {
        let old = !self.punched.load(Ordering::Relaxed);
        self.read_old.store(old, Ordering::Relaxed);
    }

    fn write(&self, _: &mut [Transfer<'_>]) {
        self.written.store(true, Ordering::Relaxed);
    }

    fn sync(&self) -> Result<(), BackingError> {
        Ok(())
    }

    fn set_len(&self, _: u64) -> Result<(), BackingError> {
        Ok(())
    }

    fn punch(&self, _: Range<u64>) -> Result<(), BackingError> {
        self.punched.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// A page cache with one frame.
struct Model {
    cache: PageCache,
    memory: Arc<Memory>,
    file: Arc<File>,
}

impl Model {
    fn new() -> Arc<Self> {
        let map = MemoryMap::new(&HeapPlatform, 1).unwrap();
        let memory = Arc::new(Memory {
            bytes: Bounce::new(PAGES),
            uses: [UnsafeCell::new(()), UnsafeCell::new(())],
            removed: AtomicBool::new(false),
        });
        let file = Arc::new(File::default());
        let cache = PageCache::new(CacheParts {
            platform: &HeapPlatform,
            number: FileNumber(1),
            ram: Arc::new(map.add_ram(1).unwrap()),
            map,
            mmu: Arc::clone(&memory) as _,
            backing: Arc::clone(&file) as _,
            memcg: None,
            size_bytes: (PAGES * PAGE_SIZE) as u64,
            most_pages: PAGES as u32,
            stats: Box::leak(Box::default()),
        });
        Arc::new(Self {
            cache: cache.unwrap(),
            memory,
            file,
        })
    }

    /// The same, with the first page in RAM.
    fn with_page(access: PinAccess) -> Arc<Self> {
        let model = Self::new();
        assert_eq!(model.read(0, access), Ok(()));
        model
    }

    /// Brings a page in, as who pins it does.
    fn read(&self, page: u32, access: PinAccess) -> Result<(), NotPinned> {
        let frame = self.cache.pin(&mut Worker::new(), page, access)?;
        self.cache.ram.unpin(frame);
        Ok(())
    }

    /// Another thread pins the first page, if it finds it there, and uses it.
    fn pin(self: &Arc<Self>, access: PinAccess) -> thread::JoinHandle<()> {
        let model = Arc::clone(self);
        thread::spawn(move || {
            let Some(frame) = model.cache.try_pin(PageIndex(0), access) else {
                return;
            };
            model.memory.uses[0].with(|_| ());
            let removed = model.memory.removed.load(Ordering::Relaxed);
            assert!(!removed, "a pinned page stays");
            if access == PinAccess::Write {
                let entry = model.cache.peek(0).cached();
                let dirty = entry.is_some_and(|page| page.is_dirty());
                assert!(dirty, "a pinned page stays dirty");
            }
            model.cache.ram.unpin(frame);
        })
    }
}

/// Runs a scenario in every order.
fn explore(scenario: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 10_000;
    builder.check(scenario);
}

fn give_up(_: u32) -> ControlFlow<()> {
    ControlFlow::Break(())
}

/// A page is cut off, and its frame is another page's at once.
fn pin_against_punch() {
    let model = Model::with_page(PinAccess::Read);
    let pinner = model.pin(PinAccess::Read);
    if model.cache.punch(0..PAGE_SIZE as u64, give_up).is_ok() {
        let entry = model.cache.peek(0);
        assert_eq!(entry.cached(), None, "what is punched is gone");
        // Unless the pinner has the frame for a moment.
        let other = model.read(1, PinAccess::Read);
        assert!(matches!(other, Ok(()) | Err(NotPinned::NoMemory)));
    }
    pinner.join().unwrap();
}

/// WB-5, GUP-3: a pin comes before a truncation has closed its range, which then finds it, or is not granted.
#[test]
fn a_pin_and_a_truncation_exclude_each_other() {
    explore(pin_against_punch);
}

/// WB-5: a pin that does not look whether the range is closed.
#[test]
#[should_panic = "Concurrent read and write accesses"]
fn a_pin_that_ignores_a_truncation_is_found() {
    seed(SeededBug::PinIgnoresTheBarrier);
    explore(pin_against_punch);
}

/// A page is read in while it is punched.
fn read_against_punch() {
    let model = Model::new();
    let at = VirtAddr::new(1 << 30);
    model.cache.add_vma(FileVma {
        at,
        first: 0,
        pages: 1,
        access: VmaAccess::Read,
    });
    let reader = {
        let model = Arc::clone(&model);
        thread::spawn(move || model.cache.fault(&mut Worker::new(), at, Access::Read))
    };
    let punched = model.cache.punch(0..PAGE_SIZE as u64, give_up);
    assert_eq!(reader.join().unwrap(), Outcome::Resolved);
    let old = model.file.read_old.load(Ordering::Relaxed);
    let there = model.cache.peek(0).cached().is_some();
    assert!(
        !(punched.is_ok() && there && old),
        "removed bytes stay away"
    );
}

/// FLT-2: what was read before a truncation closed its range is dropped by it.
#[test]
fn a_read_and_a_truncation_exclude_each_other() {
    explore(read_against_punch);
}

/// FLT-2: `remove-stale-source`.
#[test]
#[should_panic = "removed bytes stay away"]
fn a_read_that_ignores_a_truncation_is_found() {
    seed(SeededBug::ReadIgnoresTheBarrier);
    explore(read_against_punch);
}

/// A page is evicted.
fn pin_against_evict() {
    let model = Model::with_page(PinAccess::Read);
    let pinner = model.pin(PinAccess::Read);
    model.cache.shrink(1);
    pinner.join().unwrap();
}

/// RMAP-1, GUP-3: a pin comes before the claim of who evicts, which then fails, or finds the page gone.
#[test]
fn a_pin_and_an_eviction_exclude_each_other() {
    explore(pin_against_evict);
}

/// RMAP-1: `unmap-check-then-act`.
#[test]
#[should_panic = "Concurrent read and write accesses"]
fn an_eviction_that_looks_first_is_found() {
    seed(SeededBug::ClaimLooksFirst);
    explore(pin_against_evict);
}

/// A dirty page is written back.
fn pin_against_clean() {
    let model = Model::with_page(PinAccess::Write);
    let pinner = model.pin(PinAccess::Write);
    model.cache.write_back(0..1, OnPinned::Skip);
    pinner.join().unwrap();
}

/// GUP-4, RMAP-1: a pin to write comes before the claim of who cleans, which then fails, or finds the page clean.
#[test]
fn a_pin_and_a_cleaning_exclude_each_other() {
    explore(pin_against_clean);
}

/// GUP-4: `wp-bypass`.
#[test]
#[should_panic = "a pinned page stays dirty"]
fn a_cleaning_that_looks_first_is_found() {
    seed(SeededBug::ClaimLooksFirst);
    explore(pin_against_clean);
}

/// A page becomes dirty, is written through a pin, and made durable.
fn pin_against_first_store() {
    let model = Model::with_page(PinAccess::Read);
    let storer = {
        let model = Arc::clone(&model);
        thread::spawn(move || model.read(0, PinAccess::Write))
    };
    if let Some(frame) = model.cache.try_pin(PageIndex(0), PinAccess::Write) {
        let written = model.cache.write_back(0..1, OnPinned::Bounce);
        assert_eq!(
            written.pages, 1,
            "what was written through a pin is written"
        );
        model.cache.ram.unpin(frame);
    }
    assert_eq!(storer.join().unwrap(), Ok(()));
}

/// WB-2: who may write through a pin, as the page is dirty, is not forgotten by a sync after that.
#[test]
fn a_sync_finds_every_page_that_may_be_written() {
    explore(pin_against_first_store);
}

/// A dirty page is written back while somebody makes it durable.
fn sync_against_writeback() {
    let model = Model::with_page(PinAccess::Write);
    let flusher = {
        let model = Arc::clone(&model);
        thread::spawn(move || model.cache.write_back(0..1, OnPinned::Skip))
    };
    model.cache.write_back(0..1, OnPinned::Bounce);
    let written = model.file.written.load(Ordering::Relaxed);
    assert!(written, "what was dirty before a sync is written after it");
    flusher.join().unwrap();
}

/// WB-2: a sync waits for the writeback that is under way.
#[test]
fn a_sync_waits_for_writeback_that_is_under_way() {
    explore(sync_against_writeback);
}
