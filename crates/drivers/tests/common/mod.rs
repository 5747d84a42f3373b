//! What the tests of persistent memory share: a machine without an operating system's frames, and clients.
#![allow(dead_code, reason = "each test uses a part")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

pub(crate) mod mapping;
pub(crate) mod power;

use std::process::Command;
use std::sync::Arc;

use pgmap_core::memremap::MemoryMap;
use pgmap_core::platform::HeapPlatform;
use pgmap_drivers::pmem::{Client, Pmem, PmemSpec, Region};

/// Frames of 16 GiB.
pub(crate) fn map() -> Arc<MemoryMap> {
    MemoryMap::new(&pgmap_host::platform::HostPlatform, 4 << 20).unwrap()
}

/// Frames of 2 GiB, whose metadata is on the heap: a test makes many of these.
pub(crate) fn small_map() -> Arc<MemoryMap> {
    MemoryMap::new(&HeapPlatform, 512 << 10).unwrap()
}

pub(crate) fn spec(text: &str) -> PmemSpec {
    text.parse().unwrap()
}

/// A region and its first namespace in use.
pub(crate) fn open(text: &str) -> (Arc<Region>, Arc<Pmem>) {
    let region = Region::open(&spec(text), 0).unwrap();
    let pmem = region.bind(&map(), 0).unwrap();
    (region, pmem)
}

pub(crate) fn client(label: &'static str) -> Client {
    Client {
        label: label.into(),
        pid: std::process::id(),
    }
}

/// Runs one test of this program again, as a process of its own that finds `value` in the variable `PGMAP_TEST_CHILD`;
/// `before` is the command that starts it, if it needs one.
pub(crate) fn child(test: &str, value: &str, before: &[&str]) -> Command {
    let program = std::env::current_exe().unwrap();
    let mut words = before
        .iter()
        .map(std::ffi::OsString::from)
        .collect::<Vec<_>>();
    words.push(program.into());
    let mut command = Command::new(&words[0]);
    command
        .args(&words[1..])
        .args([test, "--exact", "--nocapture"]);
    command.env("PGMAP_TEST_CHILD", value);
    command
}

/// What the parent of this process told it, if it is such a child.
pub(crate) fn told() -> Option<String> {
    std::env::var("PGMAP_TEST_CHILD").ok()
}
