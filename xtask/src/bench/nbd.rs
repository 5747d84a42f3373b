//! Our NBD server beside nbdkit (file and memory plugins) and qemu-nbd: the same clients, by turns, over unix sockets,
//! with all bytes in memory.

use core::time::Duration;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use super::Effort;
use super::table::{Row, Table, Want, median};

/// Bytes of the disk.
const BYTES: u64 = 1 << 30;
/// Bytes that fio moves in one round, and requests that qemu-img makes.
const FIO_BYTES: &str = "--io_size=1G";
const REQUESTS: u32 = 100_000;
/// How long a server may take until it listens.
const START: Duration = Duration::from_secs(10);

/// What a client does with a server.
#[derive(Clone, Copy, Debug)]
enum Work {
    CopyOut,
    CopyIn,
    /// fio's pattern, and its depth.
    Fio(&'static str, u32),
    /// How to access, and bytes of a request.
    Qemu(&'static str, u32),
}

const WORK: [(&str, Work); 10] = [
    ("nbdcopy out, 1 GiB", Work::CopyOut),
    ("nbdcopy in, 1 GiB", Work::CopyIn),
    ("fio 4 KiB random read, depth 1", Work::Fio("randread", 1)),
    ("fio 4 KiB random write, depth 1", Work::Fio("randwrite", 1)),
    ("fio 4 KiB random read, depth 32", Work::Fio("randread", 32)),
    (
        "fio 4 KiB random write, depth 32",
        Work::Fio("randwrite", 32),
    ),
    ("qemu-img bench 4 KiB read", Work::Qemu("-n", 4096)),
    ("qemu-img bench 64 KiB read", Work::Qemu("-n", 65536)),
    ("qemu-img bench 4 KiB write", Work::Qemu("-w", 4096)),
    ("qemu-img bench 64 KiB write", Work::Qemu("-w", 65536)),
];

pub(crate) fn measure(root: &Path, effort: Effort) -> anyhow::Result<Vec<Table>> {
    let mut table = Table {
        title: "Block devices over NBD".to_owned(),
        against: "the best peer",
        rows: Vec::new(),
        notes: Vec::new(),
    };
    for program in ["nbdkit", "qemu-nbd", "nbdcopy", "fio", "qemu-img"] {
        let found = Command::new(program).arg("--version").output();
        if found.is_err() {
            let note = format!("SKIPPED: there is no {program} here; `.ci/setup` installs it.");
            table.notes.push(note);
            return Ok(vec![table]);
        }
    }
    let bench = Bench::new(root)?;
    let servers = bench.servers()?;
    table.notes.push(format!(
        "Medians of {} rounds: all servers by turns in each, on a unix socket, with the bytes in memory.",
        effort.rounds
    ));
    for (what, work) in WORK {
        let mut figures = vec![Vec::new(); servers.len()];
        for _ in 0..effort.rounds {
            for (server, figures) in servers.iter().zip(&mut figures) {
                figures.push(bench.figure(work, server)?);
            }
        }
        let figures: Vec<_> = figures.into_iter().map(median).collect();
        let best = figures[1..].iter().copied().reduce(f64::min);
        let unit = work.unit();
        table.rows.push(Row {
            what: what.to_owned(),
            ours: figures[0],
            theirs: best,
            unit,
            want: Want::Faster(1.0),
        });
        let peers = servers[1..].iter().zip(&figures[1..]);
        let peers = peers.map(|(server, figure)| format!("{} {figure:.1}", server.name));
        let peers = peers.collect::<Vec<_>>().join(", ");
        table.notes.push(format!("{what}, {unit}: {peers}."));
    }
    Ok(vec![table])
}

impl Work {
    const fn unit(self) -> &'static str {
        match self {
            Self::CopyOut | Self::CopyIn => "ms",
            Self::Fio(..) | Self::Qemu(..) => "us",
        }
    }
}

/// Where everything lies: on a file system in memory, removed at the end.
#[derive(Debug)]
struct Bench {
    directory: PathBuf,
    ours: PathBuf,
}

/// A server that listens, until it is dropped.
#[derive(Debug)]
struct Server {
    name: &'static str,
    child: Child,
    uri: String,
}

impl Bench {
    fn new(root: &Path) -> anyhow::Result<Self> {
        crate::cargo(&["build", "--release"].map(str::to_owned))?;
        let target = std::env::var_os("CARGO_TARGET_DIR");
        let target = target.map_or_else(|| root.join("target"), |target| root.join(target));
        let directory = PathBuf::from(format!("/dev/shm/pgmap-bench-{}", std::process::id()));
        fs::create_dir(&directory).context("/dev/shm")?;
        let ours = target.join("release/pgmap");
        let bench = Self { directory, ours };
        let image = bench.path("image");
        // Every block is there, and none is of zeros.
        let block: Vec<u8> = (0..1 << 20)
            .map(|at: u32| (at % 251 + 1).to_le_bytes()[0])
            .collect();
        let mut file = fs::File::create(&image)?;
        for _ in 0..BYTES >> 20 {
            std::io::Write::write_all(&mut file, &block)?;
        }
        for copy in ["file", "qemu"] {
            fs::copy(&image, bench.path(copy))?;
        }
        Ok(bench)
    }

    fn path(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }

    /// Ours first.
    fn servers(&self) -> anyhow::Result<Vec<Server>> {
        let socket = |name| self.path(&format!("{name}.socket"));
        let nbdkit = |name| {
            let mut command = Command::new("nbdkit");
            command.args(["-f", "--exit-with-parent", "-U", &socket(name)]);
            command
        };
        let mut ours = Command::new(&self.ours);
        ours.args([
            "serve",
            "--quiet",
            "--pmem",
            &format!("memory,size={BYTES}"),
        ]);
        ours.args(["--nbd", &format!("unix:{}", socket("ours"))]);
        ours.args(["--socket", &self.path("control")]);
        let mut file = nbdkit("nbdkit-file");
        file.args(["file", &self.path("file")]);
        let mut memory = nbdkit("nbdkit-memory");
        memory.args(["memory", &BYTES.to_string()]);
        let mut qemu = Command::new("qemu-nbd");
        qemu.args(["-t", "-f", "raw", "-e", "8", "--cache=writeback"]);
        qemu.args(["-k", &socket("qemu-nbd"), &self.path("qemu")]);
        let servers = [
            ("ours", ours),
            ("nbdkit-file", file),
            ("nbdkit-memory", memory),
            ("qemu-nbd", qemu),
        ];
        let servers = servers.into_iter().map(|(name, command)| {
            let server = Server::start(name, command, &socket(name))?;
            self.figure(Work::CopyIn, &server)?;
            Ok(server)
        });
        servers.collect()
    }

    fn figure(&self, work: Work, server: &Server) -> anyhow::Result<f64> {
        let uri = &*server.uri;
        let image = self.path("image");
        match work {
            Work::CopyOut => Ok(timed("nbdcopy", &[uri, "null:"])? * 1e3),
            Work::CopyIn => Ok(timed("nbdcopy", &[&image, uri])? * 1e3),
            Work::Fio(pattern, depth) => fio(pattern, depth, uri),
            Work::Qemu(access, size) => {
                let (count, size) = (REQUESTS.to_string(), size.to_string());
                let how = [
                    "bench", access, "-f", "raw", "-d", "32", "-c", &count, "-s", &size,
                ];
                let seconds = timed("qemu-img", &[&how[..], &[uri]].concat())?;
                Ok(seconds * 1e6 / f64::from(REQUESTS))
            }
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // What stays behind is memory: say so.
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            eprintln!("{}: {error}", self.directory.display());
        }
    }
}

impl Server {
    fn start(name: &'static str, mut command: Command, socket: &str) -> anyhow::Result<Self> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        let child = child.context(name)?;
        let uri = format!("nbd+unix:///?socket={socket}");
        let server = Self { name, child, uri };
        let begin = Instant::now();
        while !Path::new(socket).exists() {
            ensure!(begin.elapsed() < START, "{name} does not listen");
            thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // If it has ended already, this does nothing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Seconds that a program takes.
fn timed(program: &str, arguments: &[&str]) -> anyhow::Result<f64> {
    let begin = Instant::now();
    let output = Command::new(program)
        .args(arguments)
        .output()
        .context(program.to_owned())?;
    let seconds = begin.elapsed().as_secs_f64();
    if !output.status.success() {
        bail!("{program}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(seconds)
}

/// Microseconds per request.
fn fio(pattern: &str, depth: u32, uri: &str) -> anyhow::Result<f64> {
    let output = Command::new("fio")
        .args([
            "--name=nbd",
            "--ioengine=nbd",
            "--bs=4k",
            "--size=1G",
            FIO_BYTES,
        ])
        .args(["--output-format=json", &format!("--rw={pattern}")])
        .args([format!("--iodepth={depth}"), format!("--uri={uri}")])
        .output()
        .context("fio")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let json = text.find('{').map_or("", |start| &text[start..]);
    let report: Value = serde_json::from_str(json).context("fio's report")?;
    let iops = |kind: &str| report["jobs"][0][kind]["iops"].as_f64().unwrap_or(0.0);
    let iops = iops("read") + iops("write");
    ensure!(
        iops > 0.0,
        "fio did nothing: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(1e6 / iops)
}
