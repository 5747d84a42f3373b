//! A process that is killed at any moment: what `sync` returned for is in the file.
//!
//! Seconds long; `cargo xtask soak [MINUTES]` runs it for longer.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use core::time::Duration;
use std::fs;
use std::io::{BufRead, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::Instant;

use common::{MIB, PAGE, Random, Scratch, child, memory, soak, told};
use pgmap::{Pin, Prot};

/// More than there is RAM for, so that pages leave and come back, too.
const PAGES: usize = 1024;
/// Pages that are pinned all the time, and so are written from copies.
const PINNED: usize = 64;

/// The child: every word of every page gets the version, then all is synced, then that is said.
fn store_and_say(path: &str) -> ! {
    let memory = memory(2 * MIB).unwrap();
    let file = memory.open(path).unwrap();
    let whole = 0..file.len_bytes();
    let map = memory.space().map_file(&file, whole, Prot::ReadWrite);
    let map = map.unwrap();
    let start = map.range().start;
    let pinned = start..start + PINNED * PAGE;
    let pins = memory.space().pin_user_pages(pinned, &Pin::WRITE).unwrap();
    let mut page = [0; PAGE];
    map.read(0, &mut page);
    let mut version = u64::from_le_bytes(page[..8].try_into().unwrap());
    let mut random = Random::new(version);
    let mut out = std::io::stdout();
    loop {
        version += 1;
        let word = version.to_le_bytes();
        let bytes = word.repeat(PAGE / word.len());
        // Each run begins somewhere else.
        let first = random.below(PAGES);
        (first..PAGES)
            .chain(0..first)
            .for_each(|page| map.write(page * PAGE, &bytes));
        file.sync_all().unwrap();
        // The parent may be gone.
        if writeln!(out, "synced {version}")
            .and_then(|()| out.flush())
            .is_err()
        {
            drop(pins);
            std::process::exit(0);
        }
    }
}

/// Every word in the file is of the version that was synced last, or of the one that was under way.
fn check(path: &Path, synced: u64) {
    let bytes = fs::read(path).unwrap();
    assert_eq!(bytes.len(), PAGES * PAGE);
    for (nth, word) in bytes.chunks_exact(8).enumerate() {
        let version = u64::from_le_bytes(word.try_into().unwrap());
        let page = nth * 8 / PAGE;
        assert!(
            (synced..=synced + 1).contains(&version),
            "page {page} has version {version}; {synced} was synced"
        );
    }
}

/// Kills children until `end`, and answers how many.
fn kill(test: &str, path: &Path, end: Instant) -> u32 {
    let (mut random, mut killed, mut synced) = (Random::new(1), 0, 0);
    while Instant::now() < end {
        let mut command = child(test, path.to_str().unwrap());
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let reader = thread::spawn(move || {
            let lines = lines.map_while(Result::ok);
            lines
                .filter_map(|line| line.strip_prefix("synced ")?.parse().ok())
                .last()
        });
        let microseconds = 10_000 + random.below(120_000);
        thread::sleep(Duration::from_micros(u64::try_from(microseconds).unwrap()));
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert!(status.code().is_none(), "it ended by itself: {status}");
        synced = reader.join().unwrap().unwrap_or(synced);
        check(path, synced);
        // The next one begins with what is there, which may be half of the next version.
        settle(path, synced);
        killed += 1;
    }
    println!("{killed} children were killed; {synced} versions were synced");
    assert!(synced > 0, "none got as far as a sync");
    killed
}

/// Makes all of the file one version again.
fn settle(path: &Path, synced: u64) {
    fs::write(path, synced.to_le_bytes().repeat(PAGES * PAGE / 8)).unwrap();
}

fn survives(test: &str, path: PathBuf) {
    if memory(2 * MIB).is_none() {
        return;
    }
    let scratch = Scratch(path);
    settle(&scratch.0, 0);
    let length = soak().unwrap_or(Duration::from_secs(4));
    assert!(kill(test, &scratch.0, Instant::now() + length) > 0);
}

fn scratch_in(directory: &str, name: &str) -> PathBuf {
    Path::new(directory).join(format!("pgmap-{name}-{}", std::process::id()))
}

/// PMEM-4, WB-2: what `sync_all` returned for is in the file after SIGKILL at any moment, pages that were pinned included; with
/// `O_DIRECT`, if the disk can do that.
#[test]
fn what_was_synced_survives_a_kill() {
    if let Some(path) = told() {
        store_and_say(&path);
    }
    let path = scratch_in(env!("CARGO_TARGET_TMPDIR"), "killed");
    survives("what_was_synced_survives_a_kill", path);
}

/// PMEM-4: the same in a file system that is RAM itself.
#[test]
fn what_was_synced_survives_a_kill_in_shared_memory() {
    if let Some(path) = told() {
        store_and_say(&path);
    }
    if !Path::new("/dev/shm").is_dir() {
        eprintln!("SKIPPED: no /dev/shm");
        return;
    }
    let path = scratch_in("/dev/shm", "killed");
    survives("what_was_synced_survives_a_kill_in_shared_memory", path);
}
