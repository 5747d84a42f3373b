//! `pgmap map`: a range of a namespace as memory, in this process or in a program's.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write, copy, stdin, stdout};
use std::os::fd::AsRawFd;
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use pgmap_server::control::protocol::{Answer, RangeOf, Request};

use super::args::MapArgs;
use super::find;

pub(super) fn map(args: &MapArgs) -> anyhow::Result<ExitCode> {
    let mut client = find::with(&args.whom, &args.namespace)?;
    let range = RangeOf {
        namespace: args.namespace.clone(),
        offset: args.offset,
        length: args.length,
    };
    let what = format!("cannot map {}", args.namespace);
    let answer = find::ask(&mut client, &Request::Map(range.clone()), &what)?;
    let Answer::Mapped { offset, length, .. } = answer else {
        return Err(find::unexpected(&answer));
    };
    let file = client.take_file().context("no file came with the answer")?;
    let file = File::from(file);
    if let Some(label) = &args.pin {
        let label = label.clone();
        find::ask(&mut client, &Request::Pin { range, label }, &what)?;
    }
    if !args.program.is_empty() {
        return run(args, &file, offset, length);
    }
    let mut own = reopen(&file, args)?;
    own.seek(SeekFrom::Start(offset))?;
    if args.write {
        write(&mut own, length)?;
    } else {
        match copy(&mut own.take(length), &mut stdout().lock()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(error).context("cannot copy to standard output")?;
            }
            _ => {}
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The same file with a place of our own: the manager and its other clients have that of the descriptor, and move it.
fn reopen(file: &File, args: &MapArgs) -> anyhow::Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let opened = File::options().read(true).write(args.write).open(path);
    opened.context("cannot open the file that came with the answer")
}

fn write(file: &mut File, length: u64) -> anyhow::Result<()> {
    let mut input = stdin().lock();
    copy(&mut Read::by_ref(&mut input).take(length), file).context("cannot write to the range")?;
    if input.read(&mut [0])? > 0 {
        bail!("standard input is longer than the range: the rest was not written");
    }
    file.flush()?;
    file.sync_data().context("cannot flush what was written")
}

/// The program has the file; we hold the mapping and the pins for it.
fn run(args: &MapArgs, file: &File, offset: u64, length: u64) -> anyhow::Result<ExitCode> {
    let (program, arguments) = args.program.split_first().context("no program")?;
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let status = Command::new(program)
        .args(arguments)
        .env("PGMAP_FILE", path)
        .env("PGMAP_OFFSET", offset.to_string())
        .env("PGMAP_LENGTH", length.to_string())
        .status()
        .with_context(|| format!("cannot run {}", program.display()))?;
    Ok(crate::supervisor::leave_as(status))
}
