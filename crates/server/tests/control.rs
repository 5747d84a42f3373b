//! The control socket: who is answered, what a peer's death lets go of, and that rubbish harms nobody.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "the fake manager does little"
)]

use core::time::Duration;
use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use pgmap_server::control::protocol::{Answer, Code, Failure, Kind, ManagerInfo, RangeOf, Request};
use pgmap_server::control::{Client, ClientError, Listener, Manager, Session};
use tempfile::TempDir;

/// Says when it is dropped.
struct Guard(Sender<()>);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.send(());
    }
}

struct Fake {
    dropped: Sender<()>,
}

impl Manager for Fake {
    fn info(&self) -> ManagerInfo {
        ManagerInfo {
            kind: Kind::Serve,
            pid: std::process::id(),
            version: "test".into(),
            command: String::new(),
        }
    }

    fn answer(&self, request: Request, session: &mut Session) -> Result<Answer, Failure> {
        match request {
            Request::Iomem => Ok(Answer::Iomem(Vec::new())),
            Request::Pin { .. } => {
                let id = session.hold(Guard(self.dropped.clone()))?;
                Ok(Answer::Held { id })
            }
            Request::Map(range) => {
                let mut file = tempfile::tempfile().unwrap();
                file.write_all(range.namespace.as_bytes()).unwrap();
                session.attach(OwnedFd::from(file));
                let length = range.namespace.len() as u64;
                Ok(Answer::Mapped {
                    id: 0,
                    offset: 0,
                    length,
                })
            }
            Request::Release { id } => session.release(id),
            other => Err(Failure::new(Code::Unsupported, format!("{other:?}"))),
        }
    }
}

struct Fixture {
    directory: TempDir,
    listener: Listener,
    dropped: std::sync::mpsc::Receiver<()>,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (sender, dropped) = channel();
        let path = directory.path().join("test.sock");
        let listener = Listener::start(&path, Arc::new(Fake { dropped: sender })).unwrap();
        Self {
            directory,
            listener,
            dropped,
        }
    }

    fn client(&self) -> Client {
        Client::connect(self.listener.path()).unwrap()
    }

    fn raw(&self) -> (UnixStream, BufReader<UnixStream>) {
        let stream = UnixStream::connect(self.listener.path()).unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let mut greeting = String::new();
        reader.read_line(&mut greeting).unwrap();
        assert!(greeting.contains("\"protocol\":1"), "{greeting}");
        (stream, reader)
    }
}

fn pin() -> Request {
    Request::Pin {
        range: RangeOf {
            namespace: "pmem0".into(),
            offset: 0,
            length: Some(4096),
        },
        label: "test".into(),
    }
}

#[test]
fn a_request_is_answered() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    assert_eq!(client.manager().kind, Kind::Serve);
    let answer = client.ask(&Request::Iomem).unwrap();
    assert_eq!(answer, Answer::Iomem(Vec::new()));
    let refused = client.ask(&Request::List).unwrap_err();
    assert!(matches!(refused, ClientError::Refused(failure) if failure.code == Code::Unsupported));
}

#[test]
fn a_file_comes_with_its_answer() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    for name in ["pmem0", "another"] {
        let range = RangeOf {
            namespace: name.into(),
            offset: 0,
            length: None,
        };
        client.ask(&Request::Map(range)).unwrap();
        let mut file = File::from(client.take_file().unwrap());
        std::io::Seek::rewind(&mut file).unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, name);
        assert!(client.take_file().is_none());
    }
}

/// GUP-3's other side: what a peer holds ends with the peer, however it dies.
#[test]
fn what_a_dead_peer_held_is_let_go() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    let Answer::Held { id } = client.ask(&pin()).unwrap() else {
        panic!("not held");
    };
    assert_eq!(client.ask(&Request::Release { id }).unwrap(), Answer::Done);
    fixture.dropped.recv().unwrap();
    assert!(client.ask(&Request::Release { id }).is_err());
    client.ask(&pin()).unwrap();
    assert!(fixture.dropped.try_recv().is_err());
    drop(client);
    let patience = Duration::from_secs(10);
    fixture.dropped.recv_timeout(patience).unwrap();
}

/// Rubbish is answered once, and ends its sender's conversation only.
#[test]
fn rubbish_harms_only_its_sender() {
    let fixture = Fixture::new();
    let mut good = fixture.client();
    let endless = vec![b'a'; 200 << 10];
    let cases: [&[u8]; 6] = [
        b"hello\n",
        b"{\"verb\":\"fly\"}\n",
        b"{\"verb\":\"online\",\"block\":-1,\"zone\":\"auto\"}\n",
        b"{\"verb\":\"list\"",
        b"\xff\xfe\x00\n",
        &endless,
    ];
    for case in cases {
        let (mut stream, mut reader) = fixture.raw();
        // It may be gone before it has all.
        let _ = stream.write_all(case);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut rest = String::new();
        match reader.read_to_string(&mut rest) {
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
            Ok(_) => assert!(rest.is_empty() || rest.contains("not a request"), "{rest}"),
        }
        assert!(good.ask(&Request::Iomem).is_ok());
    }
}

/// A peer that says nothing, or never reads, holds nobody up, not even the end.
#[test]
fn a_stalled_peer_holds_nobody_up() {
    let fixture = Fixture::new();
    let (silent, _) = fixture.raw();
    let (mut deaf, _) = fixture.raw();
    deaf.set_write_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    while deaf.write_all(b"{\"verb\":\"iomem\"}\n").is_ok() {}
    assert!(fixture.client().ask(&Request::Iomem).is_ok());
    let started = Instant::now();
    drop(fixture);
    assert!(started.elapsed() < Duration::from_secs(5));
    drop((silent, deaf));
}

#[test]
fn there_is_one_manager_at_a_socket() {
    let fixture = Fixture::new();
    let path = fixture.listener.path().to_owned();
    let second = || {
        let (dropped, _) = channel();
        Listener::start(&path, Arc::new(Fake { dropped }))
    };
    assert_eq!(second().unwrap_err().kind(), ErrorKind::AddrInUse);
    assert!(fixture.client().ask(&Request::Iomem).is_ok());
    drop(fixture.listener);
    assert!(!path.exists());
    // As a manager leaves it that is killed.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(second().is_ok());
}

/// What is in the way and is no socket stays.
#[test]
fn a_file_is_not_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path: PathBuf = directory.path().join("precious.sock");
    fs::write(&path, "data").unwrap();
    let (dropped, _) = channel();
    assert!(Listener::start(&path, Arc::new(Fake { dropped })).is_err());
    assert_eq!(fs::read(&path).unwrap(), b"data");
}

/// Whoever asks a manager that is stopped hears so, and does not wait for ever.
#[test]
fn a_stopped_manager_is_not_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stopped.sock");
    let _never_accepts = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let error = Client::connect(&path).unwrap_err();
    assert!(error.to_string().contains("may be stopped"), "{error}");
}

#[test]
fn another_user_is_refused() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: to become another user takes root");
        return;
    }
    let fixture = Fixture::new();
    let path = fixture.listener.path();
    let script = "import socket,sys\ns=socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\nprint(s.recv(4096).decode())";
    let ask = || {
        let mut command = Command::new("python3");
        command.args(["-c", script]).arg(path).uid(65534).gid(65534);
        command.output().unwrap()
    };
    fs::set_permissions(fixture.directory.path(), Permissions::from_mode(0o755)).unwrap();
    let refused = ask();
    let errors = String::from_utf8_lossy(&refused.stderr);
    assert!(errors.contains("PermissionError"), "{errors}");
    // Even if somebody opens the socket's permissions.
    fs::set_permissions(path, Permissions::from_mode(0o666)).unwrap();
    let answer = String::from_utf8(ask().stdout).unwrap();
    assert!(answer.contains("denied"), "{answer}");
}
