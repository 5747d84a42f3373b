//! Where managers have their sockets, and how they are found.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::protocol::Kind;
use crate::unix;

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

/// Makes the directory if it is not there, for its owner only, and clears up after managers that were killed.
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
        clear_up(directory);
        return Ok(());
    }
    Err(ErrorKind::PermissionDenied.into())
}

/// Removes the sockets of managers that were killed.
fn clear_up(directory: &Path) {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    for path in entries.map(|entry| entry.path()) {
        // Such as serve-4711.sock: one whose process lives may just be about to listen.
        let name = path.file_stem().and_then(OsStr::to_str);
        let pid = name.and_then(|name| name.split_once('-')?.1.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            unix::clear(&path);
        }
    }
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
