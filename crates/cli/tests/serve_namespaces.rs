//! `pgmap serve` for clients in other namespaces: from a container to its host, or the other way round.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod serving;

use std::process::Command;

use serving::nbd::{BLOCK, Nbd};
use serving::{Place, Server, pattern};

/// A server in a namespace of processes of its own, where its clients, who stay outside, have no numbers; `None` if the machine does not
/// allow that.
fn serve_inside(place: &Place) -> Option<Server> {
    let namespace = ["--map-root-user", "--pid", "--fork", "--kill-child"];
    let probe = Command::new("unshare").args(namespace).arg("true").output();
    if !probe.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: this machine makes no namespace of our own");
        return None;
    }
    let mut command = Command::new("unshare");
    command
        .args(namespace)
        .arg(env!("CARGO_BIN_EXE_pgmap"))
        .args(["serve", "--pmem", "memory,size=8M"])
        .current_dir(&place.directory)
        .env("XDG_RUNTIME_DIR", place.directory.path());
    Some(Server::start(command))
}

/// A client whose process has no number here is served, by NBD and by the control socket, and holds things as a process that is not known.
#[test]
fn a_client_without_a_number_is_served() {
    let place = Place::new();
    let Some(server) = serve_inside(&place) else {
        return;
    };
    let mut nbd = Nbd::connect(server.nbd(), "pmem0").unwrap();
    let bytes = pattern(BLOCK, 5);
    nbd.write(0, &bytes).unwrap();
    assert_eq!(nbd.read(0, BLOCK).unwrap(), bytes);
    assert_eq!(place.read("pmem0")[..BLOCK], bytes);
}
