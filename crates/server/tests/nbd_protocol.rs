//! The NBD server answers as the protocol says, byte by byte.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::large_stack_arrays,
    reason = "a test fails where it should, and knows its numbers"
)]

use std::io::{Read, Write};

use pgmap_server::nbd::Count;
use pgmap_sync::atomic::Ordering;

mod common;

use common::{
    BLOCK_STATUS, CACHE, Client, FAST_ZERO, FLUSH, FUA, MIB, NO_HOLE, READ, REQ_ONE, RESIZE,
    Replies, Rig, TRIM, WRITE, WRITE_ZEROES, disk, greet, option, option_bytes, pattern, string,
};

const BOTH: [Replies; 2] = [Replies::Simple, Replies::Structured];

/// What is written is read, short and long, by either kind of reply.
#[test]
fn what_is_written_is_read() {
    let rig = Rig::new(8 * MIB);
    for replies in BOTH {
        let mut client = rig.client(replies);
        assert_eq!(client.size, 8 * MIB);
        for (seed, len) in [1, 511, 4096, 65536, 65537, 300_000, 3_000_001]
            .into_iter()
            .enumerate()
        {
            let (offset, bytes) = (777 + seed as u64, pattern(seed as u64, len));
            assert_eq!(client.write(0, offset, &bytes).error, 0);
            let read = client.ask(READ, 0, offset, u32::try_from(len).unwrap());
            assert_eq!(read.error, 0);
            assert!(read.payload == bytes, "{replies:?} {len}");
        }
    }
    // Both kinds of replies, seven lengths.
    assert_eq!(rig.export.counters.get(Count::Writes), 14);
    assert_eq!(rig.export.counters.get(Count::Reads), 14);
    assert_eq!(rig.export.counters.get(Count::Errors), 0);
}

/// Requests that are sent all at once are each answered, in order.
#[test]
fn requests_may_be_sent_ahead() {
    let rig = Rig::new(MIB);
    let mut client = rig.client(Replies::Structured);
    let mut all = Vec::new();
    for block in 0..64u64 {
        all.extend(common::request(WRITE, 0, 1000 + block, block * 4096, 4096));
        all.extend(pattern(block, 4096));
        all.extend(common::request(READ, 0, 2000 + block, block * 4096, 4096));
    }
    let mut writer = client.stream.try_clone().unwrap();
    let thread = std::thread::spawn(move || writer.write_all(&all).unwrap());
    for block in 0..64 {
        assert_eq!(client.reply(1000 + block, 0).error, 0);
        assert!(client.reply(2000 + block, 4096).payload == pattern(block, 4096));
    }
    thread.join().unwrap();
}

/// A request that waits for the disk keeps no reply back that was there before it.
#[test]
fn a_flush_does_not_hold_replies_up() {
    let rig = Rig::new(MIB);
    let mut client = rig.client(Replies::Simple);
    let patience = Some(core::time::Duration::from_secs(10));
    client.stream.set_read_timeout(patience).unwrap();
    for (command, flags, len) in [(FLUSH, 0, 0), (WRITE_ZEROES, FUA, 4096)] {
        let busy = rig.disk.busy.lock();
        let mut both = common::request(READ, 0, 1000, 0, 512);
        both.extend(common::request(command, flags, 2000, 0, len));
        client.stream.write_all(&both).unwrap();
        assert_eq!(client.reply(1000, 512).error, 0);
        drop(busy);
        assert_eq!(client.reply(2000, 0).error, 0);
    }
}

/// Mistakes are answered with the errors that the protocol names, and the session goes on.
#[test]
fn mistakes_are_answered() {
    let rig = Rig::new(MIB);
    for replies in BOTH {
        let mut client = rig.client(replies);
        let too_long = match replies {
            Replies::Simple => 22,
            Replies::Structured => 75,
        };
        let end = u32::try_from(MIB).unwrap();
        assert_eq!(client.ask(READ, 0, 1, end).error, 22);
        assert_eq!(client.ask(READ, 0, u64::MAX, 2).error, 22);
        assert_eq!(client.ask(READ, 0, 0, 33 << 20).error, too_long);
        assert_eq!(client.ask(READ, 1 << 9, 0, 1).error, 22);
        assert_eq!(client.write(0, MIB - 1, &[1, 2]).error, 28);
        assert_eq!(client.write(0, u64::MAX, &[0; 100_000]).error, 28);
        assert_eq!(client.write(NO_HOLE, 0, &[1, 2]).error, 22);
        assert_eq!(client.write(0, 0, &vec![1; 33 << 20]).error, 22);
        assert_eq!(client.ask(WRITE_ZEROES, 0, 1, end).error, 28);
        assert_eq!(client.ask(TRIM, 0, 1, end).error, 22);
        assert_eq!(client.ask(RESIZE, 0, 0, 0).error, 22);
        assert_eq!(client.ask(99, 0, 0, 0).error, 22);
        assert_eq!(client.ask(READ, 0, 0, 0).error, 0);
        assert_eq!(client.ask(CACHE, 0, 0, end).error, 0);
        assert_eq!(client.ask(READ, FUA, 0, 10).payload, [0; 10]);
    }
}

/// Zeros, holes and what is known about them.
#[test]
fn holes_are_made_and_shown() {
    let rig = Rig::new(MIB);
    let mut client = rig.client(Replies::Structured);
    let status = |client: &mut Client, flags| {
        let reply = client.ask(BLOCK_STATUS, flags, 0, 65536);
        assert_eq!(reply.error, 0);
        let words = reply.payload.chunks(4);
        let words = words.map(|word| u32::from_be_bytes(word.try_into().unwrap()));
        words.collect::<Vec<_>>()
    };
    assert_eq!(status(&mut client, 0), [65536, 3]);
    assert_eq!(client.write(FUA, 0, &[1; 65536]).error, 0);
    assert_eq!(status(&mut client, 0), [65536, 0]);
    assert_eq!(client.ask(TRIM, 0, 4096, 4096).error, 0);
    assert_eq!(client.ask(WRITE_ZEROES, FAST_ZERO, 8192, 4096).error, 0);
    let holes = [4096, 0, 8192, 3, 53248, 0];
    assert_eq!(status(&mut client, 0), holes);
    assert_eq!(status(&mut client, REQ_ONE), holes[..2]);
    assert_eq!(client.ask(WRITE_ZEROES, NO_HOLE, 12288, 4096).error, 0);
    assert_eq!(client.ask(READ, 0, 12288, 4096).payload, [0; 4096]);
    // Zeros that are no holes are not made fast, and nothing is changed.
    let both = NO_HOLE | FAST_ZERO;
    assert_eq!(client.ask(WRITE_ZEROES, both, 16384, 4096).error, 95);
    assert_eq!(client.ask(READ, 0, 16384, 4096).payload, [1; 4096]);
    assert_eq!(client.ask(FLUSH, 0, 0, 0).error, 0);
    assert_eq!(client.ask(BLOCK_STATUS, 0, 0, 0).error, 22);
}

/// Metadata that was not agreed on is not given.
#[test]
fn block_status_needs_an_agreement() {
    let rig = Rig::new(MIB);
    let mut client = rig.client(Replies::Simple);
    assert_eq!(client.ask(BLOCK_STATUS, 0, 0, 4096).error, 22);
}

/// A read-only export says so, and refuses changes.
#[test]
fn read_only_exports_are_not_changed() {
    let rig = Rig::new(MIB);
    let mut client = Client::new(rig.connect(), "still", Replies::Structured);
    assert_eq!(client.flags & 2, 2);
    assert_eq!(client.flags & (1 << 5 | 1 << 6), 0);
    assert_eq!(client.write(0, 0, &[1; 100_000]).error, 1);
    assert_eq!(client.ask(TRIM, 0, 0, 4096).error, 1);
    assert_eq!(client.ask(WRITE_ZEROES, 0, 0, 4096).error, 1);
    assert_eq!(client.ask(READ, 0, 0, 4).payload, [0; 4]);
}

/// PMEM-3: a lost byte is an error that says where, short and long, and the session goes on.
#[test]
fn lost_bytes_are_errors_with_their_place() {
    let rig = Rig::new(MIB);
    // Relaxed: no request is under way.
    rig.disk.bad.store(5000, Ordering::Relaxed);
    let mut client = rig.client(Replies::Structured);
    for len in [4096, 300_000] {
        let reply = client.ask(READ, 0, 4096, len);
        assert_eq!((reply.error, reply.offset), (5, Some(5000)));
    }
    assert_eq!(client.ask(READ, 0, 0, 4096).error, 0);
    let reply = client.write(0, 4097, &[1; 4096]);
    assert_eq!((reply.error, reply.offset), (5, Some(5000)));
    assert_eq!(
        rig.client(Replies::Simple).ask(READ, 0, 4096, 4096).error,
        5
    );
    assert_eq!(client.write(0, 4096, &[1; 4096]).error, 0);
    assert_eq!(client.ask(READ, 0, 4096, 4096).error, 0);
}

/// PMEM-3: a long write mends lost bytes wherever they are, though it is written in pieces, as its bytes come.
#[test]
fn long_writes_are_written_in_whole_blocks() {
    let rig = Rig::new(2 * MIB);
    let mut client = rig.client(Replies::Structured);
    for start in [0, 1234] {
        for bad in (8192..MIB).step_by(4096) {
            // Relaxed: no request is under way.
            rig.disk.bad.store(bad, Ordering::Relaxed);
            let cookie = client.send(WRITE, 0, start, 1 << 20);
            client.stream.write_all(&[7; 70_001]).unwrap();
            client
                .stream
                .write_all(&vec![7; (1 << 20) - 70_001])
                .unwrap();
            assert_eq!(client.reply(cookie, 0).error, 0, "{start} {bad}");
            assert_eq!(rig.disk.bad.load(Ordering::Relaxed), disk::NONE_BAD);
        }
    }
}

/// The oldest way to choose an export works, with zeros and without, and hangs up where there is none.
#[test]
fn the_oldest_handshake_works() {
    let rig = Rig::new(MIB);
    for (flags, padding) in [(1, 124), (3, 0)] {
        let mut stream = rig.connect();
        greet(&mut stream, flags);
        stream.write_all(&option_bytes(1, b"")).unwrap();
        let mut reply = vec![1; 10 + padding];
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..8], MIB.to_be_bytes());
        assert!(reply[10..].iter().all(|byte| *byte == 0));
        stream
            .write_all(&common::request(READ, 0, 7, 0, 4))
            .unwrap();
        let mut reply = [1; 20];
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply[4..], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0]);
    }
    let mut stream = rig.connect();
    greet(&mut stream, 3);
    stream.write_all(&option_bytes(1, b"none")).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

/// Options are answered, whatever they are, and haggling goes on after a refusal.
#[test]
fn options_are_answered() {
    const ACK: u32 = 1;
    const UNSUP: u32 = (1 << 31) + 1;
    const INVALID: u32 = (1 << 31) + 3;
    const UNKNOWN: u32 = (1 << 31) + 6;
    const TOO_BIG: u32 = (1 << 31) + 9;
    let rig = Rig::new(MIB);
    let mut stream = rig.connect();
    greet(&mut stream, 3);
    let last = |replies: Vec<(u32, Vec<u8>)>| replies.last().unwrap().0;
    let exports = option(&mut stream, 3, &[]);
    assert_eq!(exports[0], (2, b"\0\0\0\x04diska disk of memory".to_vec()));
    assert_eq!((exports[1].0, exports[2].0), (2, ACK));
    assert_eq!(last(option(&mut stream, 3, b"x")), INVALID);
    assert_eq!(last(option(&mut stream, 5, &[])), UNSUP);
    assert_eq!(last(option(&mut stream, 1234, b"whatever")), UNSUP);
    assert_eq!(last(option(&mut stream, 1234, &[0; 200_000])), TOO_BIG);
    assert_eq!(last(option(&mut stream, 7, b"x")), INVALID);
    let contexts = [&string("disk")[..], &[0; 4]].concat();
    assert_eq!(last(option(&mut stream, 9, &contexts)), INVALID);
    assert_eq!(last(option(&mut stream, 8, &[])), ACK);
    assert_eq!(
        option(&mut stream, 9, &contexts)[0].1[4..],
        *b"base:allocation"
    );
    let nowhere = [&string("nowhere")[..], &[0, 0]].concat();
    let refused = option(&mut stream, 7, &nowhere);
    assert_eq!(refused[0].0, UNKNOWN);
    assert!(String::from_utf8_lossy(&refused[0].1).contains("nowhere"));
    let wishes = [&string("")[..], &[0, 3, 0, 1, 0, 2, 0, 3]].concat();
    let info = option(&mut stream, 6, &wishes);
    assert_eq!(info[1].1, b"\0\x01disk");
    assert_eq!(info[2].1, b"\0\x02a disk of memory");
    assert_eq!(info[3].1, b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0");
    assert_eq!(option(&mut stream, 2, b"bye"), [(ACK, Vec::new())]);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}
