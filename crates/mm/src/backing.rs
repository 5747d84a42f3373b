//! What the page cache asks of a file: the kernel's `address_space_operations`.
//!
//! Called with bytes in shared memory: who maps them may change them meanwhile, and a device's DMA, too. What must
//! never happen in an implementation: a lock that a fault could wait for.

use core::fmt;
use core::ops::Range;

use pgmap_core::addr::PAGE_SIZE;

use crate::shared_mmu::SharedPages;

/// Why a file could not be read or written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BackingError {
    /// There is no room for the bytes (`ENOSPC`, `EDQUOT`, `EFBIG`).
    #[error(
        "there is no room left for the file, or this process may not make files so long (errno {0})"
    )]
    NoSpace(i32),
    /// The bytes are not there any more.
    #[error("somebody else has made the file shorter, while it was open as memory")]
    Cut,
    /// What else the machine answers.
    #[error("the file's device failed (errno {0})")]
    Io(i32),
}

/// Bytes that go to a file, or come from it.
#[derive(Debug)]
pub struct Transfer<'a> {
    /// Where in the file, in bytes: a multiple of the page size.
    pub offset_bytes: u64,
    /// Where the bytes are, or go.
    pub pages: SharedPages<'a>,
    /// How many bytes: all of the pages, or fewer where the file ends in the last.
    pub len_bytes: usize,
    /// What became of it. Bytes of the last page beyond the end of the file are zeros when they are read.
    pub outcome: Result<(), BackingError>,
}

impl<'a> Transfer<'a> {
    /// The transfer of all of `pages` that is below the end of the file, not yet made.
    #[must_use]
    pub fn new(first_page: u32, pages: SharedPages<'a>, file_bytes: u64) -> Self {
        let offset_bytes = u64::from(first_page) * PAGE_SIZE as u64;
        let left = usize::try_from(file_bytes.saturating_sub(offset_bytes)).unwrap_or(usize::MAX);
        Self {
            offset_bytes,
            pages,
            len_bytes: left.min(pages.count() * PAGE_SIZE),
            outcome: Ok(()),
        }
    }
}

/// A file, below its page cache.
pub trait Backing: Send + Sync + fmt::Debug {
    /// Reads into pages, which have nothing in them yet.
    fn read(&self, transfers: &mut [Transfer<'_>]);

    /// Writes pages. The file never becomes longer by it.
    fn write(&self, transfers: &mut [Transfer<'_>]);

    /// Makes what was written durable, and the file's length too.
    ///
    /// # Errors
    ///
    /// [`BackingError`]: then some of it is not.
    fn sync(&self) -> Result<(), BackingError>;

    /// Makes the file this long; what is new reads as zeros.
    ///
    /// # Errors
    ///
    /// [`BackingError`]; the file is as long as before then.
    fn set_len(&self, bytes: u64) -> Result<(), BackingError>;

    /// Makes these bytes zeros, and gives their room back if the file system can.
    ///
    /// # Errors
    ///
    /// [`BackingError`]; some of the bytes may be zeros then.
    fn punch(&self, bytes: Range<u64>) -> Result<(), BackingError>;
}
