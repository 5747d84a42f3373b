//! TLS over a client's socket: bytes are sealed before they are sent, and opened when they were received.
//!
//! [`Stream`](super::stream::Stream) uses it. What must never happen here: that bytes which came before the handshake, or that
//! nobody sealed, are taken for the client's.

use std::io::{self, IoSlice, Read, Write};
use std::sync::Arc;
use std::time::Instant;

use rustix::io::Errno;
use rustls::ServerConnection;

use super::credentials::Credentials;
use super::socket::{End, More, Socket, broken};

/// Bytes that are received at once: some of the longest records.
const BYTES: usize = 64 << 10;

/// A client with which we share keys.
#[derive(Debug)]
pub(super) struct Tls<'a> {
    socket: &'a Socket,
    connection: ServerConnection,
    /// What was received; from `start` to `end` it is not opened yet.
    sealed: Box<[u8]>,
    start: usize,
    end: usize,
}

impl<'a> Tls<'a> {
    /// Agrees with the client on keys, until `deadline` at most. Sends may not wait for ever.
    pub(super) fn accept(
        socket: &'a Socket,
        credentials: &Credentials,
        deadline: Instant,
    ) -> Result<Self, End> {
        let connection = ServerConnection::new(Arc::clone(&credentials.config)).map_err(failed)?;
        let mut tls = Self {
            socket,
            connection,
            sealed: vec![0; BYTES].into(),
            start: 0,
            end: 0,
        };
        let outcome = tls.shake_hands(deadline);
        if outcome.is_err() {
            // The alert that tells the client why, if it is still there.
            let _ = tls.flush();
        }
        outcome.map(|()| tls)
    }

    fn shake_hands(&mut self, deadline: Instant) -> Result<(), End> {
        while self.connection.is_handshaking() {
            if self.start == self.end {
                self.socket.wait_readable_until(deadline)?;
                self.fetch()?;
            }
            self.open()?;
        }
        Ok(())
    }

    /// Waits for bytes. Says how many there were: at least one.
    pub(super) fn receive(&mut self, to: &mut [u8]) -> Result<usize, End> {
        loop {
            let count = self.take(to)?;
            if count > 0 {
                return Ok(count);
            }
            self.fetch()?;
        }
    }

    /// Waits until all of `to` is received, until `deadline` at most.
    pub(super) fn receive_until(
        &mut self,
        deadline: Instant,
        mut to: &mut [u8],
    ) -> Result<(), End> {
        while !to.is_empty() {
            let count = self.take(to)?;
            if count == 0 {
                self.socket.wait_readable_until(deadline)?;
                self.fetch()?;
            }
            to = &mut to[count..];
        }
        Ok(())
    }

    /// Seals all of `from`, and waits until it is sent. If more follows, the last records may wait for it.
    pub(super) fn send_all(&mut self, mut from: &[u8], more: More) -> Result<(), End> {
        while !from.is_empty() {
            // It fails for want of memory only, which has its own end.
            let sealed = self.connection.writer().write(from).unwrap_or(0);
            if sealed == 0 && !self.connection.wants_write() {
                return Err(End::Disconnected);
            }
            from = &from[sealed..];
            if !from.is_empty() {
                self.flush()?;
            }
        }
        match more {
            More::Follows => Ok(()),
            More::Nothing => self.flush(),
        }
    }

    /// Tells the client that this is the end of what we say, if it is still there.
    pub(super) fn close(&mut self) {
        self.connection.send_close_notify();
        let _ = self.flush();
    }

    /// Takes of what was received, without waiting: perhaps nothing.
    fn take(&mut self, to: &mut [u8]) -> Result<usize, End> {
        let mut count = 0;
        while count < to.len() {
            match self.connection.reader().read(&mut to[count..]) {
                // The client has said that this is the end.
                Ok(0) if count == 0 => return Err(End::Disconnected),
                Ok(0) => break,
                Ok(more) => count += more,
                Err(_) if self.start < self.end => self.open()?,
                // Nothing is here.
                Err(_) => break,
            }
        }
        Ok(count)
    }

    /// Waits for sealed bytes. The last ones were opened.
    fn fetch(&mut self) -> Result<(), End> {
        (self.start, self.end) = (0, 0);
        self.end = self.socket.receive(&mut self.sealed)?;
        Ok(())
    }

    /// Opens some of the sealed bytes, and answers what has to be answered. There are some.
    fn open(&mut self) -> Result<(), End> {
        let mut sealed = &self.sealed[self.start..self.end];
        let used = self.connection.read_tls(&mut sealed);
        match used.map_err(|error| End::Tls(error.to_string()))? {
            // After its end the client says nothing.
            0 => return Err(End::Disconnected),
            used => self.start += used,
        }
        self.connection.process_new_packets().map_err(failed)?;
        self.flush()
    }

    fn flush(&mut self) -> Result<(), End> {
        while self.connection.wants_write() {
            let sent = self.connection.write_tls(&mut Wire(self.socket));
            sent.map_err(|error| Errno::from_io_error(&error).map_or(End::Disconnected, broken))?;
        }
        Ok(())
    }
}

/// Where sealed bytes go.
struct Wire<'a>(&'a Socket);

impl Write for Wire<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(from)])
    }

    fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        Ok(self.0.send_parts(from)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn failed(error: rustls::Error) -> End {
    End::Tls(error.to_string())
}
