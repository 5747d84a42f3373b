//! A stream socket as a session uses it: it waits, and an end of the stream is an end of the session.

use core::time::Duration;
use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{
    Timeout, set_socket_keepalive, set_socket_send_buffer_size, set_socket_timeout, set_tcp_nodelay,
};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, send, sendmsg};

/// Bytes that may wait in a unix socket: enough to keep both sides busy, and few enough for the CPU's cache. Measured: ten
/// times as many are a third slower.
const BUFFER_BYTES: usize = 512 << 10;

/// Why a session is over.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum End {
    /// The client has said so, or has gone.
    #[error("the client has disconnected")]
    Disconnected,
    /// The client asked, by the old way that has no errors, for an export that it cannot have.
    #[error("the client asked for an export that it cannot have")]
    Refused,
    /// The client does not speak the protocol.
    #[error("the client does not speak the protocol: {0}")]
    Garbage(&'static str),
    /// The client said nothing, or took nothing, for too long.
    #[error("the client has stalled")]
    Stalled,
    /// The device failed when the reply was under way, and the client had asked for replies that cannot say so.
    #[error("the device failed in the middle of a reply")]
    Truncated,
    /// Client and server do not agree on TLS, or somebody has changed its bytes.
    #[error("TLS failed: {0}")]
    Tls(String),
    /// The socket has failed.
    #[error("the connection failed: {0}")]
    Broken(#[from] Errno),
}

/// One client's connection.
#[derive(Debug)]
pub(super) struct Socket(OwnedFd);

/// Whether more bytes follow at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum More {
    Follows,
    Nothing,
}

impl Socket {
    pub(super) fn unix(fd: OwnedFd) -> Self {
        // With less of a buffer it is slower, and right.
        let _ = set_socket_send_buffer_size(&fd, BUFFER_BYTES);
        Self(fd)
    }

    /// TCP finds the size of its buffers itself.
    pub(super) fn tcp(fd: OwnedFd) -> Self {
        // With delays it is slower, and right.
        let _ = set_tcp_nodelay(&fd, true);
        // A client whose machine has vanished is missed some time; without, it keeps its place for ever.
        let _ = set_socket_keepalive(&fd, true);
        Self(fd)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Waits for bytes. Says how many there were: at least one.
    pub(super) fn receive(&self, to: &mut [u8]) -> Result<usize, End> {
        self.receive_with(to, RecvFlags::empty())
    }

    /// Receives what there is; `None` if there is nothing now.
    pub(super) fn try_receive(&self, to: &mut [u8]) -> Result<Option<usize>, End> {
        match self.receive_with(to, RecvFlags::DONTWAIT) {
            Ok(count) => Ok(Some(count)),
            // What a socket says that has nothing.
            Err(End::Stalled) => Ok(None),
            Err(end) => Err(end),
        }
    }

    /// Waits until all of `to` is received.
    pub(super) fn receive_all(&self, mut to: &mut [u8]) -> Result<(), End> {
        while !to.is_empty() {
            let count = self.receive_with(&mut *to, RecvFlags::WAITALL)?;
            to = &mut to[count..];
        }
        Ok(())
    }

    fn receive_with(&self, to: &mut [u8], flags: RecvFlags) -> Result<usize, End> {
        loop {
            match recv(&self.0, &mut *to, flags) {
                Ok((0, _)) => return Err(End::Disconnected),
                Ok((count, _)) => return Ok(count),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(broken(errno)),
            }
        }
    }

    /// Waits until all of `to` is received, until `deadline` at most.
    pub(super) fn receive_until(&self, deadline: Instant, mut to: &mut [u8]) -> Result<(), End> {
        while !to.is_empty() {
            self.wait_readable_until(deadline)?;
            let count = self.receive(to)?;
            to = &mut to[count..];
        }
        Ok(())
    }

    /// Waits until all of `from` is sent.
    pub(super) fn send_all(&self, mut from: &[u8], more: More) -> Result<(), End> {
        let flags = match more {
            More::Follows => SendFlags::NOSIGNAL | SendFlags::MORE,
            More::Nothing => SendFlags::NOSIGNAL,
        };
        while !from.is_empty() {
            match send(&self.0, from, flags) {
                Ok(count) => from = &from[count..],
                Err(Errno::INTR) => {}
                Err(errno) => return Err(broken(errno)),
            }
        }
        Ok(())
    }

    /// Waits until some of the bytes are sent. Says how many.
    pub(super) fn send_parts(&self, from: &[IoSlice<'_>]) -> Result<usize, Errno> {
        loop {
            let mut nothing = SendAncillaryBuffer::default();
            match sendmsg(&self.0, from, &mut nothing, SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                sent => return sent,
            }
        }
    }

    /// How long a send may wait; for ever if `None`.
    pub(super) fn limit_sends(&self, patience: Option<Duration>) -> Result<(), End> {
        Ok(set_socket_timeout(&self.0, Timeout::Send, patience)?)
    }

    /// Waits until the socket takes bytes, or has failed; says whether it did before `deadline`.
    pub(super) fn wait_writable(&self, deadline: Instant) -> Result<bool, End> {
        self.wait(PollFlags::OUT, deadline)
    }

    /// Waits until there are bytes, or the end.
    pub(super) fn wait_readable(&self) -> Result<(), End> {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Waits until there are bytes, or the end; until `deadline` at most, also if bytes never cease to come.
    pub(super) fn wait_readable_until(&self, deadline: Instant) -> Result<(), End> {
        if Instant::now() < deadline && self.wait(PollFlags::IN, deadline)? {
            return Ok(());
        }
        Err(End::Stalled)
    }

    fn wait(&self, what: PollFlags, deadline: Instant) -> Result<bool, End> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
            let mut fds = [PollFd::new(&self.0, what)];
            match poll(&mut fds, Some(&left)) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// How a session ends when the socket gave an error.
pub(super) fn broken(errno: Errno) -> End {
    match errno {
        Errno::PIPE | Errno::CONNRESET => End::Disconnected,
        // A send that may not wait for ever, see `limit_sends`.
        Errno::AGAIN => End::Stalled,
        errno => End::Broken(errno),
    }
}
