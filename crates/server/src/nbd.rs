//! Block devices served to the network, by the NBD protocol.
//!
//! [`Server`] accepts connections and gives each a thread; `handshake` agrees with the client on an [`Export`],
//! `transmission` answers its requests from the export's device. What must never happen here: that a peer's bytes
//! make us panic or take memory without bound; that a request is answered twice, or not at all while its client is
//! there; that a client which stalls keeps a device's request queue, or the end of the server, waiting.

mod credentials;
mod export;
mod failure;
mod handshake;
mod input;
mod option;
mod output;
mod pace;
mod proto;
mod reading;
mod server;
mod socket;
mod status;
mod stream;
mod tls;
mod transmission;

pub use credentials::{BadCredentials, Credentials, Peers, Security};
pub use export::{Count, Counters, Export, Exports, Refused, Writable};
pub use server::{Client, Limits, Listener, Server, Stopped};
pub use socket::End;
