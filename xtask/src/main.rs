//! `cargo xtask`: what the repository does to itself.
//!
//! `test` builds and runs every test, `tidy` checks what no lint can, `asan` runs the tests of device memory under
//! `AddressSanitizer`, `dax` tests on persistent memory in a virtual machine, `bench` measures.

mod asan;
mod bench;
mod dax;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let result = match arguments.next().as_deref() {
        Some("test") => test(arguments.collect()),
        Some("tidy") => tidy::tidy(&root()),
        Some("asan") => asan::asan(&root()),
        Some("dax") => dax::dax(&root()),
        Some("bench") => bench::bench(&root(), &arguments.collect::<Vec<_>>()),
        _ => {
            eprintln!(
                "usage: cargo xtask test [ARGUMENTS OF cargo test] | tidy | asan | dax | bench [--quick] [--write] [GROUP]"
            );
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The repository.
fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// Every test. The tests of `pgmap run` need the command and the library that it preloads, so these are built first.
fn test(arguments: Vec<String>) -> anyhow::Result<()> {
    cargo(&["build", "--release"].map(str::to_owned))?;
    let mut test = ["test", "--release", "--workspace"]
        .map(str::to_owned)
        .to_vec();
    test.extend(arguments);
    cargo(&test)
}

fn cargo(arguments: &[String]) -> anyhow::Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(arguments)
        .current_dir(root())
        .status();
    let status = status.context("cannot run cargo")?;
    if !status.success() {
        bail!("cargo {} failed", arguments.join(" "));
    }
    Ok(())
}
