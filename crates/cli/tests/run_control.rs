//! A running `pgmap run`, asked and changed by the command line while its program verifies every byte.
//!
//! `cargo xtask test` builds what these need.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;
mod serving;

use core::time::Duration;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::thread;
use std::time::Instant;

use common::{compile, library, machine_can_run};
use serde_json::Value;
use serving::{Place, signal, signal_group};

/// A run, and its program; both are killed when this is dropped.
struct Run(Child);

impl Run {
    /// Starts a program in managed memory, and waits until the run can be asked.
    fn start(place: &Place, arguments: &[&str]) -> Self {
        library();
        let mut command = place.pgmap(&["run", "--quiet", "--ram", "64M"]);
        command.args(arguments).stdout(Stdio::piped());
        let run = Self(command.process_group(0).spawn().unwrap());
        place.wait_for(&["list"], "run, process");
        run
    }

    /// Waits for the end, and answers what the program said.
    fn said(mut self) -> String {
        let mut said = String::new();
        let mut stdout = self.0.stdout.take().unwrap();
        stdout.read_to_string(&mut said).unwrap();
        assert!(self.0.wait().unwrap().success(), "{said}");
        said
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if self.0.try_wait().unwrap().is_none() {
            signal_group(self.0.id(), libc::SIGKILL);
            self.0.wait().unwrap();
        }
    }
}

fn json(place: &Place, arguments: &[&str]) -> Value {
    serde_json::from_str(&place.ok(arguments)).unwrap()
}

/// The devices, and the pages of each.
fn devices(place: &Place) -> Vec<(String, u64)> {
    let listed = json(place, &["list", "-D", "--json"]);
    let devices = listed.as_array().unwrap().iter();
    let of = |device: &Value| {
        let name = device["dev"].as_str().unwrap().to_owned();
        (name, device["pages"].as_u64().unwrap())
    };
    devices.map(of).collect()
}

/// The sockets that are there, alive or not.
fn sockets(place: &Place) -> usize {
    std::fs::read_dir(place.path("pgmap")).unwrap().count()
}

/// Every mistake is one line, and changes nothing.
fn mistakes(place: &Place) {
    let cases: [(&[&str], &str); 9] = [
        (&["unplug", "nothing0"], "nothing0"),
        (&["holders", "nothing0"], "nothing0"),
        (&["plug", "nonsense:1G"], "nonsense"),
        (&["plug", "file:/no/such/file,size=1G"], "/no/such/file"),
        (&["memory", "offline", "99999"], "there is no block 99999"),
        (&["memory", "online", "0", "--zone", "normal"], "movable"),
        (&["create-namespace"], "no `pgmap serve` of yours runs"),
        (&["scrub"], "no `pgmap serve` of yours runs"),
        (&["map", "compressed0"], "pgmap serve"),
    ];
    for (arguments, part) in cases {
        let said = place.refused(arguments);
        assert_eq!(said.lines().count(), 1, "{arguments:?}: {said}");
        assert!(said.contains(part), "{arguments:?}: {said}");
    }
}

/// HOT-5: half of the RAM goes off line, block by block, and comes back.
fn halve_the_ram(place: &Place) {
    let memory = || json(place, &["memory", "--json"]);
    let before = memory();
    let online = before["online"].as_u64().unwrap();
    assert_eq!(online, 64 << 20);
    let half = online / 2 / before["block_size"].as_u64().unwrap();
    assert!(half > 0, "{before}");
    for block in 0..half {
        place.ok(&["memory", "offline", &block.to_string(), "--timeout", "30s"]);
    }
    let halved = memory();
    assert_eq!(halved["online"].as_u64().unwrap(), online / 2);
    assert!(halved["in_use"].as_u64().unwrap() <= online / 2, "{halved}");
    assert!(place.ok(&["memory"]).contains("offline"));
    for block in 0..half {
        place.ok(&["memory", "online", &block.to_string()]);
    }
    assert_eq!(memory()["online"], before["online"]);
}

/// HOT-1: a run's map has its RAM in blocks, as they are now, and its devices behind it in order, as text and as JSON.
fn show_the_map(place: &Place) {
    let size = json(place, &["memory", "--json"])["block_size"]
        .as_u64()
        .unwrap();
    place.ok(&["memory", "offline", "1", "--timeout", "30s"]);
    let shown = json(place, &["iomem", "--json"]);
    let text = place.ok(&["iomem"]);
    place.ok(&["memory", "online", "1"]);
    assert_eq!(shown[0]["kind"], "run");
    let roots = shown[0]["resources"].as_array().unwrap();
    let names: Vec<_> = roots.iter().map(|root| &root["name"]).collect();
    assert_eq!(names, ["System RAM", &devices(place)[0].0]);
    let number = |resource: &Value, field: &str| resource[field].as_u64().unwrap();
    let end = |root| number(root, "start") + number(root, "size");
    assert!(number(&roots[1], "start") >= end(&roots[0]), "{shown}");
    assert_eq!(number(&roots[1], "size"), 512 << 20, "a file's pages");
    let off_line = &roots[0]["children"][1];
    assert_eq!(off_line["name"], "block 1 offline");
    assert_eq!(
        (number(off_line, "start"), number(off_line, "size")),
        (size, size)
    );
    assert!(text.starts_with("run, process"), "{text}");
    let line = format!("\n  {size:08x}-{:08x} : block 1 offline\n", 2 * size - 1);
    assert!(text.contains(&line), "{line}: {text}");
}

/// MAP-6, HOT-5: devices and RAM of a run are listed, added and taken away by commands, and its program finds every byte.
#[test]
fn a_run_is_asked_and_changed_while_its_program_verifies() {
    if !machine_can_run() {
        return;
    }
    let place = Place::new();
    let program = compile("threads", place.directory.path());
    let program = program.to_str().unwrap();
    let arguments = ["--device", "compressed:1G", "--", program, "48", "6"];
    let run = Run::start(&place, &arguments);
    place.wait_for(&["holders", "compressed0"], "pages, process");
    let listed = place.ok(&["list"]);
    assert!(
        listed.contains("run, process") && listed.contains("compressed:1G"),
        "{listed}"
    );
    let top = place.ok(&["top", "-n", "2", "--interval", "50ms"]);
    assert!(top.contains("compressed0") && top.contains("ram"), "{top}");
    mistakes(&place);

    // Its pages have no other place.
    let said = place.refused(&["unplug", "compressed0", "--timeout", "300ms"]);
    assert!(said.contains("compressed0 is in use, and stays"), "{said}");
    assert_eq!(devices(&place)[0].0, "compressed0");
    for round in 0..2 {
        let spec = ["compressed:512M", "file:cold,size=512M"][round];
        let old = devices(&place)[0].0.clone();
        let new = place.ok(&["plug", spec]).trim().to_owned();
        place.ok(&["unplug", &old, "--timeout", "60s"]);
        let left = devices(&place);
        assert!(
            left.len() == 1 && new.contains(&left[0].0),
            "{new}: {left:?}"
        );
    }
    halve_the_ram(&place);
    show_the_map(&place);

    assert_eq!(run.said(), "ok\n");
    assert_eq!(place.ok(&["list"]), "");
    assert_eq!(sockets(&place), 0, "the socket is left behind");
}

/// REF-7: an unplug that cannot end, or was killed, holds up nobody who asks.
#[test]
fn who_asks_does_not_wait_for_an_unplug() {
    if !machine_can_run() {
        return;
    }
    let place = Place::new();
    let fill =
        "b=bytearray(200<<20)\nfor i in range(0,len(b),4096): b[i:i+8]=i.to_bytes(8,'little')
import time\nprint('full',flush=True)\ntime.sleep(60)";
    // A child of the program: `pgmap run` itself stops when its program does.
    let program = ["sh", "-c", "/usr/bin/python3 -c \"$0\" & wait", fill];
    let arguments = [&["--device", "compressed:1G", "--"], &program[..]].concat();
    let _run = Run::start(&place, &arguments);
    place.wait_for(&["holders", "compressed0"], "pages, process");
    let mut unplug = place.pgmap(&["unplug", "compressed0"]).spawn().unwrap();
    place.wait_for(&["list"], "unplugging");
    place.ok(&["memory"]);
    assert!(
        unplug.try_wait().unwrap().is_none(),
        "it had nowhere to put the pages"
    );
    unplug.kill().unwrap();
    unplug.wait().unwrap();
    place.wait_until(&["list"], |text| !text.contains("unplugging"));

    // A program that does not answer holds up the change, and nobody else.
    let held = json(&place, &["holders", "compressed0", "--json"]);
    let pid = u32::try_from(held[0]["pid"].as_u64().unwrap()).unwrap();
    signal(pid, libc::SIGSTOP);
    let offline = ["memory", "offline", "0"];
    let mut offline = place.pgmap(&offline).spawn().unwrap();
    thread::sleep(Duration::from_millis(300));
    assert!(
        offline.try_wait().unwrap().is_none(),
        "nobody let the pages go"
    );
    let mut memory = place
        .pgmap(&["memory"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let started = Instant::now();
    while memory.try_wait().unwrap().is_none() {
        let took = started.elapsed();
        if took > Duration::from_secs(5) {
            memory.kill().unwrap();
            panic!("it waits for another's change");
        }
        thread::sleep(Duration::from_millis(10));
    }
    let busy = place.refused(&["memory", "offline", "1", "--timeout", "1s"]);
    assert!(busy.contains("another change is under way"), "{busy}");
    offline.kill().unwrap();
    offline.wait().unwrap();
    signal(pid, libc::SIGCONT);
    let again = ["memory", "offline", "0", "--timeout", "30s"];
    let done = || place.pgmap(&again).output().unwrap().status.success();
    let started = Instant::now();
    while !done() {
        // The change that was given up may still be under way.
        assert!(started.elapsed() < Duration::from_secs(20), "it stays busy");
    }
    assert!(place.ok(&["memory"]).contains("offline"));
}

/// A run that was killed leaves a socket behind, which disturbs nobody.
#[test]
fn the_socket_of_a_killed_run_disturbs_nobody() {
    if !machine_can_run() {
        return;
    }
    let place = Place::new();
    let mut killed = Run::start(&place, &["--", "sleep", "60"]);
    signal(killed.0.id(), libc::SIGKILL);
    killed.0.wait().unwrap();
    place.wait_until(&["list"], str::is_empty);
    assert_eq!(sockets(&place), 1, "what was killed cannot clean up");
    let said = place.refused(&["unplug", "compressed0"]);
    assert_eq!(said.lines().count(), 1, "{said}");
    let server = place.serve(&["memory,size=8M"]);
    let run = Run::start(&place, &["--", "sleep", "60"]);
    place.wait_for(&["list"], "pmem0");
    place.ok(&["unplug", "pmem0"]);
    assert!(server.end(libc::SIGTERM).status.success());
    drop(run);
}
