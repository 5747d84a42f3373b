//! The requests of one client, answered one after the other, in order.
//!
//! Replies are gathered, by groups that `pace` knows, and sent before we wait for a request or for the disk. What must never
//! happen here: waiting for the client with a request of the device under way, longer than `reading` allows.

use core::time::Duration;
use std::time::Instant;

use pgmap_drivers::block::{Access, BlockDevice, Direct, Zeros};
use pgmap_host::affinity::Placement;
use pgmap_sync::atomic::{AtomicBool, Ordering};
use rustix::io::Errno;

use super::export::{Count, Export, Writable};
use super::failure::{Failure, WireError};
use super::handshake::{Agreed, Metadata, Replies};
use super::input::Input;
use super::output::{MOST_COPIED, Output};
use super::pace::{Behind, Pace};
use super::proto::{ALLOCATION_ID, Command, MOST_PAYLOAD, Request, command_flag};
use super::socket::{End, More, Socket, broken};
use super::status::{Most, block_status};
use super::stream::Stream;

/// The longest payload that is received only to be refused, in bytes.
const MOST_DRAINED: u32 = 2 * MOST_PAYLOAD;
/// Requests that are shorter than this, in bytes, are short.
const FOLLOWED: usize = 32 << 10;
/// Payloads from this many bytes on may be received straight to where they belong.
const DIRECT: u64 = 32 << 10;
/// A write's pieces end at multiples of this, so that blocks are written whole.
const BLOCK: u64 = 4096;
/// How long replies are held when no more requests are here: what a client needs for two or three. While some are here, replies wait
/// for a group of them, or for a request that has to wait itself.
const HELD: Duration = Duration::from_micros(6);

/// What became of a request; the session ends if the connection did.
pub(super) type Outcome = Result<Result<(), Failure>, End>;

/// A client in the transmission phase.
#[derive(Debug)]
pub(super) struct Session<'a> {
    pub(super) stream: Stream<'a>,
    pub(super) output: Output,
    pub(super) device: &'a dyn BlockDevice,
    input: Input,
    export: &'a Export,
    metadata: Metadata,
    size_bytes: u64,
    /// The server is going away: what still comes is refused.
    stopping: &'a AtomicBool,
    /// The client's process, if it is on this machine.
    peer: Option<u32>,
    placement: Placement,
    pace: Pace,
    unflushed: bool,
    expected: Expected<'a>,
}

/// What the client is likely to send next.
#[derive(Clone, Copy, Debug)]
enum Expected<'a> {
    Anything,
    /// A payload that is not to be received into our own buffer, but from the socket.
    LongWrite(&'a Socket),
}

impl<'a> Session<'a> {
    pub(super) fn new(
        stream: Stream<'a>,
        agreed: &'a Agreed,
        peer: Option<u32>,
        stopping: &'a AtomicBool,
    ) -> Self {
        let device = &*agreed.export.device;
        Self {
            stream,
            output: Output::new(agreed.replies),
            device,
            input: Input::new(),
            export: &agreed.export,
            metadata: agreed.metadata,
            size_bytes: device.size_bytes(),
            stopping,
            peer,
            placement: Placement::new(),
            pace: Pace::new(),
            unflushed: false,
            expected: Expected::Anything,
        }
    }

    /// Answers requests until the session ends, and says why it did. If that is because the server ends, what was
    /// written is made durable.
    pub(super) fn serve(&mut self) -> End {
        let end = loop {
            if let Err(end) = self.serve_one() {
                break end;
            }
        };
        // What was answered before goes out, if the socket still takes it.
        let _ = self.output.flush(&mut self.stream, More::Nothing);
        self.stream.close();
        if self.unflushed && self.is_stopping() {
            // Nobody is there to be told if it fails.
            let _ = self.device.flush();
        }
        end
    }

    fn serve_one(&mut self) -> Result<(), End> {
        let request = self.next()?;
        if request.command == Command::Flush || request.has(command_flag::FUA) {
            // It waits for the disk: what is answered does not.
            self.flush_replies()?;
        }
        self.follow(&request);
        let refused = self.check(&request);
        let outcome = match (request.command, refused) {
            (Command::Disconnect, _) => return Err(End::Disconnected),
            (Command::Write, refused) => self.write(&request, refused)?,
            (_, Err(failure)) => Err(failure),
            (Command::Read, Ok(())) => self.read(&request)?,
            (Command::BlockStatus, Ok(())) => self.block_status(&request)?,
            (_, Ok(())) => self.without_payload(&request),
        };
        self.answer(&request, outcome)
    }

    /// Short requests that come one by one are answered on the client's CPU: waking across CPUs costs more than doing two
    /// things at a time gains. A client that does not wait for its replies is busy meanwhile, and keeps its CPU.
    fn follow(&mut self, request: &Request) {
        let payload = match request.command {
            Command::Write => usize::try_from(request.length).unwrap_or(usize::MAX),
            Command::Read
            | Command::Disconnect
            | Command::Flush
            | Command::Trim
            | Command::Cache
            | Command::WriteZeroes
            | Command::BlockStatus
            | Command::Unknown(_) => 0,
        };
        self.pace.note(if self.input.len() > payload {
            Behind::More
        } else {
            Behind::Nothing
        });
        let Some(pid) = self.peer else { return };
        let is_short = usize::try_from(request.length).is_ok_and(|len| len < FOLLOWED);
        match (is_short, self.pace.is_pipelining()) {
            (true, false) => self.placement.follow_process(pid),
            (true, true) => self.placement.avoid_process(pid),
            (false, _) => self.placement.release(),
        }
    }

    /// Answers a request, unless its payload was the answer.
    fn answer(&mut self, request: &Request, outcome: Result<(), Failure>) -> Result<(), End> {
        self.output.reserve(&mut self.stream, 0)?;
        match (outcome, request.command) {
            (Ok(()), Command::Read | Command::BlockStatus) => {}
            (Ok(()), _) => self.output.done(request),
            (Err(failure), _) => {
                self.count(Count::Errors, 1);
                self.output.failed(request, &failure);
            }
        }
        Ok(())
    }

    /// Waits for a request, with all replies sent.
    fn next(&mut self) -> Result<Request, End> {
        loop {
            if self.pace.is_group() {
                self.flush_replies()?;
            }
            if let Some(request) = self.input.request() {
                return request;
            }
            if let Expected::LongWrite(socket) = self.expected
                && self.input.try_receive_head(socket)?
            {
                continue;
            }
            if self.holds_replies()? {
                continue;
            }
            self.flush_replies()?;
            match self.expected {
                Expected::Anything => self.input.receive(&mut self.stream)?,
                Expected::LongWrite(socket) => socket.wait_readable()?,
            }
        }
    }

    fn flush_replies(&mut self) -> Result<(), End> {
        self.pace.sent();
        self.output.flush(&mut self.stream, More::Nothing)
    }

    /// Holds the replies for a moment if more requests are likely to come. Says whether one did.
    fn holds_replies(&mut self) -> Result<bool, End> {
        let (Some(socket), Expected::Anything) = (self.stream.plain(), self.expected) else {
            return Ok(false);
        };
        if !self.pace.is_worth_waiting() || !self.placement.has_choice() {
            return Ok(false);
        }
        let begin = Instant::now();
        while begin.elapsed() < HELD {
            core::hint::spin_loop();
        }
        let received = self.input.try_receive(socket)?;
        if !received {
            self.pace.waited_in_vain();
        }
        Ok(received)
    }

    /// Whether a request may be tried.
    fn check(&mut self, request: &Request) -> Result<(), Failure> {
        use command_flag::{DF, FAST_ZERO, FUA, NO_HOLE, REQ_ONE};
        let invalid = |message: &str| Err(Failure::new(WireError::Invalid, message));
        let structured = self.output.replies == Replies::Structured;
        let flags = match request.command {
            Command::Read if structured => DF,
            Command::WriteZeroes => NO_HOLE | FAST_ZERO,
            Command::BlockStatus => REQ_ONE,
            Command::Unknown(_) => return invalid("unknown command"),
            Command::Read
            | Command::Write
            | Command::Disconnect
            | Command::Flush
            | Command::Trim
            | Command::Cache => 0,
        };
        if self.is_stopping() {
            return Err(Failure::new(
                WireError::ShutDown,
                "the server is going away",
            ));
        }
        if request.flags & !(flags | FUA) != 0 {
            return invalid("a flag that the command does not know");
        }
        let changes = matches!(
            request.command,
            Command::Write | Command::Trim | Command::WriteZeroes
        );
        if changes && self.export.writable == Writable::No {
            return Err(Failure::new(
                WireError::NotPermitted,
                "the export is read-only",
            ));
        }
        let has_payload = matches!(request.command, Command::Read | Command::Write);
        if has_payload && request.length > MOST_PAYLOAD {
            let error = if request.command == Command::Read && structured {
                WireError::Overflow
            } else {
                WireError::Invalid
            };
            return Err(Failure::new(error, "more bytes than one request may have"));
        }
        if request.command == Command::Flush {
            return Ok(());
        }
        match request.end() {
            Some(end) if end <= self.size_bytes => Ok(()),
            _ => Err(Failure::out_of_range(request.command)),
        }
    }

    /// Receives a payload, and writes it unless the request is refused: then it is received all the same.
    fn write(&mut self, request: &Request, mut so_far: Result<(), Failure>) -> Outcome {
        if request.length > MOST_DRAINED {
            return Err(End::Garbage("a write of far too many bytes"));
        }
        let end = request.offset.saturating_add(u64::from(request.length));
        let mut at = end - u64::from(request.length);
        self.expected = match self.stream.plain() {
            Some(socket) if end - at >= DIRECT && self.device.likes_direct_writes() => {
                Expected::LongWrite(socket)
            }
            Some(_) | None => Expected::Anything,
        };
        while at < end {
            if let Expected::LongWrite(socket) = self.expected
                && self.input.len() == 0
                && so_far.is_ok()
            {
                at = self.write_direct(socket, at, end)?;
            }
            let left = usize::try_from(end - at).unwrap_or(usize::MAX);
            self.receive_payload(left)?;
            let mut piece = left.min(self.input.len());
            if piece < left {
                // More than a block is here.
                piece -= usize::try_from((at + piece as u64) % BLOCK).unwrap_or(0);
            }
            let bytes = self.input.take(piece);
            if so_far.is_ok() {
                let written = self.device.write(at, bytes);
                self.unflushed = true;
                so_far = written.map_err(|error| Failure::of_device(error, request));
            }
            at += piece as u64;
        }
        let so_far = so_far.and_then(|()| self.through(request));
        if so_far.is_ok() {
            self.count(Count::Writes, 1);
            self.count(Count::BytesWritten, u64::from(request.length));
        }
        Ok(so_far)
    }

    /// Receives a payload straight to where it belongs, as far as that works. Says how far: the rest is still to come.
    fn write_direct(&mut self, socket: &Socket, mut at: u64, end: u64) -> Result<u64, End> {
        // Lost blocks, and a device that is being taken away, are `write`'s business.
        while at < end
            && let Ok(direct) = self.device.direct(at..end, Access::Write)
        {
            self.unflushed = true;
            match receive_direct(direct, socket, &mut at, end) {
                // What cannot be put there is still to come.
                Ok(()) | Err(Errno::FAULT) => break,
                // No bytes are here: the request is not under way while we wait for some.
                Err(Errno::AGAIN) => {
                    self.output.flush(&mut self.stream, More::Nothing)?;
                    socket.wait_readable()?;
                }
                Err(errno) => return Err(broken(errno)),
            }
        }
        Ok(at)
    }

    /// Receives some of the `left` bytes of a payload: all of a short one, some blocks of a long one.
    fn receive_payload(&mut self, left: usize) -> Result<(), End> {
        let enough = left.min(MOST_COPIED);
        while self.input.len() < enough {
            self.output.flush(&mut self.stream, More::Nothing)?;
            if left <= MOST_COPIED {
                self.input.receive(&mut self.stream)?;
            } else {
                self.input.receive_payload(&mut self.stream, left)?;
            }
        }
        Ok(())
    }

    /// Makes a request durable, if it is to be.
    fn through(&mut self, request: &Request) -> Result<(), Failure> {
        if !request.has(command_flag::FUA) {
            return Ok(());
        }
        self.flush(request)
    }

    fn flush(&mut self, request: &Request) -> Result<(), Failure> {
        let flushed = self.device.flush();
        flushed.map_err(|error| Failure::of_device(error, request))?;
        self.unflushed = false;
        Ok(())
    }

    /// Commands that move no bytes.
    fn without_payload(&mut self, request: &Request) -> Result<(), Failure> {
        let range = request.offset..request.offset + u64::from(request.length);
        let failed = |error| Failure::of_device(error, request);
        let count = match request.command {
            Command::Flush => {
                self.flush(request)?;
                Count::Flushes
            }
            Command::Trim => {
                if !range.is_empty() {
                    self.unflushed = true;
                    self.device.discard(range).map_err(failed)?;
                }
                self.through(request)?;
                Count::Trims
            }
            Command::WriteZeroes => {
                let zeros = zeros(request)?;
                if !range.is_empty() {
                    self.unflushed = true;
                    self.device.write_zeroes(range, zeros).map_err(failed)?;
                }
                self.through(request)?;
                Count::Zeroes
            }
            // The bytes are where they can be had at once.
            Command::Cache
            | Command::Read
            | Command::Write
            | Command::Disconnect
            | Command::BlockStatus
            | Command::Unknown(_) => return Ok(()),
        };
        self.count(count, 1);
        Ok(())
    }

    fn block_status(&mut self, request: &Request) -> Outcome {
        let invalid = |message: &str| Ok(Err(Failure::new(WireError::Invalid, message)));
        if self.metadata == Metadata::Nothing {
            return invalid("no metadata was agreed on");
        }
        if request.length == 0 {
            return invalid("no bytes to ask about");
        }
        let range = request.offset..request.offset + u64::from(request.length);
        let most = if request.has(command_flag::REQ_ONE) {
            Most::One
        } else {
            Most::Many
        };
        match block_status(self.device, range, most) {
            Ok(extents) => {
                self.output.reserve(&mut self.stream, 8 * extents.len())?;
                self.output.block_status(request, ALLOCATION_ID, &extents);
                self.count(Count::Statuses, 1);
                Ok(Ok(()))
            }
            Err(error) => Ok(Err(Failure::of_device(error, request))),
        }
    }

    pub(super) fn count(&self, count: Count, more: u64) {
        self.export.counters.add(count, more);
    }

    fn is_stopping(&self) -> bool {
        // Relaxed: it is looked at again for every request, and nothing else is read by it.
        self.stopping.load(Ordering::Relaxed)
    }
}

/// Receives what there is of the bytes before `end`.
fn receive_direct(
    mut direct: Direct<'_>,
    socket: &Socket,
    at: &mut u64,
    end: u64,
) -> Result<(), Errno> {
    while *at < end {
        match direct.receive(socket.fd()) {
            // The client has gone.
            Ok(0) => return Err(Errno::CONNRESET),
            Err(errno) if errno != Errno::INTR => return Err(errno),
            Ok(_) | Err(_) => *at = end - direct.left(),
        }
    }
    Ok(())
}

/// Whether zeros may be holes. Zeros that must be fast are refused where they may not.
fn zeros(request: &Request) -> Result<Zeros, Failure> {
    if !request.has(command_flag::NO_HOLE) {
        return Ok(Zeros::MayPunch);
    }
    if request.has(command_flag::FAST_ZERO) {
        let message = "zeros that are no holes have to be written";
        return Err(Failure::new(WireError::NotSupported, message));
    }
    Ok(Zeros::KeepRoom)
}
