//! The summary as a file, for programs.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::summary::Summary;

/// A report that will be written. The file is opened before the program runs, so that a mistake is found then.
#[derive(Debug)]
pub(crate) struct Report {
    file: File,
    path: PathBuf,
}

impl Report {
    pub(crate) fn create(path: &Path) -> anyhow::Result<Self> {
        let file = File::create(path)
            .with_context(|| format!("cannot write the report to {}", path.display()))?;
        Ok(Self {
            file,
            path: path.to_owned(),
        })
    }

    pub(crate) fn write(mut self, summary: &Summary) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(summary)?;
        writeln!(self.file, "{text}")
            .with_context(|| format!("cannot write the report to {}", self.path.display()))
    }
}
