//! The allocator of the compressed pool: pieces of 1 to 4096 bytes, by handle.
//!
//! A superblock is 64 KiB that hold objects of one size class; it goes back to the allocator with its
//! last object. Class sizes are what the superblock divides into, so little is left over at its end.
//! The compressed device calls this. Reading allocates nothing, and no lock is held across a call to
//! anything but the reader's closure. All of it is ordinary private memory: a fork's child inherits it.

use pgmap_core::addr::PAGE_SIZE;
use pgmap_sync::Mutex;
use pgmap_sync::atomic::{AtomicU64, Ordering};

use crate::quota::Quota;
use blocks::{Blocks, Removed};

mod blocks;

/// Bytes that the pool takes from the allocator at a time.
pub const SUPERBLOCK_BYTES: usize = 64 << 10;
/// The size of the smallest class.
const MIN_OBJECT_BYTES: usize = 32;

const LEN_BITS: u32 = 13;
const OBJECT_BITS: u32 = 11;
const CLASS_BITS: u32 = 7;
/// Superblocks of one class that can be told apart: 2 TiB of them.
const BLOCK_BITS: u32 = 25;
const _: () = assert!(PAGE_SIZE < 1 << LEN_BITS);
const _: () = assert!(SUPERBLOCK_BYTES / MIN_OBJECT_BYTES <= 1 << OBJECT_BITS);

/// Where a piece lies, and its length: class, superblock, place in the superblock.
///
/// # Invariants
///
/// Below 2^[`BITS`](Self::BITS).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Handle(u64);

impl Handle {
    /// How many low bits of the number are used.
    pub const BITS: u32 = BLOCK_BITS + CLASS_BITS + OBJECT_BITS + LEN_BITS;

    /// The handle with this number, if there can be one; it need not be in use.
    #[must_use]
    pub const fn from_u64(number: u64) -> Option<Self> {
        // INVARIANT: just compared.
        if number >> Self::BITS == 0 {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The number.
    #[must_use]
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    fn new(class: usize, block: u32, object: usize, len: usize) -> Self {
        debug_assert!(block >> BLOCK_BITS == 0 && class >> CLASS_BITS == 0);
        debug_assert!(object >> OBJECT_BITS == 0 && len >> LEN_BITS == 0);
        let place = u64::from(block) << CLASS_BITS | class as u64;
        // INVARIANT: each part has only its own bits, checked above.
        Self((place << OBJECT_BITS | object as u64) << LEN_BITS | len as u64)
    }

    const fn len(self) -> usize {
        self.field(0, LEN_BITS)
    }

    const fn object(self) -> usize {
        self.field(LEN_BITS, OBJECT_BITS)
    }

    const fn class(self) -> usize {
        self.field(LEN_BITS + OBJECT_BITS, CLASS_BITS)
    }

    const fn block(self) -> usize {
        self.field(LEN_BITS + OBJECT_BITS + CLASS_BITS, BLOCK_BITS)
    }

    #[allow(
        clippy::cast_possible_truncation,
        reason = "fields have at most 25 bits"
    )]
    const fn field(self, shift: u32, bits: u32) -> usize {
        (self.0 >> shift & ((1 << bits) - 1)) as usize
    }
}

/// The pool has no room for another superblock.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the pool is full")]
pub struct PoolFull;

/// What a pool holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PoolUsage {
    /// Bytes of the superblocks held.
    pub physical_bytes: u64,
    /// Bytes of the pieces stored, exactly.
    pub stored_bytes: u64,
    /// Bytes of the pool's own tables, its classes left out.
    pub metadata_bytes: u64,
}

/// A pool of pieces of memory.
///
/// # Locking
///
/// Two classes are never locked at once. The quota's lock is taken inside a class's.
#[derive(Debug)]
pub struct Pool {
    /// Smallest first; the last holds whole pages.
    classes: Box<[Class]>,
    capacity_bytes: u64,
    /// Bytes of superblocks held, spoken for before they are allocated.
    physical_bytes: AtomicU64,
    quota: Mutex<Quota>,
}

#[derive(Debug)]
struct Class {
    object_bytes: usize,
    blocks: Mutex<Blocks>,
}

/// Whether a class may take another superblock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Room {
    MayGrow,
    AsItIs,
}

impl Pool {
    /// An empty pool that holds at most `capacity_bytes` bytes of superblocks, and no more than
    /// `quota` leaves it.
    #[must_use]
    pub fn new(capacity_bytes: u64, quota: Quota) -> Self {
        let classes = class_sizes().into_iter().map(|object_bytes| Class {
            object_bytes,
            blocks: Mutex::new(Blocks::new(object_bytes)),
        });
        Self {
            classes: classes.collect(),
            capacity_bytes,
            physical_bytes: AtomicU64::new(0),
            quota: Mutex::new(quota),
        }
    }

    /// Stores a copy of `bytes`, 1 to 4096 of them.
    ///
    /// # Errors
    ///
    /// [`PoolFull`] if that takes another superblock, and there may be none.
    ///
    /// # Panics
    ///
    /// If `bytes` is empty or longer than a page.
    pub fn alloc(&self, bytes: &[u8]) -> Result<Handle, PoolFull> {
        assert!(
            !bytes.is_empty() && bytes.len() <= PAGE_SIZE,
            "a piece has 1 to 4096 bytes"
        );
        let best = self
            .classes
            .partition_point(|class| class.object_bytes < bytes.len());
        let larger = best + 1..self.classes.len();
        self.alloc_in(best, bytes, Room::MayGrow)
            // Room that a larger class has left is better than none.
            .or_else(|| {
                larger
                    .into_iter()
                    .find_map(|class| self.alloc_in(class, bytes, Room::AsItIs))
            })
            .ok_or(PoolFull)
    }

    fn alloc_in(&self, class: usize, bytes: &[u8], room: Room) -> Option<Handle> {
        let mut blocks = self.classes[class].blocks.lock();
        let block = match (blocks.fullest(), room) {
            (Some(block), _) => block,
            (None, Room::AsItIs) => return None,
            (None, Room::MayGrow) => {
                self.take_superblock()?;
                blocks
                    .grow()
                    .inspect_err(|PoolFull| self.give_superblock())
                    .ok()?
            }
        };
        let object = blocks.put(block, bytes);
        Some(Handle::new(class, block, object, bytes.len()))
    }

    /// Calls `reader` with the bytes of a piece; `None` if `handle` is not in use.
    pub fn read<R>(&self, handle: Handle, reader: impl FnOnce(&[u8]) -> R) -> Option<R> {
        let blocks = self.classes.get(handle.class())?.blocks.lock();
        let object = blocks.get(handle.block(), handle.object())?;
        object.get(..handle.len()).map(reader)
    }

    /// Gives back a piece; false if `handle` was not in use.
    #[must_use]
    pub fn free(&self, handle: Handle) -> bool {
        let Some(class) = self.classes.get(handle.class()) else {
            return false;
        };
        let mut blocks = class.blocks.lock();
        match blocks.remove(handle.block(), handle.object(), handle.len()) {
            None => false,
            Some(Removed::OthersStay) => true,
            Some(Removed::Last(superblock)) => {
                drop(blocks);
                drop(superblock);
                self.give_superblock();
                true
            }
        }
    }

    /// What the pool holds now.
    #[must_use]
    pub fn usage(&self) -> PoolUsage {
        let mut usage = PoolUsage {
            // Relaxed: a figure for people.
            physical_bytes: self.physical_bytes.load(Ordering::Relaxed),
            ..PoolUsage::default()
        };
        for class in &self.classes {
            let blocks = class.blocks.lock();
            usage.stored_bytes += blocks.stored_bytes();
            usage.metadata_bytes += blocks.metadata_bytes();
        }
        usage
    }

    /// Counts everything in another quota from now on: a fork's child inherits the pool, and holds
    /// its copy beside its parent. The old quota's counters are left as they are.
    pub fn adopt(&self, quota: Quota) {
        let mut current = self.quota.lock();
        // Relaxed: superblocks are spoken for and given back under the quota's lock.
        quota.charge(self.physical_bytes.load(Ordering::Relaxed));
        *current = quota;
    }

    fn take_superblock(&self) -> Option<()> {
        let quota = self.quota.lock();
        // Relaxed: written under the quota's lock only.
        let held = self.physical_bytes.load(Ordering::Relaxed) + SUPERBLOCK_BYTES as u64;
        if held > self.capacity_bytes || !quota.take(SUPERBLOCK_BYTES as u64) {
            return None;
        }
        self.physical_bytes.store(held, Ordering::Relaxed);
        Some(())
    }

    fn give_superblock(&self) {
        let quota = self.quota.lock();
        // Relaxed: written under the quota's lock only.
        self.physical_bytes
            .fetch_sub(SUPERBLOCK_BYTES as u64, Ordering::Relaxed);
        quota.give(SUPERBLOCK_BYTES as u64);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // Relaxed: nobody else has the pool any more.
        self.quota
            .lock()
            .give(self.physical_bytes.load(Ordering::Relaxed));
    }
}

/// The sizes of the classes, smallest first: parts of a superblock, multiples of 8, each at least 16
/// bytes and 3% below the next.
fn class_sizes() -> Vec<usize> {
    let mut sizes = vec![PAGE_SIZE];
    let mut last = PAGE_SIZE;
    for objects in SUPERBLOCK_BYTES / PAGE_SIZE..=SUPERBLOCK_BYTES / MIN_OBJECT_BYTES {
        let size = (SUPERBLOCK_BYTES / objects) & !7;
        if size + (last / 33).max(16) <= last {
            sizes.push(size);
            last = size;
        }
    }
    sizes.reverse();
    sizes
}

#[cfg(test)]
mod tests;
