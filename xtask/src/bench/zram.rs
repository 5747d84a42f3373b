//! The peer: the kernel under a cgroup's memory limit, with swap on zram with lz4 if that is wanted.
//!
//! A shell script sets it up and waits; it puts everything back when its input ends, however this process ends. What must
//! never happen here: swap or a cgroup that stays behind.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::Context;

const SCRIPT: &str = include_str!("zram.sh");

/// A memory limit, until it is dropped.
#[derive(Debug)]
pub(crate) struct Limit {
    keeper: Child,
    /// Who writes its process number there is limited.
    members: PathBuf,
}

/// Whether the peer can be had here.
#[derive(Debug)]
pub(crate) enum Peer {
    Ready(Limit),
    /// Why not.
    Missing(String),
}

impl Limit {
    /// Sets a limit of `bytes` bytes up, with so many bytes of swap behind it.
    pub(crate) fn set(bytes: u64, swap_bytes: Option<u64>) -> anyhow::Result<Peer> {
        let mut keeper = Command::new("bash")
            .args(["-c", SCRIPT, "zram.sh"])
            .args([bytes, swap_bytes.unwrap_or(0)].map(|bytes| bytes.to_string()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("bash")?;
        let output = keeper.stdout.take().context("no pipe")?;
        let mut answer = String::new();
        BufReader::new(output).read_line(&mut answer)?;
        match answer.trim().split_once(' ') {
            Some(("ready", members)) => Ok(Peer::Ready(Self {
                keeper,
                members: members.into(),
            })),
            other => {
                keeper.wait()?;
                let reason = other.map_or("the set-up said nothing", |(_, reason)| reason);
                Ok(Peer::Missing(reason.to_owned()))
            }
        }
    }

    /// A command, as it is to be run under the limit.
    pub(crate) fn command(&self, command: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
        const ENTER: &str = r#"echo $$ >"$1" && shift && exec "$@""#;
        let shell = ["sh", "-c", ENTER, "sh"].map(OsString::from);
        let members = [self.members.clone().into()];
        shell.into_iter().chain(members).chain(command).collect()
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        // If the pipe is broken the keeper is at it already.
        if let Some(mut input) = self.keeper.stdin.take() {
            let _ = input.write_all(b"done\n");
        }
        let _ = self.keeper.wait();
    }
}
