//! The summary as a file, for programs.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::summary::Summary;

/// A report that will be written. The file is opened before the program runs, so that a mistake is found then.
#[derive(Debug)]
pub(crate) struct Report {
    file: File,
    path: PathBuf,
    /// Whether there was no such file before.
    fresh: bool,
}

impl Report {
    /// Makes the file, or empties it.
    pub(crate) fn create(path: &Path) -> anyhow::Result<Self> {
        let fresh = !path.exists();
        // To append: it may be the program's own output.
        let file = OpenOptions::new().append(true).create(true).open(path);
        let file = file.with_context(|| {
            let path = path.display();
            format!("cannot write the report to {path}: name a file that you may write")
        })?;
        // A terminal or a pipe has no length, and needs none.
        let _ = file.set_len(0);
        let path = path.to_owned();
        Ok(Self { file, path, fresh })
    }

    /// There is nothing to report: a file that was made for it goes.
    pub(crate) fn cancel(self) {
        if self.fresh {
            // It is empty: whoever finds it in spite of this loses nothing.
            let _ = std::fs::remove_file(self.path);
        }
    }

    pub(crate) fn write(mut self, summary: &Summary) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(summary)?;
        writeln!(self.file, "{text}")
            .with_context(|| format!("cannot write the report to {}", self.path.display()))
    }
}
