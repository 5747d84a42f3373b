//! `cargo xtask asan`: the tests of device mappings and of persistent memory under `AddressSanitizer`, which ends them at the first
//! touch of memory that is gone.
//!
//! It needs a nightly compiler, and says so where there is none: that is no failure.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

/// The only machine that pgmap runs on; naming it keeps the sanitizer out of build scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What is run. The compressing devices are left out: their C code is built by another compiler, whose sanitizer does not go with Rust's.
const TESTS: [&[&str]; 2] = [
    &["-p", "pgmap-core", "--lib", "memremap"],
    &["-p", "pgmap-drivers", "--lib", "--test", "pmem_*"],
];

/// Runs the tests.
pub(crate) fn asan(root: &Path) -> anyhow::Result<()> {
    // Not by $CARGO: that is the stable one, which knows no `+nightly`.
    let mut probe = Command::new("cargo");
    probe.args(["+nightly", "--version"]);
    let found = probe.stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !found.is_ok_and(|status| status.success()) {
        println!("SKIPPED: AddressSanitizer needs nightly: rustup toolchain install nightly");
        return Ok(());
    }
    let target = std::env::var_os("CARGO_TARGET_DIR");
    let target = target.map_or_else(|| root.join("target"), Into::into);
    for tests in TESTS {
        let mut cargo = Command::new("cargo");
        cargo
            .args(["+nightly", "test", "--no-fail-fast", "--target", TARGET])
            .args(tests)
            .args(["--", "--skip", "compress"])
            .env("RUSTFLAGS", "-Zsanitizer=address")
            // A client that gets SIGBUS is what one of the tests is about, and some tests have machines that live for ever.
            .env("ASAN_OPTIONS", "handle_sigbus=0:detect_leaks=0")
            .env("CARGO_TARGET_DIR", target.join("asan"))
            // What rustup told us about the stable compiler.
            .env_remove("RUSTUP_TOOLCHAIN")
            .env_remove("RUSTC")
            .current_dir(root);
        let status = cargo.status().context("cannot run cargo")?;
        ensure!(status.success(), "a test failed under AddressSanitizer");
    }
    Ok(())
}
