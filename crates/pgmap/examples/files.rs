//! The program of the README's "Files as memory": a socket is read into a file's pages, without a copy of our own.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::{env, fs, thread};

use pgmap::io::Ring;
use pgmap::{Device, Memory, Pin, Prot, Writeback};

fn main() -> Result<(), Box<dyn core::error::Error>> {
    let path = env::temp_dir().join(format!("pgmap-files-{}", std::process::id()));
    fs::write(&path, vec![0; 64 << 20])?;
    let memory = Memory::builder()
        .ram(16 << 20) // of files and of anonymous memory together
        .device(Device::compressed(1 << 30))
        .build()?;
    let file = memory.open(&path)?;
    let all = 0..file.len_bytes();
    let map = memory.space().map_file(&file, all, Prot::ReadWrite)?;
    map.write(0, b"stored through the mapping"); // read on a fault, dirty from here on

    // A device writes to the second MiB, behind everybody's back.
    let (mut there, socket) = UnixStream::pair()?;
    let sender = thread::spawn(move || there.write_all(&vec![7; 1 << 20]));
    let start = map.range().start + (1 << 20);
    let pin = Pin::WRITE.label("rx ring");
    let pins = memory
        .space()
        .pin_user_pages(start..start + (1 << 20), &pin)?;
    let mut ring = Ring::new(8);
    let buffer = ring.register(pins)?;
    let mut received = 0;
    while received < buffer.len_bytes() {
        received += ring.read_fixed(&buffer, received..buffer.len_bytes(), &socket, None)?;
    }
    // Bounded, even though the pages are pinned: of those a copy is written.
    let written = file.sync_range(0..2 << 20, Writeback::Integrity)?;
    println!(
        "{} pages on the disk, {} of them pinned",
        written.pages, written.bounced
    );
    drop(buffer); // unpinned, and dirty: the next writeback writes them once more

    let bytes = fs::read(&path)?;
    assert_eq!(&bytes[..26], b"stored through the mapping");
    assert!(bytes[1 << 20..2 << 20].iter().all(|byte| *byte == 7));
    println!("{received} bytes went from the socket to the file");
    sender.join().map_err(|_| "the sender panicked")??;
    fs::remove_file(&path)?;
    Ok(())
}
