//! What pgmap itself says. It must never end, or change the exit status, because nobody listens.

use core::fmt::Display;
use std::io::{ErrorKind, Write, stderr, stdout};

use anyhow::Context;

/// Writes to stderr, in one piece. Whoever closed it does not want to read it.
pub(crate) fn tell(text: impl Display) {
    let _ = stderr().write_all(text.to_string().as_bytes());
}

/// Whether somebody still reads what is printed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Reader {
    Reads,
    /// It has seen enough.
    Gone,
}

/// Writes what was asked for to stdout. A reader that has seen enough is no error.
pub(crate) fn print(text: &[u8]) -> anyhow::Result<()> {
    print_on(text).map(|_reader| ())
}

/// As [`print()`], for what goes on until nobody reads it.
pub(crate) fn print_on(text: &[u8]) -> anyhow::Result<Reader> {
    let written = stdout().write_all(text).and_then(|()| stdout().flush());
    match written {
        Ok(()) => Ok(Reader::Reads),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(error) => Err(error).context("cannot write to standard output"),
    }
}
