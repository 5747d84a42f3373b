//! What pgmap itself says. It must never end, or change the exit status, because nobody listens.

use core::fmt::Display;
use std::io::{ErrorKind, Write, stderr, stdout};

use anyhow::Context;

/// Writes to stderr, in one piece. Whoever closed it does not want to read it.
pub(crate) fn tell(text: impl Display) {
    let _ = stderr().write_all(text.to_string().as_bytes());
}

/// Writes what was asked for to stdout. A reader that has seen enough is no error.
pub(crate) fn print(text: &[u8]) -> anyhow::Result<()> {
    let written = stdout().write_all(text).and_then(|()| stdout().flush());
    match written {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(()),
    }
}
