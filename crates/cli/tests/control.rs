//! A run whose devices and budget change while its programs verify every byte.
//!
//! The supervisor is the test itself, so that it can change things at any moment. `cargo xtask test` builds what these need.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use core::time::Duration;
use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use common::{compile, library, machine_can_run};
use pgmap::run::{Change, Control, DeviceState, Failed, RUN_VARIABLE, Refused};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_mins(1);

/// A run of the test's own.
struct Run {
    control: Control,
    directory: tempfile::TempDir,
}

impl Run {
    fn new(ram: u64, devices: &[&str]) -> Self {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let specs: Vec<_> = devices.iter().map(|spec| spec.parse().unwrap()).collect();
        let control = Control::new(ram, &specs).unwrap();
        Self { control, directory }
    }

    fn start(&self, program: &Path, arguments: &[&str]) -> Child {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env(RUN_VARIABLE, self.control.path())
            .env("LD_PRELOAD", library())
            .stdout(Stdio::piped());
        command.spawn().unwrap()
    }

    /// Compiles and starts one of `tests/programs`.
    fn verify(&self, name: &str, arguments: &[&str]) -> Child {
        let program = compile(name, self.directory.path());
        self.start(&program, arguments)
    }

    fn file(&self, name: &str, size: &str) -> String {
        let path = self.directory.path().join(name);
        format!("file:{},size={size}", path.display())
    }

    fn add(&self, spec: &str) -> String {
        let (name, change) = self.control.add(&spec.parse().unwrap()).unwrap();
        self.control.wait(change).unwrap();
        name
    }

    fn unplug(&self, name: &str) -> Result<(), Failed> {
        let change = self.control.unplug(name, PATIENCE).unwrap();
        self.control.wait(change)
    }

    fn set_ram(&self, bytes: u64) -> Result<(), Failed> {
        let change = self.control.set_ram(bytes, PATIENCE).unwrap();
        self.control.wait(change)
    }

    fn pages(&self, name: &str) -> u64 {
        let devices = self.control.devices();
        let named = devices.iter().find(|device| device.name == name);
        named.unwrap().pages
    }

    /// Waits until something is so.
    fn until(&self, what: &str, is_so: impl Fn() -> bool) {
        let start = Instant::now();
        while !is_so() {
            assert!(start.elapsed() < PATIENCE, "never so: {what}");
            self.control.look();
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn until_pages(&self, name: &str, pages: u64) {
        self.until("pages go to the device", || self.pages(name) >= pages);
    }

    /// Waits for a program's end, and for what it says.
    fn said(&self, mut child: Child) -> String {
        self.until("the program ends", || has_ended(child.id()));
        let mut said = String::new();
        child
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        assert!(child.wait().unwrap().success(), "{said}");
        said
    }
}

/// Whether a child has ended; it can still be waited for.
fn has_ended(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(')').unwrap().1.starts_with(" Z")
}

fn is_running(child: &Child) -> bool {
    !has_ended(child.id())
}

fn signal(pid: u32, signal: i32) {
    let pid = i32::try_from(pid).unwrap();
    // SAFETY: a signal to a process that the test has started, and not waited for, touches no memory of ours.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

/// MAP-6, FLT-4: devices come and go under a program that uses all of them, and it finds every byte.
#[test]
fn devices_come_and_go_under_a_verifying_program() {
    if !machine_can_run() {
        return;
    }
    let run = Run::new(16 << 20, &["compressed:1G"]);
    let program = run.verify("threads", &["24", "4"]);
    run.until_pages("compressed0", 1000);
    let mut device = "compressed0".to_owned();
    let mut rounds = 0;
    while is_running(&program) {
        let spec = if rounds % 2 == 0 {
            run.file(&format!("cold{rounds}"), "256M")
        } else {
            "compressed:512M".to_owned()
        };
        let next = run.add(&spec);
        run.unplug(&device).unwrap();
        let devices = run.control.devices();
        let [only] = &devices[..] else {
            panic!("{devices:?}");
        };
        assert_eq!((&only.name, only.state), (&next, DeviceState::Live));
        device = next;
        rounds += 1;
    }
    assert_eq!(run.said(program), "ok\n");
    assert!(rounds >= 3, "the program ended before anything changed");
    assert_eq!(run.control.unplugged().len(), rounds);
    assert!(run.control.unplugged()[0].peak_pages >= 1000);
}

/// The space of a file is free when it has been unplugged: no process has it open.
#[test]
fn an_unplugged_file_is_closed_everywhere() {
    if !machine_can_run() {
        return;
    }
    let run = Run::new(16 << 20, &[]);
    let file = run.add(&run.file("cold", "256M"));
    let program = run.verify("threads", &["12", "4"]);
    run.until_pages(&file, 1000);
    let pid = program.id();
    let opens = |pid: u32| {
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let links = fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
        links
            .filter(|link| link.starts_with(run.directory.path()))
            .count()
    };
    assert!(opens(pid) > 0 && opens(std::process::id()) > 0);
    run.add("compressed:1G");
    run.unplug(&file).unwrap();
    assert_eq!((opens(pid), opens(std::process::id())), (0, 0));
    assert_eq!(run.said(program), "ok\n");
}

/// HOT-5: the budget goes down and up under a verifying program, and is kept.
#[test]
fn the_budget_goes_down_and_up() {
    if !machine_can_run() {
        return;
    }
    let run = Run::new(32 << 20, &["compressed:1G"]);
    let program = run.verify("threads", &["24", "4"]);
    run.until_pages("compressed0", 1000);
    let mut rounds = 0;
    while is_running(&program) {
        for budget in [16 << 20, 8 << 20, 64 << 20] {
            run.set_ram(budget).unwrap();
            let ram = run.control.ram();
            assert_eq!(ram.budget_bytes, budget);
            let granted: u64 = ram
                .processes
                .iter()
                .map(|process| process.granted_bytes)
                .sum();
            assert!(granted <= budget, "{ram:?}");
        }
        rounds += 1;
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(run.said(program), "ok\n");
    assert!(rounds > 1, "the program ended before anything changed");
}

/// Works with forks, a pipeline, and memory of its own.
const JOB: &str = "
import multiprocessing as mp, subprocess
d = {i: str(i) * 3 for i in range(150000)}
l = [bytes([i % 256]) * 100 for i in range(100000)]
def f(x): return len(d), d[x * 1000], sum(len(v) for v in l)
for r in range(4):
    with mp.get_context('fork').Pool(3) as p:
        assert p.map(f, range(5)) == [(150000, str(x * 1000) * 3, 10000000) for x in range(5)]
    s = subprocess.run('seq 1 100000 | sort -rn | tail -n 2', shell=True, capture_output=True)
    assert s.stdout.split() == [b'2', b'1'], s
    assert all(d[i] == str(i) * 3 for i in range(150000))
print('ok')
";

/// Processes that start and end meanwhile, and children of forks, find their bytes.
#[test]
fn processes_come_and_go_while_devices_do() {
    if !machine_can_run() {
        return;
    }
    let run = Run::new(24 << 20, &["compressed:1G"]);
    let program = run.start(Path::new("/usr/bin/python3"), &["-c", JOB]);
    let mut device = "compressed0".to_owned();
    let mut rounds = 0;
    while is_running(&program) {
        let next = run.add("compressed:1G");
        run.unplug(&device).unwrap();
        run.set_ram(if rounds % 2 == 0 { 48 << 20 } else { 24 << 20 })
            .unwrap();
        device = next;
        rounds += 1;
    }
    assert_eq!(run.said(program), "ok\n");
    assert!(rounds >= 3, "the program ended before anything changed");
}

/// Nobody waits for a process that was killed, at whatever moment, even if its parent never asks for its status.
#[test]
fn a_process_that_is_killed_holds_nothing_up() {
    if !machine_can_run() {
        return;
    }
    let run = Run::new(16 << 20, &["compressed:1G"]);
    let program = run.verify("threads", &["16", "6"]);
    let mut device = "compressed0".to_owned();
    for wait in [0, 1, 3, 10, 30] {
        let mut victim = run.verify("threads", &["16", "9"]);
        run.until("the processes use the device", || {
            let holders = &run.control.devices()[0].holders;
            let has_many = |pid| {
                let mut of = holders.iter().filter(|held| held.pid == pid);
                of.any(|held| held.pages > Some(500))
            };
            // On a slow day the program has ended by then.
            has_many(victim.id()) && (has_many(program.id()) || !is_running(&program))
        });
        let next = run.add(&run.file(&format!("cold{wait}"), "512M"));
        let change = run.control.unplug(&device, PATIENCE).unwrap();
        std::thread::sleep(Duration::from_millis(wait));
        signal(victim.id(), libc::SIGKILL);
        run.control.wait(change).unwrap();
        run.until("the dead leave", || {
            let processes = run.control.ram().processes;
            processes.iter().all(|process| process.pid != victim.id())
        });
        victim.wait().unwrap();
        device = next;
    }
    assert_eq!(run.said(program), "ok\n");
}

/// MAP-6: pages that have no other place keep their device, which works on, and who has them is named.
#[test]
fn the_last_device_stays_if_ram_is_too_small() {
    if !machine_can_run() {
        return;
    }
    let run = Run::new(16 << 20, &["compressed:1G"]);
    let program = run.verify("threads", &["16", "3"]);
    run.until_pages("compressed0", 4000);
    // Long before the patience ends: the program waits for memory, and would die of it.
    let (began, change) = (
        Instant::now(),
        run.control.unplug("compressed0", PATIENCE).unwrap(),
    );
    let again = run.control.unplug("compressed0", PATIENCE);
    assert!(matches!(again, Err(Refused::Busy)));
    let Err(Failed::StillHeld { name, holders }) = run.control.wait(change) else {
        panic!("there is no room for the pages");
    };
    assert!(began.elapsed() < PATIENCE / 4);
    assert_eq!(name, "compressed0");
    let [held] = holders[..] else {
        panic!("{holders:?}")
    };
    assert_eq!(held.pid, program.id());
    assert!(held.pages.unwrap() > 100, "{held:?}");
    assert_eq!(run.control.devices()[0].state, DeviceState::Live);
    assert_eq!(run.said(program), "ok\n");
}

/// A budget that cannot be kept, as the devices are full, is given back before a program dies of it.
#[test]
fn a_budget_that_cannot_be_kept_is_given_back() {
    if !machine_can_run() {
        return;
    }
    let run = Run::new(256 << 20, &["compressed:1M"]);
    let program = run.verify("threads", &["16", "12"]);
    run.until("the program has its memory", || {
        run.control.ram().resident_bytes > 64 << 20
    });
    let change = run
        .control
        .set_ram(16 << 20, Duration::from_secs(3))
        .unwrap();
    let outcome = run.control.wait(change);
    assert!(
        matches!(outcome, Err(Failed::NoRoomForRam { .. })),
        "{outcome:?}"
    );
    assert_eq!(run.control.ram().budget_bytes, 256 << 20);
    assert_eq!(run.said(program), "ok\n");
}

/// A process that is stopped keeps its pages where they are; it is named, and goes on later.
#[test]
fn a_process_that_is_stopped_is_named() {
    if !machine_can_run() {
        return;
    }
    let run = Run::new(16 << 20, &["compressed:1G", "compressed:1G"]);
    let program = run.verify("threads", &["16", "2"]);
    run.until_pages("compressed0", 1000);
    signal(program.id(), libc::SIGSTOP);
    let try_it = || -> Change {
        let patience = Duration::from_millis(500);
        run.control.unplug("compressed0", patience).unwrap()
    };
    let Err(Failed::StillHeld { holders, .. }) = run.control.wait(try_it()) else {
        panic!("a process that is stopped cannot bring its pages back");
    };
    assert_eq!(holders[0].pid, program.id());
    signal(program.id(), libc::SIGCONT);
    run.unplug("compressed0").unwrap();
    assert_eq!(run.said(program), "ok\n");
}

/// A process that has executed a program which cannot be managed holds nothing up.
#[test]
fn a_process_that_executes_something_else_holds_nothing_up() {
    if !machine_can_run() {
        return;
    }
    let run = Run::new(16 << 20, &["compressed:1G"]);
    let script = "unset LD_PRELOAD; exec sleep 3";
    let program = run.start(Path::new("/bin/sh"), &["-c", script]);
    run.until("the shell is managed", || {
        run.control.region().managed() > 0
    });
    let comm = format!("/proc/{}/comm", program.id());
    run.until("it executes", || {
        std::fs::read_to_string(&comm).unwrap() == "sleep\n"
    });
    run.unplug("compressed0").unwrap();
    assert!(is_running(&program));
    run.said(program);
}

/// What cannot be is refused before anything changes.
#[test]
fn what_cannot_be_is_refused() {
    let run = Run::new(16 << 20, &["compressed:1G"]);
    let refused = run.control.unplug("file7", PATIENCE).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "no device is called `file7`: there is compressed0"
    );
    let ram = |bytes| run.control.set_ram(bytes, PATIENCE).unwrap_err();
    assert!(matches!(ram(1 << 20), Refused::TooLittleRam { .. }));
    assert!(matches!(ram(1 << 60), Refused::TooMuchRam { .. }));
    for _ in 1..8 {
        run.add("compressed:1M");
    }
    let ninth = run.control.add(&"compressed:1M".parse().unwrap());
    assert!(matches!(ninth, Err(Refused::TooManyDevices)));
    // Names are not used again, slots are.
    run.unplug("compressed3").unwrap();
    assert_eq!(run.add("compressed:1M"), "compressed8");
}
