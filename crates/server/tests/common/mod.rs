//! What the tests of the NBD server share: a server on a socket of its own, and a client written by hand.
#![allow(
    clippy::unwrap_used,
    dead_code,
    reason = "each test uses a part of this, and fails where it should"
)]

use core::time::Duration;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;

use pgmap_server::nbd::{Export, Exports, Limits, Listener, Security, Server, Stopped, Writable};

pub(crate) mod disk;
pub(crate) mod load;

use disk::{Fixed, MemoryDisk};

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISCONNECT: u16 = 2;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const CACHE: u16 = 5;
pub(crate) const WRITE_ZEROES: u16 = 6;
pub(crate) const BLOCK_STATUS: u16 = 7;
pub(crate) const RESIZE: u16 = 8;
pub(crate) const FUA: u16 = 1;
pub(crate) const NO_HOLE: u16 = 2;
pub(crate) const REQ_ONE: u16 = 8;
pub(crate) const FAST_ZERO: u16 = 16;
pub(crate) const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";

/// A server with two exports: `disk`, and the same read-only as `still`.
pub(crate) struct Rig {
    pub(crate) server: Server,
    pub(crate) disk: Arc<MemoryDisk>,
    pub(crate) export: Arc<Export>,
    directory: tempfile::TempDir,
}

impl Rig {
    pub(crate) fn new(bytes: u64) -> Self {
        Self::secured(bytes, Security::Plain)
    }

    pub(crate) fn secured(bytes: u64, security: Security) -> Self {
        let handshake = Duration::from_millis(300);
        let clients = 300;
        Self::with(bytes, Limits { handshake, clients }, security)
    }

    pub(crate) fn with(bytes: u64, limits: Limits, security: Security) -> Self {
        let disk = MemoryDisk::new("disk", bytes).unwrap();
        let mut export = Export::new(disk.clone());
        export.description.push_str("a disk of memory");
        let export = Arc::new(export);
        let mut still = Export::new(disk.clone());
        "still".clone_into(&mut still.name);
        still.writable = Writable::No;
        let exports: Arc<dyn Exports> = Arc::new(Fixed(vec![export.clone(), Arc::new(still)]));
        let server = Server::new(exports, limits, security).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
        server.serve(Listener::Unix(listener)).unwrap();
        Self {
            server,
            disk,
            export,
            directory,
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    pub(crate) fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream
    }

    /// A client in the transmission phase.
    pub(crate) fn client(&self, replies: Replies) -> Client {
        Client::new(self.connect(), "disk", replies)
    }

    /// Waits until nobody is connected.
    pub(crate) fn wait_for_nobody(&self) {
        for _ in 0..1000 {
            if self.server.clients().is_empty() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("still connected: {:?}", self.server.clients());
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let stopped = self.server.stop(Duration::from_secs(5));
        assert!(std::thread::panicking() || stopped == Stopped::Clean);
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Replies {
    Simple,
    Structured,
}

/// A client by hand.
pub(crate) struct Client<S = UnixStream> {
    pub(crate) stream: S,
    pub(crate) size: u64,
    pub(crate) flags: u16,
    replies: Replies,
    cookie: u64,
}

/// What a reply said: an error, 0 for none; where; and its payload.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Reply {
    pub(crate) cookie: u64,
    pub(crate) error: u32,
    pub(crate) offset: Option<u64>,
    pub(crate) payload: Vec<u8>,
}

impl Client {
    pub(crate) fn new(mut stream: UnixStream, export: &str, replies: Replies) -> Self {
        greet(&mut stream, 3);
        Self::greeted(stream, export, replies)
    }
}

impl<S: Read + Write> Client<S> {
    /// Goes on where the greetings are over.
    pub(crate) fn greeted(mut stream: S, export: &str, replies: Replies) -> Self {
        if replies == Replies::Structured {
            assert_eq!(option(&mut stream, 8, &[])[0].0, 1);
            let mut data = string(export);
            data.extend(1u32.to_be_bytes());
            data.extend(string("base:allocation"));
            let answers = option(&mut stream, 10, &data);
            assert_eq!(answers[0], (4, b"\0\0\0\x01base:allocation".to_vec()));
        }
        let mut data = string(export);
        data.extend([0, 0]);
        let answers = option(&mut stream, 7, &data);
        assert_eq!(answers.last().unwrap().0, 1, "{answers:?}");
        let info = &answers[0].1;
        let size = u64::from_be_bytes(info[2..10].try_into().unwrap());
        let flags = u16::from_be_bytes(info[10..].try_into().unwrap());
        let cookie = 0;
        Self {
            stream,
            size,
            flags,
            replies,
            cookie,
        }
    }

    /// Sends a request's head; says its cookie.
    pub(crate) fn send(&mut self, command: u16, flags: u16, offset: u64, length: u32) -> u64 {
        self.cookie += 1;
        let head = request(command, flags, self.cookie, offset, length);
        self.stream.write_all(&head).unwrap();
        self.cookie
    }

    /// A request without payload, and its reply.
    pub(crate) fn ask(&mut self, command: u16, flags: u16, offset: u64, length: u32) -> Reply {
        let cookie = self.send(command, flags, offset, length);
        let expected = if command == READ { length } else { 0 };
        self.reply(cookie, expected as usize)
    }

    pub(crate) fn write(&mut self, flags: u16, offset: u64, bytes: &[u8]) -> Reply {
        let cookie = self.send(WRITE, flags, offset, u32::try_from(bytes.len()).unwrap());
        self.stream.write_all(bytes).unwrap();
        self.reply(cookie, 0)
    }

    /// The reply to a request; `payload` is what follows a simple one without an error.
    pub(crate) fn reply(&mut self, cookie: u64, payload: usize) -> Reply {
        let reply = self.any_reply(payload).expect("a reply");
        assert_eq!(reply.cookie, cookie);
        reply
    }

    /// Whatever reply is next; `None` if the server has hung up.
    pub(crate) fn any_reply(&mut self, payload: usize) -> Option<Reply> {
        let mut reply = Reply::default();
        loop {
            let mut magic = [0; 4];
            self.stream.read_exact(&mut magic).ok()?;
            if magic == [0x67, 0x44, 0x66, 0x98] {
                (reply.error, reply.cookie) = (self.u32(), self.u64());
                reply.payload = self.bytes(payload * usize::from(reply.error == 0));
                return Some(reply);
            }
            assert_eq!(magic, [0x66, 0x8e, 0x33, 0xef], "neither kind of reply");
            assert_eq!(self.replies, Replies::Structured);
            if self.chunk(&mut reply) {
                return Some(reply);
            }
        }
    }

    /// One chunk behind its magic; says whether it is the last.
    fn chunk(&mut self, reply: &mut Reply) -> bool {
        let flags_kind = self.u32();
        reply.cookie = self.u64();
        let len = self.u32() as usize;
        let mut body = self.bytes(len);
        match flags_kind & 0xffff {
            0 => assert_eq!(len, 0),
            1 => reply.payload.extend(&body[8..]),
            5 => reply.payload = body.split_off(4),
            kind @ (0x8001 | 0x8002) => {
                reply.error = u32::from_be_bytes(body[..4].try_into().unwrap());
                let message = usize::from(u16::from_be_bytes(body[4..6].try_into().unwrap()));
                if kind == 0x8002 {
                    let offset = body[6 + message..].try_into().unwrap();
                    reply.offset = Some(u64::from_be_bytes(offset));
                }
            }
            kind => panic!("a chunk of kind {kind}"),
        }
        flags_kind >> 16 == 1
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.bytes(4).try_into().unwrap())
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.bytes(8).try_into().unwrap())
    }
}

/// The bytes of a request's head.
pub(crate) fn request(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut head = 0x2560_9513u32.to_be_bytes().to_vec();
    head.extend(flags.to_be_bytes());
    head.extend(command.to_be_bytes());
    head.extend(cookie.to_be_bytes());
    head.extend(offset.to_be_bytes());
    head.extend(length.to_be_bytes());
    head
}

/// Reads the server's greeting, and answers with flags.
pub(crate) fn greet(stream: &mut (impl Read + Write), flags: u32) {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\0\x03");
    stream.write_all(&flags.to_be_bytes()).unwrap();
}

pub(crate) fn string(text: &str) -> Vec<u8> {
    let mut bytes = u32::try_from(text.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

/// The bytes of an option.
pub(crate) fn option_bytes(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_vec();
    bytes.extend(kind.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend(data);
    bytes
}

/// Sends an option; gives all replies, the last being an acknowledgement or an error.
pub(crate) fn option(
    stream: &mut (impl Read + Write),
    kind: u32,
    data: &[u8],
) -> Vec<(u32, Vec<u8>)> {
    stream.write_all(&option_bytes(kind, data)).unwrap();
    let mut replies = Vec::new();
    loop {
        let mut head = [0; 20];
        stream.read_exact(&mut head).unwrap();
        let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
        assert_eq!(head[..8], 0x0003_e889_0455_65a9u64.to_be_bytes());
        assert_eq!(word(8), kind);
        let mut data = vec![0; word(16) as usize];
        stream.read_exact(&mut data).unwrap();
        replies.push((word(12), data));
        if word(12) == 1 || word(12) >> 31 == 1 {
            return replies;
        }
    }
}

/// Bytes that tell where they belong.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = (0..len.div_ceil(8)).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(len).collect()
}
