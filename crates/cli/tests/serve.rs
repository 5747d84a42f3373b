//! `pgmap serve` and the verbs that ask it, as people use them.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod serving;

use core::time::Duration;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Stdio};
use std::time::Instant;

use pgmap_server::control::Client;
use pgmap_server::control::protocol::Request;
use serving::{Place, has, pattern};

const MIB: usize = 1 << 20;

/// A client that maps and pins the beginning of a namespace until it is killed.
fn pinned(place: &Place, namespace: &str) -> Child {
    let arguments = [
        "map", namespace, "--length", "2M", "--pin", "my rings", "--", "sleep", "60",
    ];
    let child = place.pgmap(&arguments).spawn().unwrap();
    place.wait_for(&["holders", namespace], "my rings");
    child
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

/// What is announced is what there is, in the words of the issue: name, mode, size, alignment.
#[test]
fn a_fresh_image_is_one_namespace() {
    let place = Place::new();
    let server = place.serve(&["disk.img,size=1G"]);
    let first = server.announced.lines().next().unwrap();
    let shown = "pmem0  fsdax  1022.0 MiB  align 2M  metadata 2.0 MiB on the device";
    assert_eq!(first, shown);
    assert!(server.announced.contains("direct: pgmap map pmem0"));
    assert!(server.announced.contains(&server.uri("pmem0")));
    let listed: serde_json::Value = serde_json::from_str(&place.ok(&["list", "--json"])).unwrap();
    let namespace = &listed[0];
    assert_eq!(namespace["dev"], "namespace0.0");
    assert_eq!(namespace["mode"], "fsdax");
    assert_eq!(namespace["blockdev"], "pmem0");
    assert_eq!(namespace["size"], 1022 << 20);
    assert_eq!(namespace["align"], 2 << 20);
    assert_eq!(namespace["state"], "enabled");
    let iomem = place.ok(&["iomem"]);
    assert!(
        iomem.contains("pmem0") && iomem.contains("Persistent Memory"),
        "{iomem}"
    );
}

/// REF-7, MAP-6: an unplug names who holds the device, changes nothing at its deadline, and waits without one.
#[test]
fn unplug_names_and_waits_for_holders() {
    let place = Place::new();
    let _server = place.serve(&["disk.img,size=32M"]);
    place.write("pmem0", "0", &pattern(4 * MIB, 1));
    let client = pinned(&place, "pmem0");
    let refused = place.refused(&["unplug", "pmem0", "--timeout", "200ms"]);
    assert!(refused.contains("pmem0 is in use"), "{refused}");
    assert!(refused.contains("pin \"my rings\", process"), "{refused}");
    assert!(refused.contains("2.0 MiB at 0x0"), "{refused}");
    // Everything is still usable.
    assert_eq!(place.read("pmem0")[..4 * MIB], pattern(4 * MIB, 1));

    let mut waiting = place.pgmap(&["unplug", "pmem0"]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(waiting.try_wait().unwrap().is_none(), "it did not wait");
    kill(client);
    assert!(waiting.wait().unwrap().success());
    assert!(place.ok(&["list"]).contains("disabled"));
    assert!(
        place
            .refused(&["map", "pmem0"])
            .contains("pgmap enable pmem0")
    );
    place.ok(&["enable", "pmem0"]);
    assert_eq!(place.read("pmem0")[..4 * MIB], pattern(4 * MIB, 1));
}

/// GUP-3: what a client held ends with it, however it dies.
#[test]
fn a_killed_client_leaves_no_pin() {
    let place = Place::new();
    let _server = place.serve(&["memory,size=32M"]);
    for _ in 0..5 {
        kill(pinned(&place, "pmem0"));
        place.wait_for(&["holders", "pmem0"], "nobody holds pmem0");
    }
    place.ok(&["unplug", "pmem0", "--timeout", "5s"]);
}

/// REF-7: who still holds something when the server ends is named, and does not hold it up.
#[test]
fn the_end_names_holders() {
    let place = Place::new();
    let server = place.serve(&["memory,size=32M"]);
    let client = pinned(&place, "pmem0");
    let output = server.end(libc::SIGTERM);
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("still held at the end: pmem0"), "{said}");
    assert!(said.contains("my rings"), "{said}");
    kill(client);
}

/// MAP-6: a region goes with all of its namespaces, or, if one of them is held, with none.
#[test]
fn a_region_goes_whole_or_stays() {
    let place = Place::new();
    let server = place.serve(&["disk.img,size=64M"]);
    place.ok(&["destroy-namespace", "-f", "pmem0"]);
    for name in ["first", "second", "third"] {
        place.ok(&["create-namespace", "--size", "8M", "--name", name]);
    }
    let client = pinned(&place, "second");
    let mut nbd = serving::nbd::Nbd::connect(server.nbd(), "pmem0").unwrap();
    let before = place.ok(&["list", "-NR", "--json"]);
    let said = place.refused(&["unplug", "region0", "--timeout", "300ms"]);
    assert!(said.contains("my rings"), "{said}");
    assert_eq!(place.ok(&["list", "-NR", "--json"]), before);
    nbd.write(0, &[7; 512]).unwrap();
    assert!(nbd.read(0, 512).unwrap() == [7; 512]);
    kill(client);
    place.ok(&["unplug", "region0", "--timeout", "10s"]);
    assert!(!place.ok(&["list"]).contains("region0"));
}

/// MAP-6: whoever asked for the unplug may die: then nobody waits, and nothing has changed.
#[test]
fn a_killed_unplug_changes_nothing() {
    let place = Place::new();
    let _server = place.serve(&["disk.img,size=32M"]);
    let client = pinned(&place, "pmem0");
    let unplug = place.pgmap(&["unplug", "pmem0"]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    kill(unplug);
    let started = Instant::now();
    while place
        .pgmap(&["map", "pmem0"])
        .output()
        .unwrap()
        .status
        .code()
        != Some(0)
    {
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "it stays frozen"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    kill(client);
}

/// PMEM-2: to disable volatile memory waits for who maps it, since its bytes are kept; nobody's store is lost.
#[test]
fn disabling_memory_waits_for_who_maps_it() {
    let place = Place::new();
    let _server = place.serve(&["memory,size=32M"]);
    place.write("pmem0", "0", b"kept");
    let arguments = ["map", "pmem0", "--", "sleep", "60"];
    let client = place.pgmap(&arguments).spawn().unwrap();
    place.wait_for(&["holders", "pmem0"], "map");
    let refused = place.refused(&["disable", "pmem0", "--timeout", "200ms"]);
    assert!(refused.contains("pmem0 is in use"), "{refused}");
    kill(client);
    place.ok(&["disable", "pmem0", "--timeout", "10s"]);
    place.ok(&["enable", "pmem0"]);
    assert!(place.read("pmem0").starts_with(b"kept"));
}

/// PMEM-2: who still maps volatile memory that was taken away gets SIGBUS, and never old bytes or zeros.
#[test]
fn whoever_maps_what_is_gone_gets_sigbus() {
    let place = Place::new();
    let _server = place.serve(&["memory,size=32M"]);
    let script = "import mmap,os,sys,time
f=os.open(os.environ['PGMAP_FILE'],os.O_RDWR)
m=mmap.mmap(f,int(os.environ['PGMAP_LENGTH']),offset=int(os.environ['PGMAP_OFFSET']))
m[0:4]=b'mine'
print('mapped',flush=True)
while True:
    assert m[0:4]==b'mine'
    time.sleep(0.01)";
    let mut command = place.pgmap(&["map", "pmem0", "--", "python3", "-c", script]);
    let mut client = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut said = [0; 6];
    client
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut said)
        .unwrap();
    let children = format!("/proc/{0}/task/{0}/children", client.id());
    let program: i32 = fs::read_to_string(children)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    // The program outlives the client that held the mapping for it.
    kill(client);
    let status = format!("/proc/{program}/stat");
    assert!(fs::exists(&status).unwrap());
    place.ok(&["unplug", "pmem0", "--timeout", "10s"]);
    let started = Instant::now();
    while fs::exists(&status).unwrap() {
        let stat = fs::read_to_string(&status).unwrap_or_default();
        if stat.is_empty() || stat.contains(") Z ") {
            break;
        }
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "it lives: {stat}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// PMEM-4: what was flushed is there after the server was killed; a second server is refused while the first lives.
#[test]
fn a_killed_server_loses_nothing_that_was_flushed() {
    let place = Place::new();
    let server = place.serve(&["disk.img,size=32M"]);
    place.write("pmem0", "2M", &pattern(3 * MIB, 7));
    let refused = place.refused(&["serve", "--pmem", "disk.img"]);
    assert!(refused.contains("in use"), "{refused}");
    assert_eq!(
        server.end(libc::SIGKILL).status.signal(),
        Some(libc::SIGKILL)
    );
    let server = place.serve(&["disk.img"]);
    let bytes = place.read("pmem0");
    assert_eq!(bytes.len(), 30 * MIB);
    assert_eq!(bytes[2 * MIB..5 * MIB], pattern(3 * MIB, 7));
    let output = server.end(libc::SIGTERM);
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    // The living server's sockets are gone with it; the killed one's stay until somebody takes their place.
    assert_eq!(place.ok(&["list"]), "");
}

/// Namespaces are made, named, disabled and destroyed, and all of it survives a restart.
#[test]
fn namespaces_survive_a_restart() {
    let place = Place::new();
    let server = place.serve(&["disk.img,size=64M"]);
    let busy = place.refused(&["destroy-namespace", "pmem0"]);
    assert!(busy.contains("disable it first"), "{busy}");
    place.ok(&["destroy-namespace", "--force", "pmem0"]);
    place.ok(&["create-namespace", "--size", "16M", "--name", "first"]);
    place.ok(&["create-namespace", "-m", "devdax", "-s", "8M", "-a", "4K"]);
    place.write("first", "0", b"bytes of the first");
    place.ok(&["disable", "namespace0.1"]);
    let state = |text: &str| {
        let kept = text.lines().filter(|line| !line.contains("\"nbd\""));
        kept.collect::<Vec<_>>().join("\n")
    };
    let listed = state(&place.ok(&["list", "-NR", "--json"]));
    drop(server.end(libc::SIGTERM));
    let _server = place.serve(&["disk.img"]);
    assert_eq!(state(&place.ok(&["list", "-NR", "--json"])), listed);
    assert!(place.read("first").starts_with(b"bytes of the first"));
    assert!(place.ok(&["list"]).contains("disabled"));
    place.ok(&["enable", "dax0.1"]);
    let full = place.refused(&["create-namespace", "--size", "1G"]);
    assert!(full.contains("in one piece"), "{full}");
}

/// PMEM-3: a bad block cannot be read, survives a restart, is found by a scrub, and cleared by request.
#[test]
fn bad_blocks_survive_a_restart() {
    let place = Place::new();
    let server = place.serve(&["disk.img,size=16M"]);
    place.ok(&["inject-error", "pmem0", "--block", "8", "--count", "4"]);
    drop(server.end(libc::SIGKILL));
    let _server = place.serve(&["disk.img"]);
    let listed: serde_json::Value =
        serde_json::from_str(&place.ok(&["list", "-M", "--json"])).unwrap();
    assert_eq!(listed[0]["badblocks"][0]["offset"], 8);
    assert_eq!(listed[0]["badblocks"][0]["length"], 4);
    assert_eq!(place.ok(&["scrub", "--wait"]), "done: 4 bad blocks\n");
    for direct in [
        &["map", "pmem0", "--length", "2M"][..],
        &["map", "pmem0", "--write"],
    ] {
        let said = place.refused(direct);
        assert!(
            said.contains("block 8 is bad") && said.contains("clear-error"),
            "{said}"
        );
    }
    place.ok(&["clear-error", "pmem0", "-B", "8", "-n", "4"]);
    assert_eq!(
        place.ok(&["scrub", "pmem0", "--wait"]),
        "done: 0 bad blocks\n"
    );
}

/// What goes wrong at the start is one line that says what to do, and changes no file.
#[test]
fn mistakes_are_one_line() {
    let place = Place::new();
    fs::write(place.path("precious"), pattern(8 * MIB, 3)).unwrap();
    fs::write(place.path("bad.toml"), "pmem = 3\n").unwrap();
    fs::write(place.path("odd.toml"), "pnem = []\n").unwrap();
    let full = ["serve", "--pmem", "memory,size=16M", "--nbd"];
    let cases: [(&[&str], &str); 11] = [
        (&["serve"], "nothing to serve"),
        (&["serve", "--pmem", "x.img"], "size="),
        (&["serve", "--pmem", "precious"], "mode=raw"),
        (&["serve", "--pmem", "."], "directory"),
        (
            &["serve", "--pmem", "no/such/x.img,size=1M"],
            "no/such/x.img",
        ),
        (&["serve", "--pmem", "x.img,size=1"], "at least one page"),
        (
            &["serve", "--config", "bad.toml"],
            "expected a text or a list",
        ),
        (&["serve", "--config", "odd.toml"], "pnem"),
        (&[&full[..], &["0.0.0.0:10809"]].concat(), "127.0.0.1"),
        (&[&full[..], &["nonsense"]].concat(), "unix:PATH"),
        (&["unplug", "pmem0"], "no manager of yours runs"),
    ];
    for (arguments, part) in cases {
        let said = place.refused(arguments);
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains(part), "{arguments:?}: {said}");
    }
    assert_eq!(
        fs::read(place.path("precious")).unwrap(),
        pattern(8 * MIB, 3)
    );
    assert!(!place.path("x.img").exists());
}

/// An address that is well written, but taken, is not told how to write one.
#[test]
fn a_taken_address_for_metrics_is_called_taken() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serve = ["serve", "--pmem", "memory,size=8M", "--metrics", &address];
    let said = Place::new().refused(&serve);
    assert!(said.contains("in use") && !said.contains("write"), "{said}");
}

/// What goes on until Ctrl-C ends when nobody reads it any more.
#[test]
fn a_look_that_nobody_reads_is_the_last() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let started = Instant::now();
    let place = Place::new();
    let mut command = place.pgmap(&["top", "--count", "2", "--interval", "20s"]);
    let output = command.stdout(writer).output().unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
    assert!(started.elapsed() < Duration::from_secs(15));
}

/// The options may come from a file; metrics are there for Prometheus.
#[test]
fn a_configuration_file_and_metrics() {
    let place = Place::new();
    // One may be written without the brackets of a list.
    let config = "pmem = [\"memory,size=16M\"]\nmetrics = \"127.0.0.1:0\"\nnbd = \"127.0.0.1:0\"\n";
    fs::write(place.path("serve.toml"), config).unwrap();
    let arguments = ["serve", "--config", "serve.toml"];
    let server = place.serve_with(&arguments);
    assert!(
        server.announced.contains("nbd://127.0.0.1:"),
        "{}",
        server.announced
    );
    let uri = server.announced.lines().nth(1).unwrap().trim();
    if has("nbdinfo") {
        let info = std::process::Command::new("nbdinfo")
            .args(["--size", uri])
            .output()
            .unwrap();
        assert_eq!(
            String::from_utf8_lossy(&info.stdout).trim(),
            (16 * MIB).to_string()
        );
    }
    let address = server.metrics();
    let mut stream = TcpStream::connect(address).unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    assert!(page.starts_with("HTTP/1.1 200 OK"), "{page}");
    assert!(
        page.contains("pgmap_reads_total{device=\"pmem0\"}"),
        "{page}"
    );
}

/// What was meant wrongly is told in one line that says what is wrong about it.
#[test]
fn mistakes_of_verbs_say_what_is_wrong() {
    let place = Place::new();
    let server = place.serve(&["memory,size=8M"]);
    let cases: [(&[&str], &str); 9] = [
        (&["map", "pmem0", "--offset", "1"], "a multiple of 2M"),
        (&["map", "pmem0", "--offset", "x"], "`x` is no size"),
        (
            &["inject-error", "pmem0", "-B", "0", "--count", "0"],
            "write at least 1",
        ),
        (
            &["clear-error", "pmem0", "-B", "0", "--count", "0"],
            "write at least 1",
        ),
        (
            &["inject-error", "pmem0", "-B", "x"],
            "write a whole number",
        ),
        (&["memory", "offline", "x"], "write a whole number"),
        (&["top", "-n", "0"], "write at least 1"),
        (&["plug", "compressed:1G"], "is a device of `pgmap run`"),
        (&["plug", "file:a,size=1G"], "is a device of `pgmap run`"),
    ];
    for (arguments, part) in cases {
        let said = place.refused(arguments);
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains(part), "{arguments:?}: {said}");
    }
    // Over the socket there is no such check before.
    let mut client = Client::connect(&server.control()).unwrap();
    let refused = client.ask(&Request::InjectError {
        namespace: "pmem0".into(),
        block: 0,
        count: 0,
    });
    assert!(refused.unwrap_err().to_string().contains("at least 1"));
}

/// A program that maps a range is looked for as a shell does it, and its status is ours.
#[test]
fn a_program_that_cannot_be_started_has_a_status_of_its_own() {
    let place = Place::new();
    let _server = place.serve(&["memory,size=8M"]);
    fs::write(place.path("plain"), "no program").unwrap();
    for (program, status) in [("nosuch", 127), ("./plain", 126), ("false", 1), ("true", 0)] {
        let mut command = place.pgmap(&["map", "pmem0", "--", program]);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{program}: {output:?}");
        assert_eq!(output.stderr.is_empty(), status < 2, "{output:?}");
    }
}

/// PMEM-4: of an input that is longer than the range, as much is written as fits, durably, and the rest is told of.
#[test]
fn too_much_input_is_written_as_far_as_it_fits() {
    let place = Place::new();
    let _server = place.serve(&["disk.img,size=8M"]);
    let bytes = pattern(2 * MIB + 1, 7);
    fs::write(place.path("input"), &bytes).unwrap();
    let mut command = place.pgmap(&["map", "pmem0", "--length", "2M", "--write"]);
    let input = fs::File::open(place.path("input")).unwrap();
    let output = command.stdin(input).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(
        said.contains("its first 2097152 bytes are written and durable"),
        "{said}"
    );
    assert!(place.read("pmem0")[..2 * MIB] == bytes[..2 * MIB]);
}

/// Who reads and who writes a range at the same time have each their own place in the file.
#[test]
fn a_writer_is_not_led_astray_by_a_reader() {
    let place = Place::new();
    let _server = place.serve(&["disk.img,size=8M"]);
    let bytes = pattern(2 * 4096, 3);
    // No pipe: the kernel copies one by itself, and looks for the place in the file only once.
    let (mut input, theirs) = UnixStream::pair().unwrap();
    let mut writer = place
        .pgmap(&["map", "pmem0", "--write"])
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .unwrap();
    input.write_all(&bytes[..4096]).unwrap();
    let start = |place: &Place| place.read("pmem0")[..2 * 4096].to_vec();
    let begin = Instant::now();
    while start(&place)[..4096] != bytes[..4096] {
        assert!(begin.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(10));
    }
    input.write_all(&bytes[4096..]).unwrap();
    drop(input);
    assert!(writer.wait().unwrap().success());
    assert!(start(&place) == bytes, "the second half went elsewhere");
}

/// REF-7: a pin that is older than it should be is told of without being asked, once; a mapping is not, and a pin that ends in time is not.
#[test]
fn an_old_pin_is_told_of_once() {
    let place = Place::new();
    let arguments = ["serve", "--pmem", "disk.img,size=64M", "--old-pins", "1s"];
    let server = place.serve_with(&arguments);
    let pin = pinned(&place, "pmem0");
    let mapped = place.pgmap(&["map", "pmem0", "--offset", "4M", "--", "sleep", "60"]);
    let mapped = { mapped }.spawn().unwrap();
    place.wait_until(&["holders", "pmem0"], |holders| {
        holders.matches("map").count() >= 2
    });
    // Two looks at the least, and another after that.
    std::thread::sleep(Duration::from_millis(2500));
    kill(pin);
    kill(mapped);
    place.wait_until(&["holders", "pmem0"], |holders| {
        !holders.contains("my rings")
    });
    let late = pinned(&place, "pmem0");
    kill(late);
    place.wait_until(&["holders", "pmem0"], |holders| {
        !holders.contains("my rings")
    });
    let output = server.end(libc::SIGTERM);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.starts_with("pgmap: pmem0: my rings (pid "), "{said}");
    let end = ") pins bytes 0x0-0x200000 for longer than 1s\n";
    assert!(said.ends_with(end), "{said}");
}
