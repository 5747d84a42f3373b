//! Files that cannot be read or written, that others change behind our back, and RAM that loses bytes: who has to know is told,
//! and nobody else's bytes suffer.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use core::ops::Range;
use core::slice;
use core::time::Duration;
use std::fs::{self, File, OpenOptions};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use common::{MIB, PAGE, Scratch, check, child, memory, pattern, told, touch};
use pgmap::{
    Backing, BackingError, FileMapping, Lost, Memcg, Memory, OpenOptions as OpenFile, Pin,
    PinError, Prot, SyncError, Transfer, Writeback,
};
use pgmap_host::file_backing::FileBacking;
use pgmap_sync::Mutex;

const SIGBUS: i32 = 7;
const SIGKILL: i32 = 9;
const EIO: i32 = 5;
const PAGES: usize = 64;

/// A file of which some pages cannot be read, some not be written, and which perhaps cannot be made durable.
#[derive(Debug)]
struct Failing {
    file: FileBacking,
    reads: Mutex<Range<u64>>,
    writes: Mutex<Range<u64>>,
    syncs: Mutex<Result<(), BackingError>>,
}

impl Failing {
    fn new(scratch: &Scratch) -> Arc<Self> {
        let file = OpenOptions::new().read(true).write(true).open(&scratch.0);
        Arc::new(Self {
            file: FileBacking::new(file.unwrap()),
            reads: Mutex::new(0..0),
            writes: Mutex::new(0..0),
            syncs: Mutex::new(Ok(())),
        })
    }

    fn open<'m>(self: &Arc<Self>, memory: &'m Memory) -> pgmap::File<'m> {
        let bytes = (PAGES * PAGE) as u64;
        let backing = Arc::clone(self) as _;
        let options = OpenFile::new();
        memory
            .open_over("failing", backing, bytes, &options)
            .unwrap()
    }
}

/// Whether a transfer touches any of these pages.
fn touches(transfer: &Transfer<'_>, pages: &Mutex<Range<u64>>) -> bool {
    let pages = pages.lock();
    let first = transfer.offset_bytes / PAGE as u64;
    let end = first + transfer.len_bytes.div_ceil(PAGE) as u64;
    first < pages.end && pages.start < end
}

impl Backing for Failing {
    fn read(&self, transfers: &mut [Transfer<'_>]) {
        for transfer in transfers {
            if touches(transfer, &self.reads) {
                transfer.outcome = Err(BackingError::Io(EIO));
            } else {
                self.file.read(slice::from_mut(transfer));
            }
        }
    }

    fn write(&self, transfers: &mut [Transfer<'_>]) {
        for transfer in transfers {
            if touches(transfer, &self.writes) {
                transfer.outcome = Err(BackingError::Io(EIO));
            } else {
                self.file.write(slice::from_mut(transfer));
            }
        }
    }

    fn sync(&self) -> Result<(), BackingError> {
        (*self.syncs.lock())?;
        self.file.sync()
    }

    fn set_len(&self, bytes: u64) -> Result<(), BackingError> {
        self.file.set_len(bytes)
    }

    fn punch(&self, bytes: Range<u64>) -> Result<(), BackingError> {
        self.file.punch(bytes)
    }
}

fn map<'m>(memory: &Memory, file: &pgmap::File<'m>) -> FileMapping<'m> {
    let whole = 0..file.len_bytes();
    let map = memory.space().map_file(file, whole, Prot::ReadWrite);
    map.unwrap()
}

fn look(map: &FileMapping<'_>, page: usize, version: u64) {
    let mut bytes = [0; PAGE];
    map.read(page * PAGE, &mut bytes);
    check(&bytes, page, version);
}

fn store(map: &FileMapping<'_>, page: usize, version: u64) {
    map.write(page * PAGE, &pattern(page, version));
}

/// Runs the same test as a child, which is to die of SIGBUS.
fn dies_of_sigbus(test: &str) {
    let status = child(test, "touch").status().unwrap();
    assert_eq!(status.signal(), Some(SIGBUS), "{status}");
}

/// The child is killed as by a full machine, and says why.
fn is_killed_as_full(test: &str, why: &str) {
    let output = child(test, "fill").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.signal(), Some(SIGKILL), "{said}");
    assert!(said.contains(why), "{said}");
}

/// HMM-8: who touches a page of a group all of whose pages are pinned is told that it is the group that is full, not RAM.
#[test]
fn a_group_that_is_full_of_pins_is_named() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    if told().is_none() {
        let test = "a_group_that_is_full_of_pins_is_named";
        return is_killed_as_full(test, "the group of a mapped file");
    }
    let scratch = Scratch::new("full-group", PAGES);
    let options = OpenFile::new().memcg(&Arc::new(Memcg::new(8)));
    let file = memory.open_with(&scratch.0, &options).unwrap();
    // Now, as this process is going to be killed.
    drop(scratch);
    let map = map(&memory, &file);
    let start = map.range().start;
    let pins = memory
        .space()
        .pin_user_pages(start..start + 8 * PAGE, &Pin::READ);
    look(&map, 20, 0);
    drop(pins.unwrap());
}

/// Dirty pages that cannot be written are not dropped, however many they are; who needs more room is told that they are why there
/// is none.
#[test]
fn ram_that_is_full_of_what_cannot_be_written_is_named() {
    let Some(memory) = memory(2 * MIB) else {
        return;
    };
    if told().is_none() {
        let test = "ram_that_is_full_of_what_cannot_be_written_is_named";
        return is_killed_as_full(test, "RAM is full of pages of files");
    }
    let pages = 3 * MIB / PAGE;
    let scratch = Scratch::new("full-ram", pages);
    let failing = Failing::new(&scratch);
    // Now, as this process is going to be killed.
    drop(scratch);
    *failing.writes.lock() = 0..pages as u64;
    let bytes = (pages * PAGE) as u64;
    let file = memory.open_over("failing", failing, bytes, &OpenFile::new());
    let file = file.unwrap();
    let map = memory
        .space()
        .map_file(&file, 0..bytes, Prot::ReadWrite)
        .unwrap();
    for page in 0..pages {
        store(&map, page, 1);
    }
}

/// FLT-1: a page that cannot be read is SIGBUS for who touches it, and an error for who pins it; all others are read, those that
/// would have come with it too. Once it is punched it is in service again.
#[test]
fn a_read_error_hits_who_touches_the_page() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("read-error", PAGES);
    let failing = Failing::new(&scratch);
    *failing.reads.lock() = 9..10;
    let file = failing.open(&memory);
    let map = map(&memory, &file);
    if told().is_some() {
        thread::scope(|scope| {
            // Others go on while one dies, as far as that can be seen.
            scope.spawn(|| (0..9).for_each(|page| look(&map, page, 0)));
        });
        look(&map, 9, 0);
        return;
    }
    dies_of_sigbus("a_read_error_hits_who_touches_the_page");
    for page in (0..PAGES).filter(|page| *page != 9) {
        look(&map, page, 0);
    }
    let ninth = map.range().start + 9 * PAGE;
    let pinned = memory
        .space()
        .pin_user_pages(ninth..ninth + PAGE, &Pin::READ);
    assert!(matches!(pinned, Err(PinError::Poisoned { at }) if at.get() == ninth));
    file.sync_all().unwrap();
    let bytes = 9 * PAGE as u64..10 * PAGE as u64;
    file.punch(bytes, Duration::ZERO).unwrap();
    *failing.reads.lock() = 0..0;
    let mut bytes = [1; PAGE];
    map.read(9 * PAGE, &mut bytes);
    assert_eq!(bytes, [0; PAGE]);
}

/// What the kernel does, as no rule says otherwise: a read that failed is SIGBUS for who touches the page then, and tried again by who
/// touches or pins it later, until it goes well; nothing has to be truncated. A memory failure stays until then.
#[test]
fn a_read_that_failed_is_tried_again() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("read-again", PAGES);
    let failing = Failing::new(&scratch);
    let file = failing.open(&memory);
    let map = map(&memory, &file);
    let (start, space) = (map.range().start, memory.space());
    *failing.reads.lock() = 40..41;
    assert!(!touch::can_read(start + 40 * PAGE));
    *failing.reads.lock() = 0..0;
    thread::sleep(Duration::from_millis(500));
    look(&map, 40, 0);
    // A page that could not be read, was, and then lost what was written to it.
    *failing.reads.lock() = 20..21;
    assert!(!touch::can_read(start + 20 * PAGE));
    *failing.reads.lock() = 9..10;
    let twentieth = start + 20 * PAGE..start + 21 * PAGE;
    drop(space.pin_user_pages(twentieth, &Pin::WRITE).unwrap());
    assert_eq!(file.memory_failure(20 * PAGE as u64), Lost::Page);
    assert!(!touch::can_read(start + 9 * PAGE));
    let ninth = start + 9 * PAGE..start + 10 * PAGE;
    let pin = || space.pin_user_pages(ninth.clone(), &Pin::READ);
    assert!(matches!(pin(), Err(PinError::Poisoned { .. })));
    *failing.reads.lock() = 0..0;
    drop(pin().unwrap());
    let began = Instant::now();
    while !touch::can_read(start + 9 * PAGE) {
        assert!(began.elapsed() < Duration::from_secs(10), "it is not tried");
        thread::sleep(Duration::from_millis(5));
    }
    (0..20).for_each(|page| look(&map, page, 0));
    thread::sleep(Duration::from_millis(500));
    assert!(!touch::can_read(start + 20 * PAGE), "its bytes are lost");
}

/// WB-5: what somebody else has cut off is SIGBUS for who touches it, and no zeros, until the file is as long as it was.
#[test]
fn what_others_cut_off_is_no_zeros() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("cut-by-others", PAGES);
    let file = memory.open(&scratch.0).unwrap();
    let map = map(&memory, &file);
    let at = |page| map.range().start + page * PAGE;
    look(&map, 30, 0);
    let other = OpenOptions::new().write(true).open(&scratch.0).unwrap();
    other.set_len(9 * PAGE as u64 + 100).unwrap();
    look(&map, 8, 0);
    look(&map, 30, 0);
    assert!(!touch::can_read(at(9)) && !touch::can_read(at(50)));
    let pin = memory.space().pin_user_pages(at(50)..at(51), &Pin::READ);
    assert!(matches!(pin, Err(PinError::Poisoned { .. })));
    other.set_len((PAGES * PAGE) as u64).unwrap();
    let began = Instant::now();
    while !touch::can_read(at(50)) {
        assert!(began.elapsed() < Duration::from_secs(10), "it is not tried");
        thread::sleep(Duration::from_millis(5));
    }
}

/// `fsync`'s promise: a failed write is told once to each who had the file open, at their next sync, whoever's it was; the bytes
/// stay dirty, and a later sync writes them.
#[test]
fn a_write_error_is_told_once_to_each_and_nothing_is_lost() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("write-error", PAGES);
    let failing = Failing::new(&scratch);
    let file = failing.open(&memory);
    let another = file.another();
    let map = map(&memory, &file);
    *failing.writes.lock() = 5..7;
    for page in 0..PAGES {
        store(&map, page, 1);
    }
    let failed = Err(SyncError::Writeback(BackingError::Io(EIO)));
    assert_eq!(file.sync_all(), failed);
    let dirty = file.pages().1;
    assert_eq!(dirty, 2, "all others are written");
    check(&scratch.page(4), 4, 1);
    let late = file.another();
    *failing.writes.lock() = 0..0;
    assert_eq!(another.sync_all(), failed, "it had the file open, too");
    for handle in [&file, &another, &late] {
        assert_eq!(handle.sync_all(), Ok(()));
    }
    assert_eq!(file.pages().1, 0);
    (0..PAGES).for_each(|page| check(&scratch.page(page), page, 1));
}

/// WB-2: a pinned page whose copy cannot be written is told of, too, and stays dirty.
#[test]
fn a_write_error_of_a_pinned_page_is_told() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("pinned-error", PAGES);
    let failing = Failing::new(&scratch);
    let file = failing.open(&memory);
    let map = map(&memory, &file);
    let start = map.range().start;
    let pins = memory
        .space()
        .pin_user_pages(start..start + PAGE, &Pin::WRITE);
    let pins = pins.unwrap();
    store(&map, 0, 1);
    *failing.writes.lock() = 0..1;
    let failed = Err(SyncError::Writeback(BackingError::Io(EIO)));
    assert_eq!(file.sync_all(), failed);
    *failing.writes.lock() = 0..0;
    let written = file.sync_range(0..PAGE as u64, Writeback::Integrity);
    assert_eq!(written.map(|written| written.bounced), Ok(1));
    check(&scratch.page(0), 0, 1);
    drop(pins);
}

/// PMEM-4: a medium that could not be told to keep what was written is not believed again: its own cache may have dropped it.
#[test]
fn a_failed_flush_is_not_forgotten() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("flush-error", PAGES);
    let failing = Failing::new(&scratch);
    let file = failing.open(&memory);
    let map = map(&memory, &file);
    store(&map, 0, 1);
    *failing.syncs.lock() = Err(BackingError::Io(EIO));
    let failed = Err(SyncError::Flush(BackingError::Io(EIO)));
    assert_eq!(file.sync_all(), failed);
    *failing.syncs.lock() = Ok(());
    assert_eq!(file.another().sync_all(), failed);
    drop((map, file));
    assert_eq!(failing.open(&memory).sync_all(), Ok(()));
}

/// `ENOSPC`'s like, from the machine: a process that may not write behind a place in a file is told so, keeps its bytes, and
/// writes them when it may.
#[test]
fn a_full_disk_is_told_and_nothing_is_lost() {
    if let Some(path) = told() {
        return write_beyond_the_limit(&path);
    }
    if memory(8 * MIB).is_none() {
        return;
    }
    let scratch = Scratch::new("full", PAGES);
    let test = child(
        "a_full_disk_is_told_and_nothing_is_lost",
        scratch.0.to_str().unwrap(),
    );
    let mut shell = Command::new("sh");
    // The limit is not to kill.
    shell.args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\""]);
    shell.arg(test.get_program()).args(test.get_args());
    for (key, value) in test.get_envs() {
        shell.env(key, value.unwrap());
    }
    let output = shell.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    (0..PAGES).for_each(|page| check(&scratch.page(page), page, 3));
}

fn write_beyond_the_limit(path: &str) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    let memory = memory(8 * MIB).unwrap();
    let file = memory.open(path).unwrap();
    let map = map(&memory, &file);
    let maximum = getrlimit(Resource::Fsize).maximum;
    let limit = |current| setrlimit(Resource::Fsize, Rlimit { current, maximum }).unwrap();
    limit(Some((PAGES * PAGE / 2) as u64));
    (0..PAGES).for_each(|page| store(&map, page, 3));
    let failed = file.sync_all();
    let told = matches!(failed, Err(SyncError::Writeback(BackingError::NoSpace(_))));
    assert!(told, "{failed:?}");
    (0..PAGES).for_each(|page| look(&map, page, 3));
    assert_eq!(file.pages().1, (PAGES / 2) as u64);
    limit(maximum);
    // The flusher may have failed once more in between.
    let _ = file.sync_all();
    assert_eq!(file.sync_all(), Ok(()));
}

/// A process that has set itself a limit for its files' length, below what files have room to grow to, opens, reads and writes those that
/// are below it, and is not killed; others are refused.
#[test]
fn a_process_may_limit_the_length_of_its_files() {
    if let Some(path) = told() {
        return open_below_the_limit(&path);
    }
    if memory(8 * MIB).is_none() {
        return;
    }
    let scratch = Scratch::new("limited", PAGES);
    let test = child(
        "a_process_may_limit_the_length_of_its_files",
        scratch.0.to_str().unwrap(),
    );
    let output = { test }.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    (0..PAGES).for_each(|page| check(&scratch.page(page), page, 3));
}

fn open_below_the_limit(path: &str) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    let maximum = getrlimit(Resource::Fsize).maximum;
    let limit = |current| setrlimit(Resource::Fsize, Rlimit { current, maximum }).unwrap();
    let memory = memory(8 * MIB).unwrap();
    limit(Some((PAGES * PAGE / 2) as u64));
    let refused = memory.open(path).unwrap_err();
    assert!(refused.to_string().contains("too large"), "{refused}");
    limit(Some((PAGES * PAGE + 1) as u64));
    let file = memory.open(path).unwrap();
    let map = map(&memory, &file);
    (0..PAGES).for_each(|page| store(&map, page, 3));
    file.sync_all().unwrap();
}

/// FLT-4: a file that others cut or delete is written as it is known here; nothing that is in RAM is lost.
#[test]
fn a_file_that_others_cut_and_delete_keeps_what_is_in_ram() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("cut", PAGES);
    let file = memory.open(&scratch.0).unwrap();
    let map = map(&memory, &file);
    store(&map, 3, 1);
    store(&map, 40, 1);
    let others = OpenOptions::new().write(true).open(&scratch.0).unwrap();
    others.set_len(10 * PAGE as u64).unwrap();
    file.sync_all().unwrap();
    check(&scratch.page(3), 3, 1);
    check(&scratch.page(40), 40, 1);
    let deleted = File::open(&scratch.0).unwrap();
    fs::remove_file(&scratch.0).unwrap();
    store(&map, 4, 2);
    file.sync_all().unwrap();
    let mut bytes = [0; PAGE];
    std::os::unix::fs::FileExt::read_exact_at(&deleted, &mut bytes, 4 * PAGE as u64).unwrap();
    check(&bytes, 4, 2);
}

/// WB-6: a page whose RAM fails is read anew if the file has its bytes. If not, who touches it gets SIGBUS, who pins it an error,
/// and who syncs is told once; its neighbours are as they were, and a punch brings it back into service.
#[test]
fn failed_ram_costs_dirty_pages_only() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("failed-ram", PAGES);
    let file = memory.open(&scratch.0).unwrap();
    let map = map(&memory, &file);
    store(&map, 7, 1);
    (0..PAGES)
        .filter(|page| *page != 7)
        .for_each(|page| look(&map, page, 0));
    // A clean page, a dirty one, and one that is not in RAM.
    assert_eq!(file.memory_failure(6 * PAGE as u64 + 5), Lost::Nothing);
    look(&map, 6, 0);
    store(&map, 8, 1);
    assert_eq!(file.memory_failure(8 * PAGE as u64), Lost::Page);
    assert_eq!(file.memory_failure(u64::MAX), Lost::Nothing);
    if told().is_some() {
        return look(&map, 8, 1);
    }
    dies_of_sigbus("failed_ram_costs_dirty_pages_only");
    let eighth = map.range().start + 8 * PAGE;
    let pinned = memory
        .space()
        .pin_user_pages(eighth..eighth + PAGE, &Pin::READ);
    assert!(matches!(pinned, Err(PinError::Poisoned { .. })));
    let told = Err(SyncError::Writeback(BackingError::Io(EIO)));
    assert_eq!((file.sync_all(), file.sync_all()), (told, Ok(())));
    look(&map, 7, 1);
    check(&scratch.page(7), 7, 1);
    check(&scratch.page(8), 8, 0);
    let bytes = 8 * PAGE as u64..9 * PAGE as u64;
    file.punch(bytes, Duration::ZERO).unwrap();
    store(&map, 8, 2);
    file.sync_all().unwrap();
    check(&scratch.page(8), 8, 2);
}

/// Runs the same test as a child, which is to die of SIGBUS before long.
fn dies_of_sigbus_soon(test: &str) {
    let mut child = child(test, "touch").spawn().unwrap();
    let status = (0..100).find_map(|_| {
        thread::sleep(Duration::from_millis(100));
        child.try_wait().unwrap()
    });
    let _ = child.kill();
    let status = status.unwrap_or_else(|| child.wait().unwrap());
    assert_eq!(status.signal(), Some(SIGBUS), "{status}");
}

/// WB-5: who touches what was cut off gets SIGBUS, and does not wait for ever, where it had been mapped to be read, too.
#[test]
fn what_was_cut_off_answers_with_sigbus() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("cut-off", PAGES);
    let file = memory.open(&scratch.0).unwrap();
    let map = map(&memory, &file);
    (0..PAGES).for_each(|page| look(&map, page, 0));
    file.set_len(8 * PAGE as u64, Duration::ZERO).unwrap();
    if told().is_some() {
        return look(&map, 20, 0);
    }
    dies_of_sigbus_soon("what_was_cut_off_answers_with_sigbus");
    file.set_len((PAGES * PAGE) as u64, Duration::ZERO).unwrap();
    let mut bytes = [1; PAGE];
    map.read(20 * PAGE, &mut bytes);
    assert_eq!(bytes, [0; PAGE]);
}

/// WB-6: RAM that fails is SIGBUS through every mapping, also where the page was protected or never touched.
#[test]
fn failed_ram_is_sigbus_through_every_mapping() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("failed-twice", PAGES);
    let file = memory.open(&scratch.0).unwrap();
    let (first, second) = (map(&memory, &file), map(&memory, &file));
    look(&second, 7, 0);
    store(&first, 7, 1);
    file.sync_all().unwrap();
    store(&first, 7, 2);
    assert_eq!(file.memory_failure(7 * PAGE as u64), Lost::Page);
    if told().is_some() {
        return look(&second, 7, 2);
    }
    dies_of_sigbus_soon("failed_ram_is_sigbus_through_every_mapping");
}
