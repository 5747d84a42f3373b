//! Where managers have their sockets, and how they are found.

use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::protocol::Kind;

/// Where this user's managers have their sockets: below `XDG_RUNTIME_DIR`, or `/run` for root, or `/tmp`.
#[must_use]
pub fn directory() -> PathBuf {
    let user = rustix::process::geteuid();
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|place| !place.is_empty()) {
        Some(place) => PathBuf::from(place).join("pgmap"),
        None if user.is_root() => PathBuf::from("/run/pgmap"),
        None => PathBuf::from(format!("/tmp/pgmap-{}", user.as_raw())),
    }
}

/// Makes the directory if it is not there: for its owner only.
///
/// # Errors
///
/// What the machine answers; [`ErrorKind::PermissionDenied`] if it is somebody else's.
pub fn prepare(directory: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let found = fs::symlink_metadata(directory)?;
    if found.is_dir() && found.uid() == rustix::process::geteuid().as_raw() {
        return Ok(());
    }
    Err(ErrorKind::PermissionDenied.into())
}

/// The socket of this process.
#[must_use]
pub fn own(directory: &Path, kind: Kind) -> PathBuf {
    let kind = match kind {
        Kind::Serve => "serve",
        Kind::Run => "run",
    };
    directory.join(format!("{kind}-{}.sock", std::process::id()))
}

/// The sockets of all managers, alive or not.
#[must_use]
pub fn all(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut sockets: Vec<_> = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| end == "sock"))
        .collect();
    sockets.sort();
    sockets
}
