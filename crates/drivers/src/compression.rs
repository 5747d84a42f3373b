//! Turning a page into fewer bytes, and back.
//!
//! The compressed device calls this. Scratch memory lives in a few states that threads share, because
//! thread-local storage with a destructor is a trap in a preloaded library. Nothing is allocated
//! after the first use of each state, and decompressing never allocates.

use core::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};
use pgmap_core::addr::{PAGE_SIZE, Page};

/// How many threads can compress at once before one waits for another.
const STATES: usize = 4;
/// A page that does not shrink below this is better stored as it is.
pub(crate) const WORTHWHILE_BYTES: usize = PAGE_SIZE * 3 / 4;

/// How pages are made smaller.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Algorithm {
    /// LZ4: a few microseconds a page.
    Lz4,
    /// Zstandard: smaller, and several times slower.
    Zstd {
        /// -7 (fastest) to 19 (smallest).
        level: i32,
    },
}

/// The bytes are not what the compressor made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Malformed;

#[derive(Debug)]
pub(crate) enum Compression {
    Lz4(States<Lz4>),
    Zstd {
        compressors: States<Zstd>,
        decompressors: States<Dctx>,
    },
}

pub(crate) struct Lz4 {
    table: CompressTable,
    out: [u8; get_maximum_output_size(PAGE_SIZE)],
}

pub(crate) struct Zstd {
    context: zstd::bulk::Compressor<'static>,
    out: [u8; WORTHWHILE_BYTES],
}

pub(crate) struct Dctx(zstd::bulk::Decompressor<'static>);

impl Compression {
    /// Makes the states; fails if Zstandard finds no memory for its own.
    pub(crate) fn new(algorithm: Algorithm) -> std::io::Result<Self> {
        Ok(match algorithm {
            Algorithm::Lz4 => Self::Lz4(States::new(|| Ok(Lz4::new()))?),
            Algorithm::Zstd { level } => Self::Zstd {
                compressors: States::new(|| Zstd::new(level))?,
                decompressors: States::new(|| zstd::bulk::Decompressor::new().map(Dctx))?,
            },
        })
    }

    /// Calls `then` with the page's bytes made smaller, or as they are if that is not worthwhile.
    pub(crate) fn compress<R>(&self, page: &Page, then: impl FnOnce(Compressed<'_>) -> R) -> R {
        match self {
            Self::Lz4(states) => {
                let mut state = states.get();
                let Lz4 { table, out } = &mut **state;
                let len = compress_into_with_table(&page.0, out, table);
                then(Compressed::new(page, out, len.ok()))
            }
            Self::Zstd { compressors, .. } => {
                let mut state = compressors.get();
                let Zstd { context, out } = &mut **state;
                let len = context.compress_to_buffer(&page.0, &mut out[..]);
                then(Compressed::new(page, out, len.ok()))
            }
        }
    }

    /// Fills `page` with the bytes that were made smaller.
    pub(crate) fn decompress(&self, bytes: &[u8], page: &mut Page) -> Result<(), Malformed> {
        let len = match self {
            Self::Lz4(_) => lz4_flex::block::decompress_into(bytes, &mut page.0).ok(),
            Self::Zstd { decompressors, .. } => decompressors
                .get()
                .0
                .decompress_to_buffer(bytes, &mut page.0[..])
                .ok(),
        };
        if len == Some(PAGE_SIZE) {
            Ok(())
        } else {
            Err(Malformed)
        }
    }
}

/// What became of a page.
pub(crate) enum Compressed<'a> {
    /// Its bytes, made smaller.
    Smaller(&'a [u8]),
    /// Its bytes as they are.
    Raw(&'a Page),
}

impl<'a> Compressed<'a> {
    fn new(page: &'a Page, out: &'a [u8], len: Option<usize>) -> Self {
        match len {
            Some(len) if len <= WORTHWHILE_BYTES => Self::Smaller(&out[..len]),
            Some(_) | None => Self::Raw(page),
        }
    }
}

impl Lz4 {
    fn new() -> Self {
        Self {
            table: CompressTable::small(),
            out: [0; get_maximum_output_size(PAGE_SIZE)],
        }
    }
}

impl Zstd {
    /// A context that has compressed a page before, and so has all of its memory.
    fn new(level: i32) -> std::io::Result<Self> {
        let mut context = zstd::bulk::Compressor::new(level)?;
        let mut out = [0; WORTHWHILE_BYTES];
        context.compress_to_buffer(&Page::ZERO.0, &mut out[..])?;
        Ok(Self { context, out })
    }
}

/// Scratch states that threads take in turn. The first is taken most: its memory is warm.
pub(crate) struct States<T>(Box<[Mutex<Box<T>>]>);

impl<T> fmt::Debug for States<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("States").field(&self.0.len()).finish()
    }
}

impl<T> States<T> {
    fn new(make: impl Fn() -> std::io::Result<T>) -> std::io::Result<Self> {
        let states = (0..STATES).map(|_| make().map(|state| Mutex::new(Box::new(state))));
        states.collect::<std::io::Result<_>>().map(Self)
    }

    fn get(&self) -> MutexGuard<'_, Box<T>> {
        for state in &self.0 {
            match state.try_lock() {
                Ok(guard) => return guard,
                // Scratch memory means nothing between two uses.
                Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => {}
            }
        }
        self.0[0].lock().unwrap_or_else(PoisonError::into_inner)
    }
}
