//! Why a request failed, as the client is told.

use pgmap_drivers::block::BlockError;
use rustix::io::Errno;

use super::proto::{Command, Request};

/// The errors that the protocol knows; the values are its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum WireError {
    NotPermitted = 1,
    Io = 5,
    NoMemory = 12,
    Invalid = 22,
    NoSpace = 28,
    Overflow = 75,
    NotSupported = 95,
    ShutDown = 108,
}

/// A request's failure.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Failure {
    pub(super) error: WireError,
    /// Where, if that is known.
    pub(super) offset: Option<u64>,
    /// For people. Only structured replies carry it.
    pub(super) message: String,
}

impl Failure {
    pub(super) fn new(error: WireError, message: impl Into<String>) -> Self {
        let (offset, message) = (None, message.into());
        Self {
            error,
            offset,
            message,
        }
    }

    /// The range of a request is not on the device.
    pub(super) fn out_of_range(command: Command) -> Self {
        let error = match command {
            Command::Write | Command::WriteZeroes => WireError::NoSpace,
            Command::Read
            | Command::Disconnect
            | Command::Flush
            | Command::Trim
            | Command::Cache
            | Command::BlockStatus
            | Command::Unknown(_) => WireError::Invalid,
        };
        Self::new(error, "the range is not on the device")
    }

    /// What the device answered to a request.
    pub(super) fn of_device(error: BlockError, request: &Request) -> Self {
        let message = error.to_string();
        let wire = match error {
            BlockError::Frozen(_) => WireError::ShutDown,
            BlockError::Bad { offset } => {
                let mut failure = Self::new(WireError::Io, message);
                let within = offset >= request.offset && Some(offset) < request.end();
                failure.offset = within.then_some(offset);
                return failure;
            }
            BlockError::OutOfRange => return Self::out_of_range(request.command),
            BlockError::ReadOnly => WireError::NotPermitted,
            BlockError::Io(errno) => of_errno(errno),
        };
        Self::new(wire, message)
    }
}

fn of_errno(errno: Errno) -> WireError {
    match errno {
        Errno::NOSPC | Errno::DQUOT | Errno::FBIG => WireError::NoSpace,
        Errno::NOMEM => WireError::NoMemory,
        Errno::PERM | Errno::ACCESS | Errno::ROFS => WireError::NotPermitted,
        Errno::INVAL => WireError::Invalid,
        _ => WireError::Io,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pgmap_core::queue::Frozen;

    fn request(command: Command) -> Request {
        let (flags, cookie, offset, length) = (0, 0, 4096, 4096);
        Request {
            flags,
            command,
            cookie,
            offset,
            length,
        }
    }

    /// PMEM-2: who asks a device that is being taken away is told to go.
    #[test]
    fn a_frozen_device_is_being_shut_down() {
        let failure = Failure::of_device(Frozen.into(), &request(Command::Read));
        assert_eq!(failure.error, WireError::ShutDown);
    }

    /// PMEM-3: a lost byte is named where it lies in the request.
    #[test]
    fn lost_bytes_are_named() {
        let at = |offset| Failure::of_device(BlockError::Bad { offset }, &request(Command::Read));
        assert_eq!(at(5000).error, WireError::Io);
        assert_eq!(at(5000).offset, Some(5000));
        assert_eq!(at(4095).offset, None);
        assert_eq!(at(8192).offset, None);
    }

    /// A write beyond the end finds no room; a read there is a mistake.
    #[test]
    fn beyond_the_end_depends_on_the_request() {
        let of = |command| Failure::of_device(BlockError::OutOfRange, &request(command)).error;
        assert_eq!(of(Command::Write), WireError::NoSpace);
        assert_eq!(of(Command::WriteZeroes), WireError::NoSpace);
        assert_eq!(of(Command::Read), WireError::Invalid);
        assert_eq!(of(Command::Trim), WireError::Invalid);
    }

    /// A full medium stays a full medium; a failed one is that.
    #[test]
    fn the_mediums_errors_are_kept() {
        let of = |errno| Failure::of_device(BlockError::Io(errno), &request(Command::Write)).error;
        assert_eq!(of(Errno::NOSPC), WireError::NoSpace);
        assert_eq!(of(Errno::DQUOT), WireError::NoSpace);
        assert_eq!(of(Errno::FAULT), WireError::Io);
    }
}
