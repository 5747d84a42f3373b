//! `pgmap doctor`: what this machine allows, and how to mend what is missing.

use std::process::ExitCode;

use anyhow::bail;
use pgmap::probe::{Check, Finding, Need, checks};
use serde_json::json;

/// How the checks are printed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Format {
    Text,
    Json,
}

pub(crate) fn doctor(format: Format) -> anyhow::Result<ExitCode> {
    let checks = checks(&std::env::temp_dir());
    if format == Format::Json {
        let rows: Vec<_> = checks.iter().map(row).collect();
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        checks.iter().for_each(print);
    }
    let runs = checks.iter().all(Check::allows_run);
    if format == Format::Text {
        println!();
        println!(
            "{}",
            if runs {
                "`pgmap run` works here."
            } else {
                "`pgmap run` does not work here yet: see above."
            }
        );
    }
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

fn print(check: &Check) {
    println!(
        "{:<9} {:<28} {}",
        word(check.finding),
        check.name,
        check.seen
    );
    if let Some(mend) = check.mend {
        println!("{:<9} {:<28} -> {mend}", "", "");
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
