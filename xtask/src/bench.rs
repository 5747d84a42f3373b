//! `cargo xtask bench`: how fast, as ratios to the floor or the peer that was measured in the same run.
//!
//! Each group measures a few rows in several rounds, ours and the floor by turns. `--write` puts the tables into
//! `docs/benchmarks.md`. What must never happen here: a figure without what it is compared with.

mod counts;
mod device;
mod files;
mod floor;
mod nbd;
mod overhead;
mod pages;
mod pmem;
mod program;
mod table;
mod zram;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};

use table::Table;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    /// Rounds of a micro-benchmark.
    rounds: usize,
    /// Rounds of a whole program.
    program_rounds: usize,
}

const FULL: Effort = Effort {
    rounds: 9,
    program_rounds: 5,
};
const QUICK: Effort = Effort {
    rounds: 3,
    program_rounds: 1,
};

type Group = fn(&Path, Effort) -> anyhow::Result<Vec<Table>>;

/// The groups, by the names that the command line knows.
const GROUPS: [(&str, Group); 6] = [
    ("counts", |_, effort| counts::measure(effort)),
    ("pages", |_, effort| pages::measure(effort)),
    ("program", program::measure),
    ("nbd", nbd::measure),
    ("pmem", |_, effort| pmem::measure(effort)),
    ("files", files::measure),
];

/// Measures, prints tables, and with `--write` puts them into the document.
pub(crate) fn bench(root: &Path, arguments: &[String]) -> anyhow::Result<()> {
    let (mut effort, mut write, mut only) = (FULL, false, Vec::new());
    for argument in arguments {
        match argument.as_str() {
            "--quick" => effort = QUICK,
            "--write" => write = true,
            name if GROUPS.iter().any(|(known, _)| *known == name) => only.push(name),
            other => {
                bail!(
                    "bench [--quick] [--write] [counts] [pages] [program] [nbd] [pmem] [files]: what is \"{other}\"?"
                )
            }
        }
    }
    let chosen = |name| only.is_empty() || only.contains(&name);
    let mut sections = Vec::new();
    let machine = table::machine();
    println!("{machine}\n");
    for (name, group) in GROUPS.iter().filter(|(name, _)| chosen(name)) {
        let tables = group(root, effort)?;
        let text: Vec<_> = tables.iter().map(ToString::to_string).collect();
        let text = text.join("\n");
        println!("{text}");
        sections.push((*name, text));
    }
    if write {
        let command = ["cargo xtask bench"]
            .into_iter()
            .chain(arguments.iter().map(String::as_str));
        table::write(
            root,
            &command.collect::<Vec<_>>().join(" "),
            &machine,
            &sections,
        )?;
    }
    Ok(())
}

/// Where programs are built, and files made.
fn directory(root: &Path) -> anyhow::Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR");
    let target = target.map_or_else(|| root.join("target"), |target| root.join(target));
    let directory = target.join("bench");
    std::fs::create_dir_all(&directory)?;
    Ok(directory)
}

/// Builds a program of `tests/programs`.
fn compile(root: &Path, directory: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let program = directory.join(name);
    let source = root.join("tests/programs").join(format!("{name}.c"));
    let built = Command::new("gcc")
        .arg("-O2")
        .arg("-o")
        .arg(&program)
        .arg(source)
        .status();
    ensure!(built.context("gcc")?.success(), "gcc failed");
    Ok(program)
}
