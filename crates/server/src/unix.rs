//! Unix sockets at a path: the owner's alone, and put where a dead process has left one.
//!
//! The control socket and the NBD clients' are made here. What must never happen here: a moment at which another user can
//! connect.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen as begin};

/// Connections that wait to be accepted: as many as the kernel allows, if that is less.
const BACKLOG: i32 = 4096;

/// The longest path that the kernel takes for a socket.
const MOST_BYTES: usize = 107;

/// Listens at a path. A socket that nobody listens at any more is replaced.
///
/// # Errors
///
/// [`ErrorKind::AddrInUse`] if somebody answers there, or if it is no socket; what else the machine answers.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    if path.as_os_str().len() > MOST_BYTES {
        let text = format!("a socket's path has {MOST_BYTES} bytes at most: name a shorter one");
        return Err(io::Error::new(ErrorKind::InvalidFilename, text));
    }
    let kind = SocketType::STREAM;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    // Before it has a name: the kernel gives its mode to the path.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    match named(&socket, path) {
        Err(Errno::ADDRINUSE) if is_left_over(path) => {
            fs::remove_file(path)?;
            named(&socket, path)?;
        }
        named => named?,
    }
    begin(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Removes a socket that nobody listens at any more.
pub(crate) fn clear(path: &Path) {
    if is_left_over(path) {
        // Somebody else may clear up, too.
        let _ = fs::remove_file(path);
    }
}

fn named(socket: &OwnedFd, path: &Path) -> Result<(), Errno> {
    bind(socket, &SocketAddrUnix::new(path)?)
}

/// Whether nobody listens at this socket any more.
fn is_left_over(path: &Path) -> bool {
    UnixStream::connect(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
        && fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// The path's mode is its owner's alone, also before somebody listens there.
    #[test]
    fn a_socket_is_its_owners_from_the_first_moment() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let socket = listen(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(listen(&path).unwrap_err().kind(), ErrorKind::AddrInUse);
        drop(socket);
        let socket = listen(&path).unwrap();
        clear(&path);
        assert!(path.exists());
        drop(socket);
        clear(&path);
        assert!(!path.exists());
    }

    #[test]
    fn a_path_that_is_too_long_is_told() {
        let error = listen(Path::new(&"x".repeat(108))).unwrap_err();
        assert!(error.to_string().contains("107 bytes at most"), "{error}");
    }
}
