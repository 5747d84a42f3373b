//! The fronts of pgmap: NBD for block devices, and the control socket by which people and other processes ask.
//!
//! `pgmap serve` is made of this. Nothing here trusts a peer: what comes in is checked before it is believed, and a peer
//! that stalls holds nobody up.
#![forbid(unsafe_code)]

pub mod control;
mod iomem;
pub mod nbd;
pub mod running;
pub mod service;
pub mod unix;
