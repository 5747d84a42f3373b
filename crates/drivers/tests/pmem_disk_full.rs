//! An image on a file system that is full.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use common::{child, client, map, spec, told};
use pgmap_drivers::block::{Access, BlockDevice, BlockError, Zeros};
use pgmap_drivers::pmem::{AccessError, Activation, Region, Sharing};
use rustix::io::Errno;

const TEST: &str = "a_full_disk_is_an_error";
const MIB: u64 = 1 << 20;

/// In a mount namespace of our own, where `directory` has room for 8 MiB.
fn fill(directory: &Path) {
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", "size=8m", "none"]);
    let mounted = mount.arg(directory).status().unwrap();
    assert!(mounted.success());
    let image = directory.join("disk.img");
    let region = Region::open(&spec(&format!("{},size=32M", image.display())), 0).unwrap();
    assert_eq!(region.is_sparse(), Ok(true));
    let pmem = region.bind(&map(), 0).unwrap();
    let chunk = vec![7; 1 << 20];
    let full = (0..30).find_map(|nth| {
        pmem.write(nth * MIB, &chunk)
            .err()
            .map(|error| (nth, error))
    });
    let (nth, error) = full.unwrap();
    assert_eq!((nth, error), (7, BlockError::Io(Errno::NOSPC)));
    // What was written before is there.
    let mut bytes = [0; 4096];
    pmem.read(5 * MIB, &mut bytes).unwrap();
    assert_eq!(bytes, [7; 4096]);
    // Straight from a socket it is an error, too, and the bytes are still to be received.
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&[1; 4096]).unwrap();
    let mut direct = pmem
        .direct(20 * MIB..20 * MIB + 4096, Access::Write)
        .unwrap();
    assert_eq!(direct.receive(ours.as_fd()), Err(Errno::FAULT));
    drop(direct);
    // No mapping where a store would be a SIGBUS.
    let refused = pmem.map(20 * MIB..22 * MIB, Sharing::Shared, client("test"));
    assert_eq!(refused.unwrap_err(), AccessError::NoRoom(Errno::NOSPC));
    assert_eq!(
        pmem.write_zeroes(20 * MIB..21 * MIB, Zeros::KeepRoom),
        Err(BlockError::Io(Errno::NOSPC))
    );
    // The label has its room.
    region.set_activation(0, Activation::Disabled).unwrap();
    pmem.inject_error(0..4096).unwrap();
    pmem.write(0, &[8; 4096]).unwrap();
    // And what is given back can be had again.
    pmem.discard(0..4 * MIB).unwrap();
    pmem.write(20 * MIB, &chunk).unwrap();
    pmem.flush().unwrap();
    println!("\nfilled");
}

/// PMEM-4: on a full file system a write is an error to who makes it, and never a SIGBUS to us; the label can still be
/// changed, and everything goes on once there is room.
#[test]
fn a_full_disk_is_an_error() {
    if let Some(directory) = told() {
        return fill(Path::new(&directory));
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().display().to_string();
    let probe = Command::new("unshare").args(["-rm", "true"]).output();
    if !probe.is_ok_and(|probe| probe.status.success()) {
        eprintln!("SKIPPED {TEST}: this machine lets nobody unshare mounts");
        return;
    }
    let output = child(TEST, &path, &["unshare", "-rm"]).output().unwrap();
    let (said, errors) = (output.stdout, String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8_lossy(&said);
    assert!(
        output.status.success() && said.contains("filled"),
        "{said}\n{errors}"
    );
}
