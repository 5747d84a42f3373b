//! Real DMA to and from pinned pages while everything else goes on: reclaim, writeback, syncs, truncation, forks, blocks of RAM
//! that go off line. Every byte is checked.
//!
//! Seconds long; `cargo xtask soak [MINUTES]` runs it for longer.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use core::ops::Range;
use core::time::Duration;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::thread;
use std::time::Instant;

use common::{MIB, PAGE, Random, Scratch, check, fork, memory, pattern, soak};
use pgmap::io::{Buffer, Ring};
use pgmap::{
    BlockState, FileMapping, Memory, Pin, PinError, PinnedPages, Prot, Writeback, ZoneChoice,
};

/// Pages of one transfer at most.
const MOST: usize = 32;
/// The parts of the file, in pages: each has one thread that changes it.
const DMA: Range<usize> = 0..6144;
const STORES: Range<usize> = 6144..12288;
const HOLES: Range<usize> = 12288..16384;
/// The size of the anonymous memory, in pages.
const ANONYMOUS: usize = 8192;

/// What all threads use.
struct Shared<'m> {
    memory: &'m Memory,
    file: pgmap::File<'m>,
    /// Two mappings of the same bytes.
    maps: [FileMapping<'m>; 2],
    end: Instant,
}

impl Shared<'_> {
    fn goes_on(&self) -> bool {
        Instant::now() < self.end
    }

    fn check(&self, map: usize, page: usize, version: u64) {
        let mut bytes = [0; PAGE];
        self.maps[map].read(page * PAGE, &mut bytes);
        check(&bytes, page, version);
    }

    /// Pins pages of the file; while the RAM is short, it waits.
    fn pin(&self, pages: &Range<usize>, pin: &Pin) -> PinnedPages {
        let start = self.maps[0].range().start;
        let range = start + pages.start * PAGE..start + pages.end * PAGE;
        loop {
            match self.memory.space().pin_user_pages(range.clone(), pin) {
                Err(PinError::NoMemory { .. }) => thread::yield_now(),
                pinned => return pinned.unwrap(),
            }
        }
    }
}

/// The versions of a part of the file.
struct Versions {
    first: usize,
    versions: Vec<u64>,
}

impl Versions {
    fn new(pages: &Range<usize>) -> Self {
        Self {
            first: pages.start,
            versions: vec![0; pages.len()],
        }
    }

    fn of(&self, page: usize) -> u64 {
        self.versions[page - self.first]
    }

    fn next(&mut self, page: usize) -> u64 {
        self.versions[page - self.first] += 1;
        self.of(page)
    }

    fn run(&self, random: &mut Random) -> Range<usize> {
        let len = 1 + random.below(MOST);
        let start = self.first + random.below(self.versions.len() - len);
        start..start + len
    }

    fn any(&self, random: &mut Random) -> usize {
        self.first + random.below(self.versions.len())
    }
}

/// A file at the other end of transfers, past the kernel's cache if that is possible.
fn other_end(scratch: &Scratch) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    let direct = options
        .clone()
        .custom_flags(libc::O_DIRECT)
        .open(&scratch.0);
    direct.or_else(|_| options.open(&scratch.0)).unwrap()
}

/// A buffer of anonymous memory for as long as the test runs.
fn anonymous_buffer<'m>(memory: &'m Memory, ring: &Ring) -> Buffer<'m> {
    let mapping = memory.map(MOST * PAGE).unwrap();
    let pin = Pin::WRITE.label("staging").long_term();
    ring.register_mapping(mapping, &pin).unwrap()
}

/// GUP-3, GUP-4: bytes go from anonymous memory to a disk and from there into the file's pages, and back, by DMA.
fn transfers(shared: &Shared<'_>, seed: u64, part: &Range<usize>) -> Versions {
    let (mut random, mut versions) = (Random::new(seed), Versions::new(part));
    let there = Scratch::new(&format!("there-{seed}"), MOST);
    let disk = other_end(&there);
    let mut ring = Ring::new(8);
    let mut staging = anonymous_buffer(shared.memory, &ring);
    while shared.goes_on() {
        let run = versions.run(&mut random);
        let len = run.len() * PAGE;
        let bytes = staging.as_mut_slice().unwrap().chunks_mut(PAGE);
        for (page, bytes) in run.clone().zip(bytes) {
            bytes.copy_from_slice(&pattern(page, versions.next(page)));
        }
        let pins = shared.pin(&run, &Pin::WRITE.label("rx ring"));
        let pages = ring.register(pins).unwrap();
        assert_eq!(ring.write_fixed(&staging, 0..len, &disk, Some(0)), Ok(len));
        // In two transfers at once, of which the second may be empty.
        let half = run.len() / 2 * PAGE;
        let first = pages.read(0..half, &disk, Some(0)).unwrap();
        let second = pages.read(half..len, &disk, Some(half as u64)).unwrap();
        let mut both = [first, second];
        ring.run(&mut both);
        let moved = both.map(|transfer| transfer.outcome().unwrap());
        assert_eq!(moved, [half, len - half]);
        drop(pages);
        run.for_each(|page| shared.check(0, page, versions.of(page)));
        let page = versions.any(&mut random);
        shared.check(1, page, versions.of(page));
        let run = versions.run(&mut random);
        send(shared, &mut ring, &mut staging, &disk, &run, &versions);
    }
    versions
}

/// The way back: pages of the file go to the disk without a copy, and from there to anonymous memory.
fn send(
    shared: &Shared<'_>,
    ring: &mut Ring,
    staging: &mut Buffer<'_>,
    disk: &File,
    run: &Range<usize>,
    versions: &Versions,
) {
    let len = run.len() * PAGE;
    let pins = shared.pin(run, &Pin::READ.label("tx ring"));
    let pages = ring.register(pins).unwrap();
    assert_eq!(ring.write_fixed(&pages, 0..len, disk, Some(0)), Ok(len));
    drop(pages);
    assert_eq!(ring.read_fixed(staging, 0..len, disk, Some(0)), Ok(len));
    let bytes = staging.as_mut_slice().unwrap().chunks(PAGE);
    for (page, bytes) in run.clone().zip(bytes) {
        check(bytes, page, versions.of(page));
    }
}

/// RMAP-1, WB-3: stores through one mapping are seen through the other, and after a sync in the file.
fn stores(shared: &Shared<'_>, scratch: &Scratch) -> Versions {
    let (mut random, mut versions) = (Random::new(3), Versions::new(&STORES));
    while shared.goes_on() {
        for _ in 0..64 {
            let page = versions.any(&mut random);
            let bytes = pattern(page, versions.next(page));
            shared.maps[random.below(2)].write(page * PAGE, &bytes);
            shared.check(random.below(2), page, versions.of(page));
            let page = versions.any(&mut random);
            shared.check(random.below(2), page, versions.of(page));
        }
        let run = versions.run(&mut random);
        let bytes = (run.start * PAGE) as u64..(run.end * PAGE) as u64;
        shared.file.sync_range(bytes, Writeback::Integrity).unwrap();
        run.for_each(|page| check(&scratch.page(page), page, versions.of(page)));
    }
    versions
}

/// The version of a page that has become zeros.
const ZEROS: u64 = u64::MAX;

/// WB-5, FLT-2: what is punched or cut off reads as zeros, and nothing else does.
fn holes(shared: &Shared<'_>) -> Versions {
    let (mut random, mut versions) = (Random::new(4), Versions::new(&HOLES));
    let look = |page: usize, version: u64| {
        if version != ZEROS {
            return shared.check(0, page, version);
        }
        let mut bytes = [1; PAGE];
        shared.maps[0].read(page * PAGE, &mut bytes);
        assert!(
            bytes == [0; PAGE],
            "page {page} is not zeros: {:?}",
            &bytes[..8]
        );
    };
    let mut version = 0;
    while shared.goes_on() {
        version += 1;
        let run = versions.run(&mut random);
        let bytes = (run.start * PAGE) as u64..(run.end * PAGE) as u64;
        match random.below(8) {
            0 => {
                let cut = HOLES.end - 1 - random.below(256);
                shared
                    .file
                    .set_len((cut * PAGE) as u64, Duration::ZERO)
                    .unwrap();
                let whole = (HOLES.end * PAGE) as u64;
                shared.file.set_len(whole, Duration::ZERO).unwrap();
                versions.versions[cut - HOLES.start..].fill(ZEROS);
            }
            1 | 2 => {
                shared.file.punch(bytes, Duration::ZERO).unwrap();
                let run = run.start - HOLES.start..run.end - HOLES.start;
                versions.versions[run].fill(ZEROS);
            }
            _ => {
                for page in run {
                    versions.versions[page - HOLES.start] = version;
                    shared.maps[1].write(page * PAGE, &pattern(page, version));
                }
            }
        }
        for _ in 0..32 {
            let page = versions.any(&mut random);
            look(page, versions.of(page));
        }
        for page in HOLES.end - 8..HOLES.end {
            look(page, versions.of(page));
        }
    }
    versions
}

/// Anonymous memory, several times as much as has room, and children that have it too.
fn anonymous(shared: &Shared<'_>) {
    let mut map = shared.memory.map(ANONYMOUS * PAGE).unwrap();
    let (mut random, mut versions) = (Random::new(5), Versions::new(&(0..ANONYMOUS)));
    for (page, bytes) in map.as_mut_slice().chunks_mut(PAGE).enumerate() {
        bytes.copy_from_slice(&pattern(page, 0));
    }
    while shared.goes_on() {
        for _ in 0..256 {
            let page = versions.any(&mut random);
            let bytes = &mut map.as_mut_slice()[page * PAGE..(page + 1) * PAGE];
            check(bytes, page, versions.of(page));
            bytes.copy_from_slice(&pattern(page, versions.next(page)));
        }
        let bytes = map.as_slice();
        let mut pages = random.below(64)..ANONYMOUS;
        let is_good = |page: usize| {
            let bytes = &bytes[page * PAGE..(page + 1) * PAGE];
            bytes == pattern(page, versions.of(page))
        };
        assert!(fork::in_a_child(|| pages.all(is_good)), "a child's memory");
    }
}

/// HOT-4, HOT-5: blocks of RAM go off line and come back. Answers how many did.
fn blocks(shared: &Shared<'_>) -> usize {
    let (mut random, mut gone) = (Random::new(6), 0);
    while shared.goes_on() {
        let blocks = shared.memory.ram_blocks();
        let block = &blocks[random.below(blocks.len())];
        // A page that is pinned for long keeps its block.
        gone += usize::from(
            shared
                .memory
                .offline(block.id, Duration::from_millis(50))
                .is_ok(),
        );
        thread::sleep(Duration::from_millis(20));
        for block in shared.memory.ram_blocks() {
            if !matches!(block.state, BlockState::Online(_)) {
                shared.memory.online(block.id, ZoneChoice::Auto).unwrap();
            }
        }
    }
    gone
}

/// WB-1, WB-2: both ways to sync, whatever is pinned.
fn syncs(shared: &Shared<'_>) {
    let mut random = Random::new(7);
    while shared.goes_on() {
        let start = (random.below(HOLES.end) * PAGE) as u64;
        let range = start..start + (4 << 20);
        let how = [Writeback::Background, Writeback::Integrity][random.below(2)];
        shared.file.sync_range(range, how).unwrap();
        thread::sleep(Duration::from_millis(5));
    }
}

/// GUP-3, GUP-4, WB-1, WB-2, WB-4, WB-5, HOT-4: every byte that is stored or comes by DMA is where it belongs, in RAM and in the
/// end in the file, while five times as much as there is RAM is in use, and it is reclaimed, written, cut and moved.
#[test]
fn every_byte_is_right_under_dma() {
    let Some(memory) = memory(32 * MIB) else {
        return;
    };
    let scratch = Scratch::new("dma", HOLES.end);
    let file = memory.open(&scratch.0).unwrap();
    let map = || {
        let whole = 0..file.len_bytes();
        memory
            .space()
            .map_file(&file, whole, Prot::ReadWrite)
            .unwrap()
    };
    let shared = Shared {
        memory: &memory,
        maps: [map(), map()],
        file: file.another(),
        end: Instant::now() + soak().unwrap_or(Duration::from_secs(6)),
    };
    let middle = DMA.start + DMA.len() / 2;
    let (gone, versions) = thread::scope(|scope| {
        let first = scope.spawn(|| transfers(&shared, 1, &(DMA.start..middle)));
        let second = scope.spawn(|| transfers(&shared, 2, &(middle..DMA.end)));
        let stores = scope.spawn(|| stores(&shared, &scratch));
        let holes = scope.spawn(|| holes(&shared));
        scope.spawn(|| anonymous(&shared));
        scope.spawn(|| syncs(&shared));
        let gone = blocks(&shared);
        (
            gone,
            [first, second, stores, holes].map(|part| part.join().unwrap()),
        )
    });
    let changes = versions
        .each_ref()
        .map(|part| part.versions.iter().filter(|version| **version > 0).count());
    println!("{gone} blocks went off line; pages changed, by thread: {changes:?}");
    assert!(memory.holders().is_empty());
    file.sync_all().unwrap();
    for part in versions {
        for (nth, version) in part.versions.iter().enumerate() {
            let bytes = scratch.page(part.first + nth);
            if *version == ZEROS {
                assert!(bytes == [0; PAGE], "page {}", part.first + nth);
            } else {
                check(&bytes, part.first + nth, *version);
            }
        }
    }
}
