//! Real programs in a budget far below their need do what they do in a plain run.
//!
//! `cargo xtask test` builds what these need.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use core::fmt::Write as _;
use std::fs;
use std::process::Command;

use common::{compile, machine_can_run, pgmap, run, succeeded};

/// Runs a program plainly and managed, and compares everything that it says.
fn same_as_plain(ram: &str, devices: &[&str], program: &[&str]) {
    if !machine_can_run() {
        return;
    }
    let plain = Command::new(program[0])
        .args(&program[1..])
        .output()
        .unwrap();
    let managed = run(ram, devices).args(program).output().unwrap();
    assert_eq!(
        managed.status,
        plain.status,
        "{}",
        String::from_utf8_lossy(&managed.stderr)
    );
    assert!(
        managed.stdout == plain.stdout,
        "the output of {program:?} differs"
    );
    assert_eq!(
        String::from_utf8_lossy(&managed.stderr),
        String::from_utf8_lossy(&plain.stderr)
    );
}

/// A verifier of ours says that all is well.
fn verifies(ram: &str, devices: &[&str], name: &str, arguments: &[&str]) {
    if !machine_can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let program = compile(name, directory.path());
    let output = run(ram, devices)
        .arg(program)
        .args(arguments)
        .output()
        .unwrap();
    assert_eq!(succeeded(&output), "ok\n");
}

#[test]
fn sort_sorts() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("lines");
    let mut text = String::new();
    let mut word = 1u64;
    for line in 0..600_000 {
        word = word
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(line);
        writeln!(text, "{word:x} {line}").unwrap();
    }
    fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap();
    same_as_plain("16M", &["compressed:1G"], &["sort", "-S", "100M", path]);
}

#[test]
fn python_computes_with_threads_children_and_forks() {
    const JOB: &str = "
import hashlib, threading, subprocess, os, multiprocessing as mp
d = {i: str(i) * 3 for i in range(200000)}
l = [bytes([i % 256]) * 100 for i in range(150000)]
b = bytearray(os.urandom(1 << 20)) * 20
out = {}
def work(k): out[k] = sum(len(v) for j, v in d.items() if j % 4 == k)
ts = [threading.Thread(target=work, args=(k,)) for k in range(4)]
[t.start() for t in ts]; [t.join() for t in ts]
assert b[:1 << 20] == b[-(1 << 20):]
print(sum(out.values()), hashlib.sha256(b''.join(l)).hexdigest())
print(subprocess.run(['python3', '-c', 'print(sum(range(10**6)))'], capture_output=True).stdout)
def f(x): return (x, len(d), d[x * 1000], sum(len(v) for v in l))
with mp.get_context('fork').Pool(3) as p: print(p.map(f, range(5)))
pid = os.fork()
if pid == 0: os._exit(0 if all(d[i] == str(i) * 3 for i in range(200000)) else 9)
print(os.waitpid(pid, 0)[1])
";
    same_as_plain("24M", &["compressed:1G"], &["python3", "-c", JOB]);
}

#[test]
fn gcc_compiles_the_same_object() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("big.c");
    let mut text = String::new();
    for function in 0..1500 {
        writeln!(text, "int f{function}(int a, int b) {{ int s = {function}; for (int i = 0; i < a; i++) s += i * b ^ s << 3; return s; }}").unwrap();
    }
    fs::write(&source, text).unwrap();
    let object = directory.path().join("big.o");
    let script = format!(
        "gcc -O2 -c {} -o {1} && cat {1}",
        source.display(),
        object.display()
    );
    same_as_plain("48M", &["compressed:1G"], &["sh", "-c", &script]);
}

#[test]
fn a_shell_pipeline_works() {
    let script = "seq 1 200000 | awk '{s[$1 % 1000] += $1} END {for (k in s) t += s[k]; print t}'; \
                  echo done | tr a-z A-Z; exit 7";
    same_as_plain("8M", &[], &["bash", "-c", script]);
}

#[test]
fn threads_find_every_byte_on_a_compressed_device() {
    verifies("16M", &["compressed:1G"], "threads", &["32", "2"]);
}

#[test]
fn threads_find_every_byte_on_a_compressed_device_with_zstd() {
    verifies(
        "16M",
        &["compressed:1G,algorithm=zstd"],
        "threads",
        &["24", "1"],
    );
}

#[test]
fn threads_find_every_byte_on_a_file_device() {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let device = format!("file:{},size=1G", directory.path().join("cold").display());
    verifies("16M", &[&device], "threads", &["16", "1"]);
    assert_eq!(
        fs::read_dir(directory.path()).unwrap().count(),
        0,
        "the file was left behind"
    );
}

#[test]
fn a_full_device_overflows_into_the_next() {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let device = format!("file:{},size=1G", directory.path().join("cold").display());
    verifies("16M", &["compressed:8M", &device], "threads", &["16", "1"]);
}

/// GUP-3: what the kernel reads into and writes from, by `O_DIRECT` too, is never moved away from under it.
#[test]
fn files_are_read_and_written_through_evicted_memory() {
    verifies("16M", &["compressed:1G"], "files", &["16", "/var/tmp"]);
}

/// GUP-3: the pages of `io_uring` are pinned while a request runs or a buffer is registered, and its own threads fault.
#[test]
fn io_uring_reads_and_writes_evicted_memory() {
    let directory = env!("CARGO_TARGET_TMPDIR");
    let program = ["64", "4", directory];
    verifies("16M", &["compressed:1G"], "uring", &program);
}

#[test]
fn children_of_fork_have_every_byte() {
    verifies("16M", &["compressed:1G"], "forks", &["48", "3"]);
}

/// Where the kernel does not tell of forks, they are announced, and the children have every byte all the same.
#[test]
fn children_of_announced_forks_have_every_byte() {
    if !machine_can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let program = compile("forks", directory.path());
    let managed = run("16M", &["compressed:1G"]);
    let output = without_tracing(&managed)
        .arg(program)
        .args(["48", "3"])
        .output()
        .unwrap();
    assert_eq!(succeeded(&output), "ok\n");
    let doctor = without_tracing(pgmap().arg("doctor")).output().unwrap();
    assert!(succeeded(&doctor).contains("degraded  userfaultfd fork events"));
}

/// A command without the right to trace others, as most users are.
fn without_tracing(command: &Command) -> Command {
    if !rustix::process::geteuid().is_root() {
        let mut same = Command::new(command.get_program());
        same.args(command.get_args());
        return same;
    }
    let mut confined = Command::new("setpriv");
    confined
        .args(["--bounding-set", "-sys_ptrace"])
        .arg(command.get_program())
        .args(command.get_args());
    confined
}

/// The reclaimer made clean shared pages private by a fault, and the thread to serve that was waiting for the reclaimer.
#[test]
fn a_parent_reads_while_its_children_share_its_pages() {
    verifies("16M", &["compressed:1G"], "fork_reads", &["96", "6"]);
}

/// The kernel tells of a fork with a descriptor. Where there was no room for it, the fork waited for ever.
#[test]
fn a_program_without_descriptors_forks() {
    verifies("16M", &["compressed:1G"], "no_descriptors", &["48"]);
}

#[test]
fn mappings_behave_at_their_edges() {
    verifies("8M", &["compressed:1G"], "mappings", &[]);
}

/// More pages that may not be written, run or not even be read, than there is RAM: they leave, and refuse the same all the time.
#[test]
fn pages_that_may_not_be_written_leave() {
    verifies("8M", &["compressed:1G"], "readonly", &["64", "1"]);
}

/// A fork that waits for the pager holds the C library's locks: the pager must not want them.
#[test]
fn forks_and_mappings_do_not_wait_for_each_other() {
    verifies("16M", &["compressed:1G"], "fork_storm", &["1000"]);
}
