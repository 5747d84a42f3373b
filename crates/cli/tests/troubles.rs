//! What people see when something goes wrong: devices that fail, signals, and bad input.
//!
//! `cargo xtask test` builds what these need.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use core::time::Duration;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::{compile, machine_can_run, pgmap, run};

/// Writes and reads 64 MiB; prints what it found, page errors included.
const TOUCH: &str = "
import mmap, random, sys
n = 64 << 20
m = mmap.mmap(-1, n, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
r = random.Random(1)
blocks = [r.randbytes(4096) for _ in range(64)]
for p in range(n // 4096): m[p * 4096:p * 4096 + 4096] = blocks[p % 64]
for p in range(n // 4096): assert m[p * 4096:p * 4096 + 4096] == blocks[p % 64], p
print('ok')
";

fn touch(devices: &[&str]) -> Output {
    let mut command = pgmap();
    command.args(["run", "--ram", "16M"]);
    for device in devices {
        command.args(["--device", device]);
    }
    // The interpreter itself, not a wrapper that may stand for it in PATH.
    command
        .args(["--", "/usr/bin/python3", "-c", TOUCH])
        .output()
        .unwrap()
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// FLT-1: a page that its device cannot read gets SIGBUS, and the summary says why.
#[test]
fn a_failing_read_is_a_bus_error() {
    if !machine_can_run() {
        return;
    }
    let output = touch(&["faulty:load-error@after=100:compressed:1G"]);
    assert_eq!(
        output.status.signal(),
        Some(libc::SIGBUS),
        "{}",
        errors(&output)
    );
    assert!(
        errors(&output).contains("could not be read"),
        "{}",
        errors(&output)
    );
}

/// A corrupted page is an error, never wrong bytes.
#[test]
fn a_corrupted_page_is_a_bus_error() {
    if !machine_can_run() {
        return;
    }
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let file = directory.path().join("cold");
    let output = touch(&[&format!(
        "faulty:corrupt@after=100:file:{},size=1G",
        file.display()
    )]);
    assert_eq!(
        output.status.signal(),
        Some(libc::SIGBUS),
        "{}",
        errors(&output)
    );
}

/// A page that its device cannot write stays in RAM, and goes to the next device.
#[test]
fn a_failing_write_loses_nothing() {
    if !machine_can_run() {
        return;
    }
    let output = touch(&["faulty:store-error@every=3:compressed:1G", "compressed:1G"]);
    assert!(output.status.success(), "{}", errors(&output));
    assert!(
        errors(&output).contains("could not be written"),
        "{}",
        errors(&output)
    );
}

/// Nowhere to go: the program is killed, as by a full machine, and the summary says so.
#[test]
fn a_full_machine_kills_the_program_and_says_so() {
    if !machine_can_run() {
        return;
    }
    let output = touch(&["compressed:8M"]);
    assert_eq!(
        output.status.signal(),
        Some(libc::SIGKILL),
        "{}",
        errors(&output)
    );
    assert!(
        errors(&output).contains("out of memory"),
        "{}",
        errors(&output)
    );
    assert!(
        errors(&output).contains("RAM and every device full"),
        "{}",
        errors(&output)
    );
}

/// Exit status and signals are the program's.
#[test]
fn the_program_decides_how_it_ends() {
    if !machine_can_run() {
        return;
    }
    for (script, code, signal) in [
        ("exit 0", Some(0), None),
        ("exit 42", Some(42), None),
        ("kill -TERM $$", None, Some(15)),
        ("kill -SEGV $$", None, Some(11)),
    ] {
        let output = run("8M", &[]).args(["sh", "-c", script]).output().unwrap();
        assert_eq!(
            (output.status.code(), output.status.signal()),
            (code, signal),
            "{script}"
        );
    }
}

/// A signal that is sent to pgmap reaches the program; killing the program leaves nothing behind.
#[test]
fn signals_are_passed_on_and_nothing_stays_behind() {
    if !machine_can_run() {
        return;
    }
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let device = format!("file:{},size=64M", directory.path().join("cold").display());
    let script = "trap 'echo got it; exit 3' TERM; echo ready; while :; do sleep 0.05; done";
    let mut child = run("8M", &[&device])
        .args(["sh", "-c", script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(700));
    let pid = i32::try_from(child.id()).unwrap();
    // SAFETY: the process is our child, which we have not waited for.
    unsafe { libc::kill(pid, libc::SIGTERM) };
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "ready\ngot it\n");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    child = run("8M", &[&device])
        .args(["sh", "-c", "kill -KILL $$"])
        .spawn()
        .unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

/// SIGTSTP stops pgmap with its program, SIGCONT lets both go on.
#[test]
fn stopping_and_continuing_works() {
    if !machine_can_run() {
        return;
    }
    let script = "echo a; kill -TSTP $$; echo b";
    let mut child = run("8M", &[])
        .args(["sh", "-c", script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    let mut status = 0;
    // SAFETY: the process is our child; the status can be written.
    let waited = unsafe { libc::waitpid(pid, &raw mut status, libc::WUNTRACED) };
    assert_eq!((waited, libc::WIFSTOPPED(status)), (pid, true));
    // SAFETY: as above.
    unsafe { libc::kill(pid, libc::SIGCONT) };
    let output = child.stdout.take().unwrap();
    assert_eq!(std::io::read_to_string(output).unwrap(), "a\nb\n");
    assert!(child.wait().unwrap().success());
}

/// Every mistake gets one line that says what to do, and the exit status that shells use.
#[test]
#[allow(clippy::too_many_lines, reason = "a table")]
fn every_mistake_gets_one_clear_line() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path().display().to_string();
    let in_directory = format!("file:{here},size=1G");
    let unwritable = "file:/proc/cold,size=1G".to_owned();
    let too_large = format!("file:{here}/cold,size=8T");
    let text = directory.path().join("text");
    std::fs::write(&text, "hello").unwrap();
    let not_executable = text.display().to_string();
    let cases: &[(&[&str], i32, &str)] = &[
        (&["run", "--ram", "64Q", "--", "true"], 2, "64Q"),
        (&["run", "--ram", "0", "--", "true"], 2, "ram"),
        (&["run", "--ram", "1M", "--", "true"], 2, "4M"),
        (&["run", "--ram", "64", "--", "true"], 2, "4M"),
        (&["run", "--ram", "1.5G", "--", "true"], 2, "whole number"),
        (
            &["run", "--ram", "64M", "--device", "compressed:0.5G"],
            2,
            "whole number",
        ),
        (&["run", "--ram", "900000T", "--", "true"], 2, "less"),
        (&["run", "--", "true"], 2, "--ram"),
        (
            &["run", "--ram", "64M", "--device", "tape:1G", "--", "true"],
            2,
            "tape",
        ),
        (
            &[
                "run",
                "--ram",
                "64M",
                "--device",
                "compressed:1G,colour=red",
                "--",
                "true",
            ],
            2,
            "colour",
        ),
        (
            &[
                "run",
                "--ram",
                "64M",
                "--device",
                "file:/var/tmp/x",
                "--",
                "true",
            ],
            2,
            "size",
        ),
        (
            &[
                "run",
                "--ram",
                "64M",
                "--device",
                &in_directory,
                "--",
                "true",
            ],
            2,
            "is a directory",
        ),
        (
            &["run", "--ram", "64M", "--device", &unwritable, "--", "true"],
            2,
            "/proc/cold",
        ),
        (
            &["run", "--ram", "64M", "--device", &too_large, "--", "true"],
            2,
            "size",
        ),
        (
            &["run", "--ram", "64M", "--frobnicate", "--", "true"],
            2,
            "frobnicate",
        ),
        (
            &[
                "run",
                "--ram",
                "64M",
                "--report",
                "/proc/report",
                "--",
                "true",
            ],
            2,
            "/proc/report",
        ),
        (
            &["run", "--ram", "64M", "--", "no-such-program"],
            127,
            "no-such-program",
        ),
        (
            &["run", "--ram", "64M", "--", "/no/such/program"],
            127,
            "/no/such/program",
        ),
        (&["run", "--ram", "64M", "--", &not_executable], 126, "text"),
        (&["run", "--ram", "64M", "--", "/"], 126, "/"),
        (&["walk"], 2, "walk"),
    ];
    for (arguments, status, word) in cases {
        let output = pgmap().args(*arguments).output().unwrap();
        let errors = errors(&output);
        assert_eq!(
            output.status.code(),
            Some(*status),
            "{arguments:?}: {errors}"
        );
        assert_eq!(errors.lines().count(), 1, "{arguments:?}: {errors}");
        assert!(
            errors.starts_with("pgmap: ") && errors.contains(word),
            "{arguments:?}: {errors}"
        );
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
}

/// A program that cannot be preloaded is refused before it runs.
#[test]
fn a_static_program_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("hello.c");
    let program = directory.path().join("hello");
    std::fs::write(
        &source,
        "#include <stdio.h>\nint main(void) { puts(\"ran\"); }\n",
    )
    .unwrap();
    let gcc = Command::new("gcc")
        .args(["-static", "-o"])
        .arg(&program)
        .arg(&source)
        .status();
    if !gcc.unwrap().success() {
        eprintln!("SKIPPED: no static C library here");
        return;
    }
    let script = directory.path().join("script");
    std::fs::write(&script, format!("#!{}\n", program.display())).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&script, mode).unwrap();
    for refused in [&program, &script] {
        let output = run("8M", &[]).arg(refused).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(
            errors(&output).contains("statically linked"),
            "{}",
            errors(&output)
        );
        assert!(output.stdout.is_empty());
    }
}

/// The report has what the summary has, in fields with units.
#[test]
fn the_report_is_json_with_units() {
    if !machine_can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let report = directory.path().join("report.json");
    let program = compile("threads", directory.path());
    let output = pgmap()
        .args(["run", "--ram", "8M", "--report"])
        .arg(&report)
        .arg("--")
        .arg(program)
        .args(["8", "1"])
        .output()
        .unwrap();
    assert!(output.status.success() && errors(&output).contains("resident"));
    let report: serde_json::Value = read_json(&report);
    assert_eq!(report["ram_budget_bytes"], 8 << 20);
    assert!(report["peak_resident_bytes"].as_u64().unwrap() <= 8 << 20);
    assert!(report["counters"]["pages_stored"].as_u64().unwrap() > 1000);
    assert_eq!(report["exit_code"], 0);
}

fn read_json(path: &Path) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Help, man pages and completions come from one definition.
#[test]
fn help_man_and_completions_agree() {
    let directory = tempfile::tempdir().unwrap();
    let help = pgmap().args(["run", "--help"]).output().unwrap();
    assert!(String::from_utf8_lossy(&help.stdout).contains("--progress"));
    assert!(
        pgmap()
            .args(["man", "--out"])
            .arg(directory.path())
            .status()
            .unwrap()
            .success()
    );
    let page = std::fs::read_to_string(directory.path().join("pgmap-run.1")).unwrap();
    assert!(page.contains("progress"));
    let completions = pgmap().args(["completions", "bash"]).output().unwrap();
    assert!(String::from_utf8_lossy(&completions.stdout).contains("progress"));
}
