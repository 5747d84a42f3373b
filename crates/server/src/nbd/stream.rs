//! What a session reads from and writes to: its socket, or TLS over it.
//!
//! Bytes move between a device and the socket without a copy only if there is no TLS: see [`Stream::plain`].

use std::time::Instant;

use super::credentials::Credentials;
use super::socket::{End, More, Socket};
use super::tls::Tls;

/// A client's bytes.
#[derive(Debug)]
pub(super) enum Stream<'a> {
    Plain(&'a Socket),
    Tls(Box<Tls<'a>>),
}

impl<'a> Stream<'a> {
    /// The socket, if its bytes are the client's own.
    pub(super) const fn plain(&self) -> Option<&'a Socket> {
        match self {
            Self::Plain(socket) => Some(socket),
            Self::Tls(_) => None,
        }
    }

    /// Begins TLS on a plain stream: agreed on by `deadline`, or the session is over.
    pub(super) fn secure(
        &mut self,
        socket: &'a Socket,
        credentials: &Credentials,
        deadline: Instant,
    ) -> Result<(), End> {
        *self = Self::Tls(Box::new(Tls::accept(socket, credentials, deadline)?));
        Ok(())
    }

    /// Waits for bytes. Says how many there were: at least one.
    pub(super) fn receive(&mut self, to: &mut [u8]) -> Result<usize, End> {
        match self {
            Self::Plain(socket) => socket.receive(to),
            Self::Tls(tls) => tls.receive(to),
        }
    }

    /// Waits until all of `to` is received.
    pub(super) fn receive_all(&mut self, mut to: &mut [u8]) -> Result<(), End> {
        match self {
            Self::Plain(socket) => return socket.receive_all(to),
            Self::Tls(tls) => {
                while !to.is_empty() {
                    let count = tls.receive(to)?;
                    to = &mut to[count..];
                }
            }
        }
        Ok(())
    }

    /// Waits until all of `to` is received, until `deadline` at most.
    pub(super) fn receive_until(&mut self, deadline: Instant, to: &mut [u8]) -> Result<(), End> {
        match self {
            Self::Plain(socket) => socket.receive_until(deadline, to),
            Self::Tls(tls) => tls.receive_until(deadline, to),
        }
    }

    /// Waits until all of `from` is sent.
    pub(super) fn send_all(&mut self, from: &[u8], more: More) -> Result<(), End> {
        match self {
            Self::Plain(socket) => socket.send_all(from, more),
            Self::Tls(tls) => tls.send_all(from, more),
        }
    }

    /// Says goodbye, if the client expects that.
    pub(super) fn close(&mut self) {
        match self {
            Self::Plain(_) => {}
            Self::Tls(tls) => tls.close(),
        }
    }
}
