//! `cargo xtask`: what the repository does to itself.
//!
//! `test` builds and runs every test, `soak` runs those that can take longer for longer, `tidy` checks what no lint can, `asan` runs the tests of device memory under
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
        Some("soak") => soak(arguments.next().as_deref().unwrap_or("10")),
        Some("asan") => asan::asan(&root()),
        Some("dax") => dax::dax(&root()),
        Some("bench") => bench::bench(&root(), &arguments.collect::<Vec<_>>()),
        _ => {
            eprintln!(
                "usage: cargo xtask test [ARGUMENTS OF cargo test] | tidy | soak [MINUTES] | asan | dax | bench [--quick] [--write] [GROUP]"
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

/// The tests of real DMA for so many minutes each, which take seconds in `test`.
fn soak(minutes: &str) -> anyhow::Result<()> {
    let number: u64 = minutes.parse().context("soak for how many minutes?")?;
    let test = "test --release -p pgmap --test dma --test crash -- --nocapture";
    let arguments: Vec<_> = test.split(' ').map(str::to_owned).collect();
    cargo_with(&arguments, &[("PGMAP_SOAK_MINUTES", number.to_string())])
}

fn cargo(arguments: &[String]) -> anyhow::Result<()> {
    cargo_with(arguments, &[])
}

fn cargo_with(arguments: &[String], environment: &[(&str, String)]) -> anyhow::Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(arguments)
        .envs(environment.iter().map(|(key, value)| (*key, value)))
        .current_dir(root())
        .status();
    let status = status.context("cannot run cargo")?;
    if !status.success() {
        bail!("cargo {} failed", arguments.join(" "));
    }
    Ok(())
}
