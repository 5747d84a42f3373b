//! Clients that nobody here wrote, on `pgmap serve`: libnbd's, qemu's, fio, and a file system in an image. What they write
//! is read directly, and the other way round: both are the same frames. Those that are not on this machine are skipped,
//! and say so.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod serving;

use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serving::{Place, has, pattern};

const MIB: usize = 1 << 20;

/// Runs a program that has to succeed; gives its output.
#[track_caller]
fn run(program: &str, arguments: &[impl AsRef<OsStr>]) -> String {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
    let mut command = Command::new(program);
    let output = command.args(arguments).env("PATH", path).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let out = text(&output.stdout);
    let errors = text(&output.stderr);
    assert!(output.status.success(), "{program}: {out}{errors}");
    out
}

/// A file in this place with so many bytes: some are zeros, so that there is something to leave out.
fn file(place: &Place, len: usize) -> (PathBuf, String, Vec<u8>) {
    let mut bytes = pattern(len, 21);
    bytes[len / 4..len / 2].fill(0);
    let path = place.path("file");
    fs::write(&path, &bytes).unwrap();
    let text = path.to_str().unwrap().to_owned();
    (path, text, bytes)
}

/// nbdinfo finds what was announced: the exports, their sizes and features, and what is a hole.
#[test]
fn nbdinfo_finds_what_was_announced() {
    if !has("nbdinfo") {
        return;
    }
    let place = Place::new();
    let server = place.serve(&["disk.img,size=32M", "memory,size=8M,mode=devdax"]);
    let (fsdax, devdax) = (server.uri("pmem0"), server.uri("dax1.0"));
    assert_eq!(run("nbdinfo", &["--size", &fsdax]).trim(), "31457280");
    assert_eq!(run("nbdinfo", &["--size", &devdax]).trim(), "8388608");
    let all = run("nbdinfo", &[&fsdax]);
    for can in ["flush", "fua", "trim", "zero", "multi_conn", "df"] {
        assert!(all.contains(&format!("can_{can}: true")), "{can}: {all}");
    }
    assert!(all.contains("is_read_only: false"), "{all}");
    let list = run("nbdinfo", &["--list", &server.uri("")]);
    for export in ["export=\"pmem0\"", "export=\"dax1.0\""] {
        assert!(list.contains(export), "{list}");
    }
    place.write("pmem0", "4M", &pattern(MIB, 1));
    let map = run("nbdinfo", &["--map", &fsdax]);
    let rows: Vec<Vec<&str>> = map
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(rows[0][..3], ["0", "4194304", "3"], "{map}");
    assert_eq!(rows[1][..3], ["4194304", "1048576", "0"], "{map}");
    // After an unplug nobody finds it.
    place.ok(&["unplug", "pmem0"]);
    let list = run("nbdinfo", &["--list", &server.uri("")]);
    assert!(!list.contains("pmem0"), "{list}");
}

/// PMEM-1: block device and direct memory are the same frames, in every mode, both ways.
#[test]
fn what_nbdcopy_writes_is_what_is_mapped() {
    if !has("nbdcopy") {
        return;
    }
    let place = Place::new();
    let regions = [
        "disk.img,size=10M",
        "memory,size=8M",
        "dax.img,size=10M,mode=devdax",
        "raw.img,size=8M,mode=raw",
    ];
    let server = place.serve(&regions);
    let (_, from, bytes) = file(&place, 8 * MIB);
    let to = place.path("back");
    for name in ["pmem0", "pmem1", "dax2.0", "pmem3"] {
        run("nbdcopy", &["--flush", &from, &server.uri(name)]);
        let mut expected = bytes.clone();
        if name == "pmem3" {
            // A file as it is has no frames: nobody maps it.
            assert!(place.refused(&["map", name]).contains("cannot map"));
            assert!(fs::read(place.path("raw.img")).unwrap() == bytes, "{name}");
        } else {
            assert!(place.read(name) == bytes, "{name}: not what was copied in");
            place.write(name, "2M", b"directly");
            expected[2 * MIB..][..8].copy_from_slice(b"directly");
        }
        run("nbdcopy", &[&server.uri(name), to.to_str().unwrap()]);
        assert!(fs::read(&to).unwrap() == expected, "{name}: copied out");
        fs::remove_file(&to).unwrap();
    }
}

/// qemu-img converts in and out, compares, and measures with flushes.
#[test]
fn qemu_img_converts_compares_and_measures() {
    if !has("qemu-img") {
        return;
    }
    let place = Place::new();
    let server = place.serve(&["disk.img,size=34M"]);
    let (_, from, bytes) = file(&place, 32 * MIB);
    let uri = server.uri("pmem0");
    let raw = ["-f", "raw"];
    run(
        "qemu-img",
        &[&["convert", "-n", "-O", "raw"], &raw[..], &[&from, &uri]].concat(),
    );
    assert!(place.read("pmem0") == bytes, "not what was converted");
    run(
        "qemu-img",
        &[&["compare", "-F", "raw"], &raw[..], &[&from, &uri]].concat(),
    );
    let back = place.path("back.qcow2");
    let back = back.to_str().unwrap();
    run(
        "qemu-img",
        &[&["convert", "-O", "qcow2"], &raw[..], &[&uri, back]].concat(),
    );
    run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "qcow2", &from, back],
    );
    let benches: [&[&str]; 4] = [
        &["-s", "4k", "-d", "32"],
        &["-s", "64k", "-d", "8"],
        &["-w", "-s", "4k", "-d", "32", "--flush-interval=64"],
        &["-w", "-s", "64k", "-d", "8", "--flush-interval=8"],
    ];
    for bench in benches {
        run(
            "qemu-img",
            &[&["bench", "-c", "1000"], &raw[..], bench, &[&uri]].concat(),
        );
    }
}

/// qemu-io writes patterns, zeros and holes, and finds them.
#[test]
fn qemu_io_finds_its_patterns() {
    if !has("qemu-io") {
        return;
    }
    let place = Place::new();
    let server = place.serve(&["memory,size=16M"]);
    let mut arguments = vec!["-f", "raw"];
    let steps = [
        "write -P 0x5a 1000 300000",
        "read -P 0x5a 1000 300000",
        "write -z 4096 8192",
        "read -P 0 4096 8192",
        "write -f -P 7 1M 4M",
        "discard 2M 1M",
        "flush",
        "read -P 7 1M 1M",
        "read -P 7 3M 2M",
    ];
    arguments.extend(steps.iter().flat_map(|step| ["-c", step]));
    let uri = server.uri("pmem0");
    arguments.push(&uri);
    let out = run("qemu-io", &arguments);
    assert!(!out.contains("failed"), "{out}");
    let bytes = place.read("pmem0");
    assert!(bytes[4096..12288].iter().all(|&byte| byte == 0));
    assert!(bytes[3 * MIB..5 * MIB].iter().all(|&byte| byte == 7));
}

/// fio verifies what several of its jobs wrote at random, flushing now and then.
#[test]
fn fio_verifies_what_its_jobs_wrote() {
    if !has("fio") {
        return;
    }
    if !run("fio", &["--enghelp"])
        .lines()
        .any(|line| line.trim() == "nbd")
    {
        eprintln!("SKIPPED: this fio has no nbd engine");
        return;
    }
    let place = Place::new();
    let server = place.serve(&["disk.img,size=66M"]);
    let (uri, aux) = (
        format!("--uri={}", server.uri("pmem0")),
        format!("--aux-path={}", place.directory.path().display()),
    );
    for (size, depth) in [("--bs=4k", "--iodepth=32"), ("--bs=1k-256k", "--iodepth=8")] {
        let arguments = [
            "--name=verify",
            "--ioengine=nbd",
            "--rw=randwrite",
            "--verify=crc32c",
            "--verify_state_save=0",
            "--numjobs=4",
            "--thread",
            "--size=16M",
            "--offset_increment=16M",
            "--fsync=64",
        ];
        run(
            "fio",
            &[&arguments[..], &[size, depth, &uri, &aux]].concat(),
        );
    }
}

/// PMEM-1: a kernel's file system in a namespace: it is whole as block device, as memory, and after a restart.
#[test]
fn a_file_system_is_whole_on_every_way() {
    if !["mkfs.ext4", "e2fsck", "debugfs", "nbdcopy"]
        .iter()
        .all(|program| has(program))
    {
        return;
    }
    let place = Place::new();
    let server = place.serve(&["disk.img,size=34M"]);
    let path = |name: &str| place.path(name).to_str().unwrap().to_owned();
    let (_, payload, bytes) = file(&place, 3 * MIB);
    let (image, back) = (path("image"), path("back"));
    let created = fs::File::create(&image).unwrap();
    created.set_len(32 << 20).unwrap();
    run("mkfs.ext4", &["-q", &image]);
    run(
        "debugfs",
        &["-w", "-R", &format!("write {payload} payload"), &image],
    );
    run("nbdcopy", &["--flush", &image, &server.uri("pmem0")]);
    let check = |image: &str| {
        run("e2fsck", &["-f", "-n", image]);
        let out = path("out");
        run("debugfs", &["-R", &format!("dump payload {out}"), image]);
        assert!(fs::read(&out).unwrap() == bytes, "the file has changed");
    };
    run("nbdcopy", &[&server.uri("pmem0"), &back]);
    check(&back);
    fs::write(path("mapped"), place.read("pmem0")).unwrap();
    check(&path("mapped"));
    drop(server.end(libc::SIGKILL));
    let _server = place.serve(&["disk.img"]);
    fs::write(path("mapped"), place.read("pmem0")).unwrap();
    check(&path("mapped"));
}
