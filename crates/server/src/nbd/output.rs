//! What goes to the client: gathered, so that the replies to many small requests cost one system call.

use super::failure::Failure;
use super::handshake::Replies;
use super::proto::{CHUNK_MAGIC, MOST_STRING, Request, SIMPLE_REPLY_MAGIC, chunk};
use super::socket::{End, More};
use super::stream::Stream;

/// The longest payload that is ever copied here, in bytes: `reading` says which go past it.
pub(super) const MOST_COPIED: usize = 64 << 10;
const BYTES: usize = 4 * MOST_COPIED;
/// The flag of the last chunk of a reply.
const DONE: u16 = 1;

/// Whether a chunk ends its reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place {
    Last,
    Before,
}

/// Replies that are still to be sent.
#[derive(Debug)]
pub(super) struct Output {
    bytes: Box<[u8]>,
    len: usize,
    pub(super) replies: Replies,
}

impl Output {
    pub(super) fn new(replies: Replies) -> Self {
        Self {
            bytes: vec![0; BYTES].into(),
            len: 0,
            replies,
        }
    }

    /// Sends all of it.
    pub(super) fn flush(&mut self, stream: &mut Stream<'_>, more: More) -> Result<(), End> {
        stream.send_all(&self.bytes[..self.len], more)?;
        self.len = 0;
        Ok(())
    }

    /// Sends what is here if a reply with `payload` bytes might find no room.
    pub(super) fn reserve(&mut self, stream: &mut Stream<'_>, payload: usize) -> Result<(), End> {
        // More than any reply's fields and message.
        let most = payload + MOST_STRING;
        if self.len + most > self.bytes.len() {
            self.flush(stream, More::Nothing)?;
        }
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    /// The reply to a request that is done and has no payload.
    pub(super) fn done(&mut self, request: &Request) {
        self.simple(request, 0);
    }

    /// A simple reply's head.
    pub(super) fn simple(&mut self, request: &Request, error: u32) {
        let mut head = [0; 16];
        head[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        head[4..8].copy_from_slice(&error.to_be_bytes());
        head[8..].copy_from_slice(&request.cookie.to_be_bytes());
        self.put(&head);
    }

    /// A chunk's head, before `len` bytes.
    fn chunk(&mut self, request: &Request, place: Place, kind: u16, len: usize) {
        let flags = match place {
            Place::Last => DONE,
            Place::Before => 0,
        };
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        let mut head = [0; 20];
        head[..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
        head[4..6].copy_from_slice(&flags.to_be_bytes());
        head[6..8].copy_from_slice(&kind.to_be_bytes());
        head[8..16].copy_from_slice(&request.cookie.to_be_bytes());
        head[16..].copy_from_slice(&len.to_be_bytes());
        self.put(&head);
    }

    /// The chunk that ends a reply and has nothing to say.
    pub(super) fn nothing_more(&mut self, request: &Request) {
        self.chunk(request, Place::Last, chunk::NONE, 0);
    }

    /// The head of a chunk of `len` bytes from `offset` on.
    pub(super) fn data_head(&mut self, request: &Request, place: Place, offset: u64, len: usize) {
        self.chunk(request, place, chunk::OFFSET_DATA, 8 + len);
        self.put(&offset.to_be_bytes());
    }

    /// The states of blocks: lengths in bytes, and flags.
    pub(super) fn block_status(&mut self, request: &Request, id: u32, extents: &[(u32, u32)]) {
        let len = 4 + 8 * extents.len();
        self.chunk(request, Place::Last, chunk::BLOCK_STATUS, len);
        self.put(&id.to_be_bytes());
        for (len, state) in extents {
            self.put(&len.to_be_bytes());
            self.put(&state.to_be_bytes());
        }
    }

    /// The reply to a request that failed.
    pub(super) fn failed(&mut self, request: &Request, failure: &Failure) {
        let error = failure.error as u32;
        if self.replies == Replies::Simple {
            return self.simple(request, error);
        }
        let message = failure.message.as_bytes();
        let message = &message[..message.len().min(MOST_STRING / 2)];
        let (kind, tail) = match failure.offset {
            Some(_) => (chunk::ERROR_OFFSET, 8),
            None => (chunk::ERROR, 0),
        };
        self.chunk(request, Place::Last, kind, 6 + message.len() + tail);
        self.put(&error.to_be_bytes());
        self.put(&u16::try_from(message.len()).unwrap_or(0).to_be_bytes());
        self.put(message);
        if let Some(offset) = failure.offset {
            self.put(&offset.to_be_bytes());
        }
    }

    /// Lets `fill` write a payload of `len` bytes behind what is here.
    pub(super) fn payload<E>(
        &mut self,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        fill(&mut self.bytes[self.len..self.len + len])?;
        self.len += len;
        Ok(())
    }

    /// Where the next byte goes, for [`take_back`](Self::take_back).
    pub(super) const fn mark(&self) -> usize {
        self.len
    }

    /// Forgets what came after a mark; nothing was sent since.
    pub(super) fn take_back(&mut self, mark: usize) {
        self.len = mark;
    }
}
