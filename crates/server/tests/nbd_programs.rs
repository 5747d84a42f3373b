//! Clients that nobody here wrote: libnbd's, qemu's, fio, and a file system in an image. Those that are not on this machine are
//! skipped, and say so.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::large_stack_arrays,
    reason = "a test fails where it should, and knows its numbers"
)]

use std::fs;
use std::path::Path;
use std::process::Command;

mod common;

use common::{MIB, Rig, pattern};

/// Whether programs are there; says so if one is not.
fn have(programs: &[&str]) -> bool {
    let missing = programs.iter().find(|program| {
        let found = Command::new("sh")
            .args(["-c", "command -v \"$0\" >/dev/null", program])
            .status();
        !found.is_ok_and(|status| status.success())
    });
    if let Some(missing) = missing {
        eprintln!("SKIPPED: there is no {missing} here");
    }
    missing.is_none()
}

/// Runs a program that has to succeed; gives its output.
fn run(command: &[&str]) -> String {
    let output = Command::new(command[0])
        .args(&command[1..])
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let out = text(&output.stdout);
    assert!(
        output.status.success(),
        "{command:?}: {out}{}",
        text(&output.stderr)
    );
    out
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// An image of data and holes.
fn image(directory: &Path, bytes: u64) -> std::path::PathBuf {
    use std::os::unix::fs::FileExt;
    let path = directory.join("image");
    let file = fs::File::create(&path).unwrap();
    file.set_len(bytes).unwrap();
    for (seed, offset) in (0..bytes).step_by(5 * MIB as usize).enumerate() {
        let data = pattern(seed as u64, 2 * MIB as usize);
        let fits = data.len().min((bytes - offset) as usize);
        file.write_all_at(&data[..fits], offset).unwrap();
    }
    path
}

#[test]
fn nbdinfo_sees_what_is_offered() {
    if !have(&["nbdinfo"]) {
        return;
    }
    let rig = Rig::new(8 * MIB);
    let all = run(&["nbdinfo", &rig.uri("")]);
    let features = [
        "df",
        "fast_zero",
        "flush",
        "fua",
        "multi_conn",
        "trim",
        "zero",
        "cache",
    ];
    for feature in features {
        assert!(
            all.contains(&format!("can_{feature}: true")),
            "{feature}: {all}"
        );
    }
    assert!(
        all.contains("base:allocation") && all.contains("a disk of memory"),
        "{all}"
    );
    let list = run(&["nbdinfo", "--list", &rig.uri("")]);
    assert!(
        list.contains("export=\"disk\"") && list.contains("export=\"still\""),
        "{list}"
    );
    let map = run(&["nbdinfo", "--map", &rig.uri("disk")]);
    assert!(map.contains("hole,zero") && !map.contains("data"), "{map}");
}

#[test]
fn nbdcopy_brings_back_what_it_took_there() {
    if !have(&["nbdcopy", "cmp"]) {
        return;
    }
    let rig = Rig::new(64 * MIB);
    let directory = tempfile::tempdir().unwrap();
    let (image, back) = (
        image(directory.path(), 64 * MIB),
        directory.path().join("back"),
    );
    for extra in [
        "--flush",
        "--connections=1",
        "--synchronous",
        "--request-size=8192",
    ] {
        run(&["nbdcopy", extra, path(&image), &rig.uri("disk")]);
        run(&["nbdcopy", extra, &rig.uri("disk"), path(&back)]);
        run(&["cmp", path(&image), path(&back)]);
        fs::remove_file(&back).unwrap();
    }
}

#[test]
fn qemu_img_converts_compares_and_measures() {
    if !have(&["qemu-img"]) {
        return;
    }
    let rig = Rig::new(64 * MIB);
    let directory = tempfile::tempdir().unwrap();
    let (image, uri) = (image(directory.path(), 64 * MIB), rig.uri("disk"));
    run(&[
        "qemu-img",
        "convert",
        "-n",
        "-f",
        "raw",
        "-O",
        "raw",
        path(&image),
        &uri,
    ]);
    run(&[
        "qemu-img",
        "compare",
        "-f",
        "raw",
        "-F",
        "raw",
        path(&image),
        &uri,
    ]);
    let back = directory.path().join("back.qcow2");
    run(&[
        "qemu-img",
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        &uri,
        path(&back),
    ]);
    run(&[
        "qemu-img",
        "compare",
        "-f",
        "raw",
        "-F",
        "qcow2",
        path(&image),
        path(&back),
    ]);
    for (size, write) in [("4k", "-w"), ("64k", "-w"), ("4k", "-n"), ("2M", "-w")] {
        run(&[
            "qemu-img", "bench", write, "-f", "raw", "-c", "500", "-d", "32", "-s", size, &uri,
        ]);
    }
}

#[test]
fn qemu_io_verifies_patterns() {
    if !have(&["qemu-io"]) {
        return;
    }
    let rig = Rig::new(64 * MIB);
    let mut command = vec!["qemu-io", "-f", "raw"];
    let steps = [
        "write -P 0x5a 1000 300000",
        "read -P 0x5a 1000 300000",
        "write -z 4096 8192",
        "read -P 0 4096 8192",
        "write -f -P 7 1M 4M",
        "discard 2M 1M",
        "read -P 7 1M 1M",
        "read -P 0 2M 1M",
        "flush",
    ];
    command.extend(steps.iter().flat_map(|step| ["-c", step]));
    let uri = rig.uri("disk");
    command.push(&uri);
    let out = run(&command);
    assert!(!out.contains("failed"), "{out}");
    assert!(
        !Command::new("qemu-io")
            .args(["-f", "raw", "-c", "write 0 4k", &rig.uri("still")])
            .output()
            .unwrap()
            .status
            .success()
    );
}

#[test]
fn fio_verifies_what_it_wrote() {
    let engine = || {
        run(&["fio", "--enghelp"])
            .lines()
            .any(|line| line.trim() == "nbd")
    };
    if !have(&["fio"]) {
        return;
    }
    if !engine() {
        eprintln!("SKIPPED: this fio has no nbd engine");
        return;
    }
    let rig = Rig::new(32 * MIB);
    let uri = format!("--uri={}", rig.uri("disk"));
    let directory = tempfile::tempdir().unwrap();
    let state = format!("--aux-path={}", directory.path().display());
    for (size, depth) in [("--bs=4k", "--iodepth=32"), ("--bs=1k-256k", "--iodepth=8")] {
        let common = [
            "--name=verify",
            "--ioengine=nbd",
            "--rw=randwrite",
            "--verify=crc32c",
        ];
        let rest = [
            "--size=32M",
            "--verify_state_save=0",
            "--fsync=100",
            size,
            depth,
            &uri,
            &state,
        ];
        run(&[&["fio"], &common[..], &rest[..]].concat());
    }
}

#[test]
fn a_file_system_survives_the_way() {
    if !have(&["mkfs.ext4", "e2fsck", "debugfs", "nbdcopy"]) {
        return;
    }
    let rig = Rig::new(64 * MIB);
    let directory = tempfile::tempdir().unwrap();
    let (image, back) = (
        directory.path().join("image"),
        directory.path().join("back"),
    );
    let (payload, file) = (pattern(3, 3_000_000), directory.path().join("file"));
    fs::File::create(&image).unwrap().set_len(64 * MIB).unwrap();
    fs::write(&file, &payload).unwrap();
    run(&["mkfs.ext4", "-q", path(&image)]);
    run(&[
        "debugfs",
        "-w",
        "-R",
        &format!("write {} file", path(&file)),
        path(&image),
    ]);
    run(&["nbdcopy", path(&image), &rig.uri("disk")]);
    run(&["nbdcopy", &rig.uri("disk"), path(&back)]);
    run(&["e2fsck", "-f", "-n", path(&back)]);
    let out = directory.path().join("out");
    run(&[
        "debugfs",
        "-R",
        &format!("dump file {}", path(&out)),
        path(&back),
    ]);
    assert!(fs::read(&out).unwrap() == payload);
}
