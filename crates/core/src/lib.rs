//! Page frames: what they are, who owns them, and how a device gets them.
//!
//! Here live the frame and its state word, the memory map and its resource tree, `memremap_pages` and its teardown, and the
//! RAM budget, whose blocks go on and off line. `mm` and the drivers call this crate. It knows no operating system: memory for its
//! tables comes from the [`Platform`](platform::Platform) that it is given.
#![cfg_attr(not(any(feature = "std", test)), no_std)]

extern crate alloc;

pub mod addr;
pub mod altmap;
pub mod dax;
pub mod devres;
pub mod driver;
pub mod holders;
pub mod hotplug;
pub mod iomem;
pub mod memcg;
pub mod memory_block;
pub mod memremap;
pub mod memtype;
pub mod page;
pub mod platform;
pub mod queue;
pub mod ram;
pub mod resource;
#[cfg(shuttle)]
pub mod seeded_bug;
pub mod sparse;
pub mod vmemmap;
pub mod zone;
