//! The counters, for Prometheus: one page of text over HTTP.

use core::fmt::Write as _;
use core::net::SocketAddr;
use core::time::Duration;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;

use pgmap_sync::atomic::{AtomicBool, Ordering};

use super::Service;
use crate::control::protocol::Counters;

/// How long a client may take. They come one after the other.
const PATIENCE: Duration = Duration::from_secs(2);
/// The longest request.
const MOST_BYTES: usize = 8 << 10;

/// A place where metrics are had; it ends when this is dropped.
#[derive(Debug)]
pub struct Metrics {
    listener: Arc<TcpListener>,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Metrics {
    /// Answers at an address.
    ///
    /// # Errors
    ///
    /// What the machine answers.
    pub fn serve(address: SocketAddr, service: &Arc<Service>) -> io::Result<Self> {
        let listener = Arc::new(TcpListener::bind(address)?);
        let ending = Arc::new(AtomicBool::new(false));
        let (ours, end, service) = (
            Arc::clone(&listener),
            Arc::clone(&ending),
            Arc::clone(service),
        );
        let thread = std::thread::Builder::new().name("pgmap-metrics".into());
        let thread = thread.spawn(move || {
            // SeqCst: the plainest; looked at once a connection.
            let going_on = ours.incoming().take_while(|_| !end.load(Ordering::SeqCst));
            for stream in going_on {
                // A client that breaks off has its own reasons.
                let _ = stream.and_then(|stream| answer(stream, &service));
            }
        })?;
        Ok(Self {
            listener,
            ending,
            thread: Some(thread),
        })
    }

    /// Where it answers.
    ///
    /// # Errors
    ///
    /// What the machine answers.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl Drop for Metrics {
    fn drop(&mut self) {
        // SeqCst: as above.
        self.ending.store(true, Ordering::SeqCst);
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn answer(mut stream: TcpStream, service: &Service) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut request = Vec::new();
    let mut bytes = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let read = stream.read(&mut bytes)?;
        if read == 0 || request.len() > MOST_BYTES {
            return Ok(());
        }
        request.extend_from_slice(&bytes[..read]);
    }
    let (status, body) = if request.starts_with(b"GET /metrics ") {
        ("200 OK", page(&service.counters()))
    } else {
        ("404 Not Found", "metrics are at /metrics\n".to_owned())
    };
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}

/// The text format that Prometheus reads.
fn page(all: &[Counters]) -> String {
    let mut text = String::new();
    let Some(first) = all.first() else {
        return text;
    };
    for (nth, (name, _)) in first.counters.iter().enumerate() {
        let _ = writeln!(text, "# TYPE pgmap_{name}_total counter");
        for counters in all {
            if let Some((_, value)) = counters.counters.get(nth) {
                let _ = writeln!(
                    text,
                    "pgmap_{name}_total{{device=\"{}\"}} {value}",
                    counters.of
                );
            }
        }
    }
    for (nth, (name, _)) in first.gauges.iter().enumerate() {
        let _ = writeln!(text, "# TYPE pgmap_{name} gauge");
        for counters in all {
            if let Some((_, value)) = counters.gauges.get(nth) {
                let _ = writeln!(text, "pgmap_{name}{{device=\"{}\"}} {value}", counters.of);
            }
        }
    }
    text
}
