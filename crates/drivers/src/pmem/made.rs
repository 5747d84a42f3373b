//! What opening an image made that was not there before, so that it can be taken back.
//!
//! Images are opened by this, and regions taken back that nobody has used. What must never happen here: a file that is
//! removed or cut although somebody else made it, or has it in use.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use rustix::fs;

/// Something that was made.
///
/// # Invariants
///
/// Whoever made it has locked the file, and keeps the lock for as long as this is.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) path: PathBuf,
    pub(super) what: What,
}

/// What was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum What {
    /// The file.
    File,
    /// The length of a file that was empty.
    Length,
}

impl Made {
    /// Makes it not to be; `file` is the open file.
    pub(super) fn take_back(&self, file: BorrowedFd<'_>) {
        // By the type invariant nobody else has it in use. If this fails there is nothing else to try: the first error is told.
        match self.what {
            What::File if self.is_named(file) => drop(fs::unlink(&self.path)),
            What::File => {}
            What::Length => drop(fs::ftruncate(file, 0)),
        }
    }

    /// Whether the path still leads to the file.
    fn is_named(&self, file: BorrowedFd<'_>) -> bool {
        let (Ok(named), Ok(ours)) = (fs::lstat(&self.path), fs::fstat(file)) else {
            return false;
        };
        (named.st_dev, named.st_ino) == (ours.st_dev, ours.st_ino)
    }
}
