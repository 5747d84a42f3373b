//! Linux as the machine: what core and mm ask for, made of system calls.
//!
//! The modules are named after the kernel's interfaces. Everything here uses raw system calls (rustix), never the C
//! library's `mmap` and friends: this crate is linked into a library that interposes those. What must never
//! happen here: an allocation, a log line or a managed address on the fault path.

pub mod affinity;
mod area;
mod buffers;
pub mod dax;
pub mod device_dax;
pub mod event;
pub mod fds;
pub mod file_backing;
pub mod file_maps;
pub mod file_memory;
mod forks;
pub mod hugetlb;
pub mod mmu;
pub mod peer;
pub mod platform;
pub mod private_file;
pub mod probe;
mod protection;
pub mod registered;
pub mod remap;
mod restricted;
pub mod shared;
pub mod thread;
mod transit;
mod uffd;
pub mod uring;
