//! Atomics, locks and reference counts that the rest of pgmap stands on.
//!
//! One facade over three worlds: the machine's atomics, loom's and shuttle's, chosen by `--cfg loom` and
//! `--cfg shuttle`. Everything above names atomics through here, so that the same code can be explored.
#![cfg_attr(not(any(feature = "std", loom, shuttle, test)), no_std)]

pub mod atomic;
pub mod cell;
mod mutex;
mod percpu_ref;
mod rw_sem;
mod wait;

pub use mutex::{Mutex, MutexGuard};
pub use percpu_ref::{PercpuRef, set_heavy_barrier, thread_number};
pub use rw_sem::{Reading, RwSem, Writing};
pub use wait::WaitQueue;
