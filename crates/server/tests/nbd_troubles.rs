//! Clients that stall, lie or die; a device that is taken away under them; and the end of the server.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::large_stack_arrays,
    reason = "a test fails where it should, and knows its numbers"
)]

use core::time::Duration;
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use pgmap_server::nbd::{Count, Limits, Listener, Security, Stopped};
use pgmap_sync::atomic::{AtomicBool, Ordering};

mod common;

use common::{
    Client, DISCONNECT, FLUSH, MIB, OPTION_MAGIC, READ, Replies, Rig, WRITE, greet, load, option,
    option_bytes, pattern, request,
};

/// Whether the server has hung up.
fn is_over(stream: &mut impl Read) -> bool {
    let mut rest = Vec::new();
    let read = stream.read_to_end(&mut rest);
    read.is_ok() || read.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset)
}

/// Bytes that are no handshake end the connection, and nothing else.
#[test]
fn garbage_in_the_handshake_ends_it() {
    let rig = Rig::new(MIB);
    let unknown_flags = [0, 0, 0, 8].to_vec();
    let no_option = [&[0, 0, 0, 3][..], &[b'x'; 64]].concat();
    let huge_option = [&[0, 0, 0, 3][..], OPTION_MAGIC, &[0, 0, 0, 6], &[0xff; 4]].concat();
    for garbage in [unknown_flags, no_option, huge_option] {
        let mut stream = rig.connect();
        stream.write_all(&garbage).unwrap();
        assert!(is_over(&mut stream), "{garbage:?}");
    }
    assert_eq!(rig.client(Replies::Simple).ask(READ, 0, 0, 1).error, 0);
}

/// Bytes that are no request end the connection; what came before is answered.
#[test]
fn garbage_among_requests_ends_the_session() {
    let rig = Rig::new(MIB);
    let mut client = rig.client(Replies::Simple);
    let mut bytes = request(READ, 0, 1, 0, 4);
    bytes.extend([b'x'; 28]);
    client.stream.write_all(&bytes).unwrap();
    assert_eq!(client.reply(1, 4).error, 0);
    assert_eq!(client.any_reply(0), None);
}

/// A write of more bytes than anybody could mean is not waited for.
#[test]
fn a_write_of_gigabytes_ends_the_session() {
    let rig = Rig::new(MIB);
    let mut client = rig.client(Replies::Structured);
    client.send(WRITE, 0, 0, u32::MAX);
    assert_eq!(client.any_reply(0), None);
}

/// A client that says nothing in the handshake, or a byte now and then, is dropped.
#[test]
fn stalled_handshakes_are_dropped() {
    let rig = Rig::new(MIB);
    let mut silent = rig.connect();
    let mut slow = rig.connect();
    let begin = Instant::now();
    greet(&mut slow, 3);
    let mut writer = slow.try_clone().unwrap();
    let thread = std::thread::spawn(move || {
        for byte in option_bytes(3, &[0; 60]) {
            std::thread::sleep(Duration::from_millis(20));
            if writer.write_all(&[byte]).is_err() {
                break;
            }
        }
    });
    assert!(is_over(&mut silent) && is_over(&mut slow));
    assert!(begin.elapsed() < Duration::from_millis(1200));
    thread.join().unwrap();
}

/// PMEM-2: a client that does not take its reply holds the device up for a moment only, and gets it all later.
#[test]
fn who_takes_no_reply_does_not_hold_the_device() {
    let rig = Rig::new(32 * MIB);
    let bytes = pattern(1, 24 << 20);
    for replies in [Replies::Simple, Replies::Structured] {
        let mut client = rig.client(replies);
        assert_eq!(client.write(0, 0, &bytes).error, 0);
        let cookie = client.send(READ, 0, 0, 24 << 20);
        // The reply begins, and does not fit into the socket.
        client.stream.set_nonblocking(false).unwrap();
        while rig.disk.queue.in_flight() == 0 {
            std::thread::yield_now();
        }
        let begin = Instant::now();
        assert!(rig.disk.queue.freeze(Some(Duration::from_secs(5))));
        assert!(begin.elapsed() < Duration::from_secs(2));
        let reply = client.reply(cookie, 24 << 20);
        assert!(reply.error == 0 && reply.payload == bytes);
        assert_eq!(client.ask(READ, 0, 0, 1).error, 108);
        rig.disk.queue.thaw();
        assert_eq!(client.ask(READ, 0, 0, 1).error, 0);
    }
}

/// PMEM-2: a client that stops in the middle of a payload holds nobody up; the write is refused once, and the session goes on.
#[test]
fn a_device_may_go_in_the_middle_of_a_payload() {
    let rig = Rig::new(4 * MIB);
    for (sent, length) in [(1000, 4096), (200_000, 1 << 20)] {
        let mut client = rig.client(Replies::Structured);
        let cookie = client.send(WRITE, 0, 0, length);
        client.stream.write_all(&vec![7; sent]).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert!(rig.disk.queue.freeze(Some(Duration::from_secs(1))));
        client
            .stream
            .write_all(&vec![7; length as usize - sent])
            .unwrap();
        assert_eq!(client.reply(cookie, 0).error, 108);
        assert_eq!(client.ask(FLUSH, 0, 0, 0).error, 108);
        rig.disk.queue.thaw();
        assert_eq!(client.ask(FLUSH, 0, 0, 0).error, 0);
    }
}

/// A client that goes in the middle of anything leaves nothing behind.
#[test]
fn clients_may_go_at_any_moment() {
    let rig = Rig::new(32 * MIB);
    rig.client(Replies::Simple);
    let mut client = rig.client(Replies::Structured);
    client.send(WRITE, 0, 0, 1 << 20);
    client.stream.write_all(&[1; 300_000]).unwrap();
    drop(client);
    let mut client = rig.client(Replies::Structured);
    client.send(READ, 0, 0, 32 << 20);
    drop(client);
    let mut stream = rig.connect();
    greet(&mut stream, 3);
    stream.write_all(&option_bytes(7, b"abc")[..18]).unwrap();
    drop(stream);
    rig.wait_for_nobody();
    assert!(rig.disk.queue.freeze(Some(Duration::ZERO)));
    rig.disk.queue.thaw();
}

/// A client that is killed leaves nothing behind.
#[test]
fn a_killed_client_leaves_nothing_behind() {
    let rig = Rig::new(64 * MIB);
    let copy = Command::new("nbdcopy")
        .args(["/dev/zero", &rig.uri("")])
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut copy) = copy else {
        eprintln!("SKIPPED: there is no nbdcopy here");
        return;
    };
    std::thread::sleep(Duration::from_millis(30));
    copy.kill().unwrap();
    copy.wait().unwrap();
    rig.wait_for_nobody();
    assert!(rig.disk.queue.freeze(Some(Duration::ZERO)));
    rig.disk.queue.thaw();
}

/// Hundreds of clients at once are served; who comes on top is turned away; all are listed.
#[test]
fn hundreds_of_clients_are_served() {
    let rig = Rig::with(
        MIB,
        Limits {
            clients: 300,
            ..Limits::default()
        },
        Security::Plain,
    );
    let mut clients: Vec<_> = (0..300).map(|_| rig.client(Replies::Simple)).collect();
    assert!(is_over(&mut rig.connect()));
    for (block, client) in (0u64..).zip(&mut clients) {
        assert_eq!(client.write(0, block * 512, &[block as u8; 512]).error, 0);
    }
    for (block, client) in (0u64..).zip(clients.iter_mut().rev()) {
        assert_eq!(client.ask(READ, 0, block * 512, 1).payload, [block as u8]);
    }
    let listed = rig.server.clients();
    assert_eq!(listed.len(), 300);
    let of_us = |pid| pid == Some(std::process::id());
    assert!(
        listed
            .iter()
            .all(|client| of_us(client.pid) && client.process.is_some())
    );
    assert!(
        listed
            .iter()
            .all(|client| client.export.as_deref() == Some("disk"))
    );
    drop(clients);
    rig.wait_for_nobody();
}

/// What one connection wrote, another reads, and flushes.
#[test]
fn connections_share_the_disk() {
    let rig = Rig::new(MIB);
    let (mut one, mut other) = (rig.client(Replies::Simple), rig.client(Replies::Structured));
    assert_eq!(one.flags & 1 << 8, 1 << 8);
    for round in 0..100u8 {
        assert_eq!(one.write(0, 4096, &[round; 4096]).error, 0);
        assert_eq!(other.ask(READ, 0, 4096, 4096).payload, [round; 4096]);
        assert_eq!(other.ask(FLUSH, 0, 0, 0).error, 0);
    }
}

/// TCP works as a unix socket does.
#[test]
fn tcp_is_served() {
    let rig = Rig::new(MIB);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    rig.server.serve(Listener::Tcp(listener)).unwrap();
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    stream.write_all(&[0, 0, 0, 3]).unwrap();
    stream.write_all(&option_bytes(1, b"disk")).unwrap();
    stream.read_exact(&mut [0; 10]).unwrap();
    stream.write_all(&request(READ, 0, 9, 0, 200_000)).unwrap();
    let mut reply = vec![1; 16 + 200_000];
    stream.read_exact(&mut reply).unwrap();
    assert!(reply[16..].iter().all(|byte| *byte == 0));
    assert_eq!(rig.server.clients()[0].pid, None);
}

/// PMEM-2: a device is frozen and thawed at random moments under writers. Each request is answered once, and what was
/// acknowledged is there.
#[test]
fn freezing_under_load_loses_nothing() {
    const WRITERS: u64 = 3;
    let rig = Rig::new(WRITERS * 4 * MIB);
    let done = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let (mut client, done) = (rig.client(Replies::Structured), done.clone());
            let mut reader = rig.client(Replies::Simple);
            std::thread::spawn(move || {
                load::write_under_freezes(writer, &mut client, &mut reader, &done)
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
    assert!(counts.iter().any(|(_, refused)| *refused > 0), "{counts:?}");
}

/// Stopping answers what was sent, refuses what comes later, and hangs up, also on those who stall.
#[test]
fn stopping_ends_all_sessions() {
    let rig = Rig::new(32 * MIB);
    let mut busy = rig.client(Replies::Structured);
    let mut stalled = rig.client(Replies::Simple);
    let mut haggling = rig.connect();
    greet(&mut haggling, 3);
    assert_eq!(busy.write(0, 0, &[5; 4096]).error, 0);
    stalled.send(READ, 0, 0, 32 << 20);
    while rig.disk.queue.in_flight() == 0 {
        std::thread::yield_now();
    }
    let mut cookies = Vec::new();
    for _ in 0..100 {
        cookies.push(busy.send(READ, 0, 0, 512));
    }
    let begin = Instant::now();
    assert_eq!(rig.server.stop(Duration::from_secs(2)), Stopped::Clean);
    assert!(begin.elapsed() < Duration::from_secs(2));
    for cookie in cookies {
        let reply = busy.reply(cookie, 512);
        assert!(reply.error == 108 || reply.payload == [5; 512]);
    }
    assert_eq!(busy.any_reply(0), None);
    assert!(is_over(&mut haggling));
    assert!(rig.server.clients().is_empty());
    let late = std::os::unix::net::UnixStream::connect(rig.socket());
    assert!(late.is_err(), "nobody listens");
}

/// The clients of one export can be sent away, and the others stay.
#[test]
fn one_exports_clients_can_be_sent_away() {
    let rig = Rig::new(MIB);
    let mut goes = Client::new(rig.connect(), "still", Replies::Simple);
    let mut stays = rig.client(Replies::Simple);
    rig.server.disconnect("still");
    assert_eq!(goes.any_reply(0), None);
    assert_eq!(stays.ask(READ, 0, 0, 1).error, 0);
}

/// A client that says goodbye gets all its replies before.
#[test]
fn goodbye_comes_after_the_replies() {
    let rig = Rig::new(MIB);
    let mut client = rig.client(Replies::Simple);
    let mut bytes = request(READ, 0, 1, 0, 4);
    bytes.extend(request(DISCONNECT, 0, 2, 0, 0));
    client.stream.write_all(&bytes).unwrap();
    assert_eq!(client.reply(1, 4).error, 0);
    assert_eq!(client.any_reply(0), None);
    rig.wait_for_nobody();
    assert_eq!(rig.export.counters.get(Count::Reads), 1);
    let mut stream = rig.connect();
    greet(&mut stream, 3);
    assert_eq!(option(&mut stream, 2, &[])[0].0, 1);
}
