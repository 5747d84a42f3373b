//! The control socket: by it people and other processes ask a manager, and it answers about itself.
//!
//! `pgmap serve` and `pgmap run` listen ([`Listener`]), the other verbs of the command ask ([`Client`]). The socket is its
//! owner's alone. What must never happen here: a peer that stalls, dies or sends rubbish and harms anybody but itself.

mod client;
mod listener;
pub mod place;
pub mod protocol;
mod session;
mod wire;

pub use client::{Client, ClientError};
pub use listener::Listener;
pub use session::{Manager, Session};
