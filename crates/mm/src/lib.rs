//! Address spaces: the page table, faults, reclaim, pins, and migration to and from devices.
//!
//! The four flows that this crate is about are one readable function each: [`AddressSpace::fault`](space::AddressSpace::fault),
//! [`AddressSpace::reclaim`](space::AddressSpace::reclaim), [`gup::pin_user_pages`] and
//! [`AddressSpace::evacuate`](space::AddressSpace::evacuate) (unplug). It knows no operating system: the machine's page
//! tables are behind [`mmu::Mmu`].
#![cfg_attr(not(any(feature = "std", test)), no_std)]

extern crate alloc;

pub mod backing;
pub mod dax;
pub mod devices;
pub mod discard;
pub mod errseq;
pub mod fault;
pub mod files;
pub mod fork;
pub mod gup;
mod mapped;
pub mod mmu;
pub mod offline;
pub mod page_cache;
pub mod page_table;
pub mod pinning;
pub mod policy;
pub mod private_file;
pub mod pte;
pub mod readahead;
pub mod reclaim;
#[cfg(any(loom, shuttle))]
pub mod seeded_bug;
pub mod shared_mmu;
pub mod space;
pub mod staging;
pub mod stats;
pub mod unplug;
pub mod vma;
