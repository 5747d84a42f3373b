//! Pins of files' pages and of anonymous memory: who has them, for how long, and what becomes of a mapping that is pinned.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use core::time::Duration;
use std::fs::OpenOptions;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;

use common::{MIB, PAGE, Scratch, check, memory, pattern};
use pgmap::io::{RegisterError, Ring, TransferError};
use pgmap::{Device, Memory, OpenError, Pin, PinError, Prot};

/// REF-7: `holders` names the pins of files' pages and of anonymous memory, with where in the source they were taken.
#[test]
fn holders_are_those_of_files_and_of_anonymous_memory() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("holders", 16);
    let file = memory.open(&scratch.0).unwrap();
    let map = memory
        .space()
        .map_file(&file, 0..16 * PAGE as u64, Prot::Read);
    let map = map.unwrap();
    let anonymous = memory.map(MIB).unwrap();
    let space = memory.space();
    let first = space.pin_user_pages(map.range(), &Pin::READ.label("tx ring"));
    let second = space.pin_user_pages(anonymous.range().clone(), &Pin::WRITE.label("staging"));
    let holders = memory.holders();
    let labels: Vec<_> = holders.iter().map(|holder| holder.label.as_ref()).collect();
    assert_eq!(labels, ["tx ring", "staging"]);
    assert_eq!(holders[0].range, map.range());
    assert!(holders[0].site.file().ends_with("pins.rs"));
    assert_eq!(memory.holders_of(anonymous.range()).len(), 1);
    drop((first.unwrap(), second.unwrap()));
    assert!(memory.holders().is_empty());
}

/// Whoever prints a mapping, or a pin in an assertion that failed, reads a page of text and not the whole memory.
#[test]
fn what_a_pin_prints_is_short() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("printed", 16);
    let file = memory.open(&scratch.0).unwrap();
    let space = memory.space();
    let map = space.map_file(&file, 0..16 * PAGE as u64, Prot::ReadWrite);
    let map = map.unwrap();
    let pins = space.pin_user_pages(map.range(), &Pin::READ).unwrap();
    let printed = [
        format!("{memory:?}"),
        format!("{map:?}"),
        format!("{pins:?}"),
    ];
    for text in printed {
        assert!(text.len() < 8000, "{} bytes: {text}", text.len());
    }
}

/// REF-7: a pin that gets older than the limit is reported once, without anybody asking; one that ends before is not.
#[test]
fn old_pins_are_reported_once() {
    let builder = Memory::builder().ram(8 << 20);
    let builder = builder.device(Device::compressed(1 << 30));
    let limit = Duration::from_millis(200);
    let (report, reported) = mpsc::channel();
    let report = move |holder: &pgmap::Holder| report.send(holder.clone()).unwrap();
    let Ok(memory) = builder.report_pins_older_than(limit, report).build() else {
        eprintln!("SKIPPED: this machine does not allow it");
        return;
    };
    let map = memory.map(MIB).unwrap();
    let pin = |label| {
        let range = map.range().clone();
        let pin = Pin::READ.label(label);
        memory.space().pin_user_pages(range, &pin).unwrap()
    };
    let old = pin("old");
    thread::sleep(Duration::from_millis(100));
    drop(pin("short"));
    let later = pin("later");
    thread::sleep(Duration::from_millis(600));
    let reported: Vec<_> = reported.try_iter().collect();
    let labels: Vec<_> = reported.iter().map(|holder| &*holder.label).collect();
    assert_eq!(labels, ["old", "later"]);
    let age_ns = memory.now_ns() - reported[0].since_ns;
    assert!(Duration::from_nanos(age_ns) > limit, "{age_ns}");
    drop((old, later));
}

/// GUP-2: a file's pages cannot be pinned for long to be written; they can to be read, and anonymous memory can for both.
#[test]
fn pages_of_files_are_not_pinned_for_long_to_be_written() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("long-term", 16);
    let file = memory.open(&scratch.0).unwrap();
    let space = memory.space();
    let map = space.map_file(&file, 0..16 * PAGE as u64, Prot::ReadWrite);
    let map = map.unwrap();
    let refused = space.pin_user_pages(map.range(), &Pin::WRITE.long_term());
    assert!(matches!(refused, Err(PinError::LongTerm { at }) if at.get() == map.range().start));
    assert!(
        space
            .pin_user_pages(map.range(), &Pin::READ.long_term())
            .is_ok()
    );
    let ring = Ring::new(1);
    let anonymous = memory.map(MIB).unwrap();
    assert!(
        ring.register_mapping(anonymous, &Pin::WRITE.long_term())
            .is_ok()
    );
}

/// GUP-4: nothing is read into pages that are pinned to be read, nor outside a buffer, nor into anonymous memory to which
/// somebody may have references.
#[test]
fn a_ring_refuses_what_would_be_unseen() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("refused", 16);
    let file = memory.open(&scratch.0).unwrap();
    let space = memory.space();
    let map = space.map_file(&file, 0..16 * PAGE as u64, Prot::ReadWrite);
    let map = map.unwrap();
    let mut ring = Ring::new(1);
    let (mut there, here) = UnixStream::pair().unwrap();
    there.write_all(&[7; PAGE]).unwrap();
    let pins = space.pin_user_pages(map.range(), &Pin::READ).unwrap();
    let buffer = ring.register(pins).unwrap();
    let read = ring.read_fixed(&buffer, 0..PAGE, &here, None);
    assert_eq!(read, Err(TransferError::ReadOnly));
    let written = ring.write_fixed(&buffer, 0..16 * PAGE + 1, &here, None);
    assert!(matches!(written, Err(TransferError::OutOfRange { .. })));
    drop(buffer);
    assert_eq!(file.pages().1, 0, "reading pins make nothing dirty");
    let anonymous = memory.map(MIB).unwrap();
    let pins = space.pin_user_pages(anonymous.range().clone(), &Pin::WRITE);
    let refused = ring.register(pins.unwrap());
    assert_eq!(refused.err(), Some(RegisterError::Anonymous));
}

/// GUP-4: pages that are pinned to be written are dirty from that moment on, whether they were in RAM or not, and however often
/// they are written back before the pin ends.
#[test]
fn a_pin_to_write_makes_its_pages_dirty() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("dirty", 16);
    let file = memory.open(&scratch.0).unwrap();
    let space = memory.space();
    let map = space.map_file(&file, 0..16 * PAGE as u64, Prot::ReadWrite);
    let map = map.unwrap();
    for _ in 0..2 {
        let pins = space.pin_user_pages(map.range(), &Pin::WRITE).unwrap();
        assert_eq!(file.pages(), (16, 16));
        file.sync_all().unwrap();
        assert_eq!(file.pages(), (16, 16));
        drop(pins);
        file.sync_all().unwrap();
        assert_eq!(file.pages(), (16, 0));
    }
}

/// GUP-1: pages that are in no page table are brought in when the kernel registers them, many more than one ring has room for.
#[test]
fn registration_faults_pages_in() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("faulted", 256);
    let file = memory.open(&scratch.0).unwrap();
    let space = memory.space();
    let map = space.map_file(&file, 0..256 * PAGE as u64, Prot::ReadWrite);
    let map = map.unwrap();
    let mut ring = Ring::new(4);
    let disk = OpenOptions::new().read(true).open(&scratch.0).unwrap();
    let buffers: Vec<_> = (0..80)
        .map(|nth| {
            let start = map.range().start + 3 * nth * PAGE;
            let pins = space.pin_user_pages(start..start + PAGE, &Pin::WRITE);
            ring.register(pins.unwrap()).unwrap()
        })
        .collect();
    let registered = buffers.iter().filter(|buffer| buffer.is_registered());
    println!("{} of 80 buffers are registered", registered.count());
    for (nth, buffer) in buffers.iter().enumerate() {
        let offset = ((nth + 1) * PAGE) as u64;
        let read = ring.read_fixed(buffer, 0..PAGE, &disk, Some(offset));
        assert_eq!(read, Ok(PAGE));
    }
    drop(buffers);
    for nth in 0..80 {
        let mut bytes = [0; PAGE];
        map.read(3 * nth * PAGE, &mut bytes);
        check(&bytes, nth + 1, 0);
    }
}

/// GUP-3, GUP-4: who lets go of a mapping and of its file while a page is pinned loses nothing: what comes by DMA afterwards is
/// in the file, which is closed when the last pin ends.
#[test]
fn a_pinned_mapping_outlives_its_handles() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("outlived", 16);
    let file = memory.open(&scratch.0).unwrap();
    let space = memory.space();
    let map = space.map_file(&file, 0..16 * PAGE as u64, Prot::ReadWrite);
    let map = map.unwrap();
    let pins = space.pin_user_pages(map.range(), &Pin::WRITE).unwrap();
    let mut ring = Ring::new(1);
    let buffer = ring.register(pins).unwrap();
    // This one is used by its addresses: they are to be what they were.
    let pins = space.pin_user_pages(map.range(), &Pin::READ).unwrap();
    let sent = ring.register(pins).unwrap();
    drop((map, file));
    let again = memory.open(&scratch.0);
    assert!(
        matches!(again, Err(OpenError::Locked(_))),
        "it is still open"
    );
    let (mut there, here) = UnixStream::pair().unwrap();
    there.write_all(&pattern(3, 9)).unwrap();
    let page = 3 * PAGE..4 * PAGE;
    let read = ring.read_fixed(&buffer, page.clone(), &here, None);
    assert_eq!(read, Ok(PAGE));
    assert_eq!(ring.write_fixed(&sent, page, &here, None), Ok(PAGE));
    let mut back = [0; PAGE];
    there.read_exact(&mut back).unwrap();
    check(&back, 3, 9);
    drop((buffer, sent));
    let again = (0..100).find_map(|_| {
        thread::sleep(Duration::from_millis(20));
        memory.open(&scratch.0).ok()
    });
    assert!(
        again.is_some(),
        "the last pin ended, and the file is not closed"
    );
    check(&scratch.page(3), 3, 9);
    check(&scratch.page(4), 4, 0);
}

/// GUP-3: of a file that is closed but for its pins, only pinned pages stay in RAM: nobody could reclaim the others.
#[test]
fn a_closed_file_keeps_its_pinned_pages_only() {
    const PAGES: usize = 4096;
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("kept", PAGES);
    let file = memory.open(&scratch.0).unwrap();
    let space = memory.space();
    let map = space.map_file(&file, 0..(PAGES * PAGE) as u64, Prot::ReadWrite);
    let map = map.unwrap();
    let mut bytes = [0; PAGE];
    // Backwards, as nobody reads ahead then.
    (0..PAGES)
        .rev()
        .for_each(|page| map.read(page * PAGE, &mut bytes));
    let (start, middle) = (map.range().start, map.range().start + PAGES / 2 * PAGE);
    let first = space.pin_user_pages(start..start + PAGE, &Pin::WRITE);
    let second = space.pin_user_pages(middle..middle + 64 * PAGE, &Pin::READ);
    drop((map, file));
    let blocks = || memory.ram_blocks();
    let used = || blocks().iter().map(|block| block.used_frames).sum::<u64>();
    assert_eq!(used(), 65);
    drop(second.unwrap());
    assert_eq!(used(), 1);
    drop(first.unwrap());
}

/// GUP-3, GUP-4: pins outlive the memory, whose pager is gone: what is pinned is sent and received as before.
#[test]
fn pins_outlive_the_memory() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("survivor", 16);
    let file = memory.open(&scratch.0).unwrap();
    let space = memory.space();
    let map = space.map_file(&file, 0..16 * PAGE as u64, Prot::ReadWrite);
    let map = map.unwrap();
    let mut ring = Ring::new(1);
    // The first is used by its addresses, of which none was touched.
    let sent = space.pin_user_pages(map.range(), &Pin::READ).unwrap();
    let sent = ring.register(sent).unwrap();
    let received = space.pin_user_pages(map.range(), &Pin::WRITE).unwrap();
    let received = ring.register(received).unwrap();
    drop((map, file));
    drop(memory);
    let (mut there, here) = UnixStream::pair().unwrap();
    let page = 3 * PAGE..4 * PAGE;
    assert_eq!(ring.write_fixed(&sent, page.clone(), &here, None), Ok(PAGE));
    let mut bytes = [0; PAGE];
    there.read_exact(&mut bytes).unwrap();
    check(&bytes, 3, 0);
    there.write_all(&pattern(3, 9)).unwrap();
    assert_eq!(ring.read_fixed(&received, page, &here, None), Ok(PAGE));
    drop((sent, received));
    check(&scratch.page(3), 3, 9);
    check(&scratch.page(4), 4, 0);
}

/// HOT-4: a block that cannot go off line because of a page of a file names who has it pinned, though nobody has the file any more.
#[test]
fn who_pins_a_page_of_a_closed_file_is_named() {
    let Some(memory) = memory(16 * MIB) else {
        return;
    };
    let scratch = Scratch::new("named", 16);
    let file = memory.open(&scratch.0).unwrap();
    let space = memory.space();
    let map = space.map_file(&file, 0..16 * PAGE as u64, Prot::Read);
    let map = map.unwrap();
    let pin = Pin::READ.label("tx ring");
    let pins = space.pin_user_pages(map.range(), &pin).unwrap();
    drop((map, file));
    let blocks = memory.ram_blocks();
    let used = blocks.iter().find(|block| block.used_frames > 0).unwrap();
    let refused = memory.offline(used.id, Duration::from_millis(50));
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("tx ring"), "{refused}");
    drop(pins);
    memory.offline(used.id, Duration::from_secs(10)).unwrap();
}
