//! `pgmap run --map-files`: what a program maps of files stays within the budget, and is what it would be without us.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::{compile, machine_can_run, pgmap, succeeded};

const MIB: u64 = 1 << 20;

/// Runs a python script in 32 MiB, with mappings of 16 MiB and more in the budget. Answers the report, too.
fn managed(directory: &Path, script: &str) -> (Output, serde_json::Value) {
    let report = directory.join("report.json");
    let output = pgmap()
        .args([
            "run",
            "--quiet",
            "--ram",
            "32M",
            "--map-files",
            "16M",
            "--report",
        ])
        .arg(&report)
        .args(["--", "python3", "-c", script])
        .current_dir(directory)
        .output()
        .unwrap();
    let report = std::fs::read_to_string(report).unwrap();
    (output, serde_json::from_str(&report).unwrap())
}

fn plain(directory: &Path, script: &str) -> Output {
    let mut python = Command::new("python3");
    let python = python.args(["-c", script]).current_dir(directory);
    python.output().unwrap()
}

/// What the scripts begin with: a file of 160 MiB, on a disk, and how much of the process's mapped files is in RAM.
const FILE: &str = r"
import mmap, os, hashlib, time, random
N = 160 << 20
random.seed(7)
block = random.randbytes(1 << 20)
with open('data', 'wb') as f:
    for nth in range(N >> 20): f.write(nth.to_bytes(4, 'little') + block[4:])
    f.flush(); os.fsync(f.fileno())
def resident():
    # Of `data` alone: the program's own files are not what this is about.
    mine, total = False, 0
    for line in open('/proc/self/smaps'):
        word = line.split()[0]
        if '-' in word and not word.endswith(':'): mine = line.rstrip().endswith('/data')
        elif mine and word == 'Rss:': total += int(line.split()[1])
    return total >> 10
def settle():
    for _ in range(100):
        if resident() <= 32: break
        time.sleep(0.05)
    return 'fits' if resident() <= 32 else f'{resident()} MiB are in RAM'
";

/// A file five times as large as the budget is read through a mapping, and fits the budget then.
#[test]
fn a_mapped_file_is_read_within_the_budget() {
    if !machine_can_run() {
        return;
    }
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let script = format!(
        "{FILE}
m = mmap.mmap(os.open('data', os.O_RDWR), N, prot=mmap.PROT_READ)
digest = hashlib.sha256(m)
for _ in range(3000): digest.update(bytes([m[random.randrange(N)]]))
print(digest.hexdigest())
import sys
print(settle(), file=sys.stderr)
"
    );
    let expected = plain(directory.path(), &script);
    let (output, report) = managed(directory.path(), &script);
    assert_eq!(succeeded(&output), succeeded(&expected));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "fits\n");
    let peak = report["peak_resident_bytes"].as_u64().unwrap();
    assert!(peak > 16 * MIB, "mapped files count: {peak}");
}

/// What the scripts begin with that share pages with a child: the kernel drops no page that a second process has mapped. `hold` has the
/// child touch so many bytes of the file.
const SHARING: &str = r"
import signal, sys
m = mmap.mmap(os.open('data', os.O_RDWR), N, prot=mmap.PROT_READ)
def touch(pages):
    for at in pages: m[at << 12]
def hold(bytes):
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        touch(range(bytes >> 12))
        os.write(tell, b'.')
        signal.pause()
    os.read(ready, 1)
    return pid
def end(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
";

/// A mapping whose pages could not be dropped for a while is within the budget once they can.
#[test]
fn pages_that_others_held_are_dropped_later() {
    if !machine_can_run() {
        return;
    }
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let script = format!(
        "{FILE}{SHARING}
child = hold(N)
touch(range(N >> 12))
time.sleep(1)
assert resident() == N >> 20, 'nobody can drop them'
end(child)
print(settle())
"
    );
    let (output, _) = managed(directory.path(), &script);
    assert_eq!(succeeded(&output), "fits\n");
}

/// Where more pages than the budget has cannot be dropped, those that can are, and trying does not cost a processor.
#[test]
fn pages_among_such_as_others_hold_are_dropped() {
    if !machine_can_run() {
        return;
    }
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let script = format!(
        "{FILE}{SHARING}
def reclaimer():
    for task in os.listdir('/proc/self/task'):
        name, rest = open(f'/proc/self/task/{{task}}/stat').read().rsplit(')', 1)
        if 'pgmap-reclaim' in name: return sum(map(int, rest.split()[11:13])) / os.sysconf('SC_CLK_TCK')
held = N >> 14
child = hold(held << 12)
touch(range(held))
before, samples = reclaimer(), []
for _ in range(30):
    until = time.monotonic() + 0.1
    while time.monotonic() < until:
        touch(random.sample(range(held, 4 * held), 64))
    samples.append(resident())
took, samples = reclaimer() - before, sorted(samples)
# Others want the processors and the disk, too: not every sample fits.
print('fits' if samples[7] <= 64 else f'{{samples}} MiB are in RAM')
print('calm' if took < 1.5 else f'{{took}} s of 3 s')
end(child)
"
    );
    let (output, _) = managed(directory.path(), &script);
    assert_eq!(succeeded(&output), "fits\ncalm\n");
}

/// Stores through a shared mapping and writes to the file see each other, and reach the file; private changes do not.
#[test]
fn a_mapped_file_is_the_file_that_everybody_sees() {
    if !machine_can_run() {
        return;
    }
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let script = format!(
        "{FILE}
fd = os.open('data', os.O_RDWR)
shared, private = mmap.mmap(fd, N), mmap.mmap(fd, N, flags=mmap.MAP_PRIVATE)
for at in range(0, N, 1 << 16): shared[at + 8] = at >> 16 & 255
for at in range(0, N, 1 << 20): private[at + 9] = 77
for at in range(0, N, 1 << 16): assert os.pread(fd, 1, at + 8)[0] == at >> 16 & 255
for at in range(0, N, 1 << 16): os.pwrite(fd, b'w', at + 10)
pid = os.fork()
if pid == 0:
    for at in range(0, N, 1 << 16): assert shared[at + 10] == ord('w')
    shared[0] = 99
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert shared[0] == 99
for at in range(0, N, 1 << 20): assert private[at + 9] == 77 and shared[at + 9] == block[9]
for at in range(0, N, 1 << 16): assert shared[at + 8] == at >> 16 & 255 and shared[at + 10] == ord('w')
shared.flush()
print(hashlib.sha256(open('data', 'rb').read()).hexdigest())
"
    );
    let expected = plain(directory.path(), &script);
    let (output, _) = managed(directory.path(), &script);
    assert_eq!(succeeded(&output), succeeded(&expected));
}

/// A private mapping three times as large as the budget, of which a third is changed, stays within the budget, and is what it would be without
/// us: in forks' children, after parts of it were given up, and where the file ends. The file itself keeps its bytes.
fn private_mappings(confine: &[&str], arguments: &[&str]) {
    if !machine_can_run() {
        return;
    }
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let program = compile("private_file", directory.path());
    let pgmap = pgmap();
    let words = confine
        .iter()
        .map(AsRef::as_ref)
        .chain([pgmap.get_program()]);
    let words: Vec<_> = words.collect();
    let output = Command::new(words[0])
        .args(&words[1..])
        .args(["run", "--quiet", "--ram", "32M", "--map-files", "16M"])
        .arg(program)
        .args(arguments)
        .current_dir(directory.path())
        .output()
        .unwrap();
    assert_eq!(succeeded(&output), "every byte was right\n");
    let resident = String::from_utf8_lossy(&output.stderr);
    for pages in resident.split_whitespace() {
        let pages: u64 = pages.parse().unwrap();
        assert!(pages * 4096 <= 32 * MIB, "{pages} pages are in RAM");
    }
}

#[test]
fn a_private_mapping_that_is_written_fits_the_budget() {
    private_mappings(&[], &[]);
}

/// The same where forks have to be announced.
#[test]
fn a_private_mapping_survives_announced_forks() {
    if rustix::process::geteuid().is_root() {
        private_mappings(
            &["setpriv", "--bounding-set", "-sys_ptrace"],
            &["announced"],
        );
    } else {
        private_mappings(&[], &["announced"]);
    }
}

/// A database that reads through a mapping and writes by system calls keeps its promises.
#[test]
fn sqlite_works_on_a_mapped_database() {
    if !machine_can_run() {
        return;
    }
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let script = r"
import sqlite3, hashlib
db = sqlite3.connect('base.db', isolation_level=None)
db.execute('pragma mmap_size = 1073741824')
db.execute('create table t(id integer primary key, word text, blob blob)')
for part in range(20):
    db.execute('begin')
    rows = ((part * 2000 + n, hashlib.md5(str(part * 2000 + n).encode()).hexdigest(), bytes([n % 256]) * 2000) for n in range(2000))
    db.executemany('insert into t values (?, ?, ?)', rows)
    db.execute('update t set word = word || ? where id % 17 = ?', (str(part), part % 17))
    db.execute('commit')
db.execute('create index i on t(word)')
db.execute('delete from t where id % 5 = 0')
assert db.execute('pragma mmap_size').fetchone()[0] > 0
assert db.execute('pragma integrity_check').fetchone() == ('ok',)
digest = hashlib.sha256()
for row in db.execute('select * from t order by word, id'): digest.update(repr(row).encode())
print(digest.hexdigest())
";
    let expected = plain(directory.path(), script);
    std::fs::remove_file(directory.path().join("base.db")).unwrap();
    let (output, _) = managed(directory.path(), script);
    assert_eq!(succeeded(&output), succeeded(&expected));
}

/// What a key-value store with memory-mapped files is tested with.
struct Lmdb {
    python: &'static str,
    load: PathBuf,
    directory: tempfile::TempDir,
}

impl Lmdb {
    /// `None` where it is not installed, which is said; where all tests have to run that is a failure.
    fn new() -> Option<Self> {
        let answers = |program: &str, arguments: &[&str]| {
            let mut command = Command::new(program);
            let output = command.args(arguments).output();
            output.is_ok_and(|output| output.status.success())
        };
        // The distribution's python has it, which another may hide.
        let mut pythons = ["python3", "/usr/bin/python3"].into_iter();
        let python = pythons.find(|python| answers(python, &["-c", "import lmdb"]));
        let has_tools = answers("mdb_stat", &["-V"]) && answers("mdb_dump", &["-V"]);
        let Some(python) = python.filter(|_| has_tools) else {
            let is_needed = std::env::var_os("CI").is_some();
            assert!(!is_needed, "LMDB is not installed: run .ci/setup as root");
            eprintln!("SKIPPED: LMDB is not installed (.ci/setup installs it)");
            return None;
        };
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/programs");
        Some(Self {
            python,
            load: sources.join("lmdb_load.py"),
            directory: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(),
        })
    }

    /// A program on one of the databases: in 32 MiB, or as it is.
    fn command(&self, memory: Memory, program: &str) -> Command {
        let mut command = match memory {
            Memory::Plain => Command::new(program),
            Memory::Managed => {
                let mut command = pgmap();
                command.args(["run", "--quiet", "--ram", "32M", "--map-files", "16M"]);
                command.args(["--", program]);
                command
            }
        };
        command.current_dir(&self.directory);
        command
    }

    /// The script that loads and verifies.
    fn script(&self, memory: Memory, arguments: &[&str]) -> Command {
        let mut command = self.command(memory, self.python);
        command.arg(&self.load).args(arguments);
        command
    }

    fn output(&self, memory: Memory, arguments: &[&str]) -> Output {
        self.script(memory, arguments).output().unwrap()
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Memory {
    Plain,
    Managed,
}

/// How many transactions there are: of 4,000 changes each, so that the database becomes more than four times as large as the budget.
const TRANSACTIONS: &str = "20";

/// What was in RAM of a database after each commit, in MiB, and what at last.
fn residents(output: &Output) -> (Vec<u64>, u64) {
    let text = String::from_utf8_lossy(&output.stderr);
    let mut samples: Vec<u64> = text.split_whitespace().flat_map(str::parse).collect();
    let last = samples.pop().unwrap();
    samples.sort_unstable();
    (samples, last)
}

/// A database that is read, or read and written, through a mapping several times as large as the budget has the same bytes as one of
/// a plain run, whoever looks; and not much more of it than the budget is in RAM meanwhile.
#[test]
fn lmdb_works_on_a_mapped_database() {
    let Some(lmdb) = Lmdb::new().filter(|_| machine_can_run()) else {
        return;
    };
    let load = |memory, name, how: &[&str]| {
        let arguments = [&["load", name, TRANSACTIONS], how].concat();
        std::fs::create_dir(lmdb.directory.path().join(name)).unwrap();
        lmdb.output(memory, &arguments)
    };
    let plain = load(Memory::Plain, "plain", &[]);
    let expected = succeeded(&lmdb.output(Memory::Plain, &["verify", "plain"]));
    let bytes = std::fs::metadata(lmdb.directory.path().join("plain/data.mdb")).unwrap();
    assert!(bytes.len() > 4 * 32 * MIB, "{} bytes", bytes.len());
    for (name, how) in [("managed", &[][..]), ("writemap", &["writemap"])] {
        let loaded = load(Memory::Managed, name, how);
        assert_eq!(succeeded(&loaded), succeeded(&plain));
        let (samples, last) = residents(&loaded);
        // The budget is kept after the fact, and others want the processors and the disk, too: not every sample fits. Without a budget
        // only the first few would, before the database is as large.
        assert!(samples[samples.len() / 4] <= 40, "{samples:?} MiB");
        assert!(last <= 32, "{last} MiB are in RAM");
        let verified = lmdb.output(Memory::Managed, &["verify", name]);
        assert_eq!(succeeded(&verified), expected);
        let stats = [Memory::Managed, Memory::Plain].map(|memory| {
            let output = lmdb
                .command(memory, "mdb_stat")
                .args(["-ef", name])
                .output();
            succeeded(&output.unwrap())
        });
        assert_eq!(stats[0], stats[1]);
    }
    let dump = |memory, name| {
        let mut shell = lmdb.command(memory, "sh");
        let output = shell
            .args(["-c", &format!("mdb_dump {name} | cksum")])
            .output();
        succeeded(&output.unwrap())
    };
    assert_eq!(
        dump(Memory::Managed, "writemap"),
        dump(Memory::Plain, "plain")
    );
}

/// A database whose writer is killed has every change of which its writer was told that it is there, and no half of one.
#[test]
fn lmdb_survives_a_kill_in_the_middle() {
    let Some(lmdb) = Lmdb::new().filter(|_| machine_can_run()) else {
        return;
    };
    for (name, how) in [("managed", &[][..]), ("writemap", &["writemap"])] {
        let arguments = [&["load", name, "1000"], how].concat();
        let mut script = lmdb.script(Memory::Managed, &arguments);
        let mut killed = script.stdout(Stdio::piped()).spawn().unwrap();
        let mut commits = BufReader::new(killed.stdout.take().unwrap()).lines();
        let told = |line: std::io::Result<String>| line.unwrap().parse::<u64>().unwrap();
        let mut last = commits.by_ref().take(12).map(told).last().unwrap();
        // In the middle of the next, which takes some tens of milliseconds.
        std::thread::sleep(core::time::Duration::from_millis(25));
        killed.kill().unwrap();
        killed.wait().unwrap();
        last = commits.map(told).last().unwrap_or(last);
        assert!(last < 1000);
        let verified = succeeded(&lmdb.output(Memory::Managed, &["verify", name]));
        let version: u64 = verified.split(' ').next().unwrap().parse().unwrap();
        assert!((last..=last + 1).contains(&version), "{version}, {last}");
        // Nothing keeps the next writer from going on.
        succeeded(&lmdb.output(Memory::Managed, &["load", name, "2"]));
        let verified = succeeded(&lmdb.output(Memory::Plain, &["verify", name]));
        assert!(verified.starts_with(&format!("{} ", version + 2)));
    }
}
