//! What the tests of files as memory share: memories, files that go away again, and bytes that tell where they belong.
#![allow(dead_code, reason = "each test uses its part")]

use core::time::Duration;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

use pgmap::{Device, Memory};

pub(crate) mod fork;
pub(crate) mod touch;

pub(crate) const MIB: usize = 1 << 20;
pub(crate) const PAGE: usize = 4096;

/// A memory of so much RAM; none where the machine does not allow it.
pub(crate) fn memory(ram_bytes: usize) -> Option<Memory> {
    let builder = Memory::builder().ram(ram_bytes as u64);
    match builder.device(Device::compressed(1 << 30)).build() {
        Ok(memory) => Some(memory),
        Err(error) => {
            eprintln!("SKIPPED: {error}");
            None
        }
    }
}

/// A file that is removed again.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Scratch {
    /// A file of so many pages, all of version 0.
    pub(crate) fn new(name: &str, pages: usize) -> Self {
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        let path = path.join(format!("{name}-{}", std::process::id()));
        let mut bytes = vec![0; pages * PAGE];
        for (nth, page) in bytes.chunks_mut(PAGE).enumerate() {
            page.copy_from_slice(&pattern(nth, 0));
        }
        fs::write(&path, bytes).unwrap();
        Self(path)
    }

    /// A page as the file has it now.
    pub(crate) fn page(&self, nth: usize) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        let file = fs::File::open(&self.0).unwrap();
        file.read_exact_at(&mut page, (nth * PAGE) as u64).unwrap();
        page
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The bytes of a page, of which each tells the page and the version.
pub(crate) fn pattern(page: usize, version: u64) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    let mut word = (page as u64) << 32 ^ version;
    for to in bytes.chunks_exact_mut(8) {
        to.copy_from_slice(&word.to_le_bytes());
        word = word
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
    }
    bytes
}

/// Compares every byte of a page, and says which page and which versions they are.
pub(crate) fn check(bytes: &[u8], page: usize, version: u64) {
    if bytes != pattern(page, version) {
        let word = u64::from_le_bytes(bytes[..8].try_into().unwrap()) ^ (page as u64) << 32;
        let at = bytes
            .iter()
            .zip(pattern(page, version))
            .position(|(a, b)| *a != b);
        panic!(
            "page {page} is not of version {version} from byte {at:?} on; its first word says {word:#x}"
        );
    }
}

/// How long a test is to run that can take any time, if `cargo xtask soak` has said so.
pub(crate) fn soak() -> Option<Duration> {
    let minutes = std::env::var("PGMAP_SOAK_MINUTES").ok()?;
    Some(Duration::from_mins(minutes.parse().unwrap()))
}

/// What the parent's test said, if this is a child that runs the same test.
pub(crate) fn told() -> Option<String> {
    std::env::var("PGMAP_TEST_CHILD").ok()
}

/// A child that runs one test of this program, and is told something.
pub(crate) fn child(test: &str, what: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]);
    command.env("PGMAP_TEST_CHILD", what);
    command
}

/// Numbers that are the same in each run.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % limit
    }
}
