//! What can go wrong with a file that is memory: when it is opened, mapped, and made durable.
//!
//! Each variant is a decision for whoever calls. What must never happen here: an error that says less than the machine has said.

use std::path::PathBuf;

use pgmap_core::addr::PAGE_SIZE;
use pgmap_core::platform::OutOfAddressSpace;
use pgmap_mm::backing::BackingError;
use rustix::io::Errno;

/// Why a file could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The machine's answer.
    #[error("{}: {error}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: std::io::Error,
    },
    /// It is open as memory already: here or by another process, to be written by one of the two at least.
    #[error(
        "{}: it is open already, here or by another pgmap, or somebody else has locked it; who has a `File` gets more of them by `another`",
        .0.display()
    )]
    Locked(PathBuf),
    /// It is a pipe, a socket, a device. (A directory cannot be opened to be written: [`Open`](Self::Open).)
    #[error("{}: not a regular file", .0.display())]
    NotRegular(PathBuf),
    /// It is longer than can be mapped.
    #[error("{}: {bytes} bytes are more than can be mapped (16 TiB)", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// The memory is a fork's parent's.
    #[error("{}: the Memory is that of the process that forked, and has no pager here: make another", .0.display())]
    Inherited(PathBuf),
    /// The machine has no room for the tables.
    #[error(transparent)]
    Tables(#[from] OutOfAddressSpace),
    /// The machine has no memory for the pages, or no thread to write them back.
    #[error("{}: no memory for its pages: {errno}", path.display())]
    Memory {
        /// The file.
        path: PathBuf,
        /// What the machine answered.
        errno: Errno,
    },
}

/// Why bytes are not on the medium. They are still in RAM, dirty, unless RAM ([`File::memory_failure`](super::File::memory_failure))
/// or the medium itself has lost them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SyncError {
    /// Writing them failed, now or before; each who has the file open is told once of each failure.
    #[error(
        "the file could not be written; its bytes stay in memory, unless that has lost them: {0}"
    )]
    Writeback(#[source] BackingError),
    /// They are written, but the medium could not be told to keep them. The machine may have lost them: this stays so until the
    /// file is opened again.
    #[error("the file could not be made durable: {0}; open it again, and look at what is there")]
    Flush(#[source] BackingError),
    /// The file is a fork's parent's, and so is what is dirty.
    #[error("the file was opened by the process that forked, which writes it: open it again here")]
    Inherited,
}

/// Why a file could not be mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MapFileError {
    /// The bytes are none, do not begin at a page, or go farther than the file may ever come. An empty file is made longer first, or
    /// mapped beyond its end.
    #[error(
        "what is mapped of a file is at least one byte, begins at a multiple of {PAGE_SIZE} bytes, and ends at byte {most_bytes} at most"
    )]
    BadRange {
        /// How long the file may become while it is open.
        most_bytes: u64,
    },
    /// It is to be mapped for writing, and open for reading only.
    #[error("the file is open to be read only: map it with Prot::Read, or open it to be written")]
    ReadOnly,
    /// Its pages are another memory's.
    #[error("the file was opened by another Memory, whose space has to map it")]
    OtherMemory,
    /// The file is a fork's parent's.
    #[error("the file was opened by the process that forked: open it again here")]
    Inherited,
    /// The machine refused.
    #[error("the machine refused to map the file: {0}")]
    Refused(#[from] Errno),
}
