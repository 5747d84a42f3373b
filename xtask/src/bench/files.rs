//! Files as memory: pins, streams, random reads and writeback, each beside what the kernel does.

mod pins;
mod random;
mod registered;
mod streams;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use pgmap::{Device, Memory};
use pgmap_core::addr::PAGE_SIZE;
use rustix::fs::{Advice, OFlags, fadvise};

use super::Effort;
use super::table::{Row, Table, Want, median};

const MIB: u64 = 1 << 20;
/// What goes to a device past the kernel's cache at once.
const REQUEST: usize = 1 << 20;

pub(crate) fn measure(root: &Path, effort: Effort) -> anyhow::Result<Vec<Table>> {
    pgmap_host::platform::use_membarrier();
    let directory = super::directory(root)?;
    Ok(vec![
        pins::measure(&directory, effort)?,
        streams::measure(&directory, effort)?,
        random::measure(root, &directory, effort)?,
    ])
}

/// A memory of so many bytes, for files alone.
fn memory(ram_bytes: u64) -> anyhow::Result<Memory> {
    let device = Device::compressed(64 * MIB);
    Ok(Memory::builder().ram(ram_bytes).device(device).build()?)
}

/// A file each of whose pages begins with its number; it is removed again.
#[derive(Debug)]
struct Scratch(PathBuf);

impl Scratch {
    fn new(directory: &Path, bytes: u64) -> anyhow::Result<Self> {
        let path = directory.join(format!("file-{}", std::process::id()));
        let file = File::create(&path).with_context(|| path.display().to_string())?;
        let scratch = Self(path);
        let mut some = vec![0x5a; REQUEST];
        for offset in (0..bytes).step_by(REQUEST) {
            for (nth, page) in some.chunks_mut(PAGE_SIZE).enumerate() {
                let number = (offset / PAGE_SIZE as u64) + nth as u64;
                page[..8].copy_from_slice(&number.to_le_bytes());
            }
            file.write_all_at(&some, offset)?;
        }
        file.sync_all()?;
        scratch.drop_cache()?;
        Ok(scratch)
    }

    /// Makes the kernel forget what it keeps of the file.
    fn drop_cache(&self) -> anyhow::Result<()> {
        Ok(fadvise(self.open()?, 0, None, Advice::DontNeed)?)
    }

    fn open(&self) -> anyhow::Result<File> {
        Ok(OpenOptions::new().read(true).write(true).open(&self.0)?)
    }

    /// The file, past the kernel's cache.
    fn open_direct(&self) -> anyhow::Result<File> {
        let flags = i32::try_from(OFlags::DIRECT.bits())?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(flags);
        Ok(options.open(&self.0)?)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn seconds(act: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let start = Instant::now();
    act()?;
    Ok(start.elapsed().as_secs_f64())
}

/// A row of the medians of what `round` answers: ours, and theirs.
fn compared(
    effort: Effort,
    (what, unit, want): (&str, &'static str, Want),
    mut round: impl FnMut() -> anyhow::Result<(f64, f64)>,
) -> anyhow::Result<Row> {
    let rounds: Vec<_> = (0..effort.rounds)
        .map(|_| round())
        .collect::<Result<_, _>>()?;
    let (ours, theirs) = rounds.into_iter().unzip();
    Ok(Row {
        what: what.to_owned(),
        ours: median(ours),
        theirs: Some(median(theirs)),
        unit,
        want,
    })
}
