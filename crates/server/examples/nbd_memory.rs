//! Serves a disk of memory on a unix socket until its standard input ends: `nbd_memory SOCKET BYTES`.
//!
//! The benchmarks measure this against other servers.

use core::time::Duration;
use std::io::{self, Read};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use pgmap_server::nbd::{Export, Limits, Listener, Server};

#[path = "../tests/common/disk.rs"]
mod disk;

fn main() -> io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(socket), Some(bytes)) = (arguments.next(), arguments.next()) else {
        return Err(io::Error::other("usage: nbd_memory SOCKET BYTES"));
    };
    let bytes = bytes.parse().map_err(io::Error::other)?;
    let export = Export::new(disk::MemoryDisk::new("memory", bytes)?);
    let exports = disk::Fixed(vec![Arc::new(export)]);
    let server = Server::new(Arc::new(exports), Limits::default())?;
    server.serve(Listener::Unix(UnixListener::bind(&socket)?))?;
    io::stdin().read_to_end(&mut Vec::new())?;
    let stopped = server.stop(Duration::from_secs(5));
    println!("{stopped:?}");
    std::fs::remove_file(socket)
}
