//! An NBD client by hand, and a writer that remembers what was acknowledged.
#![allow(
    clippy::unwrap_used,
    dead_code,
    reason = "each test uses a part of this, and fails where it should"
)]

use core::time::Duration;
use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::Random;

/// What writers write at once.
pub(crate) const BLOCK: usize = 4096;
const FUA: u16 = 1;
const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
/// Requests that a writer sends ahead.
const AHEAD: usize = 8;

/// A connection in its transmission phase, with simple replies.
pub(crate) struct Nbd {
    pub(crate) stream: UnixStream,
    next: u64,
}

/// A reply that came: whose, and its error if there was one.
pub(crate) struct Reply {
    pub(crate) cookie: u64,
    pub(crate) error: u32,
}

impl Nbd {
    /// Agrees with the server on an export.
    pub(crate) fn connect(socket: &Path, export: &str) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        let mut ours = 3u32.to_be_bytes().to_vec();
        ours.extend(b"IHAVEOPT");
        ours.extend(7u32.to_be_bytes());
        let name = u32::try_from(export.len()).unwrap();
        ours.extend((name + 6).to_be_bytes());
        ours.extend(name.to_be_bytes());
        ours.extend(export.bytes());
        ours.extend([0, 0]);
        stream.write_all(&ours)?;
        loop {
            let mut head = [0; 20];
            stream.read_exact(&mut head)?;
            let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
            let mut data = vec![0; word(16) as usize];
            stream.read_exact(&mut data)?;
            match word(12) {
                1 => return Ok(Self { stream, next: 0 }),
                3 => {}
                _ => return Err(ErrorKind::NotFound.into()),
            }
        }
    }

    /// Sends the head of a request, and answers its cookie.
    fn head(&mut self, flags: u16, command: u16, offset: u64, length: usize) -> (u64, Vec<u8>) {
        self.next += 1;
        let mut head = 0x2560_9513u32.to_be_bytes().to_vec();
        head.extend(flags.to_be_bytes());
        head.extend(command.to_be_bytes());
        head.extend(self.next.to_be_bytes());
        head.extend(offset.to_be_bytes());
        head.extend(u32::try_from(length).unwrap().to_be_bytes());
        (self.next, head)
    }

    fn send(&mut self, flags: u16, command: u16, offset: u64, bytes: &[u8]) -> io::Result<u64> {
        let (cookie, mut request) = self.head(flags, command, offset, bytes.len());
        request.extend(bytes);
        self.stream.write_all(&request)?;
        Ok(cookie)
    }

    pub(crate) fn send_write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<u64> {
        self.send(FUA, WRITE, offset, bytes)
    }

    /// Begins a write, and sends only a part of its payload.
    pub(crate) fn send_half(&mut self, offset: u64, bytes: &[u8], sent: usize) -> io::Result<()> {
        let (_, mut request) = self.head(0, WRITE, offset, bytes.len());
        request.extend(&bytes[..sent]);
        self.stream.write_all(&request)
    }

    /// Asks for bytes, and does not take them.
    pub(crate) fn send_read(&mut self, offset: u64, length: usize) -> io::Result<()> {
        let (_, request) = self.head(0, READ, offset, length);
        self.stream.write_all(&request)
    }

    pub(crate) fn reply(&mut self) -> io::Result<Reply> {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head)?;
        assert_eq!(head[..4], 0x6744_6698u32.to_be_bytes(), "not a reply");
        Ok(Reply {
            error: u32::from_be_bytes(head[4..8].try_into().unwrap()),
            cookie: u64::from_be_bytes(head[8..].try_into().unwrap()),
        })
    }

    /// Takes the reply to a request; an error of the device has its number.
    fn finish(&mut self, cookie: u64) -> io::Result<()> {
        let reply = self.reply()?;
        assert_eq!(reply.cookie, cookie, "the answer to another request");
        match i32::try_from(reply.error).unwrap() {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let cookie = self.send_write(offset, bytes)?;
        self.finish(cookie)
    }

    pub(crate) fn flush(&mut self) -> io::Result<()> {
        let cookie = self.send(0, FLUSH, 0, &[])?;
        self.finish(cookie)
    }

    pub(crate) fn trim(&mut self, offset: u64, length: usize) -> io::Result<()> {
        let (cookie, request) = self.head(0, TRIM, offset, length);
        self.stream.write_all(&request)?;
        self.finish(cookie)
    }

    pub(crate) fn read(&mut self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let (cookie, request) = self.head(0, READ, offset, length);
        self.stream.write_all(&request)?;
        self.finish(cookie)?;
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// What one writer knows of the blocks that are its own.
pub(crate) struct Writer {
    id: u64,
    /// Where its blocks begin, and how many there are.
    start: u64,
    blocks: u64,
    /// The last write of each block that was acknowledged. A block of which the last write was not, has none.
    known: BTreeMap<u64, u64>,
    version: u64,
    random: Random,
    /// Writes that were acknowledged.
    pub(crate) done: u64,
    /// Requests that were answered with an error, and connections that ended.
    pub(crate) refused: u64,
}

impl Writer {
    pub(crate) fn new(id: u64, start: u64, blocks: u64) -> Self {
        Self {
            id,
            start,
            blocks,
            known: BTreeMap::new(),
            version: 0,
            random: Random::new(id + 1),
            done: 0,
            refused: 0,
        }
    }

    fn bytes(&self, block: u64, version: u64) -> Vec<u8> {
        super::pattern(BLOCK, (self.id << 56) | (block << 40) | version)
    }

    fn offset(&self, block: u64) -> u64 {
        self.start + block * BLOCK as u64
    }

    /// Writes some blocks, all ahead, and takes the answers: to each request one, or the connection ends.
    /// Then reads one that is known.
    pub(crate) fn round(&mut self, nbd: &mut Nbd) -> io::Result<()> {
        let mut under_way = BTreeMap::new();
        for _ in 0..AHEAD {
            let block = self.random.below(self.blocks);
            if under_way.values().any(|&(other, _)| other == block) {
                continue;
            }
            self.version += 1;
            self.known.remove(&block);
            let bytes = self.bytes(block, self.version);
            let sent = nbd.send_write(self.offset(block), &bytes);
            let cookie = sent.inspect_err(|_| self.refused += 1)?;
            under_way.insert(cookie, (block, self.version));
        }
        while !under_way.is_empty() {
            let reply = nbd.reply().inspect_err(|_| self.refused += 1)?;
            let request = under_way.remove(&reply.cookie);
            let (block, version) = request.expect("an answer that nobody waits for");
            if reply.error == 0 {
                self.known.insert(block, version);
                self.done += 1;
            } else {
                assert!(is_refusal(reply.error.cast_signed()), "{}", reply.error);
                self.refused += 1;
            }
        }
        let block = self.random.below(self.blocks);
        match self.check_block(nbd, block) {
            // Refused, and the connection is as it was.
            Err(error) if error.raw_os_error().is_some_and(is_refusal) => {
                self.refused += 1;
                Ok(())
            }
            other => other,
        }
    }

    fn check_block(&self, nbd: &mut Nbd, block: u64) -> io::Result<()> {
        let Some(&version) = self.known.get(&block) else {
            return Ok(());
        };
        let found = nbd.read(self.offset(block), BLOCK)?;
        let what = format!("writer {}, block {block}, write {version}", self.id);
        assert!(found == self.bytes(block, version), "{what} is lost");
        Ok(())
    }

    /// Everything that was acknowledged is there.
    pub(crate) fn check(&self, nbd: &mut Nbd) {
        assert!(!self.known.is_empty(), "nothing was acknowledged");
        for &block in self.known.keys() {
            self.check_block(nbd, block).unwrap();
        }
    }
}

/// What NBD calls `ESHUTDOWN`: the device is out of use.
const fn is_refusal(errno: i32) -> bool {
    errno == 108
}
