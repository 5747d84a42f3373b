//! What `pgmap serve` says of sessions that went wrong.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use core::time::Duration;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

#[path = "../../server/tests/common/pki.rs"]
#[allow(dead_code, reason = "the server's tests use more of it")]
mod pki;
mod serving;

use pki::Pki;
use serving::nbd::Nbd;
use serving::{Place, Server};

const MEMORY: [&str; 3] = ["serve", "--pmem", "memory,size=16M"];

/// Says something after the greeting, and waits for the end.
fn say(socket: &Path, bytes: &[u8]) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    stream.write_all(bytes).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    // It may be reset, as there are bytes that nobody reads.
    let _ = stream.read_to_end(&mut Vec::new());
}

/// Begins TLS, and says something that is none.
fn begin_tls(socket: &Path) {
    let mut bytes = 3u32.to_be_bytes().to_vec();
    bytes.extend(b"IHAVEOPT");
    bytes.extend(5u32.to_be_bytes());
    bytes.extend(0u32.to_be_bytes());
    bytes.extend(b"GET / HTTP/1.1\r\n\r\n");
    say(socket, &bytes);
}

fn said(server: Server) -> String {
    let output = server.end(libc::SIGTERM);
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// A client that speaks something else is named, once for each time; one that comes and goes is not.
#[test]
fn garbage_is_told_and_a_goodbye_is_not() {
    let place = Place::new();
    let server = place.serve_with(&MEMORY);
    drop(Nbd::connect(server.nbd(), "pmem0").unwrap());
    say(server.nbd(), &[]);
    let _ = UnixStream::connect(server.nbd()).unwrap();
    say(server.nbd(), &[0xff; 4]);
    let said = said(server);
    assert_eq!(said.lines().count(), 1, "{said}");
    let who = format!("pgmap: an NBD client, process {} (", std::process::id());
    assert!(said.starts_with(&who), "{said}");
    assert!(
        said.contains("does not speak the protocol: unknown flags"),
        "{said}"
    );
}

/// Who fails to begin TLS is found from the server's side.
#[test]
fn a_failure_of_tls_is_told() {
    let (place, pki) = (Place::new(), Pki::new());
    let files = pki.path().to_str().unwrap();
    let tls = ["--tls", "require", "--tls-certificates", files];
    let server = place.serve_with(&[&MEMORY[..], &tls].concat());
    begin_tls(server.nbd());
    let said = said(server);
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("TLS failed: "), "{said}");
}

/// A client that hammers does not fill the disk: some lines, and how many more there were.
#[test]
fn who_hammers_is_counted() {
    let place = Place::new();
    let server = place.serve_with(&MEMORY);
    for _ in 0..100 {
        say(server.nbd(), &[0xff; 4]);
    }
    let said = said(server);
    assert!((11..20).contains(&said.lines().count()), "{said}");
    let last = said.lines().last().unwrap();
    assert!(last.ends_with("more NBD sessions went wrong"), "{said}");
}

/// With `--quiet` there is not a word.
#[test]
fn quiet_means_quiet() {
    let place = Place::new();
    let socket = place.path("nbd");
    let arguments = [&MEMORY[..], &["--quiet", "--nbd", "unix:nbd"]].concat();
    let mut command = place.pgmap(&arguments);
    let server = command.stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    while UnixStream::connect(&socket).is_err() {
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "it does not serve"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    say(&socket, &[0xff; 4]);
    place.wait_for(&["list"], "pmem0");
    serving::signal(server.id(), libc::SIGTERM);
    let output = server.wait_with_output().unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
}
