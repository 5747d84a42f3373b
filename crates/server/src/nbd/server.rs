//! Who listens, who is connected, and how all of it ends.

use core::fmt;
use core::net::SocketAddr;
use core::time::Duration;
use std::collections::BTreeMap;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Instant, SystemTime};

use pgmap_host::peer::peer;
use pgmap_sync::atomic::{AtomicBool, Ordering};
use pgmap_sync::{Mutex, WaitQueue};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{Shutdown, SocketFlags, accept_with, getpeername, shutdown};

use super::credentials::Security;
use super::export::Exports;
use super::handshake::agree;
use super::socket::{End, Socket};
use super::stream::Stream;
use super::transmission::Session;

/// How long we wait before we accept again, if the machine had nothing to spare.
const SHORTAGE: Duration = Duration::from_millis(50);

/// What clients may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// How long a handshake may take. Then the client is dropped.
    pub handshake: Duration,
    /// How many clients there may be; more are dropped at once.
    pub clients: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(30),
            clients: 1000,
        }
    }
}

/// Where clients come from.
#[derive(Debug)]
pub enum Listener {
    /// A unix socket. Who may connect is decided by the modes of its path.
    Unix(UnixListener),
    /// TCP. Whoever can reach it may connect.
    Tcp(TcpListener),
}

impl Listener {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

/// A connected client.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Client {
    /// Its process, if it came by a unix socket, and has a number where we are: clients from outside of our container have none.
    pub pid: Option<u32>,
    /// The name of that process.
    pub process: Option<String>,
    /// Where it is, if it came by TCP.
    pub address: Option<SocketAddr>,
    /// What it uses; `None` during the handshake.
    pub export: Option<String>,
    /// When it connected.
    pub since: SystemTime,
}

/// Whether all clients have gone when the server stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Stopped {
    /// None is left, and what they wrote is durable.
    Clean,
    /// So many are still in the hands of their device.
    Left(usize),
}

/// Serves block devices. Clones are the same server.
#[derive(Clone, Debug)]
pub struct Server {
    shared: Arc<Shared>,
}

struct Shared {
    exports: Arc<dyn Exports>,
    limits: Limits,
    security: Security,
    stopping: AtomicBool,
    /// Readable for ever once the server is stopping.
    stop: OwnedFd,
    connections: Mutex<Connections>,
    /// Woken when a connection has ended.
    ended: WaitQueue,
    acceptors: Mutex<Vec<JoinHandle<()>>>,
    /// Is told of sessions that ended.
    report: OnceLock<Box<Report>>,
}

type Report = dyn Fn(&Client, &End) + Send + Sync;

#[derive(Debug, Default)]
struct Connections {
    last: u64,
    open: BTreeMap<u64, Connection>,
}

#[derive(Debug)]
struct Connection {
    client: Client,
    socket: Arc<Socket>,
}

impl Server {
    /// A server that nobody can reach yet.
    ///
    /// # Errors
    ///
    /// What the machine answers when it is asked for a file descriptor.
    pub fn new(exports: Arc<dyn Exports>, limits: Limits, security: Security) -> io::Result<Self> {
        let shared = Shared {
            exports,
            limits,
            security,
            stopping: AtomicBool::new(false),
            stop: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            connections: Mutex::new(Connections::default()),
            ended: WaitQueue::new(),
            acceptors: Mutex::new(Vec::new()),
            report: OnceLock::new(),
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// Has `report` told of every session that ends, and why, by the session's thread: what it waits for, [`stop`](Self::stop)
    /// waits for, too.
    pub fn report_ends(&self, report: impl Fn(&Client, &End) + Send + Sync + 'static) {
        // There is one, and whoever comes second changes nothing.
        let _ = self.shared.report.set(Box::new(report));
    }

    /// Accepts clients on a socket, from a thread of its own, until the server stops. May be called for several sockets.
    ///
    /// # Errors
    ///
    /// If there can be no thread.
    pub fn serve(&self, listener: Listener) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let thread = thread::Builder::new().name("nbd-accept".to_owned());
        let thread = thread.spawn(move || shared.accept(&listener))?;
        self.shared.acceptors.lock().push(thread);
        Ok(())
    }

    /// Serves one client that is connected already, by a unix socket.
    pub fn admit_unix(&self, socket: OwnedFd) {
        self.shared.admit_unix(socket);
    }

    /// Who is connected, the longest first.
    #[must_use]
    pub fn clients(&self) -> Vec<Client> {
        let connections = self.shared.connections.lock();
        let open = connections.open.values();
        open.map(|connection| connection.client.clone()).collect()
    }

    /// Ends the connections of all clients that use an export: they find their requests' replies, and then the end.
    pub fn disconnect(&self, export: &str) {
        for connection in self.shared.connections.lock().open.values() {
            if connection.client.export.as_deref() == Some(export) {
                connection.hang_up(Shutdown::Read);
            }
        }
    }

    /// Accepts nobody any more, answers what is under way, refuses what still comes, makes durable what was written,
    /// and ends all connections, within `patience`.
    pub fn stop(&self, patience: Duration) -> Stopped {
        let shared = &self.shared;
        let begin = Instant::now();
        // Relaxed: a session that sees it late answers one more request; the sockets' ends order the rest.
        shared.stopping.store(true, Ordering::Relaxed);
        // It cannot be full: this is the only value that is ever written, and the most that are is one for each call.
        let _ = rustix::io::write(&shared.stop, &1u64.to_ne_bytes());
        let acceptors = core::mem::take(&mut *shared.acceptors.lock());
        for acceptor in acceptors {
            // Its panic was reported when it happened.
            let _ = acceptor.join();
        }
        shared.hang_up_all(Shutdown::Read);
        let none = || shared.connections.lock().open.is_empty();
        // Clients that do not take their replies are cut off after half of the time.
        if !shared.ended.wait_until(Some(patience / 2), none) {
            shared.hang_up_all(Shutdown::Both);
        }
        let left = patience.saturating_sub(begin.elapsed());
        if shared.ended.wait_until(Some(left), none) {
            Stopped::Clean
        } else {
            Stopped::Left(shared.connections.lock().open.len())
        }
    }
}

impl Shared {
    fn accept(self: &Arc<Self>, listener: &Listener) {
        let flags = SocketFlags::CLOEXEC;
        loop {
            let (fd, stop) = (listener.fd(), self.stop.as_fd());
            let mut fds = [fd, stop].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            if poll(&mut fds, None).is_err_and(|errno| errno != Errno::INTR) {
                return;
            }
            if !fds[1].revents().is_empty() {
                return;
            }
            if fds[0].revents().is_empty() {
                continue;
            }
            match accept_with(listener.fd(), flags) {
                Ok(socket) => match listener {
                    Listener::Unix(_) => self.admit_unix(socket),
                    Listener::Tcp(_) => {
                        let address = getpeername(&socket).ok().flatten();
                        let address = address.and_then(|address| address.try_into().ok());
                        self.admit(Socket::tcp(socket), None, address);
                    }
                },
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    thread::sleep(SHORTAGE);
                }
                // The client has gone again, or this was no event of ours.
                Err(_) => {}
            }
        }
    }

    fn admit_unix(self: &Arc<Self>, socket: OwnedFd) {
        let pid = peer(&socket).ok().and_then(|peer| peer.pid);
        self.admit(Socket::unix(socket), pid, None);
    }

    /// Gives a connection a thread. If it cannot have one, it is dropped.
    fn admit(self: &Arc<Self>, socket: Socket, pid: Option<u32>, address: Option<SocketAddr>) {
        let process = pid.and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/comm")).ok());
        let client = Client {
            pid,
            process: process.map(|name| name.trim_end().to_owned()),
            address,
            export: None,
            since: SystemTime::now(),
        };
        let socket = Arc::new(socket);
        let connection = Connection {
            client,
            socket: Arc::clone(&socket),
        };
        let Some(number) = self.connections.lock().add(connection, self.limits) else {
            return;
        };
        let open = Open {
            shared: Arc::clone(self),
            number,
        };
        let thread = thread::Builder::new().name("nbd".to_owned());
        // If it cannot be had, `open` is dropped, and the connection with it.
        let _ = thread.spawn(move || {
            let end = open.serve(&socket, pid);
            open.report(&end);
        });
    }

    fn hang_up_all(&self, how: Shutdown) {
        for connection in self.connections.lock().open.values() {
            connection.hang_up(how);
        }
    }
}

impl Connections {
    fn add(&mut self, connection: Connection, limits: Limits) -> Option<u64> {
        if self.open.len() >= limits.clients {
            return None;
        }
        self.last += 1;
        self.open.insert(self.last, connection);
        Some(self.last)
    }
}

impl Connection {
    /// The session reads what is there already, and then finds the end.
    fn hang_up(&self, how: Shutdown) {
        // It fails if the client has gone already.
        let _ = shutdown(self.socket.fd(), how);
    }
}

/// A connection in the server's list, which it leaves when this is dropped.
struct Open {
    shared: Arc<Shared>,
    number: u64,
}

impl Open {
    fn serve(&self, socket: &Socket, pid: Option<u32>) -> End {
        let shared = &*self.shared;
        let mut stream = Stream::Plain(socket);
        let patience = shared.limits.handshake;
        let agreed = match agree(
            socket,
            &mut stream,
            &*shared.exports,
            &shared.security,
            patience,
        ) {
            Ok(agreed) => agreed,
            Err(end) => {
                stream.close();
                return end;
            }
        };
        if let Some(connection) = shared.connections.lock().open.get_mut(&self.number) {
            connection.client.export = Some(agreed.export.name.clone());
        }
        Session::new(stream, &agreed, pid, &shared.stopping).serve()
    }

    fn report(&self, end: &End) {
        let Some(report) = self.shared.report.get() else {
            return;
        };
        let client = {
            let connections = self.shared.connections.lock();
            let connection = connections.open.get(&self.number);
            connection.map(|connection| connection.client.clone())
        };
        if let Some(client) = client {
            report(&client, end);
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.shared.connections.lock().open.remove(&self.number);
        self.shared.ended.wake_all();
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("limits", &self.limits)
            .field("connections", &self.connections)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Open {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "connection {}", self.number)
    }
}
