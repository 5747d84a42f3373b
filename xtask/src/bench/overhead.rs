//! What the pager itself keeps in RAM: everything that is resident in a managed program, less its managed pages, what its
//! device holds, and what the program has without us.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use serde_json::Value;

use super::program::{BUDGETS, Bench, DATA};
use super::table::{Row, Table, Want};

/// What is resident in a process, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Resident {
    /// Registered with userfaultfd: the arena and the staging area.
    managed: f64,
    other: f64,
}

pub(crate) fn measure(bench: &Bench) -> anyhow::Result<Table> {
    let report = [
        "--quiet".into(),
        "--report".into(),
        bench.report.clone().into(),
    ];
    let ours = at_end(bench.run_command(BUDGETS[0], report))?;
    let plain = at_end(vec![bench.program.clone().into(), DATA.to_string().into()])?;
    let report: Value = serde_json::from_slice(&fs::read(&bench.report)?)?;
    let held = report["devices"][0]["peak_bytes"]
        .as_f64()
        .context("no peak_bytes")?
        / 1024.0;
    #[allow(clippy::cast_precision_loss, reason = "a number for people")]
    let data = DATA as f64 / 1024.0;
    let pager = ours.other - held - (plain.other - data);
    let row = Row {
        what: "resident beside managed pages and the device's bytes".to_owned(),
        ours: pager * 100.0 / data,
        theirs: None,
        unit: "% of the data",
        want: Want::Below(2.0),
    };
    Ok(Table {
        title: "What the pager itself takes".to_owned(),
        against: "",
        rows: vec![row],
        notes: vec![format!(
            "At the end of one run with {} MiB in {} MiB: {:.1} MiB are resident in managed areas, {:.1} elsewhere, of which \
             the device's pages take {:.1} and the program itself {:.1}.",
            DATA >> 20,
            BUDGETS[0] >> 20,
            ours.managed / 1024.0,
            ours.other / 1024.0,
            held / 1024.0,
            (plain.other - data) / 1024.0,
        )],
    })
}

/// Runs the program to its end and looks at its memory before it exits.
fn at_end(command: Vec<OsString>) -> anyhow::Result<Resident> {
    let mut words = command.into_iter().chain(["wait".into()]);
    let mut child = Command::new(words.next().context("no program")?)
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let output = child.stdout.take().context("no pipe")?;
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line)?;
    let line: Value = serde_json::from_str(&line).with_context(|| line.clone())?;
    let pid = line["pid"].as_u64().context("no pid")?;
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    drop(child.stdin.take());
    ensure!(child.wait()?.success(), "the program failed");
    Ok(resident(&maps))
}

fn resident(maps: &str) -> Resident {
    let (mut resident, mut kib) = (Resident::default(), 0.0);
    for line in maps.lines() {
        if let Some(rss) = line.strip_prefix("Rss:") {
            let rss = rss.trim().trim_end_matches(" kB");
            kib = rss.parse().unwrap_or(0.0);
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            // `um`: missing pages are a userfaultfd's.
            if flags.split(' ').any(|flag| flag == "um") {
                resident.managed += kib;
            } else {
                resident.other += kib;
            }
        }
    }
    resident
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only what is registered with userfaultfd counts as managed.
    #[test]
    fn managed_areas_are_told_from_others() {
        let maps = "1-2 rw-p\nRss:    100 kB\nVmFlags: rd wr um uw\n2-3 rw-p\nRss:    23 kB\nVmFlags: rd wr\n";
        let expected = Resident {
            managed: 100.0,
            other: 23.0,
        };
        assert_eq!(resident(maps), expected);
    }
}
