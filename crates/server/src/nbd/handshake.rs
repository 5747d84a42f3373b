//! Agreeing with a client: which export, and how replies look. Fixed newstyle, in the clear or under TLS.
//!
//! The whole of it has one deadline, so a client that stalls, or goes on haggling, is dropped.

use core::time::Duration;
use std::sync::Arc;
use std::time::Instant;

use super::credentials::Security;
use super::export::{Export, Exports, Writable};
use super::option::{Choice, Contexts};
use super::proto::{
    ALLOCATION, ALLOCATION_ID, Fields, INIT_MAGIC, MOST_PAYLOAD, OPTION_MAGIC, OPTION_REPLY_MAGIC,
    PREFERRED_BLOCK, handshake_flag, info, option, option_reply, transmission_flag,
};
use super::socket::{End, More, Socket};
use super::stream::Stream;

/// The longest data of an option that is looked at, in bytes.
const MOST_DATA: usize = 64 << 10;
/// The longest that is read, to be told that it is too long.
const MOST_SKIPPED: u32 = 1 << 20;

/// How replies look.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Replies {
    Simple,
    Structured,
}

/// Whether the client may ask where the holes are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Metadata {
    Allocation,
    Nothing,
}

/// What client and server have agreed on.
#[derive(Clone, Debug)]
pub(super) struct Agreed {
    pub(super) export: Arc<Export>,
    pub(super) replies: Replies,
    pub(super) metadata: Metadata,
}

/// Haggles until the client chooses an export, at most `patience`.
///
/// # Errors
///
/// Why there is nothing to serve.
pub(super) fn agree<'a>(
    socket: &'a Socket,
    stream: &mut Stream<'a>,
    exports: &dyn Exports,
    security: &Security,
    patience: Duration,
) -> Result<Agreed, End> {
    let deadline = Instant::now() + patience;
    socket.limit_sends(Some(patience))?;
    let mut haggling = Haggling {
        stream,
        exports,
        security,
        deadline,
        padding: 124,
        replies: Replies::Simple,
        contexts_of: None,
    };
    haggling.greet()?;
    let agreed = loop {
        if let Some(agreed) = haggling.option()? {
            break agreed;
        }
    };
    socket.limit_sends(None)?;
    Ok(agreed)
}

struct Haggling<'a, 'b> {
    stream: &'b mut Stream<'a>,
    exports: &'b dyn Exports,
    security: &'b Security,
    deadline: Instant,
    /// Zeros behind the reply to the oldest option.
    padding: usize,
    replies: Replies,
    /// The export whose metadata was chosen.
    contexts_of: Option<Arc<Export>>,
}

impl Haggling<'_, '_> {
    fn greet(&mut self) -> Result<(), End> {
        let flags = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
        let mut greeting = INIT_MAGIC.to_be_bytes().to_vec();
        greeting.extend(OPTION_MAGIC.to_be_bytes());
        greeting.extend(flags.to_be_bytes());
        self.stream.send_all(&greeting, More::Nothing)?;
        let mut answer = [0; 4];
        self.stream.receive_until(self.deadline, &mut answer)?;
        let answer = u32::from_be_bytes(answer);
        if answer & !u32::from(flags) != 0 {
            return Err(End::Garbage("unknown flags in the handshake"));
        }
        if answer & u32::from(handshake_flag::NO_ZEROES) != 0 {
            self.padding = 0;
        }
        Ok(())
    }

    /// Answers one option. Says what is agreed on, if it was the last.
    fn option(&mut self) -> Result<Option<Agreed>, End> {
        let mut head = [0; 16];
        self.stream.receive_until(self.deadline, &mut head)?;
        let mut fields = Fields(&head);
        let magic = fields.u64();
        let (Some(OPTION_MAGIC), Some(kind), Some(len)) = (magic, fields.u32(), fields.u32())
        else {
            return Err(End::Garbage("an option without its magic"));
        };
        let data = self.data(len)?;
        if self.is_too_early(kind) {
            return self.refuse_early(kind).map(|()| None);
        }
        let Some(data) = data else {
            let too_long = "the option's data is too long";
            self.reply(kind, option_reply::ERR_TOO_BIG, too_long.as_bytes())?;
            return Ok(None);
        };
        match kind {
            option::EXPORT_NAME => return self.export_name(&data).map(Some),
            option::ABORT => {
                self.reply(kind, option_reply::ACK, &[])?;
                return Err(End::Disconnected);
            }
            option::LIST | option::STRUCTURED_REPLY if !data.is_empty() => {
                self.invalid(kind, "the option takes no data")?;
            }
            option::LIST => self.list()?,
            option::STRUCTURED_REPLY => {
                self.replies = Replies::Structured;
                self.reply(kind, option_reply::ACK, &[])?;
            }
            option::INFO => {
                self.choose(kind, &data)?;
            }
            option::GO => return self.choose(kind, &data),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(kind, &data)?,
            option::START_TLS => self.start_tls(kind, &data)?,
            _ => self.reply(kind, option_reply::ERR_UNSUP, b"unknown option")?,
        }
        Ok(None)
    }

    /// Whether the client has to begin TLS before it may ask for that.
    fn is_too_early(&self, kind: u32) -> bool {
        matches!(self.security, Security::Required(_))
            && self.stream.plain().is_some()
            && !matches!(kind, option::START_TLS | option::ABORT)
    }

    fn refuse_early(&mut self, kind: u32) -> Result<(), End> {
        if kind == option::EXPORT_NAME {
            return Err(End::Refused);
        }
        self.reply(kind, option_reply::ERR_TLS_REQD, b"begin TLS first")
    }

    /// Goes on under TLS, as if nothing had been said before: somebody else may have said it.
    fn start_tls(&mut self, kind: u32, data: &[u8]) -> Result<(), End> {
        let Some(credentials) = self.security.credentials() else {
            return self.reply(kind, option_reply::ERR_UNSUP, b"there is no TLS here");
        };
        let Some(socket) = self.stream.plain() else {
            return self.invalid(kind, "TLS has begun already");
        };
        if !data.is_empty() {
            return self.invalid(kind, "the option takes no data");
        }
        self.reply(kind, option_reply::ACK, &[])?;
        self.stream.secure(socket, credentials, self.deadline)?;
        self.replies = Replies::Simple;
        self.contexts_of = None;
        Ok(())
    }

    /// The data of an option. `None` if it is too long, and skipped.
    fn data(&mut self, len: u32) -> Result<Option<Vec<u8>>, End> {
        if len > MOST_SKIPPED {
            return Err(End::Garbage("an option with far too much data"));
        }
        let mut left = usize::try_from(len).unwrap_or(usize::MAX);
        let mut data = vec![0; left.min(MOST_DATA)];
        if left <= MOST_DATA {
            self.stream.receive_until(self.deadline, &mut data)?;
            return Ok(Some(data));
        }
        while left > 0 {
            let piece = left.min(MOST_DATA);
            self.stream
                .receive_until(self.deadline, &mut data[..piece])?;
            left -= piece;
        }
        Ok(None)
    }

    /// The oldest way to choose, which knows no errors.
    fn export_name(&mut self, name: &[u8]) -> Result<Agreed, End> {
        let name = str::from_utf8(name).map_err(|_| End::Garbage("a name that is no text"))?;
        let export = self.exports.find(name).map_err(|_| End::Refused)?;
        let mut reply = export.device.size_bytes().to_be_bytes().to_vec();
        reply.extend(self.flags(&export).to_be_bytes());
        reply.resize(reply.len() + self.padding, 0);
        self.stream.send_all(&reply, More::Nothing)?;
        Ok(self.agreed(export))
    }

    fn list(&mut self) -> Result<(), End> {
        let mut replies = Vec::new();
        for export in self.exports.list() {
            let mut data = len_u32(&export.name).to_be_bytes().to_vec();
            data.extend(export.name.as_bytes());
            data.extend(export.description.as_bytes());
            put_reply(&mut replies, option::LIST, option_reply::SERVER, &data);
        }
        put_reply(&mut replies, option::LIST, option_reply::ACK, &[]);
        self.stream.send_all(&replies, More::Nothing)
    }

    /// Tells about an export; agrees on it if that is what the client wants.
    fn choose(&mut self, kind: u32, data: &[u8]) -> Result<Option<Agreed>, End> {
        let Some(choice) = Choice::parse(data) else {
            self.invalid(kind, "the option's data is malformed")?;
            return Ok(None);
        };
        let export = match self.exports.find(choice.name) {
            Ok(export) => export,
            Err(refused) => {
                let message = refused.to_string();
                self.reply(kind, option_reply::ERR_UNKNOWN, message.as_bytes())?;
                return Ok(None);
            }
        };
        let mut replies = Vec::new();
        let mut about = info::EXPORT.to_be_bytes().to_vec();
        about.extend(export.device.size_bytes().to_be_bytes());
        about.extend(self.flags(&export).to_be_bytes());
        put_reply(&mut replies, kind, option_reply::INFO, &about);
        for wanted in [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE] {
            if choice.infos.contains(&wanted) {
                let about = describe(&export, wanted);
                put_reply(&mut replies, kind, option_reply::INFO, &about);
            }
        }
        put_reply(&mut replies, kind, option_reply::ACK, &[]);
        self.stream.send_all(&replies, More::Nothing)?;
        Ok((kind == option::GO).then(|| self.agreed(export)))
    }

    /// Lists or chooses metadata contexts.
    fn contexts(&mut self, kind: u32, data: &[u8]) -> Result<(), End> {
        if kind == option::SET_META_CONTEXT {
            self.contexts_of = None;
        }
        let Some(contexts) = Contexts::parse(data) else {
            return self.invalid(kind, "the option's data is malformed");
        };
        if self.replies == Replies::Simple {
            return self.invalid(
                kind,
                "metadata needs structured replies: agree on these first",
            );
        }
        let export = match self.exports.find(contexts.name) {
            Ok(export) => export,
            Err(refused) => {
                let message = refused.to_string();
                return self.reply(kind, option_reply::ERR_UNKNOWN, message.as_bytes());
            }
        };
        let mut replies = Vec::new();
        let id = if kind == option::SET_META_CONTEXT {
            let chosen = contexts.choose_allocation();
            self.contexts_of = chosen.then_some(export);
            chosen.then_some(ALLOCATION_ID)
        } else {
            contexts.list_allocation().then_some(0)
        };
        if let Some(id) = id {
            let mut data = id.to_be_bytes().to_vec();
            data.extend(ALLOCATION.as_bytes());
            put_reply(&mut replies, kind, option_reply::META_CONTEXT, &data);
        }
        put_reply(&mut replies, kind, option_reply::ACK, &[]);
        self.stream.send_all(&replies, More::Nothing)
    }

    fn agreed(&self, export: Arc<Export>) -> Agreed {
        // Metadata was chosen for one export; under whatever name the client knows it.
        let same = |chosen: &Arc<Export>| Arc::ptr_eq(chosen, &export);
        let metadata = if self.contexts_of.as_ref().is_some_and(same) {
            Metadata::Allocation
        } else {
            Metadata::Nothing
        };
        Agreed {
            export,
            replies: self.replies,
            metadata,
        }
    }

    /// What the client may do with an export.
    fn flags(&self, export: &Export) -> u16 {
        use transmission_flag as flag;
        let always = flag::HAS_FLAGS | flag::FLUSH | flag::FUA | flag::MULTI_CONN | flag::CACHE;
        let structured = match self.replies {
            Replies::Simple => 0,
            Replies::Structured => flag::DF,
        };
        let changes = match export.writable {
            Writable::Yes => flag::TRIM | flag::WRITE_ZEROES | flag::FAST_ZERO,
            Writable::No => flag::READ_ONLY,
        };
        always | structured | changes
    }

    fn invalid(&mut self, kind: u32, message: &str) -> Result<(), End> {
        self.reply(kind, option_reply::ERR_INVALID, message.as_bytes())
    }

    fn reply(&mut self, kind: u32, reply: u32, data: &[u8]) -> Result<(), End> {
        let mut bytes = Vec::new();
        put_reply(&mut bytes, kind, reply, data);
        self.stream.send_all(&bytes, More::Nothing)
    }
}

/// What the client asked about an export.
fn describe(export: &Export, wanted: u16) -> Vec<u8> {
    let mut about = wanted.to_be_bytes().to_vec();
    match wanted {
        info::NAME => about.extend(export.name.as_bytes()),
        info::DESCRIPTION => about.extend(export.description.as_bytes()),
        _ => {
            let sizes = [1, PREFERRED_BLOCK, MOST_PAYLOAD];
            about.extend(sizes.iter().flat_map(|size| size.to_be_bytes()));
        }
    }
    about
}

fn put_reply(bytes: &mut Vec<u8>, kind: u32, reply: u32, data: &[u8]) {
    bytes.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(reply.to_be_bytes());
    bytes.extend(len_u32(data).to_be_bytes());
    bytes.extend(data);
}

/// The length of something short.
fn len_u32(bytes: impl AsRef<[u8]>) -> u32 {
    u32::try_from(bytes.as_ref().len()).unwrap_or(u32::MAX)
}
