//! Programs whose buffers are in managed memory do real DMA to and from them, several times as much as there is RAM: fio writes
//! with `io_uring` past the kernel's cache, and reads and verifies what it wrote.
//!
//! `cargo xtask test` builds what these need.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;
mod serving;

use std::process::Output;
use std::thread;

use common::{library, machine_can_run};
use serving::{Place, has};

/// fio in 12 MiB of RAM, with two devices, of which `meanwhile` may take one away.
fn fio(arguments: &[&str], meanwhile: impl FnOnce(&Place) + Send) {
    if !machine_can_run() || !has("fio") {
        return;
    }
    library();
    let place = Place::new();
    let device = ["--device", "compressed:256M"];
    let run = [&["run", "--quiet", "--ram", "12M"], &device[..], &device].concat();
    let same = [
        "--",
        "fio",
        "--name=dma",
        "--ioengine=io_uring",
        "--rw=randwrite",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        // As threads, as they are one process then, with all buffers.
        "--thread",
        "--numjobs=2",
        "--size=48M",
        "--filename_format=dma.$jobnum",
        "--minimal",
    ];
    let mut command = place.pgmap(&[&run[..], &same, arguments].concat());
    let output: Output = thread::scope(|scope| {
        let fio = scope.spawn(move || command.output().unwrap());
        meanwhile(&place);
        fio.join().unwrap()
    });
    let said = [&output.stdout[..], &output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    if said.contains("io_uring") && said.contains("not permitted") {
        eprintln!("SKIPPED: this machine forbids io_uring");
        return;
    }
    assert!(output.status.success(), "{said}");
    assert!(!said.contains("verify:"), "{said}");
}

/// Direct where the file system can do that.
fn direct() -> &'static str {
    // Scratch files are where temporary ones are.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("direct");
    let direct = rustix::fs::open(
        path,
        rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::DIRECT,
        rustix::fs::Mode::RUSR,
    );
    match direct {
        Ok(_) => "--direct=1",
        Err(_) => "--direct=0",
    }
}

/// GUP-3: 32 MiB of buffers in 12 MiB of RAM: a page that the kernel has pinned for a transfer stays, and no byte is wrong.
#[test]
fn fio_verifies_with_its_buffers_in_managed_memory() {
    fio(&[direct(), "--iodepth=64", "--bs=256k"], |_| {});
}

/// GUP-3: the same with buffers that fio registers, and so pins for as long as it runs.
#[test]
fn fio_verifies_with_registered_buffers() {
    let arguments = [direct(), "--fixedbufs=1", "--iodepth=16", "--bs=64k"];
    fio(&arguments, |_| {});
}

/// MAP-6, GUP-3: a device is unplugged, with pages of buffers on it, while transfers are in flight.
#[test]
fn fio_verifies_while_a_device_is_unplugged() {
    let arguments = [direct(), "--iodepth=64", "--bs=256k", "--loops=6"];
    fio(&arguments, |place| {
        place.wait_for(&["list"], "run, process");
        place.wait_for(&["holders", "compressed0"], "pages, process");
        place.ok(&["unplug", "compressed0", "--timeout", "60s"]);
    });
}
