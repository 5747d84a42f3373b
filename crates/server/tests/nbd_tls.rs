//! Clients under TLS: who is let in, what is refused before, and that nothing else changes.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails where it should, and knows its numbers"
)]

use core::time::Duration;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Instant;

use pgmap_server::nbd::{BadCredentials, Credentials, Peers, Security, Stopped};
use pgmap_sync::atomic::{AtomicBool, Ordering};
use rustls::{ClientConnection, StreamOwned};

mod common;
#[path = "common/pki.rs"]
mod pki;

use common::{Client, FLUSH, MIB, READ, Replies, Rig, WRITE, greet, load, option, option_bytes};
use common::{pattern, request, string};
use pki::Pki;

const LIST: u32 = 3;
const START_TLS: u32 = 5;
const GO: u32 = 7;
const ACK: u32 = 1;
const UNSUP: u32 = (1 << 31) + 1;
const INVALID: u32 = (1 << 31) + 3;
const TLS_REQD: u32 = (1 << 31) + 5;

type Secured = StreamOwned<ClientConnection, UnixStream>;

fn required(pki: &Pki) -> Rig {
    Rig::secured(32 * MIB, Security::Required(pki.server(Peers::Verified)))
}

/// A connection that is greeted, and goes on under TLS.
fn secured(rig: &Rig, pki: &Pki) -> Secured {
    let mut stream = rig.connect();
    greet(&mut stream, 3);
    assert_eq!(option(&mut stream, START_TLS, &[])[0].0, ACK);
    handshake(stream, pki)
}

fn handshake(stream: UnixStream, pki: &Pki) -> Secured {
    let name = "localhost".try_into().unwrap();
    StreamOwned::new(ClientConnection::new(pki.client(), name).unwrap(), stream)
}

fn client(rig: &Rig, pki: &Pki, replies: Replies) -> Client<Secured> {
    Client::greeted(secured(rig, pki), "disk", replies)
}

/// Whether the server hangs up without another byte.
fn is_over(stream: &mut impl Read) -> bool {
    match stream.read(&mut [0]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
    }
}

/// Before TLS a server that requires it answers nothing else, and tells the reason; afterwards it answers everything.
#[test]
fn nothing_is_answered_before_tls() {
    let (pki, mut go) = (Pki::new(), string("disk"));
    go.extend([0, 0]);
    let rig = required(&pki);
    let mut stream = rig.connect();
    greet(&mut stream, 3);
    let long = vec![0; 100_000];
    for (kind, data) in [(LIST, &[][..]), (GO, &go), (6, &go), (8, &[]), (99, &long)] {
        assert_eq!(option(&mut stream, kind, data)[0].0, TLS_REQD, "{kind}");
    }
    assert_eq!(option(&mut stream, START_TLS, &[])[0].0, ACK);
    let mut stream = handshake(stream, &pki);
    assert_eq!(option(&mut stream, LIST, &[]).len(), 3);
    assert_eq!(option(&mut stream, START_TLS, &[])[0].0, INVALID);
    let mut client = Client::greeted(stream, "disk", Replies::Structured);
    assert_eq!(client.ask(READ, 0, 0, 10).payload, [0; 10]);
}

/// The oldest way to choose knows no errors: before TLS it ends the connection. Saying goodbye is always possible.
#[test]
fn old_clients_are_sent_away_and_may_leave() {
    let rig = required(&Pki::new());
    let mut stream = rig.connect();
    greet(&mut stream, 3);
    stream.write_all(&option_bytes(1, b"disk")).unwrap();
    assert!(is_over(&mut stream));
    let mut stream = rig.connect();
    greet(&mut stream, 3);
    assert_eq!(option(&mut stream, 2, &[])[0].0, ACK);
}

/// A server without TLS never asks for it; one that offers it serves those who do without; the option takes no data.
#[test]
fn tls_may_be_absent_or_a_choice() {
    let pki = Pki::new();
    let plain = Rig::new(MIB);
    let mut stream = plain.connect();
    greet(&mut stream, 3);
    assert_eq!(option(&mut stream, START_TLS, &[])[0].0, UNSUP);
    let rig = Rig::secured(MIB, Security::Offered(pki.server(Peers::Anybody)));
    assert_eq!(rig.client(Replies::Structured).ask(READ, 0, 0, 1).error, 0);
    let mut stream = rig.connect();
    greet(&mut stream, 3);
    assert_eq!(option(&mut stream, START_TLS, b"x")[0].0, INVALID);
    assert_eq!(
        client(&rig, &pki, Replies::Simple).ask(READ, 0, 0, 1).error,
        0
    );
}

/// What was agreed on in the clear is forgotten: somebody else may have said it.
#[test]
fn tls_begins_with_nothing_agreed_on() {
    let pki = Pki::new();
    let rig = Rig::secured(MIB, Security::Offered(pki.server(Peers::Verified)));
    let mut stream = rig.connect();
    greet(&mut stream, 3);
    assert_eq!(option(&mut stream, 8, &[])[0].0, ACK);
    assert_eq!(option(&mut stream, START_TLS, &[])[0].0, ACK);
    let stream = handshake(stream, &pki);
    // Structured replies would be taken for garbage.
    let mut client = Client::greeted(stream, "disk", Replies::Simple);
    assert_eq!(client.ask(READ, 0, 0, 100_000).payload, vec![0; 100_000]);
}

/// Bytes that come with STARTTLS, in the clear, are not taken for options under TLS: the session ends.
#[test]
fn what_came_before_the_handshake_is_no_command() {
    let pki = Pki::new();
    let rig = Rig::secured(MIB, Security::Offered(pki.server(Peers::Anybody)));
    let mut stream = rig.connect();
    greet(&mut stream, 3);
    let injected = [option_bytes(START_TLS, &[]), option_bytes(LIST, &[])].concat();
    stream.write_all(&injected).unwrap();
    let mut answers = Vec::new();
    let _ = stream.read_to_end(&mut answers);
    // An acknowledgement, and an alert at most: no list.
    assert!(answers.len() < 20 + 10, "{answers:?}");
    assert_eq!(answers[8..16], [0, 0, 0, 5, 0, 0, 0, 1]);
}

/// Garbage instead of a handshake, or among records, ends the session and nothing else.
#[test]
fn garbage_under_tls_ends_the_session() {
    let pki = Pki::new();
    let rig = required(&pki);
    for garbage in [
        &[0x16, 3, 1, 0xff, 0xff, 1][..],
        &[b'x'; 200],
        &[0x15, 3, 3, 0, 2, 1, 0],
    ] {
        let mut stream = rig.connect();
        greet(&mut stream, 3);
        assert_eq!(option(&mut stream, START_TLS, &[])[0].0, ACK);
        stream.write_all(garbage).unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
        let mut client = client(&rig, &pki, Replies::Simple);
        assert_eq!(client.ask(READ, 0, 0, 1).error, 0);
        client.stream.sock.write_all(garbage).unwrap();
        assert!(is_over(&mut client.stream.sock) || client.any_reply(0).is_none());
    }
    rig.wait_for_nobody();
}

/// A client that says nothing in the handshake of TLS, or a byte now and then, or never ceases, is dropped.
#[test]
fn stalled_handshakes_are_dropped() {
    let pki = Pki::new();
    let rig = Rig::secured(MIB, Security::Offered(pki.server(Peers::Anybody)));
    let begin = Instant::now();
    let in_handshake = || {
        let mut stream = rig.connect();
        greet(&mut stream, 3);
        assert_eq!(option(&mut stream, START_TLS, &[])[0].0, ACK);
        stream
    };
    let (silent, mut slow) = (in_handshake(), in_handshake());
    let slow = std::thread::spawn(move || {
        // The head of a record, a byte at a time, and no end of it.
        for byte in [0x16, 3, 1, 0x3f, 0xff]
            .into_iter()
            .chain(core::iter::repeat(0))
        {
            std::thread::sleep(Duration::from_millis(20));
            assert!(begin.elapsed() < Duration::from_secs(5), "it goes on");
            if slow.write_all(&[byte]).is_err() {
                return;
            }
        }
    });
    let mut haggler = rig.connect();
    greet(&mut haggler, 3);
    let mut reader = haggler.try_clone().unwrap();
    let reader = std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
    while haggler
        .write_all(&option_bytes(LIST, &[]).repeat(100))
        .is_ok()
    {
        assert!(begin.elapsed() < Duration::from_secs(5), "it goes on");
    }
    slow.join().unwrap();
    let _ = reader.join().unwrap();
    rig.wait_for_nobody();
    drop(silent);
}

/// Requests of all lengths come back as they went, and counters and errors are the same as in the clear.
#[test]
fn bytes_come_back_as_they_went() {
    let pki = Pki::new();
    let rig = required(&pki);
    for replies in [Replies::Simple, Replies::Structured] {
        let mut client = client(&rig, &pki, replies);
        for (seed, length) in [1, 512, 16_384, 65_536, 65_537, 300_001, 20 << 20]
            .iter()
            .enumerate()
        {
            let bytes = pattern(seed as u64, *length);
            assert_eq!(client.write(0, 12_345, &bytes).error, 0);
            let read = client.ask(READ, 0, 12_345, *length as u32);
            assert!(read.error == 0 && read.payload == bytes, "{length}");
        }
        assert_eq!(client.ask(FLUSH, 0, 0, 0).error, 0);
        assert_ne!(client.ask(READ, 0, 32 * MIB, 1).error, 0);
    }
}

/// PMEM-2: a client that does not take its reply holds no request; a write of which nothing has come neither.
#[test]
fn stalled_clients_hold_no_request() {
    let pki = Pki::new();
    let rig = required(&pki);
    let mut reader = client(&rig, &pki, Replies::Simple);
    let cookie = reader.send(READ, 0, 0, 24 << 20);
    let mut writer = client(&rig, &pki, Replies::Structured);
    let write = writer.send(WRITE, 0, 0, 1 << 20);
    writer.stream.write_all(&vec![7; 200_000]).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert!(rig.disk.queue.freeze(Some(Duration::from_secs(5))));
    let reply = reader.reply(cookie, 24 << 20);
    assert!(reply.error == 0 && reply.payload.len() == 24 << 20);
    assert_eq!(reader.ask(READ, 0, 0, 100_000).error, 108);
    writer
        .stream
        .write_all(&vec![7; (1 << 20) - 200_000])
        .unwrap();
    assert_eq!(writer.reply(write, 0).error, 108);
    rig.disk.queue.thaw();
    assert_eq!(reader.ask(READ, 0, 0, 100_000).error, 0);
    let cookie = reader.send(READ, 0, 0, 24 << 20);
    assert_eq!(rig.server.stop(Duration::from_secs(2)), Stopped::Clean);
    drop((reader, cookie));
}

/// PMEM-2: a device is frozen and thawed at random moments under writers, and what was acknowledged is there.
#[test]
fn freezing_under_load_loses_nothing() {
    let pki = Pki::new();
    let rig = required(&pki);
    let done = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..2)
        .map(|number| {
            let (mut writer, done) = (client(&rig, &pki, Replies::Structured), done.clone());
            let mut reader = client(&rig, &pki, Replies::Simple);
            std::thread::spawn(move || {
                load::write_under_freezes(number, &mut writer, &mut reader, &done)
            })
        })
        .collect();
    load::freeze_and_thaw(&rig);
    // Relaxed: the writers are joined below.
    done.store(true, Ordering::Relaxed);
    let counts: Vec<_> = writers
        .into_iter()
        .map(|writer| writer.join().unwrap())
        .collect();
    assert!(counts.iter().all(|(written, _)| *written > 0), "{counts:?}");
}

/// Requests that came before the client's end of TLS are answered, and the server says its own end.
#[test]
fn goodbye_comes_after_the_replies() {
    let pki = Pki::new();
    let rig = required(&pki);
    let mut client = client(&rig, &pki, Replies::Simple);
    client.stream.write_all(&request(READ, 0, 1, 0, 4)).unwrap();
    client.stream.conn.send_close_notify();
    client.stream.flush().unwrap();
    assert_eq!(client.reply(1, 4).error, 0);
    // Without the server's goodbye this would be an error.
    assert_eq!(client.stream.read(&mut [0]).unwrap(), 0);
}

/// Files that are missing, empty, or do not belong together are named.
#[test]
fn bad_credentials_are_named() {
    let read = |pki: &Pki| Credentials::read(pki.path(), Peers::Verified).unwrap_err();
    for name in [
        "ca-cert.pem",
        "server-cert.pem",
        "server-key.pem",
        "ca-crl.pem",
    ] {
        let pki = Pki::new();
        pki.put(name, "nothing");
        assert!(read(&pki).to_string().contains(name), "{name}");
        if name != "ca-crl.pem" {
            std::fs::remove_file(pki.path().join(name)).unwrap();
            assert!(read(&pki).to_string().contains(name), "{name}");
        }
    }
    let (pki, other) = (Pki::new(), Pki::new());
    let key = std::fs::read_to_string(other.path().join("server-key.pem")).unwrap();
    pki.put("server-key.pem", &key);
    assert!(matches!(read(&pki), BadCredentials::Own(_)));
}

/// A certificate of another authority is refused, and so is one that was taken back.
#[test]
fn only_our_authoritys_clients_are_let_in() {
    let (pki, other) = (Pki::new(), Pki::new());
    let rig = required(&pki);
    let mut stream = rig.connect();
    greet(&mut stream, 3);
    assert_eq!(option(&mut stream, START_TLS, &[])[0].0, ACK);
    // It believes the server, and shows what another authority gave it.
    let ca = std::fs::read_to_string(pki.path().join("ca-cert.pem")).unwrap();
    other.put("ca-cert.pem", &ca);
    let mut stream = handshake(stream, &other);
    let refused = stream.write_all(&option_bytes(LIST, &[])).is_err();
    assert!(refused || stream.read(&mut [0]).is_err());
    pki.revoke();
    let strict = required(&pki);
    let mut stream = secured(&strict, &pki);
    let refused = stream.write_all(&option_bytes(LIST, &[])).is_err();
    assert!(refused || stream.read(&mut [0]).is_err());
    // Before it was taken back it was good.
    assert_eq!(
        client(&rig, &pki, Replies::Simple).ask(READ, 0, 0, 1).error,
        0
    );
}

/// Runs a program; `None`, said aloud, if it is not there.
fn run(arguments: &[&str]) -> Option<Output> {
    let output = Command::new(arguments[0]).args(&arguments[1..]).output();
    if output.is_err() {
        eprintln!("SKIPPED: there is no {} here", arguments[0]);
    }
    output.ok()
}

fn uri(rig: &Rig, certificates: &std::path::Path) -> String {
    let (socket, certificates) = (rig.socket(), certificates.display());
    format!(
        "nbds+unix:///disk?socket={}&tls-certificates={certificates}&tls-hostname=localhost",
        socket.display()
    )
}

/// libnbd's clients copy there and back; those without a certificate, of another authority, or in the clear, are refused.
#[test]
fn nbdcopy_and_nbdinfo_speak_tls() {
    let (pki, other) = (Pki::new(), Pki::new());
    let rig = required(&pki);
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("in"), pattern(5, 32 << 20)).unwrap();
    let good = uri(&rig, pki.path());
    let Some(copied) = run(&["nbdcopy", "--flush", &path("in"), &good]) else {
        return;
    };
    assert!(copied.status.success(), "{copied:?}");
    assert!(
        run(&["nbdcopy", &good, &path("out")])
            .unwrap()
            .status
            .success()
    );
    assert!(std::fs::read(path("out")).unwrap() == pattern(5, 32 << 20));
    let info = run(&["nbdinfo", &good]).unwrap();
    assert!(
        String::from_utf8_lossy(&info.stdout).contains("protocol: newstyle-fixed with TLS"),
        "{info:?}"
    );
    let nameless = pki.without_client();
    for bad in [
        uri(&rig, other.path()),
        uri(&rig, nameless.path()),
        rig.uri("disk"),
    ] {
        assert!(!run(&["nbdinfo", &bad]).unwrap().status.success(), "{bad}");
    }
}

/// qemu's client compares what libnbd's would have copied.
#[test]
fn qemu_img_speaks_tls() {
    let pki = Pki::new();
    let rig = required(&pki);
    let mut writer = client(&rig, &pki, Replies::Simple);
    let bytes = pattern(6, 32 << 20);
    assert_eq!(writer.write(0, 0, &bytes).error, 0);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &bytes).unwrap();
    let object = format!(
        "tls-creds-x509,id=tls0,endpoint=client,dir={}",
        pki.path().display()
    );
    let ours = format!(
        "driver=nbd,server.type=unix,server.path={},export=disk,tls-creds=tls0,tls-hostname=localhost",
        rig.socket().display()
    );
    let theirs = format!("driver=raw,file.filename={}", file.path().display());
    let arguments = [
        "qemu-img",
        "compare",
        "--object",
        &object,
        "--image-opts",
        &ours,
        &theirs,
    ];
    if let Some(compared) = run(&arguments) {
        assert!(compared.status.success(), "{compared:?}");
    }
}
