//! What a client sent: received in large pieces, so that many small requests cost one system call.

use super::proto::Request;
use super::socket::{End, Socket};
use super::stream::Stream;

/// Bytes that are received at once: few enough to be in the CPU's cache when they are written to the device.
const BYTES: usize = 256 << 10;

/// Bytes that were received and not yet used.
#[derive(Debug)]
pub(super) struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Input {
    pub(super) fn new() -> Self {
        Self {
            bytes: vec![0; BYTES].into(),
            start: 0,
            end: 0,
        }
    }

    /// How many bytes can be used.
    pub(super) const fn len(&self) -> usize {
        self.end - self.start
    }

    /// The next request, if all of its head is here.
    pub(super) fn request(&mut self) -> Option<Result<Request, End>> {
        let (head, _) = self.bytes[self.start..self.end].split_first_chunk()?;
        let request = Request::parse(head).ok_or(End::Garbage("a request without its magic"));
        self.start += Request::BYTES;
        Some(request)
    }

    /// Uses `count` bytes, which are there.
    pub(super) fn take(&mut self, count: usize) -> &[u8] {
        let start = self.start;
        self.start += count;
        &self.bytes[start..self.start]
    }

    /// Receives what there is, at least a byte.
    pub(super) fn receive(&mut self, stream: &mut Stream<'_>) -> Result<(), End> {
        self.make_room();
        self.end += stream.receive(&mut self.bytes[self.end..])?;
        Ok(())
    }

    /// Receives what there is. Says whether there was anything.
    pub(super) fn try_receive(&mut self, socket: &Socket) -> Result<bool, End> {
        self.make_room();
        let received = socket.try_receive(&mut self.bytes[self.end..])?;
        self.end += received.unwrap_or(0);
        Ok(received.is_some())
    }

    /// Receives what there is of a request's head, and nothing that comes after. Says whether there was anything.
    pub(super) fn try_receive_head(&mut self, socket: &Socket) -> Result<bool, End> {
        self.make_room();
        let end = Request::BYTES.max(self.end + 1);
        let received = socket.try_receive(&mut self.bytes[self.end..end])?;
        self.end += received.unwrap_or(0);
        Ok(received.is_some())
    }

    /// Receives until `count` bytes can be used, or as many as there is room for, and none that come after.
    pub(super) fn receive_payload(
        &mut self,
        stream: &mut Stream<'_>,
        count: usize,
    ) -> Result<(), End> {
        self.make_room();
        let end = count.min(self.bytes.len()).max(self.end);
        stream.receive_all(&mut self.bytes[self.end..end])?;
        self.end = end;
        Ok(())
    }

    /// Moves what is left to the front.
    fn make_room(&mut self) {
        self.bytes.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
    }
}
