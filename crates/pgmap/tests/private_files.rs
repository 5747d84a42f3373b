//! Private mappings of files that change, and whose pages the program drops with system calls that the pager does not see.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::fs::File;
use std::os::fd::AsFd;

use common::touch::can_read;
use common::{MIB, PAGE, Scratch, check, memory};
use pgmap::{Memory, Pin};

/// A file of one page, and where it is mapped. Its page has been read.
fn mapped(memory: &Memory, name: &str) -> (Scratch, usize) {
    let scratch = Scratch::new(name, 1);
    let file = File::open(&scratch.0).unwrap();
    let at = memory.space().map_private_file(file.as_fd(), 0, PAGE);
    let at = at.unwrap();
    check(&bytes(at), 0, 0);
    (scratch, at)
}

fn bytes(at: usize) -> [u8; PAGE] {
    // SAFETY: a page of the file is mapped there, and nobody writes it.
    unsafe { (at as *const [u8; PAGE]).read() }
}

/// `MADV_DONTNEED` as a program makes it that does not ask the library.
fn drop_unseen(at: usize) {
    // SAFETY: nobody has a reference to the page.
    let done = unsafe { libc::madvise(at as *mut _, PAGE, libc::MADV_DONTNEED) };
    assert_eq!(done, 0);
}

fn cut(scratch: &Scratch, bytes: usize) {
    let file = File::options().write(true).open(&scratch.0).unwrap();
    file.set_len(bytes as u64).unwrap();
}

fn used_frames(memory: &Memory) -> u64 {
    let blocks = memory.ram_blocks();
    blocks.iter().map(|block| block.used_frames).sum()
}

/// FLT-1: an access to a page that is dropped, and that the file has no more, is a signal; a discard brings the file's page back when
/// there is one again.
#[test]
fn a_dropped_page_behind_the_end_of_its_file_is_a_signal() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let before = used_frames(&memory);
    let (scratch, at) = mapped(&memory, "dropped");
    cut(&scratch, 0);
    drop_unseen(at);
    assert!(!can_read(at));
    cut(&scratch, PAGE);
    assert!(!can_read(at));
    // SAFETY: nobody has a reference to the page.
    unsafe { memory.space().discard(at, PAGE) }.unwrap();
    assert_eq!(bytes(at), [0; PAGE]);
    // SAFETY: nobody uses the mapping any more.
    unsafe { memory.space().unmap(at, PAGE) }.unwrap();
    assert_eq!(used_frames(&memory), before);
}

/// FLT-1, GUP-3: so it is if the page is pinned, and its frame stays until the page is discarded.
#[test]
fn a_pinned_page_behind_the_end_of_its_file_is_a_signal() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let before = used_frames(&memory);
    let (scratch, at) = mapped(&memory, "pinned");
    let pin = memory.space().pin_user_pages(at..at + PAGE, &Pin::READ);
    cut(&scratch, 0);
    drop_unseen(at);
    assert!(!can_read(at));
    assert_eq!(used_frames(&memory), before + 1);
    drop(pin.unwrap());
    // SAFETY: nobody uses the mapping any more.
    unsafe { memory.space().unmap(at, PAGE) }.unwrap();
    assert_eq!(used_frames(&memory), before);
}
