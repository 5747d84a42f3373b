//! A client in another process maps a device that is taken away.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use core::time::Duration;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::Instant;

use common::mapping::Mapping;
use common::{child, client, map, open, told};
use pgmap_drivers::block::BlockDevice;
use pgmap_drivers::pmem::{Afterwards, Patience, Sharing};

const LEN: usize = 8 << 20;
const SIGBUS: i32 = 7;

/// The client: stores, says so, and looks at its bytes until they are taken away. Whatever else it sees is wrong.
fn look_until_gone(path: &str) -> ! {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mapping = Mapping::new(&file, 0, LEN);
    let places = [0, LEN / 2, LEN - 1];
    for at in places {
        mapping.store(at, 77);
    }
    println!("\nready");
    // Not for ever: the parent may have failed.
    let end = Instant::now() + Duration::from_mins(1);
    while places.iter().all(|at| mapping.load(*at) == 77) && Instant::now() < end {}
    std::process::exit(3);
}

/// PMEM-2: who maps volatile memory gets SIGBUS when it is taken away for ever, and never sees other bytes; the next who has it
/// finds zeros.
#[test]
fn who_maps_memory_that_goes_gets_sigbus() {
    if let Some(path) = told() {
        look_until_gone(&path);
    }
    let (region, pmem) = open("memory,size=8M");
    let mapped = pmem
        .map(0..LEN as u64, Sharing::Shared, client("child"))
        .unwrap();
    let fd = mapped.fd().unwrap().as_raw_fd();
    let path = format!("/proc/{}/fd/{fd}", std::process::id());
    let mut command = child("who_maps_memory_that_goes_gets_sigbus", &path, &[]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line == "ready"));
    let mut bytes = [0; 1];
    pmem.read(LEN as u64 - 1, &mut bytes).unwrap();
    assert_eq!(bytes, [77]);
    // The guard says that it is still mapped: that is no reason to wait.
    pmem.unbind(&Patience::new(None), Afterwards::Forget, |holds| {
        assert_eq!(holds.len(), 1);
    })
    .unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(SIGBUS));
    drop(mapped);
    let pmem = region.bind(&map(), 0).unwrap();
    for at in [0, LEN / 2, LEN - 1] {
        pmem.read(at as u64, &mut bytes).unwrap();
        assert_eq!(bytes, [0], "{at}");
    }
}

/// PMEM-1: what is stored through a mapping is read by requests, and the other way round.
#[test]
fn a_mapping_and_requests_see_the_same_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    let (_region, pmem) = open(&format!("{},size=10M", image.display()));
    let mapped = pmem
        .map(2 << 20..4 << 20, Sharing::Shared, client("test"))
        .unwrap();
    let file = File::from(mapped.fd().unwrap().try_clone_to_owned().unwrap());
    let mapping = Mapping::new(
        &file,
        mapped.offset(),
        usize::try_from(mapped.len()).unwrap(),
    );
    mapping.store(5, 9);
    let mut bytes = [0; 6];
    pmem.read(2 << 20, &mut bytes).unwrap();
    assert_eq!(bytes, [0, 0, 0, 0, 0, 9]);
    pmem.write((4 << 20) - 1, &[8]).unwrap();
    assert_eq!(mapping.load((2 << 20) - 1), 8);
    // The room was taken before: a store is no SIGBUS on a full disk.
    let extents = pmem.extents(2 << 20..4 << 20).unwrap();
    assert_eq!(extents.len(), 1);
}
