//! The programs of the README do what it says.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::env;
use std::process::Command;

use common::{MIB, memory};

/// Runs an example, which lies beside the directory of this test.
fn run(name: &str) -> Option<String> {
    memory(2 * MIB)?;
    let here = env::current_exe().unwrap();
    let built = here.parent().unwrap().with_file_name("examples").join(name);
    if !built.is_file() {
        eprintln!("SKIPPED: {name} is not built: `cargo test` without `--test` builds it");
        return None;
    }
    let output = Command::new(built).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    Some(String::from_utf8(output.stdout).unwrap())
}

/// GUP-1, REF-7: more memory than RAM, with pages pinned in between.
#[test]
fn readme() {
    let Some(said) = run("readme") else { return };
    assert!(
        said.starts_with("rx ring holds 1024 KiB in RAM\n"),
        "{said}"
    );
}

/// GUP-4, WB-2: a socket is read into a file's pages, and a sync covers them while they are pinned.
#[test]
fn files() {
    let Some(said) = run("files") else { return };
    let pages = "257 pages on the disk, 256 of them pinned\n";
    assert!(said.starts_with(pages), "{said}");
}
