//! A whole program whose data is two and four times its budget: under `pgmap run`, and natively with kernel swap on
//! zram under a limit of the same size.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use serde_json::Value;

use super::Effort;
use super::overhead;
use super::table::{Row, Table, Want, median};
use super::zram::{Limit, Peer};

/// Bytes of data, and the budgets.
pub(super) const DATA: u64 = 512 << 20;
pub(super) const BUDGETS: [u64; 2] = [256 << 20, 128 << 20];
/// The phases, and how much faster than the kernel each should be; on one CPU none may be slower.
const PHASES: [(&str, f64); 4] = [
    ("fill", 1.2),
    ("sequential read", 3.0),
    ("random read", 1.5),
    ("random write", 1.2),
];
const MIB: u64 = 1 << 20;
/// Bytes of swap that the peer has.
const SWAP: u64 = 4 << 30;

/// Microseconds per access, for each phase.
type Times = [f64; PHASES.len()];

/// Where a run may execute.
#[derive(Clone, Copy, Debug)]
enum Cpus {
    All,
    One,
}

pub(crate) fn measure(root: &Path, effort: Effort) -> anyhow::Result<Vec<Table>> {
    let bench = Bench::new(root)?;
    let mut tables = Vec::new();
    for cpus in [Cpus::All, Cpus::One] {
        let plain: Vec<_> = (0..effort.program_rounds)
            .map(|_| bench.plain(cpus))
            .collect::<Result<_, _>>()?;
        let plain = middle(&plain);
        for budget in BUDGETS {
            tables.push(bench.compare(effort, cpus, budget, &plain)?);
        }
    }
    tables.push(overhead::measure(&bench)?);
    Ok(tables)
}

/// The programs that take part.
#[derive(Debug)]
pub(super) struct Bench {
    pub(super) program: PathBuf,
    pgmap: PathBuf,
    pub(super) report: PathBuf,
}

impl Bench {
    fn new(root: &Path) -> anyhow::Result<Self> {
        let directory = super::directory(root)?;
        let program = super::compile(root, &directory, "bench_access")?;
        crate::cargo(&["build", "--release", "--quiet"].map(str::to_owned))?;
        Ok(Self {
            program,
            pgmap: directory.with_file_name("release").join("pgmap"),
            report: directory.join("report.json"),
        })
    }

    fn compare(
        &self,
        effort: Effort,
        cpus: Cpus,
        budget: u64,
        plain: &Times,
    ) -> anyhow::Result<Table> {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        let mut missing = None;
        for _ in 0..effort.program_rounds {
            ours.push(self.managed(cpus, budget)?);
            match Limit::set(budget, Some(SWAP))? {
                Peer::Ready(limit) => theirs.push(self.limited(cpus, &limit)?),
                Peer::Missing(reason) => missing = Some(reason),
            }
        }
        let mut notes = vec![format!(
            "Medians of {} rounds. With no limit at all: {}.",
            effort.program_rounds,
            PHASES
                .iter()
                .zip(plain)
                .map(|((name, _), us)| format!("{name} {us:.2} us"))
                .collect::<Vec<_>>()
                .join(", ")
        )];
        if let Some(reason) = missing {
            notes.push(format!("SKIPPED, the kernel's side: {reason}."));
        }
        let theirs = (!theirs.is_empty()).then(|| middle(&theirs));
        let rows = PHASES.iter().enumerate().zip(middle(&ours));
        let rows = rows.map(|((phase, (name, wanted)), ours)| Row {
            what: format!("{name}, per page"),
            ours,
            theirs: theirs.map(|theirs| theirs[phase]),
            unit: "us",
            want: Want::Faster(match cpus {
                Cpus::All => *wanted,
                Cpus::One => 1.0,
            }),
        });
        Ok(Table {
            title: format!(
                "A program with {} MiB of data in {} MiB, {}",
                DATA / MIB,
                budget / MIB,
                match cpus {
                    Cpus::All => "all CPUs",
                    Cpus::One => "one CPU",
                }
            ),
            against: "zram, lz4",
            rows: rows.collect(),
            notes,
        })
    }

    fn plain(&self, cpus: Cpus) -> anyhow::Result<Times> {
        times(&run(
            cpus,
            [self.program.clone().into(), DATA.to_string().into()],
        )?)
    }

    fn managed(&self, cpus: Cpus, budget: u64) -> anyhow::Result<Times> {
        let command = self.run_command(budget, [OsString::from("--quiet")]);
        times(&run(cpus, command)?)
    }

    /// `pgmap run` of the program.
    pub(super) fn run_command<const N: usize>(
        &self,
        budget: u64,
        more: [OsString; N],
    ) -> Vec<OsString> {
        let ram = budget.to_string();
        let head = [
            self.pgmap.as_os_str(),
            "run".as_ref(),
            "--ram".as_ref(),
            ram.as_ref(),
        ];
        let mut command: Vec<OsString> = head.map(Into::into).to_vec();
        command.extend(["--device", "compressed:2G"].map(Into::into));
        command.extend(more);
        command.extend([
            "--".into(),
            self.program.clone().into(),
            DATA.to_string().into(),
        ]);
        command
    }

    fn limited(&self, cpus: Cpus, limit: &Limit) -> anyhow::Result<Times> {
        let program = self.program.clone().into();
        times(&run(
            cpus,
            limit.command([program, DATA.to_string().into()]),
        )?)
    }
}

fn middle(runs: &[Times]) -> Times {
    core::array::from_fn(|phase| median(runs.iter().map(|times| times[phase]).collect()))
}

/// Runs a command and answers the line that it prints.
fn run(cpus: Cpus, command: impl IntoIterator<Item = OsString>) -> anyhow::Result<String> {
    let confined: &[&str] = match cpus {
        Cpus::All => &[],
        Cpus::One => &["taskset", "-c", "0"],
    };
    let mut words = confined.iter().map(Into::into).chain(command);
    let mut child = Command::new(words.next().context("no program")?);
    let output = child.args(words).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "{child:?}: {}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

fn times(line: &str) -> anyhow::Result<Times> {
    let line: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
    let mut times = [0.0; PHASES.len()];
    for (time, (name, _)) in times.iter_mut().zip(PHASES) {
        *time = line[name]
            .as_f64()
            .with_context(|| format!("no figure for {name}"))?;
    }
    Ok(times)
}
