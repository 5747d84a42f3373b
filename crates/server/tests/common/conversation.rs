//! A conversation over the control socket of a service with one namespace: bytes in, bytes out. For the fuzz target and
//! for ordinary tests.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};

use pgmap_server::control::protocol::{Answer, Code, Failure, ManagerInfo, Request};
use pgmap_server::control::{Listener, Manager, Session};
use pgmap_server::service::Service;

/// A service that opens no files, whatever it is asked.
struct NoFiles(Arc<Service>);

impl Manager for NoFiles {
    fn info(&self) -> ManagerInfo {
        self.0.info()
    }

    fn answer(&self, request: Request, session: &mut Session) -> Result<Answer, Failure> {
        match &request {
            Request::Plug { spec } if !spec.starts_with("memory,size=4K") => {
                Err(Failure::new(Code::Denied, "no files here"))
            }
            _ => self.0.answer(request, session),
        }
    }
}

fn listener() -> &'static Listener {
    static LISTENER: OnceLock<Listener> = OnceLock::new();
    LISTENER.get_or_init(|| {
        let service = Service::new().expect("addresses");
        let spec = "memory,size=4M".parse().expect("a region");
        service.plug(&spec).expect("memory");
        let name = format!("pgmap-conversation-{}.sock", std::process::id());
        let path = std::env::temp_dir().join(name);
        Listener::start(&path, Arc::new(NoFiles(service))).expect("a socket")
    })
}

/// All that is answered to these bytes.
pub(crate) fn whole(bytes: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(listener().path()).expect("it listens");
    let mut answers = Vec::new();
    // It may have ended the conversation before it has all.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.read_to_end(&mut answers);
    answers
}
