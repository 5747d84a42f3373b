//! What cannot be done with a file as memory is refused at once, by a name of its own that says what to do instead.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use core::time::Duration;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::{fs, thread};

use common::{MIB, PAGE, Scratch, memory};
use pgmap::{MapFileError, OpenError, OpenOptions, PinError, Prot, TruncateError};

const READ_ONLY: OpenOptions = OpenOptions::new().read_only();

/// A pipe that nobody writes is refused instead of waited for, and so are a directory and a device.
#[test]
fn what_is_no_file_is_refused_at_once() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let pipe = Scratch::new("pipe", 0);
    fs::remove_file(&pipe.0).unwrap();
    let made = Command::new("mkfifo").arg(&pipe.0).status();
    assert!(made.unwrap().success());
    let (done, opened) = mpsc::channel();
    // Not a thread of a scope, which would wait for an open that never ends.
    let path = pipe.0.clone();
    thread::spawn(move || {
        for path in [&*path, Path::new("/"), Path::new("/dev/null")] {
            let refused = memory.open_with(path, &READ_ONLY).map(drop);
            done.send(matches!(refused, Err(OpenError::NotRegular(_))))
                .unwrap();
        }
    });
    let soon = Duration::from_secs(30);
    for _ in 0..3 {
        assert_eq!(opened.recv_timeout(soon), Ok(true));
    }
}

/// Nobody would serve the faults of a file that another memory has opened.
#[test]
fn a_file_of_another_memory_is_not_mapped() {
    let (Some(memory), Some(other)) = (memory(8 * MIB), memory(8 * MIB)) else {
        return;
    };
    let scratch = Scratch::new("foreign", 4);
    let file = memory.open(&scratch.0).unwrap();
    let refused = other.space().map_file(&file, 0..PAGE as u64, Prot::Read);
    assert_eq!(refused.unwrap_err(), MapFileError::OtherMemory);
}

/// A range that no file can have mapped says how far it may go.
#[test]
fn a_range_that_cannot_be_mapped_is_named_as_such() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("ranges", 4);
    let file = memory.open(&scratch.0).unwrap();
    let most_bytes = 16 << 30;
    for range in [0..0, 1..4096, 0..most_bytes + 1, 0..u64::MAX] {
        let refused = memory.space().map_file(&file, range, Prot::Read);
        assert_eq!(refused.unwrap_err(), MapFileError::BadRange { most_bytes });
    }
    let map = memory
        .space()
        .map_file(&file, 0..most_bytes, Prot::Read)
        .unwrap();
    let start = map.range().start;
    let refused = memory
        .space()
        .pin_user_pages(start..start, &pgmap::Pin::READ);
    assert_eq!(refused.unwrap_err(), PinError::Empty);
}

/// A file that is open for reading is changed in no way, and says so.
#[test]
fn a_read_only_file_stays_as_it_is() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("unchanged", 4);
    let file = memory.open_with(&scratch.0, &READ_ONLY).unwrap();
    let whole = 0..file.len_bytes();
    let refused = memory
        .space()
        .map_file(&file, whole.clone(), Prot::ReadWrite);
    assert_eq!(refused.unwrap_err(), MapFileError::ReadOnly);
    let patience = Duration::ZERO;
    assert_eq!(file.set_len(0, patience), Err(TruncateError::ReadOnly));
    assert_eq!(
        file.set_len(1 << 20, patience),
        Err(TruncateError::ReadOnly)
    );
    assert_eq!(file.punch(whole, patience), Err(TruncateError::ReadOnly));
    assert_eq!(file.len_bytes(), 4 * PAGE as u64);
}
