//! The socket itself: who may connect, and a thread for each who does.

use core::time::Duration;
use std::fs;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use pgmap_host::peer::peer;
use pgmap_sync::Mutex;
use pgmap_sync::atomic::{AtomicBool, Ordering};

use super::protocol::Code;
use super::session::{Manager, Session};

/// Conversations at once; more are told so.
const MOST_SESSIONS: usize = 64;

/// A socket on which a manager answers. It and all conversations end when this is dropped.
#[derive(Debug)]
pub struct Listener {
    path: PathBuf,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    listener: UnixListener,
    ending: AtomicBool, // A: set once
    /// The streams of all conversations, to end them with. A conversation that has ended has closed its own.
    sessions: Mutex<Vec<(JoinHandle<()>, Weak<UnixStream>)>>,
}

impl Listener {
    /// Listens at `path`, and answers for `manager` on threads of its own. A socket that a dead manager has left there is
    /// replaced.
    ///
    /// # Errors
    ///
    /// [`AddrInUse`](io::ErrorKind::AddrInUse) if somebody answers there, or if it is no socket; what else the machine answers.
    pub fn start(path: &Path, manager: Arc<dyn Manager>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            listener: crate::unix::listen(path)?,
            ending: AtomicBool::new(false),
            sessions: Mutex::default(),
        });
        let ours = Arc::clone(&shared);
        let acceptor = std::thread::Builder::new()
            .name("pgmap-control".into())
            .spawn(move || accept(&ours, &manager))?;
        Ok(Self {
            path: path.to_owned(),
            shared,
            acceptor: Some(acceptor),
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // SeqCst: looked at once a connection, so that the plainest ordering costs nothing.
        self.shared.ending.store(true, Ordering::SeqCst);
        // Wakes the acceptor, which holds the socket until it is joined.
        let _ = rustix::net::shutdown(&self.shared.listener, rustix::net::Shutdown::Both);
        let _ = fs::remove_file(&self.path);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        let sessions = core::mem::take(&mut *self.shared.sessions.lock());
        for stream in sessions.iter().filter_map(|(_, stream)| stream.upgrade()) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        for (session, _) in sessions {
            let _ = session.join();
        }
    }
}

fn accept(shared: &Shared, manager: &Arc<dyn Manager>) {
    for stream in shared.listener.incoming() {
        // SeqCst: as in `drop`.
        if shared.ending.load(Ordering::SeqCst) {
            return;
        }
        let begun = stream.and_then(|stream| begin(stream, shared, manager));
        if begun.is_err() {
            // Out of descriptors or threads: others end, and it goes on.
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn begin(stream: UnixStream, shared: &Shared, manager: &Arc<dyn Manager>) -> io::Result<()> {
    if !may_ask(&stream) {
        return Session::refuse(stream, Code::Denied, "this manager is another user's");
    }
    let mut sessions = shared.sessions.lock();
    sessions.retain(|(session, _)| !session.is_finished());
    if sessions.len() >= MOST_SESSIONS {
        drop(sessions);
        return Session::refuse(stream, Code::Busy, "too many ask at once: try again");
    }
    let stream = Arc::new(stream);
    let ours = Arc::downgrade(&stream);
    let manager = Arc::clone(manager);
    let session = std::thread::Builder::new()
        .name("pgmap-session".into())
        .spawn(move || {
            // A conversation that breaks off is its peer's business.
            let _ = Session::new(stream).and_then(|session| session.run(&*manager));
        })?;
    sessions.push((session, ours));
    Ok(())
}

/// The owner may, and root.
fn may_ask(stream: &UnixStream) -> bool {
    let owner = rustix::process::geteuid();
    peer(stream).is_ok_and(|peer| peer.uid == owner || peer.uid.is_root())
}
