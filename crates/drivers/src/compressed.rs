//! The compressed pool: pages made smaller, in RAM.
//!
//! `mm` calls this through [`PrivateOps`]. A page of one repeated word takes no room; one that does not
//! shrink is stored as it is. Loading a page allocates nothing.

use pgmap_core::addr::{PAGE_SIZE, Page};
use pgmap_core::driver::{DeviceData, DeviceError, Latency, Load, PrivateOps, Store, Usage};

pub use crate::compression::Algorithm;

use crate::compression::{Compressed, Compression, Malformed, WORTHWHILE_BYTES};
use crate::quota::Quota;
use crate::zsmalloc::{Handle, Pool, PoolFull, PoolUsage};
use pgmap_sync::atomic::{AtomicU64, Ordering};

/// What a compressed device is made of.
#[derive(Clone, Copy, Debug)]
pub struct CompressedOptions {
    /// Bytes of RAM that this device may take for compressed pages.
    pub capacity_bytes: u64,
    /// How pages are made smaller.
    pub algorithm: Algorithm,
    /// Pages that this device may hold, those that take no room included.
    pub max_pages: u64,
    /// What it shares with other processes' devices, beside its own capacity.
    pub quota: Quota,
}

/// There was no memory for the compressor.
#[derive(Debug, thiserror::Error)]
#[error("cannot start the compressor: {0}; use algorithm=lz4, or free some memory")]
pub struct NoCompressor(#[from] std::io::Error);

/// A pool of compressed pages.
#[derive(Debug)]
pub struct CompressedDevice {
    pool: Pool,
    compression: Compression,
    pages: AtomicU64,
    max_pages: u64,
    capacity_bytes: u64,
}

/// How a page is stored, as the low and high bits of its word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Entry {
    /// One word repeated, which has this value.
    Filled(u64),
    /// The page's own bytes.
    Raw(Handle),
    /// What the compressor made of them.
    Smaller(Handle),
}

/// Bits of a device's word that hold the value or the handle; the kind lies above.
const PAYLOAD_BITS: u32 = 56;
const _: () = assert!(Handle::BITS <= PAYLOAD_BITS);

impl Entry {
    fn encode(self) -> DeviceData {
        let (kind, payload) = match self {
            Self::Filled(value) => (1, value & (u64::MAX >> (u64::BITS - PAYLOAD_BITS))),
            Self::Raw(handle) => (2, handle.as_u64()),
            Self::Smaller(handle) => (3, handle.as_u64()),
        };
        DeviceData(kind << PAYLOAD_BITS | payload)
    }

    fn decode(data: DeviceData) -> Option<Self> {
        let payload = data.0 & (u64::MAX >> (u64::BITS - PAYLOAD_BITS));
        match data.0 >> PAYLOAD_BITS {
            1 => Some(Self::Filled(sign_extended(payload))),
            2 => Handle::from_u64(payload).map(Self::Raw),
            3 => Handle::from_u64(payload).map(Self::Smaller),
            _ => None,
        }
    }
}

/// The value whose low bits `payload` holds, if those are all that matter.
fn sign_extended(payload: u64) -> u64 {
    let unused = u64::BITS - PAYLOAD_BITS;
    ((payload << unused).cast_signed() >> unused).cast_unsigned()
}

/// The word that the whole page repeats, if there is one and the device's word has room for it.
fn filling(page: &Page) -> Option<u64> {
    const WORD: usize = size_of::<u64>();
    let (first, _) = page.0.split_first_chunk::<WORD>()?;
    let value = u64::from_le_bytes(*first);
    let repeats = page.0[WORD..] == page.0[..PAGE_SIZE - WORD];
    (repeats && sign_extended(value & (u64::MAX >> 8)) == value).then_some(value)
}

impl CompressedDevice {
    /// An empty pool.
    ///
    /// # Errors
    ///
    /// [`NoCompressor`] if there is no memory for the compressor's state.
    pub fn new(options: CompressedOptions) -> Result<Self, NoCompressor> {
        Ok(Self {
            pool: Pool::new(options.capacity_bytes, options.quota),
            compression: Compression::new(options.algorithm)?,
            pages: AtomicU64::new(0),
            max_pages: options.max_pages,
            capacity_bytes: options.capacity_bytes.min(options.quota.limit),
        })
    }

    /// What the pool holds, to the byte.
    #[must_use]
    pub fn pool_usage(&self) -> PoolUsage {
        self.pool.usage()
    }

    /// Counts what the device holds in `quota` from now on. A fork's child calls this once: it inherits
    /// the pool, and the counters that its parent goes on using.
    pub fn adopt(&self, quota: Quota) {
        self.pool.adopt(quota);
    }

    fn store(&self, page: &Page) -> Result<DeviceData, DeviceError> {
        self.take_page()?;
        self.place(page).map(Entry::encode).map_err(|PoolFull| {
            self.give_page();
            DeviceError::Full
        })
    }

    fn place(&self, page: &Page) -> Result<Entry, PoolFull> {
        if let Some(value) = filling(page) {
            return Ok(Entry::Filled(value));
        }
        self.compression
            .compress(page, |compressed| match compressed {
                Compressed::Smaller(bytes) => self.pool.alloc(bytes).map(Entry::Smaller),
                Compressed::Raw(page) => self.pool.alloc(&page.0).map(Entry::Raw),
            })
    }

    fn load(&self, data: DeviceData, page: &mut Page) -> Result<(), DeviceError> {
        match Entry::decode(data).ok_or(DeviceError::Corrupt)? {
            Entry::Filled(value) => {
                let (words, _) = page.0.as_chunks_mut();
                words.fill(value.to_le_bytes());
            }
            Entry::Raw(handle) => self.fetch(handle, |bytes| {
                page.0 = *<&[u8; PAGE_SIZE]>::try_from(bytes).ok()?;
                Some(())
            })?,
            Entry::Smaller(handle) => {
                // Copied first: the class is locked for a tenth of the time that decompressing takes.
                let mut copy = [0; WORTHWHILE_BYTES];
                let bytes = self.fetch(handle, |bytes| {
                    let copy = copy.get_mut(..bytes.len())?;
                    copy.copy_from_slice(bytes);
                    Some(copy)
                })?;
                let decompressed = self.compression.decompress(bytes, page);
                decompressed.map_err(|Malformed| DeviceError::Corrupt)?;
            }
        }
        Ok(())
    }

    /// What `reader` makes of a piece; the data is corrupt if there is no such piece, or it makes nothing.
    fn fetch<R>(
        &self,
        handle: Handle,
        reader: impl FnOnce(&[u8]) -> Option<R>,
    ) -> Result<R, DeviceError> {
        self.pool
            .read(handle, reader)
            .flatten()
            .ok_or(DeviceError::Corrupt)
    }

    fn take_page(&self) -> Result<(), DeviceError> {
        // Relaxed: the number guards no other memory.
        let before = self.pages.fetch_add(1, Ordering::Relaxed);
        if before >= self.max_pages {
            self.give_page();
            return Err(DeviceError::Full);
        }
        Ok(())
    }

    fn give_page(&self) {
        // Relaxed: as in `take_page`.
        self.pages.fetch_sub(1, Ordering::Relaxed);
    }
}

impl PrivateOps for CompressedDevice {
    fn name(&self) -> &'static str {
        "compressed"
    }

    fn latency(&self) -> Latency {
        Latency::Memory
    }

    fn migrate_to_device(&self, batch: &mut [Store<'_>]) {
        for store in batch {
            store.outcome = self.store(store.page);
        }
    }

    fn migrate_to_ram(&self, batch: &mut [Load<'_>]) {
        for load in batch {
            load.outcome = self.load(load.data, load.page);
        }
    }

    fn page_free(&self, data: DeviceData) {
        let freed = match Entry::decode(data) {
            Some(Entry::Filled(_)) => true,
            Some(Entry::Raw(handle) | Entry::Smaller(handle)) => self.pool.free(handle),
            None => false,
        };
        debug_assert!(freed, "{data:?} is no page of this device");
        if freed {
            self.give_page();
        }
    }

    fn usage(&self) -> Usage {
        Usage {
            // Relaxed: a figure for people.
            pages: self.pages.load(Ordering::Relaxed),
            bytes: self.pool.usage().physical_bytes,
            capacity_bytes: self.capacity_bytes,
        }
    }
}

#[cfg(test)]
mod tests;
