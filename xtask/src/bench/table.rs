//! A table of figures, for people and for `docs/benchmarks.md`.

use core::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Context;

/// What a figure should be.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Want {
    /// At most this many times the floor.
    AtMost(f64),
    /// The peer's figure is at least this many times ours.
    Faster(f64),
    /// At most this much, in the row's unit.
    Below(f64),
}

/// One figure beside what it is compared with.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) what: String,
    pub(crate) ours: f64,
    /// The floor's or the peer's figure, if there is one.
    pub(crate) theirs: Option<f64>,
    pub(crate) unit: &'static str,
    pub(crate) want: Want,
}

/// A figure judged: the ratio that counts, what is wanted, and whether it is met.
struct Verdict {
    ratio: String,
    wanted: String,
    met: Option<bool>,
}

impl Row {
    fn verdict(&self) -> Verdict {
        let slower = self.theirs.map(|theirs| self.ours / theirs);
        let (ratio, wanted, met) = match (self.want, slower) {
            (Want::AtMost(most), Some(slower)) => {
                let met = slower <= most;
                (
                    format!("{slower:.2} x"),
                    format!("at most {most} x"),
                    Some(met),
                )
            }
            (Want::Faster(least), Some(slower)) => {
                let faster = 1.0 / slower;
                let wanted = if least > 1.0 {
                    format!("{least} x as fast")
                } else {
                    "no slower".to_owned()
                };
                (
                    format!("{faster:.2} x as fast"),
                    wanted,
                    Some(faster >= least),
                )
            }
            (Want::Below(most), _) => {
                let met = self.ours <= most;
                (
                    String::new(),
                    format!("below {most} {}", self.unit),
                    Some(met),
                )
            }
            (Want::AtMost(_) | Want::Faster(_), None) => {
                ("not compared".to_owned(), String::new(), None)
            }
        };
        Verdict { ratio, wanted, met }
    }
}

/// Figures that belong together.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    pub(crate) title: String,
    /// What the rows are compared with.
    pub(crate) against: &'static str,
    pub(crate) rows: Vec<Row>,
    /// What a reader should know, a paragraph each.
    pub(crate) notes: Vec<String>,
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "### {}\n", self.title)?;
        for note in &self.notes {
            writeln!(f, "{note}\n")?;
        }
        if self.rows.is_empty() {
            return Ok(());
        }
        writeln!(
            f,
            "| what | pgmap | {} | ratio | wanted | met |",
            self.against
        )?;
        writeln!(f, "|---|---|---|---|---|---|")?;
        for row in &self.rows {
            let Verdict { ratio, wanted, met } = row.verdict();
            let theirs = row.theirs.map(|theirs| figure(theirs, row.unit));
            let met = met.map_or("", |met| if met { "yes" } else { "**no**" });
            let ours = figure(row.ours, row.unit);
            let theirs = theirs.unwrap_or_default();
            writeln!(
                f,
                "| {} | {ours} | {theirs} | {ratio} | {wanted} | {met} |",
                row.what
            )?;
        }
        Ok(())
    }
}

fn figure(value: f64, unit: &str) -> String {
    let digits = match value.abs() {
        value if value < 10.0 => 2,
        value if value < 100.0 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {unit}")
}

/// The middle of some figures; 0 if there are none.
pub(crate) fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_unstable_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(0.0)
}

/// One line about this machine.
pub(crate) fn machine() -> String {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        let value = line.and_then(|line| line.split_once(':'));
        value
            .map(|(_, value)| value.trim().to_owned())
            .unwrap_or_default()
    };
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = field(&read("/proc/meminfo"), "MemTotal");
    let kernel = read("/proc/sys/kernel/osrelease");
    let model = field(&read("/proc/cpuinfo"), "model name");
    let load = read("/proc/loadavg");
    let load = load.split(' ').next().unwrap_or_default();
    format!(
        "{cpus} CPUs, {model}, {memory} of memory, Linux {}, load average before {load}",
        kernel.trim()
    )
}

const BEGIN: &str = "<!-- measured: ";
const END: &str = "<!-- end -->";

/// Replaces the measured sections of the document, each between its two marks.
pub(crate) fn write(
    root: &Path,
    command: &str,
    machine: &str,
    sections: &[(&str, String)],
) -> anyhow::Result<()> {
    let path = root.join("docs/benchmarks.md");
    let mut document = fs::read_to_string(&path).context("docs/benchmarks.md")?;
    let date = Command::new("date").args(["-u", "+%Y-%m-%d"]).output()?;
    let date = String::from_utf8_lossy(&date.stdout);
    let head = format!("`{command}`, {}, on {}.", date.trim(), machine);
    for (name, text) in sections {
        document = replace(&document, name, &format!("{head}\n\n{text}"))
            .with_context(|| format!("docs/benchmarks.md has no section \"{name}\""))?;
    }
    fs::write(&path, document)?;
    println!("written: docs/benchmarks.md");
    Ok(())
}

fn replace(document: &str, name: &str, text: &str) -> Option<String> {
    let mark = format!("{BEGIN}{name} -->\n");
    let start = document.find(&mark)? + mark.len();
    let end = start + document[start..].find(END)?;
    Some(format!(
        "{}\n{}\n{}",
        &document[..start],
        text.trim_end(),
        &document[end..]
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(ours: f64, theirs: Option<f64>, want: Want) -> Row {
        let what = "a".to_owned();
        let unit = "ns";
        Row {
            what,
            ours,
            theirs,
            unit,
            want,
        }
    }

    /// A figure that misses its budget says so.
    #[test]
    fn budgets_are_judged() {
        let met = |ours, theirs, want| row(ours, theirs, want).verdict().met;
        assert_eq!(met(11.0, Some(10.0), Want::AtMost(1.1)), Some(true));
        assert_eq!(met(12.0, Some(10.0), Want::AtMost(1.1)), Some(false));
        assert_eq!(met(5.0, Some(10.0), Want::Faster(2.0)), Some(true));
        assert_eq!(met(6.0, Some(10.0), Want::Faster(2.0)), Some(false));
        assert_eq!(met(2.1, None, Want::Below(2.0)), Some(false));
        assert_eq!(met(2.1, None, Want::Faster(2.0)), None);
    }

    /// Only the named section of the document changes.
    #[test]
    fn sections_are_replaced() {
        let document =
            "a\n<!-- measured: x -->\nold\n<!-- end -->\nb\n<!-- measured: y -->\n<!-- end -->\n";
        let new = replace(document, "x", "new\n").unwrap();
        assert_eq!(
            new,
            "a\n<!-- measured: x -->\n\nnew\n<!-- end -->\nb\n<!-- measured: y -->\n<!-- end -->\n"
        );
        assert!(replace(document, "z", "new").is_none());
    }
}
