//! `pgmap doctor`: what this machine allows, and how to mend what is missing.

use std::process::ExitCode;

use anyhow::bail;
use pgmap::probe::{Check, Finding, Need, checks};
use serde_json::json;

use crate::{output, run};

/// How the checks are printed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Format {
    Text,
    Json,
}

pub(crate) fn doctor(format: Format) -> anyhow::Result<ExitCode> {
    let mut checks = checks(&std::env::temp_dir());
    checks.push(library());
    let runs = checks.iter().all(Check::allows_run);
    let text = match format {
        Format::Json => {
            let rows: Vec<_> = checks.iter().map(row).collect();
            serde_json::to_string_pretty(&rows)? + "\n"
        }
        Format::Text => {
            let verdict = if runs {
                "`pgmap run` works here."
            } else {
                "`pgmap run` does not work here yet: see above."
            };
            let lines: String = checks.iter().map(line).collect();
            format!("{lines}\n{verdict}\n")
        }
    };
    output::print(text.as_bytes())?;
    Ok(if runs {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Refuses to run a program where it cannot work, with how to mend that.
pub(crate) fn refuse_if_hopeless() -> anyhow::Result<()> {
    match checks(&std::env::temp_dir())
        .into_iter()
        .find(|check| !check.allows_run())
    {
        Some(Check {
            name, seen, mend, ..
        }) => {
            bail!(
                "{name}: {seen}; {}",
                mend.unwrap_or("`pgmap doctor` says more")
            )
        }
        None => Ok(()),
    }
}

/// Whether what is preloaded is where `run` will look for it.
fn library() -> Check {
    let (finding, seen, mend) = match run::library() {
        Ok(path) => (Finding::Ok, path.display().to_string(), None),
        Err(error) => (Finding::Missing, error.to_string(), Some(run::LIBRARY_MEND)),
    };
    Check {
        name: "preloaded library",
        need: Need::Run,
        finding,
        seen,
        mend,
    }
}

fn line(check: &Check) -> String {
    let line = format!(
        "{:<9} {:<28} {}\n",
        word(check.finding),
        check.name,
        check.seen
    );
    match check.mend {
        Some(mend) => format!("{line}{:<9} {:<28} -> {mend}\n", "", ""),
        None => line,
    }
}

fn row(check: &Check) -> serde_json::Value {
    let need = match check.need {
        Need::Always => "always",
        Need::Run => "run",
        Need::Better => "better",
    };
    json!({
        "name": check.name,
        "finding": word(check.finding),
        "need": need,
        "seen": check.seen,
        "mend": check.mend,
    })
}

const fn word(finding: Finding) -> &'static str {
    match finding {
        Finding::Ok => "ok",
        Finding::Degraded => "degraded",
        Finding::Missing => "missing",
    }
}
