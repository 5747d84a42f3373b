//! Files as memory: what is stored through a mapping is in the file, whatever the pager does meanwhile.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use core::time::Duration;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use common::{child, fork, told};
use pgmap::{
    Device, File, Memcg, Memory, OpenError, OpenOptions, Pin, PinError, Prot, TruncateError,
    Writeback,
};

const MIB: usize = 1 << 20;
const PAGE: usize = 4096;

/// A memory of 8 MiB; none where the machine does not allow it.
fn memory() -> Option<Memory> {
    let builder = Memory::builder().ram(8 << 20);
    match builder.device(Device::compressed(1 << 30)).build() {
        Ok(memory) => Some(memory),
        Err(error) => {
            eprintln!("SKIPPED: {error}");
            None
        }
    }
}

/// A file that is removed again.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str, bytes: &[u8]) -> Self {
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        let path = path.join(format!("{name}-{}", std::process::id()));
        fs::write(&path, bytes).unwrap();
        Self(path)
    }

    /// The word that page `page` of the file begins with now.
    fn word(&self, page: usize) -> u64 {
        let mut word = [0; 8];
        let file = fs::File::open(&self.0).unwrap();
        file.read_exact_at(&mut word, (page * PAGE) as u64).unwrap();
        u64::from_le_bytes(word)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A file of so many pages, each of which begins with its number.
fn numbered(name: &str, pages: usize) -> Scratch {
    let mut bytes = vec![0; pages * PAGE];
    for (nth, page) in bytes.chunks_mut(PAGE).enumerate() {
        page[..8].copy_from_slice(&(nth as u64).to_le_bytes());
    }
    Scratch::new(name, &bytes)
}

fn resident_pages(memory: &Memory) -> u64 {
    memory
        .ram_blocks()
        .iter()
        .map(|block| block.used_frames)
        .sum()
}

fn word(map: &pgmap::FileMapping<'_>, page: usize) -> u64 {
    let mut word = [0; 8];
    map.read(page * PAGE, &mut word);
    u64::from_le_bytes(word)
}

fn map<'m>(memory: &Memory, file: &File<'m>) -> pgmap::FileMapping<'m> {
    let whole = 0..file.len_bytes();
    memory
        .space()
        .map_file(file, whole, Prot::ReadWrite)
        .unwrap()
}

/// A file four times as large as the budget is read and written through a mapping, and all of it reaches the file.
#[test]
fn a_file_larger_than_ram_is_read_and_written() {
    let Some(memory) = memory() else { return };
    let pages = 32 * MIB / PAGE;
    let scratch = numbered("larger", pages);
    let file = memory.open(&scratch.0).unwrap();
    let map = map(&memory, &file);
    for page in 0..pages {
        assert_eq!(word(&map, page), page as u64);
    }
    assert!(resident_pages(&memory) <= 2048);
    for page in 0..pages {
        map.write(page * PAGE, &(page as u64 + 7).to_le_bytes());
    }
    assert!(resident_pages(&memory) <= 2048);
    for page in (0..pages).rev() {
        assert_eq!(word(&map, page), page as u64 + 7);
    }
    file.sync_all().unwrap();
    assert_eq!(file.pages().1, 0);
    for page in 0..pages {
        assert_eq!(scratch.word(page), page as u64 + 7);
    }
}

/// WB-1, WB-2, GUP-4: a pinned page is skipped in the background, written by an integrity sync, and stays dirty.
#[test]
fn a_pinned_page_is_written_from_a_copy_and_stays_dirty() {
    let Some(memory) = memory() else { return };
    let scratch = numbered("pinned", 64);
    let file = memory.open(&scratch.0).unwrap();
    let map = map(&memory, &file);
    let start = map.range().start;
    let pin = Pin::WRITE.label("rx ring");
    let pins = memory
        .space()
        .pin_user_pages(start..start + PAGE, &pin)
        .unwrap();
    map.write(0, &100u64.to_le_bytes());
    map.write(PAGE, &101u64.to_le_bytes());
    file.sync_range(0..1 << 20, Writeback::Background).unwrap();
    assert_eq!((scratch.word(0), scratch.word(1)), (0, 101));
    let written = file.sync_range(0..1 << 20, Writeback::Integrity).unwrap();
    assert_eq!((written.pages, written.bounced), (1, 1));
    assert_eq!((scratch.word(0), file.pages().1), (100, 1));
    let holders = memory.holders_of(&map.range());
    assert_eq!(holders[0].label, "rx ring");
    drop(pins);
    file.sync_range(0..1 << 20, Writeback::Background).unwrap();
    assert_eq!(file.pages().1, 0);
}

/// WB-5, GUP-3: a truncation reports a pin in its range, and nothing has changed; one beside its range does not matter.
#[test]
fn a_truncation_reports_pins_in_its_range_only() {
    let Some(memory) = memory() else { return };
    let scratch = numbered("truncated", 64);
    let file = memory.open(&scratch.0).unwrap();
    let map = map(&memory, &file);
    let start = map.range().start;
    let tenth = start + 10 * PAGE..start + 11 * PAGE;
    let pins = memory.space().pin_user_pages(tenth, &Pin::READ).unwrap();
    let refused = file.set_len(8 * PAGE as u64, Duration::from_millis(5));
    assert_eq!(refused, Err(TruncateError::Pinned { page: 10 }));
    assert_eq!((file.len_bytes(), word(&map, 63)), (64 * PAGE as u64, 63));
    file.set_len(11 * PAGE as u64, Duration::ZERO).unwrap();
    drop(pins);
    file.set_len(8 * PAGE as u64 + 4, Duration::ZERO).unwrap();
    assert_eq!(word(&map, 8), 8);
    file.set_len(64 * PAGE as u64, Duration::ZERO).unwrap();
    assert_eq!((word(&map, 8), word(&map, 10), word(&map, 63)), (8, 0, 0));
    file.punch(0..8 * PAGE as u64, Duration::ZERO).unwrap();
    assert_eq!((word(&map, 7), word(&map, 8)), (0, 8));
}

/// RMAP-1, WB-3: two mappings of one file show the same bytes, and both report their writes after each sync.
#[test]
fn two_mappings_are_cleaned_together() {
    let Some(memory) = memory() else { return };
    let scratch = numbered("twice", 64);
    let file = memory.open(&scratch.0).unwrap();
    let (first, second) = (map(&memory, &file), map(&memory, &file));
    for round in 1..20u64 {
        first.write(0, &round.to_le_bytes());
        assert_eq!(word(&second, 0), round);
        file.sync_all().unwrap();
        second.write(PAGE, &round.to_le_bytes());
        first.write(2 * PAGE, &round.to_le_bytes());
        assert_eq!(file.pages().1, 2);
        file.sync_all().unwrap();
        assert_eq!([0, 1, 2].map(|page| scratch.word(page)), [round; 3]);
    }
}

/// HOT-4, HOT-5: the pages of files leave a block of RAM that goes off line, and keep their bytes, clean or dirty.
#[test]
fn pages_of_files_leave_a_block_that_goes_off_line() {
    let builder = Memory::builder().ram(64 << 20);
    let Ok(memory) = builder.device(Device::compressed(1 << 30)).build() else {
        eprintln!("SKIPPED: this machine does not allow it");
        return;
    };
    let pages = 48 * MIB / PAGE;
    let scratch = numbered("offline", pages);
    let file = memory.open(&scratch.0).unwrap();
    let map = map(&memory, &file);
    for page in 0..pages {
        assert_eq!(word(&map, page), page as u64);
    }
    for page in (0..pages).step_by(3) {
        map.write(page * PAGE, &(page as u64 + 7).to_le_bytes());
    }
    let blocks: Vec<_> = memory.ram_blocks().iter().map(|block| block.id).collect();
    for block in &blocks[..4] {
        memory.offline(*block, Duration::from_secs(10)).unwrap();
    }
    assert!(resident_pages(&memory) <= 32 * (MIB / PAGE) as u64);
    for page in 0..pages {
        let more = if page.is_multiple_of(3) { 7 } else { 0 };
        assert_eq!(word(&map, page), page as u64 + more);
    }
}

/// HMM-8: the pages of a group stay within its limit, however much RAM there is, and are charged once.
#[test]
fn a_group_of_files_keeps_its_limit() {
    let Some(memory) = memory() else { return };
    let pages = 4 * MIB / PAGE;
    let scratches = [numbered("first", pages), numbered("second", pages)];
    let group = Arc::new(Memcg::new(128));
    let options = OpenOptions::new().memcg(&group);
    let files = [0, 1].map(|nth| memory.open_with(&scratches[nth].0, &options).unwrap());
    let maps = [0, 1].map(|nth| map(&memory, &files[nth]));
    for page in 0..pages {
        for map in &maps {
            assert_eq!(word(map, page), page as u64);
            map.write(page * PAGE, &(page as u64 + 7).to_le_bytes());
        }
    }
    assert_eq!(group.peak_pages(), 128);
    assert!(group.charged_pages() > 64, "{}", group.charged_pages());
    let cached = files[0].pages().0 + files[1].pages().0;
    assert_eq!(group.charged_pages(), cached);
    drop((maps, files));
    assert_eq!(group.charged_pages(), 0);
    for page in 0..pages {
        assert_eq!(scratches[1].word(page), page as u64 + 7);
    }
}

/// GUP-1: a file that is open for reading is neither mapped nor pinned to be written.
#[test]
fn a_read_only_file_is_only_read() {
    let Some(memory) = memory() else { return };
    let scratch = numbered("readonly", 64);
    let file = memory
        .open_with(&scratch.0, &OpenOptions::new().read_only())
        .unwrap();
    let whole = 0..file.len_bytes();
    assert!(
        memory
            .space()
            .map_file(&file, whole.clone(), Prot::ReadWrite)
            .is_err()
    );
    let map = memory.space().map_file(&file, whole, Prot::Read).unwrap();
    let pin = |pin: &Pin| memory.space().pin_user_pages(map.range(), pin).map(drop);
    assert_eq!(pin(&Pin::READ), Ok(()));
    assert!(matches!(
        pin(&Pin::WRITE),
        Err(PinError::NotWritable { .. })
    ));
    assert_eq!(word(&map, 63), 63);
}

/// GUP-4: what is written through a pin reaches the file, even if the pin is the last that anybody has of it.
#[test]
fn the_last_pin_writes_back() {
    let Some(memory) = memory() else { return };
    let scratch = numbered("last", 64);
    let file = memory.open(&scratch.0).unwrap();
    let map = map(&memory, &file);
    let start = map.range().start;
    let pins = memory
        .space()
        .pin_user_pages(start..start + PAGE, &Pin::WRITE)
        .unwrap();
    map.write(0, &77u64.to_le_bytes());
    drop((map, file));
    assert_eq!(scratch.word(1), 1);
    assert!(matches!(memory.open(&scratch.0), Err(OpenError::Locked(_))));
    drop(pins);
    assert_eq!(scratch.word(0), 77);
}

/// FLT-2: what is punched while it is being read ahead is zeros for ever, and what is not punched is read. Most file systems let no
/// read pass a hole that is being punched; that ours would not either is shown in the lab (`what_is_removed_is_not_read_ahead`).
#[test]
fn what_is_punched_is_not_read_ahead() {
    const GROUP: usize = 256;
    let Some(memory) = memory() else { return };
    for round in 0..20 {
        let scratch = numbered("ahead", 8 * GROUP);
        let file = memory.open(&scratch.0).unwrap();
        let map = map(&memory, &file);
        // A reader of the first group: those behind it are read by others now.
        for page in 0..64 + round {
            assert_eq!(word(&map, page), page as u64);
        }
        let punched = GROUP..2 * GROUP;
        let bytes = (punched.start * PAGE) as u64..(punched.end * PAGE) as u64;
        file.punch(bytes, Duration::from_secs(5)).unwrap();
        for page in 0..8 * GROUP {
            let expected = if punched.contains(&page) { 0 } else { page };
            assert_eq!(word(&map, page), expected as u64, "page {page}");
        }
    }
}

/// A sequential reader finds pages in RAM that it has not asked for.
#[test]
fn a_sequential_reader_is_read_ahead_of() {
    let Some(memory) = memory() else { return };
    let scratch = numbered("sequential", 1024);
    let file = memory.open(&scratch.0).unwrap();
    let map = map(&memory, &file);
    for page in 0..64 {
        word(&map, page);
    }
    let began = std::time::Instant::now();
    // The whole of the next group, which no fault reads along.
    while file.pages().0 < 256 && began.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(file.pages().0 >= 256, "{:?}", file.pages());
}

/// A file that is closed while others read it ahead, or write it back, can be opened again at once.
#[test]
fn a_closed_file_can_be_opened_again_at_once() {
    let Some(memory) = memory() else { return };
    let scratch = numbered("again", 1024);
    for round in 0..200u64 {
        let file = memory.open(&scratch.0).unwrap();
        let map = map(&memory, &file);
        for page in 0..64 {
            assert_eq!(
                word(&map, page),
                if page == 1 && round > 0 {
                    round
                } else {
                    page as u64
                }
            );
        }
        map.write(PAGE, &(round + 1).to_le_bytes());
    }
}

/// Pages that a sequential writer has not reached yet hold what the file holds, and so does the file when they are written.
#[test]
fn a_sequential_writer_changes_nothing_that_it_has_not_reached() {
    let Some(memory) = memory() else { return };
    let scratch = numbered("writer", 1024);
    let file = memory.open(&scratch.0).unwrap();
    let map = map(&memory, &file);
    for page in 0..500 {
        map.write(page * PAGE, &(page as u64 + 7).to_le_bytes());
    }
    file.sync_all().unwrap();
    for page in 0..1024 {
        let expected = if page < 500 { page + 7 } else { page };
        assert_eq!(scratch.word(page), expected as u64);
        assert_eq!(word(&map, page), expected as u64);
    }
}

/// A file whose pages are all in RAM, in which a fault of a first write is seldom, as nothing is written back meanwhile.
fn written_in_order(act: impl FnOnce(&File<'_>, &pgmap::FileMapping<'_>)) -> Option<u64> {
    let builder = Memory::builder().ram(64 << 20);
    let memory = builder.device(Device::compressed(1 << 30)).build();
    let memory = memory
        .inspect_err(|error| eprintln!("SKIPPED: {error}"))
        .ok()?;
    let scratch = numbered("in-order", 1024);
    let file = memory.open(&scratch.0).unwrap();
    let map = map(&memory, &file);
    (0..1024).for_each(|page| assert_eq!(word(&map, page), page as u64));
    act(&file, &map);
    let mut counters = memory.stats().counters();
    let faults = counters.find(|(name, _)| *name == "faults_file_write");
    Some(faults.unwrap().1)
}

/// Who writes page after page takes a fault for several of them.
#[test]
fn stores_in_order_take_few_faults() {
    let faults = written_in_order(|_, map| {
        (0..1024).for_each(|page| map.write(page * PAGE, &[1]));
    });
    assert!(
        faults.is_none_or(|faults| faults < 512),
        "{faults:?} faults"
    );
}

/// Who makes each page durable before the next has one page written each time.
#[test]
fn a_log_is_written_page_by_page() {
    let faults = written_in_order(|file, map| {
        for page in 0..100 {
            map.write(page * PAGE, &[1]);
            let written = file.sync_range(0..u64::MAX, Writeback::Integrity);
            assert_eq!(written.unwrap().pages, 1, "page {page}");
        }
    });
    assert!(faults.is_none_or(|faults| faults == 100));
}

/// A fork's child, which has the same descriptors, keeps nobody from opening a file again that its parent has closed.
#[test]
fn a_forks_child_does_not_keep_the_lock() {
    if told().is_none() {
        // Alone in its process: a fork waits for all pagers of its process.
        let mut alone = child("a_forks_child_does_not_keep_the_lock", "fork");
        assert!(alone.status().unwrap().success());
        return;
    }
    let Some(memory) = memory() else { return };
    let scratch = numbered("inherited", 4);
    let file = memory.open(&scratch.0).unwrap();
    let child = fork::fork(|| {
        std::thread::sleep(Duration::from_secs(2));
        true
    });
    drop(file);
    let again = memory.open(&scratch.0).map(drop);
    assert_eq!(fork::wait(child), 0);
    again.unwrap();
}

/// A file becomes as long as it may, and no longer, and its last page is a page like all others.
#[test]
fn a_file_becomes_as_long_as_it_may() {
    let Some(memory) = memory() else { return };
    let scratch = numbered("longest", 5);
    let sparse = fs::OpenOptions::new().write(true).open(&scratch.0).unwrap();
    // Its table has another number of blocks than a group.
    sparse.set_len((4 << 30) + 5 * PAGE as u64).unwrap();
    let file = memory.open(&scratch.0).unwrap();
    let refused = file.set_len(u64::MAX, Duration::ZERO);
    let Err(TruncateError::TooLong { most_bytes }) = refused else {
        panic!("{refused:?}");
    };
    file.set_len(most_bytes, Duration::ZERO).unwrap();
    let end = most_bytes - 300 * PAGE as u64..most_bytes;
    let map = memory.space().map_file(&file, end, Prot::ReadWrite);
    let map = map.unwrap();
    for page in 0..300 {
        assert_eq!(word(&map, page), 0);
    }
    map.write(299 * PAGE, &7u64.to_le_bytes());
    file.sync_all().unwrap();
    assert_eq!(
        scratch.word(usize::try_from(most_bytes).unwrap() / PAGE - 1),
        7
    );
}

/// FLT-3: a fork's child has no mapping of a file, and dies of SIGSEGV where it touches one. It is none of zeros, or of
/// pages that nobody brings; the parent goes on.
#[test]
fn a_forks_child_has_no_mapping_of_a_file() {
    const SIGSEGV: i32 = 11;
    if told().is_none() {
        // Alone in its process: a fork waits for all pagers of its process.
        let mut alone = child("a_forks_child_has_no_mapping_of_a_file", "fork");
        assert!(alone.status().unwrap().success());
        return;
    }
    let Some(memory) = memory() else { return };
    let scratch = numbered("forked", 4);
    let file = memory.open(&scratch.0).unwrap();
    let map = memory.space().map_file(&file, 0..4 * 4096, Prot::ReadWrite);
    let map = map.unwrap();
    // A page that is in RAM, and one that is not.
    map.write(0, &[1]);
    for page in [0, 2] {
        let child = fork::fork(|| {
            map.read(page * PAGE, &mut [0]);
            true
        });
        assert_eq!(fork::wait(child) & 0x7f, SIGSEGV, "page {page}");
    }
    let mut byte = [0];
    map.read(2 * PAGE, &mut byte);
    assert_eq!(byte, [2]);
}
