//! What a device-dax does, shown on memory that stands for one, with its write-backs noted.

use core::cell::RefCell;
use std::os::unix::net::UnixStream;

use rustix::fs::{AtFlags, StatxAttributes, StatxFlags};

use super::*;

const BYTES: u64 = 4 << 20;
const UNIT: u64 = 2 << 20;

thread_local! {
    /// Where bytes were written back, as addresses.
    static WRITTEN_BACK: RefCell<Vec<Range<usize>>> = const { RefCell::new(Vec::new()) };
}

/// Notes a write-back instead of making it.
unsafe fn note(start: NonNull<u8>, len: usize) {
    let start = start.addr().get();
    WRITTEN_BACK.with_borrow_mut(|all| all.push(start..start + len));
}

fn device() -> SharedFrames {
    let fd = fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
    fs::ftruncate(&fd, BYTES).unwrap();
    SharedFrames::mapped(fd, BYTES, Kind::Device(UNIT, note), MapFlags::SHARED).unwrap()
}

/// What was written back since the last look, as bytes of the device.
fn written_back(device: &SharedFrames) -> Vec<Range<usize>> {
    let start = device.start.addr().get();
    let all = WRITTEN_BACK.take().into_iter();
    all.map(|range| range.start - start..range.end - start)
        .collect()
}

/// PMEM-4: whatever is stored in a device is written back before it is said to be there, and no more than that.
#[test]
fn what_is_stored_in_a_device_is_written_back() {
    let device = device();
    device.write(4000, &[7; 200]).unwrap();
    assert_eq!(written_back(&device), vec![4000..4200; 1]);
    let (ours, theirs) = UnixStream::pair().unwrap();
    rustix::io::write(&ours, b"some bytes").unwrap();
    assert_eq!(device.receive(9000..9100, theirs.as_fd()), Ok(10));
    assert_eq!(written_back(&device), vec![9000..9010; 1]);
    let mut bytes = [0; 10];
    device.read(9000, &mut bytes).unwrap();
    assert_eq!(&bytes, b"some bytes");
    assert_eq!(device.send(9000..9010, theirs.as_fd()), Ok(10));
    device.flush().unwrap();
    assert!(written_back(&device).is_empty());
}

/// A device has all of its room, in units of its own; zeros have to be written.
#[test]
fn a_device_gives_nothing_back() {
    let device = device();
    let all = 0..BYTES;
    assert_eq!(device.punch(&all), Err(Errno::OPNOTSUPP));
    assert_eq!(device.zero(&all), Err(Errno::OPNOTSUPP));
    assert_eq!(device.allocate(&all), Ok(()));
    assert_eq!(
        device.extents(all.clone()),
        Ok(vec![Extent::Data(all.clone())])
    );
    assert_eq!(device.room_bytes(), Ok(BYTES));
    assert_eq!(device.unit_bytes(), UNIT);
    assert_eq!(device.map_sync(), Some(MapSync::Yes));
    assert_eq!(
        device.write(BYTES - 1, &[0; 2]),
        Err(Errno::INVAL),
        "beyond the end"
    );
}

/// A device that is gone is an error, and no signal; nothing is written back there.
#[test]
fn a_device_that_is_gone_is_an_error() {
    let device = device();
    device.write(0, b"some bytes").unwrap();
    fs::ftruncate(&device.fd, 0).unwrap();
    WRITTEN_BACK.take();
    let (ours, theirs) = UnixStream::pair().unwrap();
    rustix::io::write(&ours, b"some bytes").unwrap();
    assert_eq!(device.read(0, &mut [0; 10]), Err(Errno::IO));
    assert_eq!(device.write(0, b"some bytes"), Err(Errno::IO));
    assert_eq!(device.send(0..10, theirs.as_fd()), Err(Errno::FAULT));
    assert_eq!(device.receive(0..10, theirs.as_fd()), Err(Errno::FAULT));
    assert!(written_back(&device).is_empty());
}

/// A copy that comes to the end of what is there stops there, and then is an error.
#[test]
fn a_copy_ends_with_the_device() {
    let device = device();
    fs::ftruncate(&device.fd, 8192).unwrap();
    WRITTEN_BACK.take();
    assert_eq!(device.write(4096, &[7; 8192]), Err(Errno::IO));
    assert_eq!(written_back(&device), vec![4096..8192; 1]);
    assert_eq!(device.read(4096, &mut [0; 8192]), Err(Errno::IO));
}

/// What this CPU has for it writes back any bytes, and changes none.
#[cfg(target_arch = "x86_64")]
#[test]
fn this_cpu_writes_back_and_changes_nothing() {
    let write_back = write_back::of_this_cpu().unwrap();
    let mut bytes = vec![7; 10_000];
    let at = NonNull::from(&mut bytes[13..]).cast();
    // SAFETY: the bytes are ours.
    unsafe { write_back(at, 9000) };
    assert!(bytes.iter().all(|&byte| byte == 7));
}

/// A file is made durable by the CPU only if it is on persistent memory itself, and memory by nothing.
#[test]
fn only_persistent_memory_is_durable_by_the_cpu() {
    let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    file.set_len(8192).unwrap();
    let frames = SharedFrames::of_file(file.into(), 8192).unwrap();
    let told = fs::statx(frames.fd(), "", AtFlags::EMPTY_PATH, StatxFlags::empty()).unwrap();
    assert!(frames.map_sync().is_some());
    if !told.stx_attributes.contains(StatxAttributes::DAX) {
        assert_eq!(frames.map_sync(), Some(MapSync::No));
    }
    let memory = SharedFrames::memory("test", 8192).unwrap();
    assert_eq!(memory.map_sync(), None);
    let null = fs::open("/dev/null", OFlags::RDWR, fs::Mode::empty()).unwrap();
    assert_eq!(
        SharedFrames::of_file(null, 8192).map(drop),
        Err(Errno::NODEV)
    );
}
