//! A `pgmap serve` to try things on, with a runtime directory of its own.
#![allow(
    clippy::unwrap_used,
    dead_code,
    reason = "each test uses a part of this, and fails where it should"
)]

use core::time::Duration;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;

use tempfile::TempDir;

pub(crate) mod nbd;

/// A directory for images and sockets, and the servers that were started in it.
pub(crate) struct Place {
    pub(crate) directory: TempDir,
}

/// A server that runs. It is killed when this is dropped, unless it was ended before.
pub(crate) struct Server {
    child: Child,
    /// What it said at its start.
    pub(crate) announced: String,
    nbd: PathBuf,
}

impl Place {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { directory }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The command, with this place's sockets and directory.
    pub(crate) fn pgmap(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pgmap"));
        command
            .args(arguments)
            .current_dir(self.directory.path())
            .env("XDG_RUNTIME_DIR", self.directory.path());
        command
    }

    /// What a verb prints, if it succeeds.
    #[track_caller]
    pub(crate) fn ok(&self, arguments: &[&str]) -> String {
        let output = self.pgmap(arguments).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a verb says when it is refused: with status 2, and nothing on standard output.
    #[track_caller]
    pub(crate) fn refused(&self, arguments: &[&str]) -> String {
        let output = self.pgmap(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// Starts a server with these regions.
    #[track_caller]
    pub(crate) fn serve(&self, regions: &[&str]) -> Server {
        let mut arguments = vec!["serve"];
        for region in regions {
            arguments.extend(["--pmem", region]);
        }
        self.serve_with(&arguments)
    }

    #[track_caller]
    pub(crate) fn serve_with(&self, arguments: &[&str]) -> Server {
        Server::start(self.pgmap(arguments))
    }

    /// Copies bytes into a namespace through a mapping.
    pub(crate) fn write(&self, namespace: &str, offset: &str, bytes: &[u8]) {
        use std::io::Write;
        let mut command = self.pgmap(&["map", namespace, "--offset", offset, "--write"]);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(bytes).unwrap();
        assert!(child.wait().unwrap().success());
    }

    /// The bytes of a namespace.
    pub(crate) fn read(&self, namespace: &str) -> Vec<u8> {
        let output = self.pgmap(&["map", namespace]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        output.stdout
    }

    /// Waits until what a verb prints has `part` in it.
    #[track_caller]
    pub(crate) fn wait_for(&self, arguments: &[&str], part: &str) {
        self.wait_until(arguments, |text| text.contains(part));
    }

    #[track_caller]
    pub(crate) fn wait_until(&self, arguments: &[&str], condition: impl Fn(&str) -> bool) {
        let started = Instant::now();
        loop {
            let text = self.ok(arguments);
            if condition(&text) {
                return;
            }
            let patience = Duration::from_secs(20);
            assert!(started.elapsed() < patience, "{arguments:?}: {text}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Server {
    /// Starts a command that becomes a server.
    #[track_caller]
    pub(crate) fn start(mut command: Command) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut server = Self {
            child: command.spawn().unwrap(),
            announced: String::new(),
            nbd: PathBuf::new(),
        };
        let mut output = BufReader::new(server.child.stdout.take().unwrap());
        loop {
            let mut line = String::new();
            if output.read_line(&mut line).unwrap() == 0 {
                let mut errors = String::new();
                let mut stderr = server.child.stderr.take().unwrap();
                stderr.read_to_string(&mut errors).unwrap();
                panic!("{command:?} ended: {errors}");
            }
            server.announced += &line;
            if let Some(path) = line.strip_prefix("control: ") {
                server.nbd = Path::new(path.trim_end()).with_extension("nbd");
                return server;
            }
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where NBD clients find an export.
    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.nbd.display())
    }

    /// The socket of NBD clients.
    pub(crate) fn nbd(&self) -> &Path {
        &self.nbd
    }

    /// The socket of those who ask.
    pub(crate) fn control(&self) -> PathBuf {
        self.nbd.with_extension("sock")
    }

    /// Where metrics are had.
    pub(crate) fn metrics(&self) -> String {
        let line = self.announced.lines().find_map(|line| {
            let url = line.strip_prefix("metrics: http://")?;
            url.strip_suffix("/metrics")
        });
        line.unwrap().to_owned()
    }

    /// Sends a signal and waits for the end.
    pub(crate) fn end(mut self, signal: i32) -> Output {
        // SAFETY: the process is our child, and has not been waited for.
        unsafe { libc::kill(i32::try_from(self.child.id()).unwrap(), signal) };
        let mut stderr = Vec::new();
        let mut errors = self.child.stderr.take().unwrap();
        errors.read_to_end(&mut stderr).unwrap();
        Output {
            status: self.child.wait().unwrap(),
            stdout: Vec::new(),
            stderr,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a signal to a process that the test started and has not waited for.
pub(crate) fn signal(pid: u32, signal: i32) {
    // SAFETY: a signal to a child touches no memory of ours.
    assert_eq!(unsafe { libc::kill(pid.cast_signed(), signal) }, 0);
}

/// The same, to a group of processes, by its leader.
pub(crate) fn signal_group(pid: u32, signal: i32) {
    // SAFETY: a signal to children touches no memory of ours.
    assert_eq!(unsafe { libc::kill(-pid.cast_signed(), signal) }, 0);
}

/// Whether a program is here; says so if it is not.
pub(crate) fn has(program: &str) -> bool {
    let found = Command::new("sh")
        .args(["-c", &format!("command -v {program}")])
        .stdout(Stdio::null())
        .status()
        .unwrap()
        .success();
    if !found {
        eprintln!("SKIPPED: {program} is not installed (.ci/setup installs it)");
    }
    found
}

/// Numbers that are the same for the same seed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed << 1 | 1)
    }

    const fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number that is less than `end`.
    pub(crate) const fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 20) % end
    }

    /// A time that is shorter.
    pub(crate) const fn sleep_below(&mut self, millis: u64) -> Duration {
        Duration::from_millis(self.below(millis))
    }
}

/// Bytes that are alike nowhere.
pub(crate) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend_from_slice(&random.next().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
