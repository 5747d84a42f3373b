//! The asking end of the control socket.

use core::fmt;
use core::time::Duration;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::place;
use super::protocol::{Answer, Failure, Greeting, ManagerInfo, Reply, Request, VERSION};
use super::wire::{MOST_REPLY_BYTES, Wire};

/// Why there was no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error("no manager answers at {path}: {error}")]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// What the machine said.
        error: io::Error,
    },
    /// It is a manager of another version.
    #[error(
        "the manager speaks version {0} of the protocol, this pgmap {VERSION}: use the same pgmap for both"
    )]
    Version(u32),
    /// The conversation broke off.
    #[error("the manager ended the conversation: {0}")]
    Lost(#[from] io::Error),
    /// It was refused.
    #[error(transparent)]
    Refused(#[from] Failure),
}

/// How long a manager may take to say who it is.
const GREETING: Duration = Duration::from_secs(1);

/// What a manager may say first.
#[derive(Deserialize)]
#[serde(untagged)]
enum First {
    Greeting(Greeting),
    Reply(Reply),
}

/// A conversation with a manager. What it holds for us (mappings, pins) it lets go of when this is dropped.
pub struct Client {
    wire: Wire,
    manager: ManagerInfo,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("manager", &self.manager)
            .finish_non_exhaustive()
    }
}

impl Client {
    /// Begins a conversation.
    ///
    /// # Errors
    ///
    /// See [`ClientError`].
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let unreachable = |error: io::Error| ClientError::Unreachable {
            path: path.to_owned(),
            error: if error.kind() == io::ErrorKind::WouldBlock {
                io::Error::other("it says nothing, and may be stopped")
            } else {
                error
            },
        };
        let stream = UnixStream::connect(path).map_err(unreachable)?;
        let stream = Arc::new(stream);
        // A manager that is stopped listens, and says nothing.
        stream
            .set_read_timeout(Some(GREETING))
            .map_err(unreachable)?;
        let mut wire = Wire::new(Arc::clone(&stream), MOST_REPLY_BYTES).map_err(unreachable)?;
        let greeting = match wire.receive().map_err(unreachable)? {
            Some(First::Greeting(greeting)) => greeting,
            Some(First::Reply(Reply::Error(failure))) => return Err(failure.into()),
            Some(First::Reply(Reply::Ok(_))) | None => {
                return Err(unreachable(io::ErrorKind::UnexpectedEof.into()));
            }
        };
        stream.set_read_timeout(None).map_err(unreachable)?;
        if greeting.protocol != VERSION {
            return Err(ClientError::Version(greeting.protocol));
        }
        Ok(Self {
            wire,
            manager: greeting.manager,
        })
    }

    /// All managers of this user that answer.
    #[must_use]
    pub fn all() -> Vec<Self> {
        place::all(&place::directory())
            .iter()
            .filter_map(|socket| Self::connect(socket).ok())
            .collect()
    }

    /// Who answers.
    #[must_use]
    pub const fn manager(&self) -> &ManagerInfo {
        &self.manager
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    ///
    /// See [`ClientError`].
    pub fn ask(&mut self, request: &Request) -> Result<Answer, ClientError> {
        self.wire.send(request, None)?;
        match self.wire.receive()? {
            Some(Reply::Ok(answer)) => Ok(answer),
            Some(Reply::Error(failure)) => Err(failure.into()),
            None => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
        }
    }

    /// The file that came with the last answer.
    pub fn take_file(&mut self) -> Option<OwnedFd> {
        self.wire.take_file()
    }
}
