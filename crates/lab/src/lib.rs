//! A deterministic machine for exploring the interleavings of pgmap.
//!
//! [`ModelMmu`](model::ModelMmu) stands in for the host's page tables and [`ModelDevice`](device::ModelDevice) for a
//! driver; both check that they are used as their contracts say, and both can be told to be *flawed*, which proves
//! that a test can fail. A [`Machine`](machine::Machine) puts them together with the real `core` and `mm`, and a
//! [`Cpu`](machine::Cpu) runs a program's loads and stores on it. A [`FileMachine`](file_machine::FileMachine) has a file
//! besides, mapped over [`ModelSharedMmu`](shared_memory::ModelSharedMmu) and kept on a [`ModelFile`](disk::ModelFile). With `--cfg shuttle` every step of all of them is a
//! place where another thread may go on.
#![deny(unsafe_code)]

pub mod device;
pub mod disk;
pub mod file_machine;
pub mod machine;
#[allow(
    unsafe_code,
    reason = "the modelled memory, and the contract of the trait that it implements"
)]
pub mod model;
pub mod private_file;
#[allow(
    unsafe_code,
    reason = "the modelled memory, and the contract of the trait that it implements"
)]
pub mod shared_memory;
