//! Lines over a unix socket, with file descriptors that come along.

use core::mem::MaybeUninit;
use core::time::Duration;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The longest request, in bytes; answers may be longer.
pub(super) const MOST_REQUEST_BYTES: usize = 64 << 10;
/// The longest answer.
pub(super) const MOST_REPLY_BYTES: usize = 64 << 20;
/// Descriptors in one message, at most; those beyond are closed by the kernel.
const FDS: usize = 4;
/// How long a peer may take to read what we send.
const PATIENCE: Duration = Duration::from_secs(10);

/// One end of a conversation.
#[derive(Debug)]
pub(super) struct Wire {
    stream: Arc<UnixStream>,
    /// What has come and is not yet a whole line.
    pending: Vec<u8>,
    /// How much of `pending` has no line's end in it.
    searched: usize,
    fds: Vec<OwnedFd>,
    most_bytes: usize,
}

impl Wire {
    /// A conversation in which lines that come are `most_bytes` long at most.
    pub(super) fn new(stream: Arc<UnixStream>, most_bytes: usize) -> io::Result<Self> {
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self {
            stream,
            pending: Vec::new(),
            searched: 0,
            fds: Vec::new(),
            most_bytes,
        })
    }

    /// Sends one line, and a file.
    pub(super) fn send(
        &self,
        message: &impl Serialize,
        file: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut with = SendAncillaryBuffer::new(&mut space);
        let files: Vec<_> = file.into_iter().collect();
        if !files.is_empty() {
            with.push(SendAncillaryMessage::ScmRights(&files));
        }
        let mut left = &line[..];
        while !left.is_empty() {
            let flags = SendFlags::NOSIGNAL;
            let sent = rustix::net::sendmsg(&self.stream, &[IoSlice::new(left)], &mut with, flags)?;
            left = &left[sent..];
            // It went with the first byte.
            with.clear();
        }
        Ok(())
    }

    /// Receives one line; `None` at the end of the conversation.
    pub(super) fn receive<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        loop {
            let new = &self.pending[self.searched..];
            if let Some(end) = new.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=self.searched + end).collect();
                self.searched = 0;
                let message = serde_json::from_slice(&line);
                // Whatever is wrong with a line, it is the line.
                let wrong = |error| io::Error::new(ErrorKind::InvalidData, error);
                return message.map(Some).map_err(wrong);
            }
            self.searched = self.pending.len();
            if self.searched > self.most_bytes {
                let most = self.most_bytes;
                let text = format!("a line of more than {most} bytes");
                return Err(io::Error::new(ErrorKind::InvalidData, text));
            }
            if self.fill()? == 0 {
                return match self.searched {
                    0 => Ok(None),
                    _ => Err(ErrorKind::UnexpectedEof.into()),
                };
            }
        }
    }

    /// The file that came with what was received so far, oldest first.
    pub(super) fn take_file(&mut self) -> Option<OwnedFd> {
        (!self.fds.is_empty()).then(|| self.fds.remove(0))
    }

    fn fill(&mut self) -> io::Result<usize> {
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
        let mut with = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        let received = loop {
            match rustix::net::recvmsg(&self.stream, &mut buffers, &mut with, flags) {
                Err(rustix::io::Errno::INTR) => {}
                received => break received?.bytes,
            }
        };
        for message in with.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                // A peer that sends files nobody asked for does not fill our table.
                self.fds.extend(files);
                self.fds.truncate(FDS);
            }
        }
        self.pending.extend_from_slice(&bytes[..received]);
        Ok(received)
    }

    /// Whether the other end is gone: nobody waits for an answer.
    pub(super) fn is_hung_up(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::from_borrowed_fd(
            self.stream.as_fd(),
            PollFlags::RDHUP,
        )];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().intersects(gone)
    }
}
