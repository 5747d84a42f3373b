//! Shared frames: what is written is read, moved through sockets, punched and revoked.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use pgmap_host::shared::{Extent, SharedFrames};
use rustix::io::Errno;

const MIB: u64 = 1 << 20;

/// Bytes go to a socket and come from one without being copied in between.
#[test]
fn bytes_pass_through_sockets() {
    let frames = SharedFrames::memory("test", MIB).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    frames.write(5000, b"some bytes").unwrap();
    assert_eq!(frames.send(5000..5010, ours.as_fd()), Ok(10));
    assert_eq!(frames.receive(9000..9010, theirs.as_fd()), Ok(10));
    assert_eq!(
        frames.receive(9000..9010, theirs.as_fd()),
        Err(Errno::AGAIN)
    );
    let mut bytes = [0; 10];
    frames.read(9000, &mut bytes).unwrap();
    assert_eq!(&bytes, b"some bytes");
}

/// A punched hole reads as zeros and takes no room.
#[test]
fn a_punched_hole_reads_as_zeros() {
    let frames = SharedFrames::memory("test", MIB).unwrap();
    frames.write(0, &[7; 3 * 4096]).unwrap();
    frames.punch(&(4096..8192)).unwrap();
    let mut bytes = [1; 4096];
    frames.read(4096, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 4096]);
    let extents = frames.extents(0..16384).unwrap();
    let expected = [
        Extent::Data(0..4096),
        Extent::Hole(4096..8192),
        Extent::Data(8192..12288),
        Extent::Hole(12288..16384),
    ];
    assert_eq!(extents, expected);
}

/// After revocation an access is an error here, and nothing comes back.
#[test]
fn revoked_frames_are_an_error() {
    let frames = SharedFrames::memory("test", MIB).unwrap();
    frames.write(0, b"secret").unwrap();
    frames.revoke().unwrap();
    let (ours, _theirs) = UnixStream::pair().unwrap();
    assert_eq!(frames.send(0..6, ours.as_fd()), Err(Errno::FAULT));
    assert_eq!(frames.read(0, &mut [0; 6]), Err(Errno::IO));
}

/// What is not there cannot be asked for.
#[test]
fn bytes_beyond_the_end_are_refused() {
    let frames = SharedFrames::memory("test", MIB).unwrap();
    assert_eq!(frames.write(MIB - 1, &[0; 2]), Err(Errno::INVAL));
    assert_eq!(frames.punch(&(MIB..MIB + 1)), Err(Errno::INVAL));
    assert_eq!(frames.write(u64::MAX, &[0; 2]), Err(Errno::INVAL));
}

/// Bytes taken away from the end on leave those before them; zeros that keep their room are data.
#[test]
fn a_part_is_revoked_and_a_part_is_zeroed() {
    let frames = SharedFrames::memory("test", MIB).unwrap();
    frames.write(0, &[7; 8192]).unwrap();
    assert_eq!(frames.room_bytes(), Ok(8192));
    match frames.zero(&(0..4096)) {
        // tmpfs has no such call.
        Ok(()) | Err(Errno::OPNOTSUPP) => {}
        Err(errno) => panic!("{errno}"),
    }
    frames.revoke_from(4096).unwrap();
    assert_eq!(frames.present_bytes(), Ok(4096));
    assert_eq!(frames.read(0, &mut [0; 4096]), Ok(()));
    assert_eq!(frames.read(4096, &mut [0; 1]), Err(Errno::IO));
}

/// Who has the descriptor cannot keep memory from being taken away.
#[test]
fn nobody_can_seal_shared_memory() {
    let frames = SharedFrames::memory("test", MIB).unwrap();
    let theirs = frames.fd().try_clone_to_owned().unwrap();
    let sealed = rustix::fs::fcntl_add_seals(&theirs, rustix::fs::SealFlags::SHRINK);
    assert_eq!(sealed, Err(Errno::PERM));
    frames.revoke().unwrap();
}
