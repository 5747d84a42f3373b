//! What the tests of `pgmap run` share: the command, programs compiled from C, and a plain run to compare with.
#![allow(
    clippy::unwrap_used,
    dead_code,
    reason = "each test uses a part of this, and fails where it should"
)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The library that is preloaded. It lies beside the command: `cargo xtask test` builds both.
pub(crate) fn library() -> PathBuf {
    let command = PathBuf::from(env!("CARGO_BIN_EXE_pgmap"));
    let library = command.with_file_name("libpgmap_preload.so");
    assert!(
        library.is_file(),
        "{} is missing: run the tests with `cargo xtask test`",
        library.display()
    );
    library
}

/// The command under test.
pub(crate) fn pgmap() -> Command {
    library();
    Command::new(env!("CARGO_BIN_EXE_pgmap"))
}

/// `pgmap run` with a budget and devices, `--quiet`, and the program that follows.
pub(crate) fn run(ram: &str, devices: &[&str]) -> Command {
    let mut command = pgmap();
    command.args(["run", "--quiet", "--ram", ram]);
    for device in devices {
        command.args(["--device", device]);
    }
    command.arg("--");
    command
}

/// Whether this machine can run programs in managed memory; says so if it cannot.
pub(crate) fn machine_can_run() -> bool {
    let able = pgmap().args(["doctor"]).output().unwrap().status.success();
    if !able {
        eprintln!("SKIPPED: this machine does not allow `pgmap run`; see `pgmap doctor`");
    }
    able
}

/// Compiles one of `tests/programs`.
pub(crate) fn compile(name: &str, directory: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/programs")
        .join(name)
        .with_extension("c");
    let program = directory.join(name);
    let gcc = Command::new("gcc")
        .args(["-O1", "-pthread", "-o"])
        .arg(&program)
        .arg(&source)
        .status()
        .unwrap();
    assert!(gcc.success(), "gcc could not compile {}", source.display());
    program
}

/// Standard output, after checking that the program ended well.
pub(crate) fn succeeded(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {errors}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}
