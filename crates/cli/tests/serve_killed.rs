//! `pgmap serve` and its clients are killed, stopped, or told nonsense at random moments.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod serving;

use core::time::Duration;
use pgmap_sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::Instant;

use serving::nbd::{BLOCK, Nbd, Writer};
use serving::{Place, Random, has, pattern, signal};

const MIB: usize = 1 << 20;
/// Blocks of each writer.
const BLOCKS: u64 = 256;

fn connect(socket: &Path) -> Nbd {
    Nbd::connect(socket, "pmem0").unwrap()
}

fn writers() -> [Writer; 3] {
    [0, 1, 2].map(|id| Writer::new(id, id * BLOCKS * BLOCK as u64, BLOCKS))
}

/// Writes until the connection ends.
fn write_to_the_end(writer: &mut Writer, socket: &Path) {
    let mut nbd = connect(socket);
    while writer.round(&mut nbd).is_ok() {}
}

/// Each of these writes a label.
fn write_labels(place: &Place, over: &AtomicBool) {
    while !over.load(SeqCst) {
        for verb in ["inject-error", "clear-error"] {
            let arguments = [verb, "pmem0", "--block", "61000"];
            // Refused once the server is gone.
            let _ = place.pgmap(&arguments).stderr(Stdio::null()).status();
        }
    }
}

/// PMEM-4: a server is killed at random moments under writes with FUA. What was acknowledged is there after a restart, and
/// labels that were being written are old or new.
#[test]
fn a_server_that_is_killed_under_load_loses_nothing() {
    let place = Place::new();
    let mut server = place.serve(&["disk.img,size=32M"]);
    let (mut random, mut writers) = (Random::new(3), writers());
    for round in 0..12 {
        let (pid, socket) = (server.pid(), server.nbd().to_owned());
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            for writer in &mut writers {
                scope.spawn(|| write_to_the_end(writer, &socket));
            }
            scope.spawn(|| write_labels(&place, &over));
            thread::sleep(Duration::from_millis(20) + random.sleep_below(150));
            signal(pid, libc::SIGKILL);
            over.store(true, SeqCst);
        });
        drop(server);
        server = place.serve(&["disk.img"]);
        let mut nbd = connect(server.nbd());
        for writer in &writers {
            writer.check(&mut nbd);
        }
        let listed = place.ok(&["list", "-M"]);
        assert!(listed.contains("fsdax"), "round {round}: {listed}");
    }
    assert!(writers.iter().all(|writer| writer.done > 100));
}

/// SIGTERM under load: every request is answered or its connection ended, all is flushed, and the end is clean and soon.
#[test]
fn a_server_ends_cleanly_under_load() {
    let place = Place::new();
    for round in 0..3 {
        let mut server = place.serve(&["disk.img,size=32M"]);
        let (socket, mut writers) = (server.nbd().to_owned(), writers());
        thread::scope(|scope| {
            for writer in &mut writers {
                scope.spawn(|| write_to_the_end(writer, &socket));
            }
            thread::sleep(Duration::from_millis(150 + 70 * round));
            let started = Instant::now();
            let output = server.end(libc::SIGTERM);
            assert!(output.status.success(), "{output:?}");
            assert!(output.stderr.is_empty(), "{output:?}");
            let took = started.elapsed();
            assert!(took < Duration::from_secs(5), "{took:?}");
        });
        assert!(!socket.exists() && !socket.with_extension("sock").exists());
        server = place.serve(&["disk.img"]);
        let mut nbd = connect(server.nbd());
        for writer in &writers {
            assert!(writer.done > 20, "this was no load");
            writer.check(&mut nbd);
        }
    }
}

/// REF-7: clients that take no replies, stop in the middle of a payload or of a question, or are stopped, hold up no unplug
/// and no end.
#[test]
fn stopped_clients_hold_nobody_up() {
    let place = Place::new();
    let server = place.serve(&["disk.img,size=32M"]);
    let mut greedy = connect(server.nbd());
    for _ in 0..16 {
        greedy.send_read(0, 2 * MIB).unwrap();
    }
    let mut half = connect(server.nbd());
    half.send_half(0, &pattern(MIB, 1), 100_000).unwrap();
    let mut asking = UnixStream::connect(server.control()).unwrap();
    asking.write_all(b"{\"unp").unwrap();
    let silent = UnixStream::connect(server.nbd()).unwrap();
    let mut stopped = None;
    if has("qemu-img") {
        let uri = server.uri("pmem0");
        let mut command = std::process::Command::new("qemu-img");
        command.args(["bench", "-w", "-f", "raw", "-d", "32", "-c", "1000000"]);
        let child = command.arg(uri).stdout(Stdio::null()).spawn().unwrap();
        place.wait_until(&["top", "-n", "1", "--interval", "50ms"], |_| true);
        thread::sleep(Duration::from_millis(200));
        signal(child.id(), libc::SIGSTOP);
        stopped = Some(child);
    }
    thread::sleep(Duration::from_millis(100));
    place.ok(&["unplug", "pmem0", "--timeout", "5s"]);
    place.ok(&["enable", "pmem0"]);
    let mut nbd = connect(server.nbd());
    nbd.write(0, &[7; BLOCK]).unwrap();
    let started = Instant::now();
    let output = server.end(libc::SIGTERM);
    assert!(output.status.success(), "{output:?}");
    let took = started.elapsed();
    assert!(took < Duration::from_secs(8), "{took:?}");
    if let Some(mut child) = stopped {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    drop((greedy, half, asking, silent));
}

/// Who does not want to wait for the last replies sends a second signal.
#[test]
fn a_second_signal_ends_a_server_at_once() {
    let place = Place::new();
    let server = place.serve(&["disk.img,size=32M"]);
    let mut greedy = connect(server.nbd());
    for _ in 0..16 {
        greedy.send_read(0, 2 * MIB).unwrap();
    }
    thread::sleep(Duration::from_millis(100));
    let started = Instant::now();
    signal(server.pid(), libc::SIGTERM);
    while server.control().exists() {
        thread::sleep(Duration::from_millis(10));
    }
    let output = server.end(libc::SIGTERM);
    assert_eq!(output.status.signal(), Some(libc::SIGTERM), "{output:?}");
    let took = started.elapsed();
    assert!(took < Duration::from_secs(3), "{took:?}");
    drop(greedy);
}

/// Clients that go in the middle of a payload leave nothing behind, and what others write is not touched.
#[test]
fn clients_that_go_in_the_middle_leave_nothing() {
    let place = Place::new();
    let server = place.serve(&["memory,size=32M"]);
    let mut random = Random::new(8);
    let mut good = connect(server.nbd());
    let bytes = pattern(2 * MIB, 5);
    good.write(0, &bytes).unwrap();
    for _ in 0..200 {
        let mut nbd = connect(server.nbd());
        let sent = usize::try_from(random.below(MIB as u64)).unwrap();
        let at = 4 * MIB as u64;
        // The server may have read nothing yet.
        let _ = nbd.send_half(at, &bytes[..MIB], sent);
        if random.below(2) == 0 {
            let _ = nbd.stream.shutdown(Shutdown::Both);
        }
    }
    assert!(good.read(0, 2 * MIB).unwrap() == bytes);
    drop(good);
    let top = ["top", "-n", "1", "--interval", "10ms"];
    place.wait_for(&["holders", "pmem0"], "nobody holds pmem0");
    place.ok(&top);
    place.ok(&["unplug", "pmem0", "--timeout", "1s"]);
    assert!(server.end(libc::SIGTERM).status.success());
}

/// Sends one bad message: random bytes, or the beginning of a good one with some bytes changed.
fn nonsense(socket: &Path, good: &[u8], random: &mut Random) {
    let Ok(mut stream) = UnixStream::connect(socket) else {
        return;
    };
    let length = usize::try_from(random.below(2048)).unwrap();
    let mut bytes = pattern(length, random.below(1 << 40));
    if random.below(4) > 0 {
        bytes.splice(..0, good.iter().copied());
        for _ in 0..random.below(4) {
            let at = usize::try_from(random.below(good.len() as u64)).unwrap();
            bytes[at] = random.below(256).to_le_bytes()[0];
        }
    }
    let patience = Some(Duration::from_millis(10));
    stream.set_read_timeout(patience).unwrap();
    // It may hang up at any byte.
    let _ = stream.write_all(&bytes);
    let _ = stream.read(&mut [0; 256]);
}

fn talk_nonsense(socket: &Path, good: &[u8], seed: u64, until: Instant) {
    let mut random = Random::new(seed);
    while Instant::now() < until {
        nonsense(socket, good, &mut random);
    }
}

/// Garbage on both sockets ends the connection that it came by, and disturbs nobody else.
#[test]
fn garbage_disturbs_nobody() {
    let place = Place::new();
    let server = place.serve(&["disk.img,size=32M"]);
    let until = Instant::now() + Duration::from_millis(1500);
    // A handshake and a read.
    let handshake = [
        &b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x0b\0\0\0\x05pmem0\0\0"[..],
        b"\x25\x60\x95\x13\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\x10\0",
    ]
    .concat();
    let asked = br#"{"verb":"list"}
{"verb":"holders","device":"pmem0"}
{"verb":"map","namespace":"pmem0","offset":0,"length":null}
{"verb":"pin","namespace":"pmem0","offset":0,"length":4096,"label":"x"}
"#;
    let mut writer = Writer::new(0, 8 * MIB as u64, BLOCKS);
    thread::scope(|scope| {
        for (seed, socket, good) in [
            (1, server.nbd().to_owned(), &handshake[..]),
            (2, server.control(), &asked[..]),
        ] {
            scope.spawn(move || talk_nonsense(&socket, good, seed, until));
        }
        let mut nbd = connect(server.nbd());
        while Instant::now() < until {
            writer.round(&mut nbd).unwrap();
            place.ok(&["list"]);
        }
        writer.check(&mut nbd);
    });
    place.ok(&["unplug", "pmem0", "--timeout", "2s"]);
    let output = server.end(libc::SIGTERM);
    assert!(output.status.success(), "{output:?}");
    // It is told of, and the thousands of lines that it would be are not.
    let said = String::from_utf8(output.stderr).unwrap();
    let is_told = |line: &str| {
        line.contains("does not speak the protocol") || line.ends_with("sessions went wrong")
    };
    assert!(
        said.lines().count() < 20 && said.lines().all(is_told),
        "{said}"
    );
}
