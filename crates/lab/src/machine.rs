//! A whole modelled machine: the real `core` and `mm` over the model's memory and devices.
//!
//! Tests build one, run [`Cpu`]s on it, and end with [`Machine::assert_empty`], which finds whatever leaked.

use std::sync::Arc;

use pgmap_core::addr::{PAGE_SIZE, VirtAddr};
use pgmap_core::memremap::{MapError, MemoryMap, MemoryType, SUBSECTION_FRAMES};
use pgmap_core::memremap::DevPagemap;
use pgmap_core::platform::HeapPlatform;
use pgmap_mm::fault::{Access, Outcome};
use pgmap_mm::reclaim::Caller;
use pgmap_mm::space::{AddressSpace, Parts, Worker};
use pgmap_mm::stats::Stats;
use pgmap_sync::atomic::spin_loop;

use crate::device::ModelDevice;
use crate::model::{Dma, Fault, ModelMmu};
