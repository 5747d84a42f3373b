//! The command itself: what it says, how it ends, and that neither depends on who listens.
//!
//! `cargo xtask test` builds what these need.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use core::time::Duration;
use std::fs::{self, OpenOptions, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use common::{machine_can_run, pgmap, run};

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn script(directory: &Path, name: &str, text: &str) -> PathBuf {
    let path = directory.join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    path
}

/// The letter by which the kernel shows what a process does; `T` if it is stopped.
fn state(pid: u32) -> char {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after_name = stat.rsplit_once(") ").unwrap().1;
    after_name.chars().next().unwrap()
}

fn becomes(pid: u32, wanted: char) -> bool {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        if state(pid) == wanted {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

fn signal(pid: u32, signal: i32) {
    // SAFETY: the process is our child or its child, and has not been waited for.
    unsafe { libc::kill(i32::try_from(pid).unwrap(), signal) };
}

/// The exit status is the program's, even if the summary and the report can be written nowhere.
#[test]
fn nobody_who_listens_is_no_failure() {
    if !machine_can_run() {
        return;
    }
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = pgmap();
    command.args(["run", "--ram", "8M", "--report", "/dev/full", "--"]);
    command.args(["sh", "-c", "exit 5"]).stderr(full);
    assert_eq!(command.status().unwrap().code(), Some(5));
}

/// A reader that has seen enough is no error; a full disk is one.
#[test]
fn output_that_is_not_read_is_no_failure() {
    for verb in [&["completions", "bash"][..], &["doctor", "--json"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = pgmap().args(verb).stdout(writer).output().unwrap();
        assert_eq!(output.status.signal(), None, "{verb:?}");
        assert!(output.stderr.is_empty(), "{}", errors(&output));
    }
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = pgmap();
    command.args(["completions", "bash"]).stdout(full);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(errors(&output).lines().count(), 1);
}

/// What is refused leaves an older report as it is, and makes no new one.
#[test]
fn a_refused_run_writes_no_report() {
    if !machine_can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (old, new) = (directory.path().join("old"), directory.path().join("new"));
    fs::write(&old, "older").unwrap();
    let device = format!("file:{},size=1G", directory.path().display());
    let mut command = pgmap();
    command.args(["run", "--ram", "8M", "--device", &device, "--report"]);
    let output = command.arg(&old).args(["--", "true"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(fs::read_to_string(&old).unwrap(), "older");

    let broken = script(directory.path(), "broken", "#!/no/such/interpreter\n");
    let mut command = pgmap();
    command.args(["run", "--ram", "8M", "--report"]).arg(&new);
    let output = command.arg("--").arg(broken).output().unwrap();
    assert_eq!(output.status.code(), Some(126));
    assert!(
        errors(&output).contains("interpreter"),
        "{}",
        errors(&output)
    );
    assert!(!new.exists());
}

/// What cannot be addressed, or told to the program, is refused: it never runs in plain memory instead.
#[test]
fn impossible_sizes_and_paths_are_refused() {
    if !machine_can_run() {
        return;
    }
    let cases: [(&str, &[&str]); 4] = [
        ("16T", &[]),
        ("8M", &["compressed:2T"]),
        ("8M", &["compressed:1T", "compressed:1T"]),
        ("8M", &["file:/var/tmp/a\nb,size=1M"]),
    ];
    for (ram, devices) in cases {
        let output = run(ram, devices).args(["echo", "ran"]).output().unwrap();
        let errors = errors(&output);
        assert_eq!(output.status.code(), Some(2), "{ram} {devices:?}: {errors}");
        assert_eq!(errors.lines().count(), 1, "{ram} {devices:?}: {errors}");
        assert!(output.stdout.is_empty(), "{ram} {devices:?}");
    }
    assert!(!Path::new("/var/tmp/a\nb").exists());
}

/// Scripts without a first line that names an interpreter, and no name at all: one line, as shells have it.
#[test]
fn what_is_no_program_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let bare = script(directory.path(), "bare", "echo hello\n");
    let bare = bare.to_str().unwrap();
    for (program, status, word) in [(bare, 126, "#!"), ("", 127, "empty")] {
        let output = run("8M", &[]).arg(program).output().unwrap();
        let errors = errors(&output);
        assert_eq!(output.status.code(), Some(status), "{program}: {errors}");
        assert_eq!(errors.lines().count(), 1, "{program}: {errors}");
        assert!(errors.contains(word), "{program}: {errors}");
    }
}

/// The loader preloads nothing into a program that gains rights.
#[test]
fn a_program_that_gains_rights_is_refused() {
    const NOBODY: u32 = 65_534;
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    let setuid = here.join("setuid");
    let capable = here.join("capable");
    let command = here.join("pgmap");
    fs::set_permissions(here, Permissions::from_mode(0o755)).unwrap();
    fs::copy("/bin/true", &setuid).unwrap();
    fs::copy("/bin/true", &capable).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_pgmap"), &command).unwrap();
    fs::set_permissions(&setuid, Permissions::from_mode(0o4755)).unwrap();
    let mut setcap = Command::new("setcap");
    let granted = setcap.arg("cap_net_raw+ep").arg(&capable).status();
    if !rustix::process::getuid().is_root() || !granted.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: only root can make programs that gain rights, and setcap is needed");
        return;
    }
    for program in [setuid, capable] {
        let mut command = Command::new(&command);
        command.args(["run", "--ram", "8M", "--"]).arg(&program);
        let output = command.uid(NOBODY).gid(NOBODY).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", errors(&output));
        assert!(
            errors(&output).contains("setuid"),
            "{program:?}: {}",
            errors(&output)
        );
    }
}

/// A signal that comes at any moment of the start ends pgmap and the program, or neither has begun.
#[test]
fn an_early_signal_leaves_no_program_behind() {
    if !machine_can_run() {
        return;
    }
    let (reader, writer) = std::io::pipe().unwrap();
    for round in 0..60 {
        let mut command = run("8M", &[]);
        command.args(["sleep", "600"]);
        command.stdout(writer.try_clone().unwrap());
        let mut child = command.spawn().unwrap();
        drop(command);
        std::thread::sleep(Duration::from_micros(150 * round));
        signal(child.id(), libc::SIGTERM);
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGTERM));
    }
    // The pipe ends when the last of the programs that write to it has.
    drop(writer);
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || tell.send(std::io::read_to_string(reader)));
    let end = told.recv_timeout(Duration::from_secs(20));
    assert!(end.is_ok(), "a program was left behind");
}

/// The program decides what a signal means, however often pgmap is sent it; SIGINT and SIGQUIT like any other.
#[test]
fn every_signal_reaches_the_program_every_time() {
    if !machine_can_run() {
        return;
    }
    let script =
        "trap 'echo int' INT; trap 'echo quit' QUIT; trap 'echo term' TERM; trap 'exit 4' USR1
        echo ready; for n in $(seq 1000); do sleep 0.02; done";
    let mut command = run("8M", &[]);
    command.args(["sh", "-c", script]).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(output.next().unwrap().unwrap(), "ready");
    for (number, name) in [
        (libc::SIGINT, "int"),
        (libc::SIGQUIT, "quit"),
        (libc::SIGTERM, "term"),
    ] {
        for _ in 0..3 {
            signal(child.id(), number);
            assert_eq!(output.next().unwrap().unwrap(), name);
        }
    }
    signal(child.id(), libc::SIGUSR1);
    assert_eq!(child.wait().unwrap().code(), Some(4));
}

/// Who kills pgmap kills the program, even one that listens to nothing; its file goes, too.
#[test]
fn killing_pgmap_kills_its_program() {
    if !machine_can_run() {
        return;
    }
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let device = format!("file:{},size=64M", directory.path().join("cold").display());
    let script = "
import signal, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
memory = bytearray(b'x' * (32 << 20))
print('ready', flush=True)
while True: time.sleep(0.01); memory[::4096] = memory[::4096]
";
    let mut command = run("8M", &[&device]);
    command.args(["/usr/bin/python3", "-c", script]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    for number in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        signal(child.id(), number);
    }
    std::thread::sleep(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none());
    signal(child.id(), libc::SIGKILL);
    assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    // The pipe ends when the program that writes to it has.
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || tell.send(output.read_line(&mut line)));
    let end = told.recv_timeout(Duration::from_secs(20));
    assert!(end.is_ok(), "the program was left behind");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

/// What the program has started goes on without pgmap, and finds every byte.
#[test]
fn children_survive_pgmap_with_every_byte() {
    if !machine_can_run() {
        return;
    }
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let device = format!("file:{},size=256M", directory.path().join("cold").display());
    let program = "
import os, subprocess, time
parent = os.getppid()
memory = bytearray(32 << 20)
places = range(0, len(memory), 4096)
for at in places: memory[at:at + 4] = at.to_bytes(4, 'little')
print('ready', flush=True)
for _ in range(1000):
    if os.getppid() != parent: break
    time.sleep(0.01)
else: raise SystemExit('the parent lives')
for _ in range(3):
    for at in places:
        assert memory[at:at + 4] == at.to_bytes(4, 'little')
        memory[at + 8] ^= 1
subprocess.run(['echo', 'and its children'], check=True)
print('went on', flush=True)
";
    let mut command = run("8M", &[&device]);
    command.args(["sh", "-c", "/usr/bin/python3 -c \"$0\" & wait", program]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(output.next().unwrap().unwrap(), "ready");
    signal(child.id(), libc::SIGKILL);
    assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    let rest: Vec<_> = output.map(Result::unwrap).collect();
    assert_eq!(rest, ["and its children", "went on"]);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

/// SIGTSTP that is sent to pgmap alone stops the program, too, and SIGCONT continues both.
#[test]
fn stopping_pgmap_stops_its_program() {
    if !machine_can_run() {
        return;
    }
    let mut command = run("8M", &[]);
    command.args(["sh", "-c", "echo $$; read line; echo $line"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    // A group that the shell of this test does not know: its own jobs stay out of this.
    let mut child = command.process_group(0).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    let program: u32 = line.trim().parse().unwrap();
    signal(child.id(), libc::SIGTSTP);
    assert!(becomes(program, 'T') && becomes(child.id(), 'T'));
    signal(child.id(), libc::SIGCONT);
    assert!(becomes(program, 'S') && becomes(child.id(), 'S'));
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
}

/// Signals that the caller ignores are ignored by the program, as they would be without us (nohup).
#[test]
fn ignored_signals_stay_ignored() {
    if !machine_can_run() {
        return;
    }
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP INT; exec \"$@\"", "sh"]);
    let managed = run("8M", &[]);
    command.arg(managed.get_program()).args(managed.get_args());
    command.args(["grep", "SigIgn", "/proc/self/status"]);
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mask = u64::from_str_radix(text.split_whitespace().nth(1).unwrap(), 16).unwrap();
    assert_eq!(mask & 0b11, 0b11, "{text}");
}

/// Without a verb there is help; without its library, `doctor` and `run` say so.
#[test]
fn what_is_missing_is_said() {
    let output = pgmap().output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(errors(&output).contains("Examples:"));

    let directory = tempfile::tempdir().unwrap();
    let alone = directory.path().join("pgmap");
    fs::copy(env!("CARGO_BIN_EXE_pgmap"), &alone).unwrap();
    let doctor = Command::new(&alone).arg("doctor").output().unwrap();
    assert_eq!(doctor.status.code(), Some(1));
    let text = String::from_utf8(doctor.stdout).unwrap();
    assert!(text.contains("libpgmap_preload.so is not in"), "{text}");
    if !machine_can_run() {
        return;
    }
    let mut command = Command::new(&alone);
    let output = command
        .args(["run", "--ram", "8M", "true"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        errors(&output).contains("cargo build"),
        "{}",
        errors(&output)
    );
}

/// A directory with a blank or a colon in its name is no trouble, though the loader separates by them.
#[test]
fn the_library_is_found_in_awkward_directories() {
    if !machine_can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let awkward = directory.path().join("a b:c");
    fs::create_dir(&awkward).unwrap();
    let installed = PathBuf::from(env!("CARGO_BIN_EXE_pgmap"));
    for name in ["pgmap", "libpgmap_preload.so"] {
        fs::copy(installed.with_file_name(name), awkward.join(name)).unwrap();
    }
    let mut command = Command::new(awkward.join("pgmap"));
    command.args(["run", "--ram", "8M", "--", "sh", "-c", "sort --version >&2"]);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", errors(&output));
    assert!(
        errors(&output).contains("2 processes managed"),
        "{}",
        errors(&output)
    );
    assert!(
        !errors(&output).contains("cannot be preloaded"),
        "{}",
        errors(&output)
    );
}

/// What did not happen is not mentioned, and what did is said in the words of the help.
#[test]
fn the_summary_says_what_happened_in_plain_words() {
    if !machine_can_run() {
        return;
    }
    let summary = |size: &str| {
        let program =
            format!("b = bytearray({size}); b[::4096] = b[::4096]; b[::4096] = b[::4096]");
        let mut command = pgmap();
        command.args([
            "run",
            "--ram",
            "16M",
            "--",
            "/usr/bin/python3",
            "-c",
            &program,
        ]);
        errors(&command.output().unwrap())
    };
    let (small, large) = (summary("1 << 20"), summary("64 << 20"));
    for absent in ["moved", "device", "kept", "note"] {
        assert!(!small.contains(absent), "{absent}: {small}");
    }
    let help = pgmap().args(["run", "--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    for line in large.lines().skip(1) {
        assert!(!line.contains(" 0 ") && !line.contains(" 0.0"), "{large}");
        let label = line[..14].trim_end();
        assert!(help.contains(&format!("\n{label}  ")), "{label}: {help}");
    }
    for present in ["moved out", "moved in", "compressed pool: "] {
        assert!(large.contains(present), "{present}: {large}");
    }
}

/// A program that no loader touches runs in plain memory. That is said in one line, and nothing else.
#[test]
fn a_program_that_was_not_managed_is_told_so() {
    if !machine_can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (loader, program) = (
        directory.path().join("loader"),
        directory.path().join("program"),
    );
    let source = directory.path().join("loader.c");
    let code = "
void _start(void) {
#ifdef __x86_64__
    __asm__ volatile(\"mov $60, %eax; mov $9, %edi; syscall\");
#else
    __asm__ volatile(\"mov x8, #93; mov x0, #9; svc #0\");
#endif
}
int main(void) { return 0; }
";
    fs::write(&source, code).unwrap();
    let gcc = |arguments: &[&str], output: &Path| {
        let mut command = Command::new("gcc");
        command.args(arguments).arg("-o").arg(output).arg(&source);
        assert!(command.status().unwrap().success());
    };
    gcc(&["-static", "-nostdlib"], &loader);
    let names_it = format!("-Wl,--dynamic-linker={}", loader.display());
    gcc(&["-nostartfiles", &names_it], &program);
    let mut command = pgmap();
    let output = command
        .args(["run", "--ram", "8M", "--"])
        .arg(program)
        .output()
        .unwrap();
    let errors = errors(&output);
    assert_eq!(output.status.code(), Some(9), "{errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
    assert!(errors.contains("not managed"), "{errors}");
}

/// What is internal stays out of completions, pages and help, and is no verb either.
#[test]
fn what_is_internal_is_not_shown() {
    for verb in [
        &["completions", "bash"][..],
        &["completions", "zsh"],
        &["completions", "fish"],
        &["--help"],
        &["man"],
    ] {
        let output = pgmap().args(verb).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("doctor"), "{verb:?}");
        assert!(
            !text.contains("__workload") && !text.contains("pgmap____"),
            "{verb:?}"
        );
    }
    let output = pgmap().args(["help", "__workload"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", errors(&output));
}

/// `man` prints a page, and writes files only where it is told to.
#[test]
fn man_prints_a_page_or_writes_all() {
    let directory = tempfile::tempdir().unwrap();
    let man = |arguments: &[&str]| {
        let mut command = pgmap();
        command.arg("man").args(arguments);
        let output = command.current_dir(&directory).output().unwrap();
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            errors(&output)
        );
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(man(&[]).starts_with(".TH pgmap 1 \"\" \"pgmap "));
    let run = man(&["run"]);
    assert_eq!(run, man(&["pgmap-run"]));
    for section in ["NAME", "SYNOPSIS", "OPTIONS", "EXAMPLES", "\"EXIT STATUS\""] {
        assert!(
            run.contains(&format!("\n.SH {section}\n")),
            "{section}: {run}"
        );
    }
    assert!(!run.contains("EXTRA"));
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
    assert_eq!(man(&["--out", "pages"]), "");
    let written = fs::read_to_string(directory.path().join("pages/pgmap-run.1")).unwrap();
    assert_eq!(written, run);
    let output = pgmap().args(["man", "walk"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        errors(&output).contains("run, serve"),
        "{}",
        errors(&output)
    );
}

/// The README shows the examples that are built.
#[test]
fn the_readme_shows_the_examples_as_they_are() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    for name in ["readme.rs", "files.rs"] {
        let example = root.join("crates/pgmap/examples").join(name);
        let example = fs::read_to_string(example).unwrap();
        let code = &example[example.find("use ").unwrap()..];
        assert!(readme.contains(&format!("```rust\n{code}```\n")), "{name}");
    }
}

/// The terminal tells only its session's leader that it hangs up: the program hears of it, too.
#[test]
fn a_terminal_that_hangs_up_ends_the_program() {
    const HANG_UP: &str = "
import os, pty, sys, time
pid, terminal = pty.fork()
if pid == 0: os.execv(sys.argv[1], sys.argv[1:])
time.sleep(1)
os.close(terminal)
for _ in range(100):
    time.sleep(0.1)
    if os.waitpid(pid, os.WNOHANG)[0]: print('ended'); sys.exit()
os.kill(pid, 9)
";
    let run = pgmap();
    let output = Command::new("python3")
        .args(["-c", HANG_UP])
        .arg(run.get_program())
        .args(["run", "--quiet", "--ram", "16M", "--", "sleep", "60"])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "ended\n");
}

/// An argument that is no text is a mistake like any other; and a mistake in a verb points to that verb's help.
#[test]
fn mistakes_point_to_the_help_that_knows() {
    use std::os::unix::ffi::OsStrExt;
    let none = std::ffi::OsStr::from_bytes(b"\xff");
    for (verb, hint) in [
        (none, "`pgmap --help`"),
        ("run".as_ref(), "`pgmap run --help`"),
    ] {
        let output = pgmap().arg(verb).arg("--bogus").output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", errors(&output));
        assert!(errors(&output).contains(hint), "{}", errors(&output));
    }
}
