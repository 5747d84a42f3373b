//! Requests to read: short ones are copied behind their reply's head, long ones go from the device straight to the
//! socket, or, under TLS, to a copy that is sealed.
//!
//! Holes are not looked for: to find the end of the data the kernel looks at all that follows, which costs more than it
//! saves. Clients that care ask for the block status.

use core::ops::Range;
use core::time::Duration;
use std::time::Instant;

use pgmap_drivers::block::{Access, Direct};
use rustix::io::Errno;

use super::export::Count;
use super::failure::{Failure, WireError};
use super::handshake::Replies;
use super::output::{MOST_COPIED, Place};
use super::proto::Request;
use super::socket::{End, More, Socket, broken};
use super::transmission::{Outcome, Session};

/// How long a request waits altogether for a client that does not take its reply, before the rest is copied and the
/// request ends: the device may be waiting to be taken away.
const PATIENCE: Duration = Duration::from_millis(100);

impl Session<'_> {
    pub(super) fn read(&mut self, request: &Request) -> Outcome {
        let len = usize::try_from(request.length).unwrap_or(usize::MAX);
        // Simple replies cannot tell of an error behind their head: most clients' largest requests are still copied for them.
        let is_short = match self.output.replies {
            Replies::Structured => len < MOST_COPIED,
            Replies::Simple => len <= MOST_COPIED,
        };
        let result = match self.stream.plain() {
            _ if is_short => self.read_short(request, len)?,
            Some(socket) => self.read_long(request, socket, len)?,
            None => self.read_copy(request, len)?,
        };
        if result.is_ok() {
            self.count(Count::Reads, 1);
            self.count(Count::BytesRead, u64::from(request.length));
        }
        Ok(result)
    }

    fn read_short(&mut self, request: &Request, len: usize) -> Outcome {
        self.output.reserve(&mut self.stream, len)?;
        let mark = self.output.mark();
        match self.output.replies {
            Replies::Structured if len == 0 => self.output.nothing_more(request),
            Replies::Structured => {
                let offset = request.offset;
                self.output.data_head(request, Place::Last, offset, len);
            }
            Replies::Simple => self.output.simple(request, 0),
        }
        let device = self.device;
        let read = |to: &mut [u8]| device.read(request.offset, to);
        let result = self.output.payload(len, read);
        if result.is_err() {
            self.output.take_back(mark);
        }
        Ok(result.map_err(|error| Failure::of_device(error, request)))
    }

    fn read_long(&mut self, request: &Request, socket: &Socket, len: usize) -> Outcome {
        let (start, end) = (request.offset, request.offset + u64::from(request.length));
        let direct = match self.device.direct(start..end, Access::Read) {
            Ok(direct) => direct,
            Err(error) => return Ok(Err(Failure::of_device(error, request))),
        };
        self.output.reserve(&mut self.stream, 0)?;
        match self.output.replies {
            Replies::Simple => self.output.simple(request, 0),
            // Not the last: what follows may have to say that it failed.
            Replies::Structured => self.output.data_head(request, Place::Before, start, len),
        }
        self.output.flush(&mut self.stream, More::Follows)?;
        let outcome = self.send(direct, socket, end)?;
        if outcome.is_ok() && self.output.replies == Replies::Structured {
            self.output.nothing_more(request);
        }
        Ok(outcome)
    }

    /// All is copied before any of it is sealed: the request has ended, whatever becomes of the client, and its error comes
    /// before its reply's head.
    fn read_copy(&mut self, request: &Request, len: usize) -> Outcome {
        let mut bytes = vec![0; len];
        if let Err(error) = self.device.read(request.offset, &mut bytes) {
            return Ok(Err(Failure::of_device(error, request)));
        }
        self.output.reserve(&mut self.stream, 0)?;
        match self.output.replies {
            Replies::Simple => self.output.simple(request, 0),
            Replies::Structured => {
                let offset = request.offset;
                self.output.data_head(request, Place::Last, offset, len);
            }
        }
        self.output.flush(&mut self.stream, More::Follows)?;
        self.stream.send_all(&bytes, More::Nothing).map(Ok)
    }

    /// Sends the bytes before `end`.
    fn send(&mut self, mut direct: Direct<'_>, socket: &Socket, end: u64) -> Outcome {
        let mut waited = Duration::ZERO;
        while direct.left() > 0 {
            match direct.send(socket.fd()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if waits(socket, &mut waited)? => {}
                Err(Errno::AGAIN) => return self.send_copy(direct, end),
                Err(errno @ (Errno::FAULT | Errno::INVAL)) => {
                    let left = direct.left();
                    drop(direct);
                    return self.fill(errno, end - left..end);
                }
                Err(errno) => return Err(broken(errno)),
            }
        }
        Ok(Ok(()))
    }

    /// Sends the rest however long that takes, with the request ended.
    fn send_copy(&mut self, direct: Direct<'_>, end: u64) -> Outcome {
        let left = direct.left();
        match direct.copy_left() {
            Ok(bytes) => self.stream.send_all(&bytes, More::Nothing).map(Ok),
            Err(errno) => self.fill(errno, end - left..end),
        }
    }

    /// The device failed behind a head that promised more bytes: these are zeros, and an error follows.
    fn fill(&mut self, errno: Errno, missing: Range<u64>) -> Outcome {
        if self.output.replies == Replies::Simple {
            return Err(End::Truncated);
        }
        let zeros = [0; 4096];
        let mut left = missing.end - missing.start;
        while left > 0 {
            let len = usize::try_from(left).map_or(zeros.len(), |left| left.min(zeros.len()));
            self.stream.send_all(&zeros[..len], More::Follows)?;
            left -= len as u64;
        }
        let mut failure = Failure::new(WireError::Io, format!("the medium failed: {errno}"));
        failure.offset = Some(missing.start);
        Ok(Err(failure))
    }
}

/// Waits until the socket takes bytes again, and says whether it does before the client has used up our patience.
fn waits(socket: &Socket, waited: &mut Duration) -> Result<bool, End> {
    let begin = Instant::now();
    let writable = socket.wait_writable(begin + PATIENCE.saturating_sub(*waited));
    *waited += begin.elapsed();
    writable
}
