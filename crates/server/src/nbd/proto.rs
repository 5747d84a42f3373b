//! The numbers of the NBD protocol, and the request as it comes over the wire. All of them are big-endian.

/// What the server says first.
pub(super) const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Before each option, and after the first magic: "IHAVEOPT".
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(super) const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags, the server's and the client's alike.
pub(super) mod handshake_flag {
    pub(crate) const FIXED_NEWSTYLE: u16 = 1;
    pub(crate) const NO_ZEROES: u16 = 1 << 1;
}

/// What the server says that it can, when the handshake ends.
pub(super) mod transmission_flag {
    pub(crate) const HAS_FLAGS: u16 = 1;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const FLUSH: u16 = 1 << 2;
    pub(crate) const FUA: u16 = 1 << 3;
    pub(crate) const TRIM: u16 = 1 << 5;
    pub(crate) const WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const DF: u16 = 1 << 7;
    pub(crate) const MULTI_CONN: u16 = 1 << 8;
    pub(crate) const CACHE: u16 = 1 << 10;
    pub(crate) const FAST_ZERO: u16 = 1 << 11;
}

/// Options of the handshake.
pub(super) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const START_TLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
}

/// Replies to options.
pub(super) mod option_reply {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    pub(crate) const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub(crate) const ERR_INVALID: u32 = (1 << 31) + 3;
    pub(crate) const ERR_TLS_REQD: u32 = (1 << 31) + 5;
    pub(crate) const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    pub(crate) const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// What a client may want to know about an export.
pub(super) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const DESCRIPTION: u16 = 2;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// Flags of a request.
pub(super) mod command_flag {
    pub(crate) const FUA: u16 = 1;
    pub(crate) const NO_HOLE: u16 = 1 << 1;
    pub(crate) const DF: u16 = 1 << 2;
    pub(crate) const REQ_ONE: u16 = 1 << 3;
    pub(crate) const FAST_ZERO: u16 = 1 << 4;
}

/// Kinds of chunks of a structured reply.
pub(super) mod chunk {
    pub(crate) const NONE: u16 = 0;
    pub(crate) const OFFSET_DATA: u16 = 1;
    pub(crate) const BLOCK_STATUS: u16 = 5;
    pub(crate) const ERROR: u16 = (1 << 15) + 1;
    pub(crate) const ERROR_OFFSET: u16 = (1 << 15) + 2;
}

/// The only metadata context that there is.
pub(super) const ALLOCATION: &str = "base:allocation";
/// Its number, once chosen.
pub(super) const ALLOCATION_ID: u32 = 1;
/// States of a block in it: it takes no room, and reads as zeros.
pub(super) const STATE_HOLE_ZERO: u32 = 3;
/// Somebody may have written it.
pub(super) const STATE_DATA: u32 = 0;

/// The longest string of the protocol, in bytes.
pub(super) const MOST_STRING: usize = 4096;
/// The longest payload of one request, in bytes.
pub(super) const MOST_PAYLOAD: u32 = 32 << 20;
/// Offsets and lengths that are multiples of this are served best.
pub(super) const PREFERRED_BLOCK: u32 = 4096;

/// What a request wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    Cache,
    WriteZeroes,
    BlockStatus,
    /// Resizing, which is refused, and what nobody knows.
    Unknown(u16),
}

impl Command {
    const fn of(number: u16) -> Self {
        match number {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            unknown => Self::Unknown(unknown),
        }
    }
}

/// The head of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Request {
    pub(super) flags: u16,
    pub(super) command: Command,
    /// The client's own name for the request; the reply carries it.
    pub(super) cookie: u64,
    pub(super) offset: u64,
    /// In bytes.
    pub(super) length: u32,
}

impl Request {
    /// Bytes on the wire.
    pub(super) const BYTES: usize = 28;

    /// The request, unless its magic is wrong.
    pub(super) fn parse(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let mut fields = Fields(bytes);
        if fields.u32()? != REQUEST_MAGIC {
            return None;
        }
        Some(Self {
            flags: fields.u16()?,
            command: Command::of(fields.u16()?),
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: fields.u32()?,
        })
    }

    /// Whether it has a flag.
    pub(super) const fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Where the bytes end that it is about, if that is a number.
    pub(super) const fn end(&self) -> Option<u64> {
        self.offset.checked_add(self.length as u64)
    }
}

/// Bytes from which numbers and strings are taken one by one; `None` where there are too few.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.array()?))
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        Some(u64::from_be_bytes(self.array()?))
    }

    /// A string behind its length.
    pub(super) fn string(&mut self) -> Option<&'a str> {
        let count = usize::try_from(self.u32()?).ok()?;
        let text = (count <= MOST_STRING).then(|| self.bytes(count))??;
        str::from_utf8(text).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A request is read field by field, and only with its magic.
    #[test]
    fn requests_are_parsed() {
        let mut bytes = *b"\x25\x60\x95\x13\x00\x01\x00\x06ABCDEFGH\0\0\0\0\0\x01\0\0\0\0\x20\0";
        let request = Request::parse(&bytes).unwrap();
        assert_eq!(request.command, Command::WriteZeroes);
        assert_eq!(request.cookie, u64::from_be_bytes(*b"ABCDEFGH"));
        assert_eq!((request.offset, request.length), (1 << 16, 8192));
        assert!(request.has(command_flag::FUA) && !request.has(command_flag::DF));
        assert_eq!(request.end(), Some((1 << 16) + 8192));
        bytes[0] ^= 1;
        assert_eq!(Request::parse(&bytes), None);
    }

    /// A range whose end is no number has none.
    #[test]
    fn ends_do_not_wrap() {
        let (flags, command, cookie) = (0, Command::Read, 0);
        let (offset, length) = (u64::MAX - 1, 2);
        let request = Request {
            flags,
            command,
            cookie,
            offset,
            length,
        };
        assert_eq!(request.end(), None);
    }

    /// Strings that lie about their length, are too long, or no text, are none.
    #[test]
    fn strings_are_checked() {
        assert_eq!(Fields(b"\0\0\0\x02ab").string(), Some("ab"));
        assert_eq!(Fields(b"\0\0\0\x03ab").string(), None);
        assert_eq!(Fields(b"\0\0\0\x01\xff").string(), None);
        let mut long = vec![b'x'; 4 + MOST_STRING + 1];
        long[..4].copy_from_slice(&0x1001u32.to_be_bytes());
        assert_eq!(Fields(&long).string(), None);
    }
}
