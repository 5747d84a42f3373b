//! The superblocks of one size class.
//!
//! The pool calls this under the class's lock. New objects go into the fullest superblock that has
//! room, so that the emptiest ones run dry and can be given back.

use core::mem;

use super::{BLOCK_BITS, PoolFull, SUPERBLOCK_BYTES};

/// Superblocks that have room are listed by how full they are, in this many steps.
const GROUPS: usize = 4;
/// The end of a list.
const END: u32 = u32::MAX;

/// The superblocks of one class.
///
/// # Invariants
///
/// Each entry is on exactly one list, or on none if it is full: `vacant` if it holds no
/// memory, else `groups[fullness]`. A superblock with memory has at least one object, except between
/// `grow` and the `put` that follows it.
#[derive(Debug)]
pub(super) struct Blocks {
    object_bytes: usize,
    entries: Vec<Block>,
    groups: [u32; GROUPS],
    vacant: u32,
    stored_bytes: u64,
}

#[derive(Debug)]
struct Block {
    /// Empty if the superblock was given back.
    bytes: Box<[u8]>,
    /// One bit for each object, set while it is in use.
    taken: Box<[u64]>,
    used: u32,
    prev: u32,
    next: u32,
}

/// What is left of the superblock that an object was removed from.
pub(super) enum Removed {
    /// It has other objects.
    OthersStay,
    /// Its memory, which is to be dropped after the lock.
    Last(Box<[u8]>),
}

impl Blocks {
    pub(super) fn new(object_bytes: usize) -> Self {
        // INVARIANT: no entries, empty lists.
        Self {
            object_bytes,
            entries: Vec::new(),
            groups: [END; GROUPS],
            vacant: END,
            stored_bytes: 0,
        }
    }

    /// The fullest superblock that has room for one more.
    pub(super) fn fullest(&self) -> Option<u32> {
        self.groups.iter().rev().copied().find(|head| *head != END)
    }

    /// Adds an empty superblock, which the caller puts an object into at once.
    pub(super) fn grow(&mut self) -> Result<u32, PoolFull> {
        let bytes = zeroed(SUPERBLOCK_BYTES)?;
        let taken = zeroed(self.objects().div_ceil(64))?;
        let block = Block {
            bytes,
            taken,
            used: 0,
            prev: END,
            next: END,
        };
        let index = if self.vacant == END {
            let index = u32::try_from(self.entries.len())
                .ok()
                .filter(|index| index >> BLOCK_BITS == 0);
            let index = index.ok_or(PoolFull)?;
            self.entries.try_reserve(1).map_err(|_| PoolFull)?;
            self.entries.push(block);
            index
        } else {
            let index = self.vacant;
            let entry = &mut self.entries[index as usize];
            self.vacant = entry.next;
            *entry = block;
            index
        };
        self.link(index, 0);
        Ok(index)
    }

    /// Copies `bytes` to a free place in a superblock that has one, and says which place.
    pub(super) fn put(&mut self, index: u32, bytes: &[u8]) -> usize {
        let (objects, object_bytes) = (self.objects(), self.object_bytes);
        let block = &mut self.entries[index as usize];
        let object = block.first_free();
        debug_assert!(object < objects, "a listed superblock has room");
        block.taken[object / 64] |= 1 << (object % 64);
        block.bytes[object * object_bytes..][..bytes.len()].copy_from_slice(bytes);
        let before = group(block.used, objects);
        block.used += 1;
        let after = group(block.used, objects);
        self.stored_bytes += bytes.len() as u64;
        self.move_between(index, before, after);
        object
    }

    /// The whole place of an object that is in use.
    pub(super) fn get(&self, index: usize, object: usize) -> Option<&[u8]> {
        let block = self
            .entries
            .get(index)
            .filter(|block| block.is_taken(object))?;
        block
            .bytes
            .get(object * self.object_bytes..)?
            .get(..self.object_bytes)
    }

    /// Removes an object of `len` bytes that is in use.
    pub(super) fn remove(&mut self, index: usize, object: usize, len: usize) -> Option<Removed> {
        let objects = self.objects();
        let block = self
            .entries
            .get_mut(index)
            .filter(|block| block.is_taken(object))?;
        block.taken[object / 64] &= !(1 << (object % 64));
        let before = group(block.used, objects);
        block.used -= 1;
        let used = block.used;
        self.stored_bytes -= len as u64;
        #[allow(
            clippy::cast_possible_truncation,
            reason = "entries are numbered in 25 bits"
        )]
        let index = index as u32;
        if used > 0 {
            self.move_between(index, before, group(used, objects));
            return Some(Removed::OthersStay);
        }
        self.unlink(index, before);
        let block = &mut self.entries[index as usize];
        block.taken = Box::default();
        block.next = self.vacant;
        self.vacant = index;
        Some(Removed::Last(mem::take(&mut block.bytes)))
    }

    pub(super) fn stored_bytes(&self) -> u64 {
        self.stored_bytes
    }

    pub(super) fn metadata_bytes(&self) -> u64 {
        let bitmaps: usize = self
            .entries
            .iter()
            .map(|block| size_of_val(&*block.taken))
            .sum();
        (self.entries.capacity() * size_of::<Block>() + bitmaps) as u64
    }

    fn objects(&self) -> usize {
        SUPERBLOCK_BYTES / self.object_bytes
    }

    fn move_between(&mut self, index: u32, before: Option<usize>, after: Option<usize>) {
        if before != after {
            self.unlink(index, before);
            if let Some(group) = after {
                self.link(index, group);
            }
        }
    }

    fn link(&mut self, index: u32, group: usize) {
        let next = mem::replace(&mut self.groups[group], index);
        if next != END {
            self.entries[next as usize].prev = index;
        }
        let block = &mut self.entries[index as usize];
        (block.prev, block.next) = (END, next);
    }

    fn unlink(&mut self, index: u32, group: Option<usize>) {
        let Some(group) = group else { return };
        let Block { prev, next, .. } = self.entries[index as usize];
        if prev == END {
            self.groups[group] = next;
        } else {
            self.entries[prev as usize].next = next;
        }
        if next != END {
            self.entries[next as usize].prev = prev;
        }
    }
}

impl Block {
    fn is_taken(&self, object: usize) -> bool {
        self.taken
            .get(object / 64)
            .is_some_and(|word| word >> (object % 64) & 1 == 1)
    }

    /// The lowest place not in use; past the last one if all are.
    fn first_free(&self) -> usize {
        let word = self.taken.iter().position(|word| *word != u64::MAX);
        word.map_or(usize::MAX, |word| {
            word * 64 + self.taken[word].trailing_ones() as usize
        })
    }
}

/// The list for a superblock with `used` of `objects` places in use; `None` if it is full.
fn group(used: u32, objects: usize) -> Option<usize> {
    let group = used as usize * GROUPS / objects;
    (group < GROUPS).then_some(group)
}

/// Zeros, unless the machine has no memory for them.
fn zeroed<T: Clone + Default>(len: usize) -> Result<Box<[T]>, PoolFull> {
    let mut zeros = Vec::new();
    zeros.try_reserve_exact(len).map_err(|_| PoolFull)?;
    zeros.resize(len, T::default());
    Ok(zeros.into_boxed_slice())
}
