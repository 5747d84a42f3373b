//! One conversation, at the manager's end, and what it holds for its peer.

use core::any::Any;
use core::fmt;
use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use pgmap_host::peer::peer;

use super::protocol::{Answer, Code, Failure, Greeting, ManagerInfo, Reply, Request, VERSION};
use super::wire::{MOST_REQUEST_BYTES, Wire};

/// A process that manages memory, as the control socket sees it.
pub trait Manager: Send + Sync {
    /// Who we are.
    fn info(&self) -> ManagerInfo;

    /// Does what was asked. May take its time: others' requests come on other threads.
    ///
    /// # Errors
    ///
    /// A [`Failure`]: then everything is as it was.
    fn answer(&self, request: Request, session: &mut Session) -> Result<Answer, Failure>;
}

/// One conversation.
pub struct Session {
    wire: Wire,
    pid: Option<u32>,
    next: u64,
    /// What the peer holds. Dropped with the conversation, however it ends.
    held: BTreeMap<u64, Box<dyn Any + Send>>,
    file: Option<OwnedFd>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("pid", &self.pid)
            .field("held", &self.held.len())
            .finish_non_exhaustive()
    }
}

/// Mappings and pins of one conversation, at most.
const MOST_HELD: usize = 4096;

impl Session {
    pub(super) fn new(stream: Arc<UnixStream>) -> io::Result<Self> {
        Ok(Self {
            pid: peer(&stream)?.pid,
            wire: Wire::new(stream, MOST_REQUEST_BYTES)?,
            next: 0,
            held: BTreeMap::new(),
            file: None,
        })
    }

    /// The peer's process, as it was when it connected; `None` if it has no number where we are.
    #[must_use]
    pub const fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// Whether nobody waits for the answer any more.
    #[must_use]
    pub fn is_hung_up(&self) -> bool {
        self.wire.is_hung_up()
    }

    /// Holds something for the peer, until it says [`Request::Release`] or is gone. The number is the peer's name for it.
    ///
    /// # Errors
    ///
    /// A peer that holds thousands of things gets no more.
    pub fn hold(&mut self, guard: impl Any + Send) -> Result<u64, Failure> {
        if self.held.len() >= MOST_HELD {
            let text = "this connection holds as much as it may: release something first";
            return Err(Failure::new(Code::Busy, text));
        }
        self.next += 1;
        self.held.insert(self.next, Box::new(guard));
        Ok(self.next)
    }

    /// What the peer holds under this number, if it is of this kind.
    #[must_use]
    pub fn held<T: Any>(&self, id: u64) -> Option<&T> {
        self.held.get(&id)?.downcast_ref()
    }

    /// Lets go of what the peer holds under this number.
    ///
    /// # Errors
    ///
    /// [`Code::NotFound`].
    pub fn release(&mut self, id: u64) -> Result<Answer, Failure> {
        match self.held.remove(&id) {
            Some(_) => Ok(Answer::Done),
            None => Err(Failure::new(Code::NotFound, format!("you hold no {id}"))),
        }
    }

    /// Sends a file along with the answer.
    pub fn attach(&mut self, file: OwnedFd) {
        self.file = Some(file);
    }

    /// Answers until the peer is gone.
    pub(super) fn run(mut self, manager: &dyn Manager) -> io::Result<()> {
        let greeting = Greeting {
            protocol: VERSION,
            manager: manager.info(),
        };
        self.wire.send(&greeting, None)?;
        loop {
            let reply = match self.wire.receive::<Request>() {
                Ok(None) => return Ok(()),
                Ok(Some(request)) => match manager.answer(request, &mut self) {
                    Ok(answer) => Reply::Ok(answer),
                    Err(failure) => Reply::Error(failure),
                },
                // Whoever speaks something else hears so, once.
                Err(error) if error.kind() == ErrorKind::InvalidData => {
                    let failure = Failure::new(Code::Invalid, format!("not a request: {error}"));
                    return self.wire.send(&Reply::Error(failure), None);
                }
                Err(error) => return Err(error),
            };
            let file = self.file.take();
            self.wire.send(&reply, file.as_ref().map(AsFd::as_fd))?;
        }
    }

    /// Ends a conversation before it begins.
    pub(super) fn refuse(stream: UnixStream, code: Code, why: &str) -> io::Result<()> {
        let wire = Wire::new(Arc::new(stream), MOST_REQUEST_BYTES)?;
        wire.send(&Reply::Error(Failure::new(code, why)), None)
    }
}
