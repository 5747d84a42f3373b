//! Address spaces: the page table, faults, reclaim, pins, and migration to and from devices.
//!
//! The four flows that this crate is about are one readable function each: `fault`, `reclaim`, `pin`,
//! `unplug`. It knows no operating system: the machine's page tables are behind [`mmu::Mmu`].
#![cfg_attr(not(feature = "std"), no_std)]

extern crate alloc;

pub mod mmu;
