//! Images that are full, cut off, damaged, somebody else's, or in use.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod serving;

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::process::Command;

use serving::nbd::Nbd;
use serving::{Place, Server, has, pattern};

const MIB: usize = 1 << 20;
/// Bytes of both copies of a label.
const LABELS: usize = 1 << 20;

fn connect(server: &Server, name: &str) -> Nbd {
    Nbd::connect(server.nbd(), name).unwrap()
}

/// A server in a mount namespace of its own, whose directory `small` has room for so many bytes; `None` if the machine does
/// not allow that.
fn with_little_room(place: &Place, room: &str, regions: [&str; 2]) -> Option<Server> {
    in_little_room(place, room, regions, "").map(Server::start)
}

/// The same before it is started; `after` is what the shell does then.
fn in_little_room(place: &Place, room: &str, regions: [&str; 2], after: &str) -> Option<Command> {
    fs::create_dir(place.path("small")).unwrap();
    let namespace = ["-rm", "sh", "-c"];
    let mount = format!("mount -t tmpfs -o size={room} none small");
    let mut probe = Command::new("unshare");
    probe
        .args(namespace)
        .arg(&mount)
        .current_dir(&place.directory);
    if !probe.output().is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: this machine mounts no tmpfs in a namespace of our own");
        return None;
    }
    let serve = match after {
        "" => "exec \"$0\" \"$@\"".to_owned(),
        after => format!("\"$0\" \"$@\"; {after}"),
    };
    let mut command = Command::new("unshare");
    command
        .args(namespace)
        .arg(format!("{mount} && {serve}"))
        .arg(env!("CARGO_BIN_EXE_pgmap"))
        .args(["serve", "--pmem", regions[0], "--pmem", regions[1]])
        .current_dir(&place.directory)
        .env("XDG_RUNTIME_DIR", place.directory.path());
    Some(command)
}

fn errno(result: &io::Result<()>) -> Option<i32> {
    result.as_ref().err()?.raw_os_error()
}

/// PMEM-4: a full disk is an error of the write that needed room; the server lives, others go on, and room that comes back
/// is used.
#[test]
fn a_full_disk_is_an_error_of_one_write() {
    let place = Place::new();
    let regions = ["small/disk.img,size=66M", "memory,size=8M"];
    let Some(server) = with_little_room(&place, "24m", regions) else {
        return;
    };
    let mut nbd = connect(&server, "pmem0");
    let bytes = pattern(MIB, 4);
    let mut written = 0;
    let full = loop {
        let result = nbd.write(written * MIB as u64, &bytes);
        if result.is_err() {
            break result;
        }
        written += 1;
    };
    assert_eq!(errno(&full), Some(libc::ENOSPC), "{full:?}");
    assert!((10..24).contains(&written), "{written}");
    assert!(nbd.read(0, MIB).unwrap() == bytes);
    // By the way of a mapping the same.
    let mut child = place.pgmap(&["map", "pmem0", "--offset", "40M", "--write"]);
    child.stdin(fs::File::open("/dev/zero").unwrap());
    let output = child.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(
        said.contains("No space left") && said.lines().count() == 1,
        "{said}"
    );
    // Others notice nothing.
    let mut other = connect(&server, "pmem1");
    other.write(0, &bytes).unwrap();
    assert!(other.read(0, MIB).unwrap() == bytes);
    place.ok(&["inject-error", "pmem0", "--block", "8"]);
    place.ok(&["clear-error", "pmem0", "--block", "8"]);
    // A hole makes room.
    nbd.trim(0, 8 * MIB).unwrap();
    nbd.trim(40 * MIB as u64, 24 * MIB).unwrap();
    nbd.write(32 * MIB as u64, &bytes).unwrap();
    nbd.flush().unwrap();
    place.ok(&["disable", "pmem0", "--timeout", "2s"]);
    place.ok(&["enable", "pmem0"]);
    let mut nbd = connect(&server, "pmem0");
    assert!(nbd.read(32 * MIB as u64, MIB).unwrap() == bytes);
    let output = server.end(libc::SIGTERM);
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
}

/// A start that fails leaves nothing that was not there before, in whichever region it failed.
#[test]
fn a_failed_start_leaves_no_files() {
    let place = Place::new();
    let regions = ["first.img,size=8M", "small/n.img,size=64M"];
    let Some(mut command) = in_little_room(&place, "64k", regions, "ls small") else {
        return;
    };
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("n.img") && said.contains("No space left"),
        "{said}"
    );
    assert_eq!(String::from_utf8_lossy(&output.stdout), "");
    assert!(!place.path("first.img").exists());
    // What was there stays.
    drop(place.serve(&["first.img,size=8M"]));
    fs::write(place.path("foreign"), pattern(8 * MIB, 1)).unwrap();
    place.refused(&["serve", "--pmem", "first.img", "--pmem", "foreign"]);
    let metrics = ["--metrics", "nonsense"];
    place.refused(&[&["serve", "--pmem", "second.img,size=8M"], &metrics[..]].concat());
    assert!(place.path("first.img").exists());
    assert!(!place.path("second.img").exists());
}

/// PMEM-3: of an image that is cut off while it is served, what is gone is an error, and nobody dies of it.
#[test]
fn a_truncated_image_is_an_error() {
    let place = Place::new();
    let server = place.serve(&["disk.img,size=34M", "memory,size=8M"]);
    let mut nbd = connect(&server, "pmem0");
    let bytes = pattern(MIB, 9);
    nbd.write(0, &bytes).unwrap();
    nbd.write(20 * MIB as u64, &bytes).unwrap();
    let image = fs::File::options().write(true).open(place.path("disk.img"));
    image.unwrap().set_len(10 << 20).unwrap();
    for length in [512, 64 << 10] {
        let gone = nbd.read(20 * MIB as u64, length).map(drop);
        assert_eq!(errno(&gone), Some(libc::EIO), "{length}: {gone:?}");
    }
    // Without structured replies a long read can only end the connection; with them it is an error.
    let gone = connect(&server, "pmem0").read(20 * MIB as u64, MIB);
    assert_eq!(gone.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    if has("qemu-io") {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw", "-c", "read 20M 1M", &server.uri("pmem0")]);
        let output = command.output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(said.contains("Input/output error"), "{said}");
    }
    nbd.write(MIB as u64, &bytes).unwrap();
    assert!(nbd.read(0, MIB).unwrap() == bytes);
    assert_eq!(
        fs::metadata(place.path("disk.img")).unwrap().len(),
        10 << 20
    );
    place.pgmap(&["scrub", "--wait"]).output().unwrap();
    connect(&server, "pmem1").write(0, &bytes).unwrap();
    place.ok(&["unplug", "pmem0", "--timeout", "2s"]);
    place.ok(&["list"]);
    let output = server.end(libc::SIGTERM);
    assert!(output.status.code().is_some(), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    let ended = "of pmem0: the device failed in the middle of a reply\n";
    assert_eq!(said.matches(ended).count(), 1, "{said}");
    // Such an image is not served again, and says why.
    let said = place.refused(&["serve", "--pmem", "disk.img"]);
    assert!(
        said.contains("was truncated") && said.lines().count() == 1,
        "{said}"
    );
}

/// One image has one server, by whatever name and in whatever mode.
#[test]
fn an_image_has_one_server() {
    let place = Place::new();
    let server = place.serve(&["disk.img,size=16M"]);
    place.write("pmem0", "0", &pattern(MIB, 2));
    std::os::unix::fs::symlink("disk.img", place.path("symbolic")).unwrap();
    fs::hard_link(place.path("disk.img"), place.path("hard")).unwrap();
    for spec in [
        "disk.img",
        "symbolic",
        "hard",
        "disk.img,mode=raw",
        "disk.img,mode=devdax",
    ] {
        let said = place.refused(&["serve", "--pmem", spec]);
        assert!(
            said.contains("in use") && said.lines().count() == 1,
            "{said}"
        );
        let said = place.refused(&["plug", spec]);
        assert!(
            said.contains("in use") && said.lines().count() == 1,
            "{said}"
        );
    }
    assert!(place.read("pmem0").starts_with(&pattern(MIB, 2)));
    drop(server);
    drop(place.serve(&["hard"]));
}

/// What is not ours, or is damaged, is refused in one line, and not a byte of it is touched.
fn is_refused(place: &Place, name: &str, bytes: &[u8]) {
    let path = place.path(name);
    fs::write(&path, bytes).unwrap();
    for spec in [name.to_owned(), format!("{name},mode=devdax")] {
        let said = place.refused(&["serve", "--pmem", &spec]);
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains(name), "{said}");
    }
    assert!(fs::read(&path).unwrap() == bytes, "{name} was touched");
}

/// Images of other programs are refused, and untouched.
#[test]
fn images_of_other_programs_are_refused() {
    let place = Place::new();
    let text = |name: &str| place.path(name).to_str().unwrap().to_owned();
    let mut text_file = vec![b'\n'; 16 * MIB];
    text_file[..5].copy_from_slice(b"hello");
    is_refused(&place, "text", &text_file);
    let mut late = vec![0; 16 * MIB];
    late[15 * MIB] = 1;
    is_refused(&place, "late", &late);
    if has("qemu-img") {
        let arguments = ["create", "-q", "-f", "qcow2", &text("made"), "64M"];
        assert!(
            Command::new("qemu-img")
                .args(arguments)
                .status()
                .unwrap()
                .success()
        );
        is_refused(&place, "qcow2", &fs::read(place.path("made")).unwrap());
    }
    if has("mkfs.ext4") {
        fs::write(place.path("made"), vec![0; 16 * MIB]).unwrap();
        let made = Command::new("sh")
            .args([
                "-c",
                "PATH=$PATH:/usr/sbin mkfs.ext4 -q \"$0\"",
                &text("made"),
            ])
            .status();
        assert!(made.unwrap().success());
        is_refused(&place, "ext4", &fs::read(place.path("made")).unwrap());
    }
}

/// PMEM-4: a damaged label is refused, whatever is in its place; one good copy is enough.
#[test]
fn damaged_labels_are_refused() {
    let place = Place::new();
    let server = place.serve(&["disk.img,size=4M"]);
    // Changes write the copies in turn: now there are two.
    place.ok(&["disable", "pmem0"]);
    place.ok(&["enable", "pmem0"]);
    drop(server);
    let good = fs::read(place.path("disk.img")).unwrap();
    for seed in 0..12 {
        let mut bytes = good.clone();
        bytes[..LABELS].copy_from_slice(&pattern(LABELS, seed));
        is_refused(&place, "random", &bytes);
        // The beginning is ours, the rest is not.
        bytes[..16].copy_from_slice(&good[..16]);
        is_refused(&place, "half", &bytes);
    }
    for start in [0, LABELS / 2] {
        let image = fs::File::options().write(true).open(place.path("disk.img"));
        let half = pattern(LABELS / 2, 5);
        image.unwrap().write_all_at(&half, start as u64).unwrap();
        let server = place.serve(&["disk.img"]);
        // This writes both again.
        place.ok(&["disable", "pmem0"]);
        place.ok(&["enable", "pmem0"]);
        assert!(server.end(libc::SIGTERM).status.success());
    }
}
