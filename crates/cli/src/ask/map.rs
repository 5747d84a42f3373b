//! `pgmap map`: a range of a namespace as memory, in this process or in a program's.

use core::ops::Range;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write, stdin, stdout};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread;

use anyhow::{Context, bail};
use pgmap_host::shared::SharedFrames;
use pgmap_server::control::Client;
use pgmap_server::control::protocol::{Answer, BadBlocks, RangeOf, Request};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::args::MapArgs;
use super::find;
use crate::program::{self, Refusal};
use crate::supervisor;

/// Bytes that are copied at once.
const CHUNK_BYTES: usize = 1 << 20;

pub(super) fn map(args: &MapArgs) -> anyhow::Result<ExitCode> {
    let program = match args.program.first().map(|name| program::find(name)) {
        Some(Err(refusal)) => return Ok(refusal.tell()),
        Some(Ok(path)) => Some(path),
        None => None,
    };
    let mut client = find::with(&args.whom, &args.namespace)?;
    let range = RangeOf {
        namespace: args.namespace.clone(),
        offset: args.offset,
        length: args.length,
    };
    let what = format!("cannot map {}", args.namespace);
    let answer = find::ask(&mut client, &Request::Map(range.clone()), &what)?;
    let Answer::Mapped { id, offset, length } = answer else {
        return Err(find::unexpected(&answer));
    };
    let file = client.take_file().context("no file came with the answer")?;
    let file = File::from(file);
    if let Some(label) = &args.pin {
        let label = label.clone();
        find::ask(&mut client, &Request::Pin { range, label }, &what)?;
    }
    if let Some(program) = program {
        let held = Held { client, id };
        return Ok(run(&program, args, &file, offset..offset + length, held));
    }
    let mut held = Held { client, id };
    let end = offset + length;
    // The file's own calls move the place of a descriptor that the manager and its other clients have, too; and some files have none.
    let frames = SharedFrames::of_file(file.into(), end).context("cannot map the range")?;
    if args.write {
        write(&frames, offset..end, &mut held)?;
    } else {
        read(&frames, offset..end, &mut held)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The mapping, as the manager holds it for us.
struct Held {
    client: Client,
    id: u64,
}

impl Held {
    /// Which of the mapped blocks are lost, of which nobody has told us yet (WB-6).
    fn lost(&mut self) -> anyhow::Result<Vec<BadBlocks>> {
        let (id, wait) = (self.id, false);
        self.ask(&Request::Lost { id, wait })
    }

    /// The same, and waits until some are.
    fn wait_for_lost(&mut self) -> anyhow::Result<Vec<BadBlocks>> {
        let (id, wait) = (self.id, true);
        self.ask(&Request::Lost { id, wait })
    }

    fn ask(&mut self, request: &Request) -> anyhow::Result<Vec<BadBlocks>> {
        let answer = self.client.ask(request)?;
        let Answer::Lost(blocks) = answer else {
            return Err(find::unexpected(&answer));
        };
        Ok(blocks)
    }

    /// Says so if what was just copied may be lost.
    fn check(&mut self) -> anyhow::Result<()> {
        match self.lost()?.first() {
            None => Ok(()),
            Some(lost) => bail!(
                "block {} is bad since it was mapped: write all of it over NBD, or give its bytes up with clear-error",
                lost.offset
            ),
        }
    }
}

/// Copies a range to standard output, as far as somebody reads it.
fn read(frames: &SharedFrames, range: Range<u64>, held: &mut Held) -> anyhow::Result<()> {
    let (mut output, mut bytes) = (stdout().lock(), vec![0; CHUNK_BYTES]);
    let mut at = range.start;
    while at < range.end {
        let part = part(&mut bytes, range.end - at);
        frames.read(at, part).context("cannot read the range")?;
        // Afterwards: what is lost since is not in here.
        held.check()?;
        match output.write_all(part) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            written => written.context("cannot copy to standard output")?,
        }
        at += part.len() as u64;
    }
    output.flush().context("cannot copy to standard output")
}

/// Copies standard input to the start of a range, durably. What was copied before an error is durable, too.
fn write(frames: &SharedFrames, range: Range<u64>, held: &mut Held) -> anyhow::Result<()> {
    let copied = copy(frames, range, held);
    frames.flush().context("cannot flush what was written")?;
    copied
}

fn copy(frames: &SharedFrames, range: Range<u64>, held: &mut Held) -> anyhow::Result<()> {
    let (mut input, mut bytes) = (stdin().lock(), vec![0; CHUNK_BYTES]);
    let mut at = range.start;
    while at < range.end {
        let part = part(&mut bytes, range.end - at);
        let count = input.read(part).context("cannot read standard input")?;
        if count == 0 {
            break;
        }
        let written = frames.write(at, &part[..count]);
        written.context("cannot write to the range")?;
        held.check()?;
        at += count as u64;
    }
    if input.read(&mut [0])? > 0 {
        let bytes = range.end - range.start;
        bail!(
            "standard input is longer than the range: its first {bytes} bytes are written and durable, the rest is not"
        );
    }
    Ok(())
}

/// As much of a buffer as there is to be moved.
fn part(bytes: &mut [u8], left: u64) -> &mut [u8] {
    let len = usize::try_from(left).map_or(bytes.len(), |left| left.min(bytes.len()));
    &mut bytes[..len]
}

/// The program has the file; we hold the mapping and the pins for it, and tell it of lost bytes.
fn run(path: &Path, args: &MapArgs, file: &File, range: Range<u64>, held: Held) -> ExitCode {
    let place = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let words = &args.program;
    let child = Command::new(path)
        .arg0(words.first().map_or(path.as_os_str(), OsString::as_os_str))
        .args(words.iter().skip(1))
        .env("PGMAP_FILE", place)
        .env("PGMAP_OFFSET", range.start.to_string())
        .env("PGMAP_LENGTH", (range.end - range.start).to_string())
        .spawn();
    let status = child.and_then(|mut child| {
        // If there is none, the machine has no descriptors left, and the program has other troubles.
        if let Ok(program) = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            let namespace = args.namespace.clone();
            thread::spawn(move || tell(&program, &namespace, held));
            child.wait()
        } else {
            let status = child.wait();
            drop(held);
            status
        }
    });
    match status {
        Ok(status) => supervisor::leave_as(status),
        Err(error) => Refusal::not_started(path, &error).tell(),
    }
}

/// Sends the program SIGBUS whenever blocks that it maps are lost, until the manager is gone. Nobody can see which pages it touches, so
/// it gets the signal for all of them, as for a memory failure of the machine.
fn tell(program: &OwnedFd, namespace: &str, mut held: Held) {
    while let Ok(lost) = held.wait_for_lost() {
        for BadBlocks { offset, length } in &lost {
            eprintln!(
                "pgmap: {namespace}: {length} blocks from {offset} on are bad since they were mapped: the program gets SIGBUS"
            );
        }
        if !lost.is_empty() {
            // It may have ended meanwhile.
            let _ = pidfd_send_signal(program, Signal::BUS);
        }
    }
}
