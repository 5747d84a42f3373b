//! `pgmap serve` for clients under TLS.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs;
use std::process::Command;

#[path = "../../server/tests/common/pki.rs"]
#[allow(dead_code, reason = "the server's tests use more of it")]
mod pki;
mod serving;

use pki::Pki;
use serving::{Place, has};

const MEMORY: [&str; 3] = ["serve", "--pmem", "memory,size=16M"];

/// Whether libnbd's client gets to an export with these certificates.
fn reaches(uri: &str, certificates: &Pki) -> bool {
    let certificates = certificates.path().display();
    let uri = format!("{uri}tls-certificates={certificates}&tls-hostname=localhost");
    let output = Command::new("nbdinfo").args(["--size", &uri]).output();
    output.unwrap().status.success()
}

/// Options that promise less than they say, or more, are refused with what to do.
#[test]
fn half_of_tls_is_refused() {
    let (place, pki) = (Place::new(), Pki::new());
    let files = pki.path().to_str().unwrap();
    let cases: &[(&[&str], &str)] = &[
        (&["--tls", "require"], "--tls-certificates"),
        (&["--tls-certificates", files], "--tls require"),
        (&["--tls-verify-peer"], "--tls require"),
        (
            &["--tls", "on", "--tls-certificates", "/no/such"],
            "/no/such/server-cert.pem",
        ),
        (
            &[
                "--nbd",
                "0.0.0.0:0",
                "--tls",
                "require",
                "--tls-certificates",
                files,
            ],
            "--tls-verify-peer",
        ),
        (
            &[
                "--nbd",
                "0.0.0.0:0",
                "--tls",
                "on",
                "--tls-certificates",
                files,
                "--tls-verify-peer",
            ],
            "--tls require",
        ),
    ];
    for (arguments, part) in cases {
        let said = place.refused(&[&MEMORY, *arguments].concat());
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains(part), "{arguments:?}: {said}");
    }
}

/// Clients of other machines are served if all of them show a certificate; the options may come from a file.
#[test]
fn other_machines_are_served_with_certificates() {
    let (place, pki) = (Place::new(), Pki::new());
    let config = format!(
        "pmem = [\"memory,size=16M\"]\ntls = \"require\"\ntls-certificates = \"{}\"\ntls-verify-peer = true\n",
        pki.path().display()
    );
    fs::write(place.path("serve.toml"), config).unwrap();
    let arguments = ["serve", "--config", "serve.toml", "--nbd", "0.0.0.0:0"];
    let server = place.serve_with(&arguments);
    let uri = server.announced.lines().nth(1).unwrap().trim();
    assert!(uri.starts_with("nbds://0.0.0.0:"), "{uri}");
    if has("nbdinfo") {
        let uri = uri.replace("0.0.0.0", "127.0.0.1") + "?";
        assert!(reaches(&uri, &pki));
        assert!(!reaches(&uri, &Pki::new()));
        assert!(!reaches(&uri.replace("nbds:", "nbd:"), &pki));
    }
}

/// Where TLS is a choice, both ways lead to the same bytes.
#[test]
fn tls_may_be_a_choice() {
    let (place, pki) = (Place::new(), Pki::new());
    let files = pki.path().to_str().unwrap();
    let tls = ["--tls", "on", "--tls-certificates", files];
    let server = place.serve_with(&[&MEMORY[..], &tls].concat());
    let plain = server.uri("pmem0") + "&";
    assert!(server.announced.contains(&server.uri("pmem0")));
    if has("nbdinfo") {
        assert!(reaches(&plain, &pki));
        assert!(reaches(&plain.replace("nbd+", "nbds+"), &pki));
    }
}
