//! A file that takes its time to be written, and what others do not have to wait for meanwhile.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use core::ops::Range;
use core::time::Duration;
use std::sync::{Arc, mpsc};
use std::thread;

use common::{MIB, PAGE, Scratch, memory};
use pgmap::{Backing, BackingError, OpenOptions, Prot, Transfer};
use pgmap_sync::Mutex;

/// A file of zeros that says when a write begins, and is done with it after two seconds.
#[derive(Debug)]
struct Slow(Mutex<mpsc::Sender<()>>);

impl Backing for Slow {
    fn read(&self, _: &mut [Transfer<'_>]) {}

    fn write(&self, _: &mut [Transfer<'_>]) {
        // Nobody waits any more when the test ends.
        let _ = self.0.lock().send(());
        thread::sleep(Duration::from_secs(2));
    }

    fn sync(&self) -> Result<(), BackingError> {
        Ok(())
    }

    fn set_len(&self, _: u64) -> Result<(), BackingError> {
        Ok(())
    }

    fn punch(&self, _: Range<u64>) -> Result<(), BackingError> {
        Ok(())
    }
}

/// A file that is closed while another is written in the background can be opened again at once.
#[test]
fn a_closed_file_does_not_wait_for_another_files_writes() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let (begins, begun) = mpsc::channel();
    let bytes = PAGE as u64;
    let options = OpenOptions::new();
    let slow = memory.open_over("slow", Arc::new(Slow(Mutex::new(begins))), bytes, &options);
    let slow = slow.unwrap();
    let scratch = Scratch::new("beside-slow", 1);
    let file = memory.open(&scratch.0).unwrap();
    let map = memory.space().map_file(&slow, 0..bytes, Prot::ReadWrite);
    map.unwrap().write(0, &[1]);
    begun.recv().unwrap();
    drop(file);
    memory.open(&scratch.0).unwrap();
}
