//! Files as memory in a program that forks. Alone in its process: a fork waits for the pager of every memory that there is.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use core::time::Duration;
use std::thread;
use std::time::Instant;

use common::{MIB, PAGE, Scratch, memory};
use pgmap::{Pin, Prot};

/// WB-2: copies of pinned pages are written while the program forks: whoever forks has the allocator's locks until the pager has
/// listened, and the pager may wait for whoever copies.
#[test]
fn copies_are_made_while_the_program_forks() {
    let Some(memory) = memory(8 * MIB) else {
        return;
    };
    let scratch = Scratch::new("forks", 64);
    let file = memory.open(&scratch.0).unwrap();
    let space = memory.space();
    let map = space.map_file(&file, 0..64 * PAGE as u64, Prot::ReadWrite);
    let map = map.unwrap();
    let first = map.range().start..map.range().start + PAGE;
    let pins = space.pin_user_pages(first, &Pin::WRITE).unwrap();
    let end = Instant::now() + Duration::from_secs(2);
    let goes_on = || Instant::now() < end;
    thread::scope(|scope| {
        scope.spawn(|| {
            while goes_on() {
                file.sync_all().unwrap();
            }
        });
        scope.spawn(|| {
            while goes_on() {
                (1..64).for_each(|page| map.write(page * PAGE, &[1]));
            }
        });
        while goes_on() {
            assert!(common::fork::in_a_child(|| true));
        }
    });
    drop(pins);
}
