//! Who is at the other end of a unix socket, as the kernel noted when it connected.
//!
//! Called by servers, for each client. What must never happen here: that a process without a number in our namespace is read as one
//! with a number.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::process::Uid;

/// The process at the other end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Its number; `None` if it has none in our namespace of processes, as that is a container's, or it is in another's.
    pub pid: Option<u32>,
    /// Its user.
    pub uid: Uid,
}

/// Asks who is at the other end of a connected unix socket.
///
/// # Errors
///
/// What the machine answers, if this is no socket.
#[doc(alias = "SO_PEERCRED")]
pub fn peer(socket: impl AsFd) -> io::Result<Peer> {
    // rustix has no room for a number that is 0 (`rustix::net::UCred`).
    let mut found = libc::ucred {
        pid: 0,
        uid: u32::MAX,
        gid: u32::MAX,
    };
    let mut len = libc::socklen_t::try_from(size_of::<libc::ucred>()).unwrap_or(0);
    // SAFETY: the descriptor is open; the kernel writes at most `len` bytes to `found`, which is as long, and what it has written to
    // `len`. Any bytes are a `ucred`.
    let done = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut found).cast(),
            &raw mut len,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    let pid = u32::try_from(found.pid).ok().filter(|pid| *pid != 0);
    let uid = Uid::from_raw(found.uid);
    Ok(Peer { pid, uid })
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::os::unix::net::UnixStream;

    /// Who connects to itself is found as itself.
    #[test]
    fn a_process_knows_itself() {
        let (one, _other) = UnixStream::pair().unwrap();
        let itself = Peer {
            pid: Some(std::process::id()),
            uid: rustix::process::geteuid(),
        };
        assert_eq!(peer(&one).unwrap(), itself);
    }

    /// An error is no answer, least of all that root is there.
    #[test]
    fn what_is_no_socket_has_no_peer() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(peer(&file).is_err());
    }
}
