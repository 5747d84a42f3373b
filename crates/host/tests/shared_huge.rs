//! Shared frames of huge pages: they do what others do, and what they cannot do is an error and no signal.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[path = "common/huge.rs"]
mod huge;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use huge::{HUGE, HugePages};
use pgmap_host::hugetlb;
use pgmap_host::shared::{Extent, SharedFrames};
use rustix::io::Errno;

fn frames(pages: u64) -> SharedFrames {
    SharedFrames::huge("test", pages * HUGE, HUGE).unwrap()
}

/// Bytes are written, read, and moved through sockets, across the border of two pages, too.
#[test]
fn bytes_are_moved_like_those_of_any_file() {
    let Some(_pages) = HugePages::reserve(4) else {
        return;
    };
    let frames = frames(2);
    assert_eq!(frames.room_bytes(), Ok(2 * HUGE));
    assert!(frames.is_memory());
    frames.write(HUGE - 5, b"some bytes").unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let here = HUGE - 5..HUGE + 5;
    assert_eq!(frames.send(here, ours.as_fd()), Ok(10));
    assert_eq!(frames.receive(9000..9010, theirs.as_fd()), Ok(10));
    assert_eq!(
        frames.receive(9000..9010, theirs.as_fd()),
        Err(Errno::AGAIN)
    );
    let mut bytes = [0; 10];
    frames.read(9000, &mut bytes).unwrap();
    assert_eq!(&bytes, b"some bytes");
    frames.flush().unwrap();
    let all = 0..2 * HUGE;
    assert_eq!(frames.extents(all.clone()), Ok(vec![Extent::Data(all)]));
}

/// Only whole pages can be given back; what is punched reads as zeros without a page, which others may have meanwhile.
#[test]
fn whole_pages_are_given_back() {
    let Some(_pages) = HugePages::reserve(3) else {
        return;
    };
    let frames = frames(3);
    frames.write(0, &vec![7; 3 << 21]).unwrap();
    assert_eq!(frames.punch(&(0..4096)), Err(Errno::OPNOTSUPP));
    assert_eq!(frames.zero(&(0..HUGE)), Err(Errno::OPNOTSUPP));
    frames.punch(&(HUGE - 4096..2 * HUGE + 4096)).unwrap();
    let mut bytes = vec![1; 3 << 21];
    frames.read(0, &mut bytes).unwrap();
    let zeros = (2 << 20) - 4096..(4 << 20) + 4096;
    assert!(bytes[zeros.clone()].iter().all(|&byte| byte == 0));
    assert!(bytes[..zeros.start].iter().all(|&byte| byte == 7));
    assert!(bytes[zeros.end..].iter().all(|&byte| byte == 7));
    assert_eq!(frames.room_bytes(), Ok(2 * HUGE));
    let (ours, _theirs) = UnixStream::pair().unwrap();
    assert_eq!(frames.send(HUGE..HUGE + 100, ours.as_fd()), Ok(100));
    assert_eq!(frames.room_bytes(), Ok(2 * HUGE), "reading took room");
    // Somebody else takes the page: there is no room for a write then, and no signal.
    let other = self::frames(1);
    assert_eq!(frames.write(HUGE, b"no room"), Err(Errno::NOSPC));
    assert_eq!(frames.allocate(&(HUGE..2 * HUGE)), Err(Errno::NOSPC));
    // To give back takes none, also where only a part of a hole is given back.
    frames.punch(&(0..HUGE + 4096)).unwrap();
    frames.punch(&(HUGE - 4096..3 * HUGE)).unwrap();
    assert_eq!(frames.room_bytes(), Ok(0));
    drop(other);
    frames.write(HUGE, b"room").unwrap();
}

/// Who maps somebody else's huge pages keeps nobody from those that were given back.
#[test]
fn a_second_mapping_reserves_nothing() {
    let Some(_pages) = HugePages::reserve(2) else {
        return;
    };
    let frames = frames(2);
    frames.punch(&(0..HUGE)).unwrap();
    let before = hugetlb::pool(HUGE);
    let fd = frames.fd().try_clone_to_owned().unwrap();
    let second = SharedFrames::of_file(fd, 2 * HUGE).unwrap();
    second.write(HUGE, b"some bytes").unwrap();
    assert_eq!(hugetlb::pool(HUGE), before);
    drop(second);
    assert_eq!(hugetlb::pool(HUGE), before);
    frames.write(0, b"and into the hole").unwrap();
}

/// After revocation every access is an error here, and no signal.
#[test]
fn revoked_huge_pages_are_an_error() {
    let Some(_pages) = HugePages::reserve(1) else {
        return;
    };
    let frames = frames(1);
    frames.write(0, b"secret").unwrap();
    frames.revoke().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    assert_eq!(frames.send(0..6, ours.as_fd()), Err(Errno::FAULT));
    assert_eq!(frames.read(0, &mut [0; 6]), Err(Errno::IO));
    assert_eq!(frames.write(0, b"secret"), Err(Errno::IO));
    rustix::io::write(&ours, b"bytes").unwrap();
    assert_eq!(frames.receive(0..5, theirs.as_fd()), Err(Errno::FAULT));
}

/// Who asks for more than there is gets an error at once, takes nothing, and the pool says how many there are.
#[test]
fn too_few_huge_pages_are_an_error_at_the_start() {
    let Some(_pages) = HugePages::reserve(2) else {
        return;
    };
    let before = hugetlb::pool(HUGE).unwrap();
    let bytes = (before.available + 1) * HUGE;
    let refused = SharedFrames::huge("test", bytes, HUGE);
    assert_eq!(refused.map(drop), Err(Errno::NOMEM));
    assert_eq!(hugetlb::pool(HUGE), Some(before));
}
