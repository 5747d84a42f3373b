//! Random reads of a file four times as large as what may be of it in RAM.

use core::time::Duration;
use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use pgmap::{Memory, Prot};
use pgmap_core::addr::PAGE_SIZE;

use super::{MIB, Scratch, memory, seconds};
use crate::bench::Effort;
use crate::bench::floor::touch;
use crate::bench::table::{Row, Table, Want, median};
use crate::bench::zram::{Limit, Peer};

const BYTES: u64 = 128 * MIB;
const BUDGET: u64 = BYTES / 4;
/// Pages that are read in a round.
const ACCESSES: u64 = 24_576;
/// Reads that are not counted before them: until then all may be in RAM, or nothing.
const SETTLE: Duration = Duration::from_millis(1500);

pub(super) fn measure(root: &Path, directory: &Path, effort: Effort) -> anyhow::Result<Table> {
    let program = crate::bench::compile(root, directory, "bench_file")?;
    crate::cargo(&["build", "--release", "--quiet"].map(str::to_owned))?;
    let pgmap = directory.with_file_name("release").join("pgmap");
    let scratch = Scratch::new(directory, BYTES)?;
    let memory = memory(BUDGET)?;
    let read: [OsString; 3] = [
        program.into(),
        scratch.0.clone().into(),
        ACCESSES.to_string().into(),
    ];
    let (ram, budget) = ("--ram".into(), BUDGET.to_string().into());
    let options = [
        "--quiet",
        "--device",
        "compressed:64M",
        "--map-files",
        "1M",
        "--",
    ];
    let managed = [pgmap.into(), "run".into(), ram, budget].into_iter();
    let managed = managed
        .chain(options.map(OsString::from))
        .chain(read.clone());
    let managed: Vec<_> = managed.collect();
    let (mut library, mut run) = (Vec::new(), Vec::new());
    let (mut plain, mut advised) = (Vec::new(), Vec::new());
    let mut notes = vec![format!(
        "{ACCESSES} reads of a random page of a file of {} MiB, {} MiB of which may be in RAM; medians of {} rounds. The peer: the \
         kernel's mapping, in a process under a limit of as many bytes, for three \
         seconds at most. Each round begins with a second and a half of the same, which is not counted, so that budgets are kept.",
        BYTES / MIB,
        BUDGET / MIB,
        effort.rounds
    )];
    for _ in 0..effort.rounds {
        library.push(in_library(&memory, &scratch)?);
        scratch.drop_cache()?;
        run.push(printed(managed.clone())?);
        scratch.drop_cache()?;
        match Limit::set(BUDGET, None)? {
            Peer::Ready(limit) => {
                plain.push(printed(limit.command(read.clone()))?);
                scratch.drop_cache()?;
                let read = read.iter().cloned().chain(["random".into()]);
                advised.push(printed(limit.command(read))?);
                scratch.drop_cache()?;
            }
            Peer::Missing(reason) => notes.push(format!("SKIPPED, the kernel's side: {reason}.")),
        }
    }
    let row = |what: &str, ours: &[f64], theirs: &[f64]| Row {
        what: what.to_owned(),
        ours: median(ours.to_vec()),
        theirs: (!theirs.is_empty()).then(|| median(theirs.to_vec())),
        unit: "us",
        want: Want::Faster(1.0),
    };
    Ok(Table {
        title: "Random reads of a file 4 x the budget".to_owned(),
        against: "cgroup",
        rows: vec![
            row("`map_file`, a read", &library, &plain),
            row("the same, beside `MADV_RANDOM`", &library, &advised),
            row("`pgmap run --map-files`, a read", &run, &plain),
            row("the same, beside `MADV_RANDOM`", &run, &advised),
        ],
        notes,
    })
}

/// Microseconds for each read.
fn in_library(memory: &Memory, scratch: &Scratch) -> anyhow::Result<f64> {
    let file = memory.open(&scratch.0)?;
    let map = memory.space().map_file(&file, 0..BYTES, Prot::ReadWrite)?;
    let start = map.range().start;
    let pages = BYTES / PAGE_SIZE as u64;
    let mut nth = 0;
    let mut read = || {
        nth += 1;
        let page = usize::try_from(scramble(nth) % pages)?;
        // SAFETY: the page is mapped, and the pager answers.
        unsafe { touch(start + page * PAGE_SIZE) };
        anyhow::Ok(())
    };
    let began = Instant::now();
    while began.elapsed() < SETTLE {
        read()?;
    }
    let taken = seconds(|| (0..ACCESSES).try_for_each(|_| read()))?;
    #[allow(clippy::cast_precision_loss, reason = "a small number")]
    Ok(taken * 1e6 / ACCESSES as f64)
}

/// The same numbers as in the program.
const fn scramble(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Runs a command, and answers the figure that it prints.
fn printed(command: impl IntoIterator<Item = OsString>) -> anyhow::Result<f64> {
    let mut words = command.into_iter();
    let mut child = Command::new(words.next().context("no program")?);
    let output = child.args(words).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "{child:?}: {}", output.status);
    let figure = String::from_utf8(output.stdout)?;
    figure.trim().parse().with_context(|| figure)
}
