//! A file below a page cache, as a model: what was written to it, and what of that is durable.
//!
//! Every page of a transfer is two steps, as a device's DMA and its medium are, and so others come between. What must never
//! happen here: a misuse that goes unnoticed. Two transfers of one page at once, of which one is a write, and bytes written
//! behind the end are such.

use core::ops::Range;
use std::collections::BTreeMap;
use std::sync::Arc;

use pgmap_core::addr::{PAGE_SIZE, Page};
use pgmap_mm::backing::{Backing, BackingError, Transfer};
use pgmap_sync::Mutex;

use crate::shared_memory::fill;

/// What is wrong with a model on purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flaw {
    /// Nothing.
    None,
    /// It says that bytes are durable that are only written.
    NeverSyncs,
}

/// An operation that can be told to fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// [`Backing::read`].
    Read,
    /// [`Backing::write`].
    Write,
    /// [`Backing::sync`].
    Sync,
    /// [`Backing::set_len`].
    SetLen,
    /// [`Backing::punch`].
    Punch,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Busy {
    Reads(u32),
    Write,
}

#[derive(Debug, Default)]
struct Medium {
    written: Vec<u8>,
    durable: Vec<u8>,
    failures: Vec<(Operation, BackingError)>,
    /// Pages that are being read or written.
    busy: BTreeMap<usize, Busy>,
}

impl Medium {
    fn failure(&mut self, operation: Operation) -> Result<(), BackingError> {
        let nth = self.failures.iter().position(|(of, _)| *of == operation);
        nth.map_or(Ok(()), |nth| Err(self.failures.remove(nth).1))
    }

    fn begin(&mut self, operation: Operation, page: usize) {
        let before = self.busy.get(&page).copied();
        let now = match (operation, before) {
            (Operation::Read, None) => Busy::Reads(1),
            (Operation::Read, Some(Busy::Reads(count))) => Busy::Reads(count + 1),
            (Operation::Write, None) => Busy::Write,
            (operation, before) => {
                panic!("two transfers of page {page} at once: {operation:?} and {before:?}")
            }
        };
        self.busy.insert(page, now);
    }

    fn end(&mut self, page: usize) {
        match self.busy.remove(&page) {
            Some(Busy::Reads(count)) if count > 1 => {
                self.busy.insert(page, Busy::Reads(count - 1));
            }
            Some(Busy::Reads(_) | Busy::Write) | None => {}
        }
    }

    /// Who changes the file below a cache has waited for the transfers there.
    fn assert_idle(&self, bytes: &Range<usize>) {
        let pages = bytes.start / PAGE_SIZE..bytes.end.div_ceil(PAGE_SIZE);
        let busy = self.busy.range(pages).next();
        assert_eq!(busy, None, "bytes were removed under a transfer");
    }
}

/// A modelled file.
#[derive(Debug)]
pub struct ModelFile {
    medium: Mutex<Medium>,
    flaw: Flaw,
}

impl ModelFile {
    /// A file with these bytes, all of them durable.
    #[must_use]
    pub fn new(bytes: Vec<u8>, flaw: Flaw) -> Arc<Self> {
        let medium = Medium {
            durable: bytes.clone(),
            written: bytes,
            ..Medium::default()
        };
        Arc::new(Self {
            medium: Mutex::new(medium),
            flaw,
        })
    }

    /// What was written: what is found after a crash of the program.
    #[must_use]
    pub fn written(&self) -> Vec<u8> {
        self.medium.lock().written.clone()
    }

    /// What was made durable: what is found after the power was cut, if nothing came through that was not promised.
    #[must_use]
    pub fn durable(&self) -> Vec<u8> {
        self.medium.lock().durable.clone()
    }

    /// Makes the next operation of a kind fail.
    pub fn fail(&self, operation: Operation, error: BackingError) {
        self.medium.lock().failures.push((operation, error));
    }

    /// Forgets what [`fail`](Self::fail) asked for and has not happened.
    pub fn fail_nothing(&self) {
        self.medium.lock().failures.clear();
    }

    /// Failures that were asked for and have not happened.
    #[must_use]
    pub fn failures_left(&self) -> usize {
        self.medium.lock().failures.len()
    }

    fn each_page(
        &self,
        operation: Operation,
        transfers: &mut [Transfer<'_>],
        page: impl Fn(&Transfer<'_>, usize, Range<usize>),
    ) {
        for transfer in transfers {
            transfer.outcome = self.medium.lock().failure(operation);
            let pages = transfer.len_bytes.div_ceil(PAGE_SIZE);
            let first = offset(transfer.offset_bytes);
            for nth in (0..pages).take_while(|_| transfer.outcome.is_ok()) {
                let start = first + nth * PAGE_SIZE;
                let end = (start + PAGE_SIZE).min(first + transfer.len_bytes);
                self.medium.lock().begin(operation, start / PAGE_SIZE);
                page(transfer, nth, start..end);
                self.medium.lock().end(start / PAGE_SIZE);
            }
        }
    }
}

impl Backing for ModelFile {
    fn read(&self, transfers: &mut [Transfer<'_>]) {
        self.each_page(Operation::Read, transfers, |transfer, nth, bytes| {
            let mut page = Page::ZERO;
            let medium = self.medium.lock();
            let there = bytes.start.min(medium.written.len())..bytes.end.min(medium.written.len());
            page.0[..there.len()].copy_from_slice(&medium.written[there]);
            drop(medium);
            fill(transfer.pages, nth, &page);
        });
    }

    fn write(&self, transfers: &mut [Transfer<'_>]) {
        self.each_page(Operation::Write, transfers, |transfer, nth, bytes| {
            let mut page = Page::ZERO;
            transfer.pages.copy_page(nth, &mut page);
            let mut medium = self.medium.lock();
            assert!(
                bytes.end <= medium.written.len(),
                "a write lengthened the file"
            );
            let len = bytes.len();
            medium.written[bytes].copy_from_slice(&page.0[..len]);
        });
    }

    fn sync(&self) -> Result<(), BackingError> {
        let medium = &mut *self.medium.lock();
        medium.failure(Operation::Sync)?;
        if self.flaw != Flaw::NeverSyncs {
            medium.durable.clone_from(&medium.written);
        }
        Ok(())
    }

    fn set_len(&self, bytes: u64) -> Result<(), BackingError> {
        let medium = &mut *self.medium.lock();
        medium.failure(Operation::SetLen)?;
        medium.assert_idle(&(offset(bytes)..medium.written.len().max(offset(bytes))));
        medium.written.resize(offset(bytes), 0);
        Ok(())
    }

    fn punch(&self, bytes: Range<u64>) -> Result<(), BackingError> {
        let medium = &mut *self.medium.lock();
        medium.failure(Operation::Punch)?;
        let bytes = offset(bytes.start)..offset(bytes.end);
        // Where a file system has no holes, zeros are written.
        assert!(
            bytes.end <= medium.written.len(),
            "a punch lengthened the file"
        );
        medium.assert_idle(&bytes);
        medium.written[bytes].fill(0);
        Ok(())
    }
}

fn offset(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
