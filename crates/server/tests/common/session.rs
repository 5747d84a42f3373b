//! A whole session over bytes that a client might send: the fuzz targets and `nbd_fuzz` run it.

use core::time::Duration;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::thread;

use pgmap_server::nbd::{Export, Limits, Security, Server};

#[path = "disk.rs"]
pub(crate) mod disk;

/// Small, so that requests meet its end.
const BYTES: u64 = 1 << 20;
/// Structured replies, metadata of the default export, and go.
const HANDSHAKE: &[u8] = b"\0\0\0\x03IHAVEOPT\0\0\0\x08\0\0\0\0\
    IHAVEOPT\0\0\0\x0a\0\0\0\x1b\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation\
    IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0";

/// A client that says these bytes and hangs up, having read whatever the server answered.
pub(crate) fn whole(bytes: &[u8]) -> Vec<u8> {
    static SERVER: OnceLock<Server> = OnceLock::new();
    let server = SERVER.get_or_init(|| {
        // A panic of a session would only look like the end of it.
        let report = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            report(panic);
            if thread::current().name() == Some("nbd") {
                std::process::abort();
            }
        }));
        let disk = disk::MemoryDisk::new("fuzz", BYTES).expect("memory");
        let exports = disk::Fixed(vec![Arc::new(Export::new(disk))]);
        let limits = Limits {
            handshake: Duration::from_secs(1),
            ..Limits::default()
        };
        Server::new(Arc::new(exports), limits, Security::Plain).expect("a server")
    });
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    server.admit_unix(OwnedFd::from(theirs));
    let mut answers = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| {
            // It fails where the server hangs up first.
            let _ = (&ours).write_all(bytes);
            let _ = ours.shutdown(Shutdown::Write);
        });
        let _ = (&ours).read_to_end(&mut answers);
    });
    answers
}

/// The same behind a good handshake.
pub(crate) fn after_handshake(bytes: &[u8]) -> Vec<u8> {
    whole(&[HANDSHAKE, bytes].concat())
}
