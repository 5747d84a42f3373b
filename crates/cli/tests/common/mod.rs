//! What the tests of `pgmap run` share: the command, programs compiled from C, and a plain run to compare with.
#![allow(
    clippy::unwrap_used,
    dead_code,
    reason = "each test uses a part of this, and fails where it should"
)]

use std::io::{Write as _, stderr};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;

/// The library that is preloaded. It lies beside the command; `cargo xtask test` builds both, `cargo test` alone only the command.
/// Without the library that belongs to it nearly all tests would fail, and none would say why: the first that asks ends them all.
pub(crate) fn library() -> PathBuf {
    static LIBRARY: LazyLock<PathBuf> = LazyLock::new(|| {
        let command = PathBuf::from(env!("CARGO_BIN_EXE_pgmap"));
        let library = command.with_file_name("libpgmap_preload.so");
        if is_built(&library) != Some(true) {
            // Not as a test's output, which would be lost here.
            let _ = writeln!(
                stderr(),
                "{} is missing, or older than its sources: run the tests with `cargo xtask test`, or `cargo build` \
                 first, with `--release` if the tests are",
                library.display()
            );
            std::process::exit(1);
        }
        library
    });
    LIBRARY.clone()
}

/// Whether a library is newer than all that cargo says it was made of, which is a rule as in a makefile. `None` if it, its rule or a
/// source is not there.
fn is_built(library: &Path) -> Option<bool> {
    let time = |path: &Path| path.metadata().and_then(|file| file.modified()).ok();
    let built = time(library)?;
    let rule = std::fs::read_to_string(library.with_extension("d")).ok()?;
    let (_, sources) = rule.split_once(": ")?;
    let sources = sources.replace("\\ ", "\0");
    for source in sources.split_whitespace() {
        if time(Path::new(&source.replace('\0', " ")))? > built {
            return Some(false);
        }
    }
    Some(true)
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
