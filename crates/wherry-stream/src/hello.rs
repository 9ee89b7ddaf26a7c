//! The first bytes on every connection, in both directions: who speaks, which version, and what the channel is for.
//!
//! ```text
//! opener (source)                         acceptor (destination)
//!   connect ---------------------------->  accept
//!   Hello{versions, kind, index, attempt}> read; the engine looks at it
//!   <--------- Hello{chosen version, status} accept() or refuse(why)
//!   Channel                                Channel
//! ```
//!
//! A type is declared, never guessed from what arrives. Wrong magic, no common version, an unknown kind: each is an
//! error that says what was found and what was expected, at both ends.

use std::fmt;
use std::time::Instant;

use crate::{Channel, Connection, StreamError};

/// The first eight bytes.
pub const HELLO_MAGIC: [u8; 8] = *b"\x89WHERRY\n";
/// Size of a hello.
pub const HELLO_BYTES: usize = 64;
/// Oldest version of the protocol this program speaks.
pub const VERSION_MIN: u16 = 1;
/// Newest version of the protocol this program speaks.
pub const VERSION_MAX: u16 = 1;

/// What a channel is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum ChannelKind {
    /// Messages in both directions. One, and the first.
    Control = 1,
    /// Memory forward, acknowledgements back.
    Data = 2,
    /// Requested memory forward, requests back.
    Urgent = 3,
}

impl ChannelKind {
    fn from_wire(value: u16) -> Option<Self> {
        [Self::Control, Self::Data, Self::Urgent].into_iter().find(|kind| *kind as u16 == value)
    }
}

impl fmt::Display for ChannelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Control => "control",
            Self::Data => "data",
            Self::Urgent => "urgent",
        })
    }
}

/// Declares a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// What the channel is for.
    pub kind: ChannelKind,
    /// Which one of that kind, from 0.
    pub index: u16,
    /// The attempt it belongs to: random, chosen by the source once per journey.
    pub attempt: [u8; 16],
}

/// Why an acceptor does not want a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum HelloRefusal {
    /// No version of the protocol is spoken by both.
    Version = 1,
    /// It does not know that kind of channel.
    Kind = 2,
    /// It takes part in another attempt, or in none.
    Attempt = 3,
    /// It does not expect that kind or index of channel now.
    Unexpected = 4,
    /// It is busy with another journey.
    Busy = 5,
}

impl HelloRefusal {
    fn from_wire(value: u16) -> Option<Self> {
        use HelloRefusal::{Attempt, Busy, Kind, Unexpected, Version};
        [Version, Kind, Attempt, Unexpected, Busy].into_iter().find(|refusal| *refusal as u16 == value)
    }
}

impl fmt::Display for HelloRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Version => "it speaks no version of the protocol that this side speaks",
            Self::Kind => "it does not know this kind of channel; it may be an older Wherry",
            Self::Attempt => "it takes part in another attempt, or in none",
            Self::Unexpected => "it does not expect this channel now",
            Self::Busy => "it is busy with another journey; try again later",
        })
    }
}

/// The first bytes of the peer are not what they must be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// Not a Wherry.
    #[error("the peer is no Wherry: expected the magic {:02x?}, found {found:02x?}", HELLO_MAGIC)]
    Magic {
        /// What came.
        found: [u8; 8],
    },
    /// TLS where none is configured.
    #[error("the peer speaks TLS and this side does not: give both ends certificates, or neither")]
    Tls,
    /// No common version.
    #[error("the peer speaks protocol versions {min} to {max}, this Wherry {VERSION_MIN} to {VERSION_MAX}")]
    Version {
        /// The peer's oldest.
        min: u16,
        /// The peer's newest.
        max: u16,
    },
    /// The kind of channel is none.
    #[error("the peer opens a channel of kind {found}; expected 1 (control), 2 (data) or 3 (urgent)")]
    Kind {
        /// What came.
        found: u16,
    },
    /// Both ends want to open, or both to accept.
    #[error("the peer says it is the {found} of the channel; expected the {expected}: are both ends the same side?")]
    Role {
        /// What the peer says.
        found: Role,
        /// What it should be.
        expected: Role,
    },
    /// A field has a value that no version gives it.
    #[error("the peer's hello has {value} in {field}, which no protocol version known here allows")]
    Field {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The checksum is wrong.
    #[error("the peer's hello has checksum {found:#010x}, its bytes give {expected:#010x}: corrupt")]
    Checksum {
        /// As sent.
        found: u32,
        /// As computed.
        expected: u32,
    },
    /// The answer belongs to another channel.
    #[error("the peer answers for {found}, but {expected} was opened")]
    Mismatch {
        /// The channel the answer names.
        found: String,
        /// The channel that was opened.
        expected: String,
    },
    /// The peer does not want the channel.
    #[error("the peer refuses {wanted}: {refusal}")]
    Refused {
        /// The channel.
        wanted: String,
        /// Why.
        refusal: HelloRefusal,
    },
}

/// Who sends a hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Role {
    /// Who connected.
    Opener = 1,
    /// Who listened.
    Acceptor = 2,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Opener => "opener",
            Self::Acceptor => "acceptor",
        })
    }
}

/// A hello as its bytes say it, before this side judges it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawHello {
    /// Who speaks.
    pub role: Role,
    /// Oldest version; in an answer that accepts, the chosen one.
    pub version_min: u16,
    /// Newest version; in an answer that accepts, the chosen one.
    pub version_max: u16,
    /// Kind of channel.
    pub kind: u16,
    /// Index of the channel.
    pub index: u16,
    /// Attempt.
    pub attempt: [u8; 16],
    /// 0, or in an answer why not.
    pub status: u16,
}

impl RawHello {
    /// As bytes.
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[0..8].copy_from_slice(&HELLO_MAGIC);
        bytes[8..10].copy_from_slice(&self.version_min.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.version_max.to_le_bytes());
        bytes[12] = self.role as u8;
        bytes[14..16].copy_from_slice(&self.status.to_le_bytes());
        bytes[16..18].copy_from_slice(&self.kind.to_le_bytes());
        bytes[18..20].copy_from_slice(&self.index.to_le_bytes());
        bytes[20..36].copy_from_slice(&self.attempt);
        let crc = crc32c::crc32c(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// From bytes. What a later version may define otherwise (kind, status) is left as it is; the frame around it
    /// (magic, versions, role, checksum) is the same for ever.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Self, HelloError> {
        check_magic(&bytes[..HELLO_MAGIC.len()])?;
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let found = u32::from_le_bytes([bytes[60], bytes[61], bytes[62], bytes[63]]);
        let expected = crc32c::crc32c(&bytes[..60]);
        if found != expected {
            return Err(HelloError::Checksum { found, expected });
        }
        let (version_min, version_max) = (u16_at(8), u16_at(10));
        if version_min == 0 || version_min > version_max {
            return Err(HelloError::Field { field: "its version range", value: version_min.into() });
        }
        let role = match bytes[12] {
            1 => Role::Opener,
            2 => Role::Acceptor,
            other => return Err(HelloError::Field { field: "role", value: other.into() }),
        };
        Ok(Self {
            role,
            version_min,
            version_max,
            status: u16_at(14),
            kind: u16_at(16),
            index: u16_at(18),
            attempt: bytes[20..36].first_chunk().copied().unwrap_or_default(),
        })
    }

    /// The newest version that both speak.
    pub fn common_version(&self) -> Result<u16, HelloError> {
        let version = self.version_max.min(VERSION_MAX);
        if version < self.version_min.max(VERSION_MIN) {
            return Err(HelloError::Version { min: self.version_min, max: self.version_max });
        }
        Ok(version)
    }

    /// What it declares, if this side knows that kind of channel.
    pub fn hello(&self) -> Result<Hello, HelloError> {
        let kind = ChannelKind::from_wire(self.kind).ok_or(HelloError::Kind { found: self.kind })?;
        Ok(Hello { kind, index: self.index, attempt: self.attempt })
    }

    fn describe(&self) -> String {
        self.hello().map_or_else(|_| format!("channel {} of kind {}", self.index, self.kind), |hello| hello.to_string())
    }
}

impl fmt::Display for Hello {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            ChannelKind::Data => write!(f, "data channel {}", self.index),
            kind if self.index == 0 => write!(f, "{kind} channel"),
            kind => write!(f, "{kind} channel {}", self.index),
        }
    }
}

fn wrong(connection: &Connection, source: HelloError) -> StreamError {
    StreamError::Hello { channel: connection.name().to_owned(), source }
}

fn check_magic(found: &[u8]) -> Result<(), HelloError> {
    if found == HELLO_MAGIC {
        return Ok(());
    }
    if crate::tls::looks_like_tls(found) {
        return Err(HelloError::Tls);
    }
    Err(HelloError::Magic { found: found.first_chunk().copied().unwrap_or_default() })
}

fn read(connection: &mut Connection, doing: &'static str) -> Result<RawHello, StreamError> {
    let mut bytes = [0; HELLO_BYTES];
    // The magic alone first: a peer that is something else may never send as much as 64 bytes.
    let (magic, rest) = bytes.split_at_mut(HELLO_MAGIC.len());
    // Of those, two say that it is TLS: a TLS peer that gives up sends seven.
    let (first, others) = magic.split_at_mut(2);
    connection.reader.read_exact(first, doing)?;
    if crate::tls::looks_like_tls(first) {
        return Err(wrong(connection, HelloError::Tls));
    }
    connection.reader.read_exact(others, doing)?;
    check_magic(magic).map_err(|e| wrong(connection, e))?;
    connection.reader.read_exact(rest, doing)?;
    RawHello::decode(&bytes).map_err(|e| wrong(connection, e))
}

impl Hello {
    /// Declares the channel on a fresh connection and waits until the peer has accepted it.
    pub fn open(self, mut connection: Connection, deadline: Instant) -> Result<Channel, StreamError> {
        connection.secure(Role::Opener, deadline)?;
        connection.set_deadline(Some(deadline));
        let sent = RawHello {
            role: Role::Opener,
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            kind: self.kind as u16,
            index: self.index,
            attempt: self.attempt,
            status: 0,
        };
        connection.writer.write_all(&sent.encode(), false, "sending the hello")?;
        let answer = read(&mut connection, "waiting for the peer's hello")?;
        let error = if answer.role != Role::Acceptor {
            Some(HelloError::Role { found: answer.role, expected: Role::Acceptor })
        } else if (answer.kind, answer.index, answer.attempt) != (sent.kind, sent.index, sent.attempt) {
            Some(HelloError::Mismatch { found: answer.describe(), expected: self.to_string() })
        } else {
            match (answer.status, HelloRefusal::from_wire(answer.status)) {
                (0, _) if answer.version_min != answer.version_max => {
                    Some(HelloError::Field { field: "the chosen version", value: answer.version_min.into() })
                }
                (0, _) => None,
                (_, Some(HelloRefusal::Version)) => {
                    Some(HelloError::Version { min: answer.version_min, max: answer.version_max })
                }
                (_, Some(refusal)) => Some(HelloError::Refused { wanted: self.to_string(), refusal }),
                (status, None) => Some(HelloError::Field { field: "status", value: status.into() }),
            }
        };
        if let Some(error) = error {
            return Err(wrong(&connection, error));
        }
        let version = answer.common_version().map_err(|e| wrong(&connection, e))?;
        Ok(Channel::new(connection, self, version))
    }
}

/// A channel that a peer wants to open. Accept or refuse it; dropping it closes the connection without an answer.
#[derive(Debug)]
pub struct Greeting {
    connection: Connection,
    raw: RawHello,
    hello: Hello,
    version: u16,
}

impl Greeting {
    /// Reads the hello of an accepted connection. A peer that cannot be served is told so.
    pub fn read(mut connection: Connection, deadline: Instant) -> Result<Self, StreamError> {
        connection.secure(Role::Acceptor, deadline)?;
        connection.set_deadline(Some(deadline));
        let raw = read(&mut connection, "waiting for the peer's hello")?;
        if raw.role != Role::Opener {
            let error = HelloError::Role { found: raw.role, expected: Role::Opener };
            return Err(wrong(&connection, error));
        }
        let judged = match raw.common_version() {
            Ok(version) => raw.hello().map(|hello| (hello, version)).map_err(|e| (e, HelloRefusal::Kind)),
            Err(e) => Err((e, HelloRefusal::Version)),
        };
        match judged {
            Ok((hello, version)) => Ok(Self { connection, raw, hello, version }),
            Err((error, refusal)) => {
                // The peer learns why if it still listens; the error to report is this one either way.
                let _ = answer(&mut connection, &raw, (VERSION_MIN, VERSION_MAX), refusal as u16);
                Err(wrong(&connection, error))
            }
        }
    }

    /// What the peer declares.
    pub fn hello(&self) -> Hello {
        self.hello
    }

    /// Who the peer is, for messages.
    pub fn peer(&self) -> &str {
        self.connection.peer()
    }

    /// Takes the channel.
    pub fn accept(mut self) -> Result<Channel, StreamError> {
        answer(&mut self.connection, &self.raw, (self.version, self.version), 0)?;
        Ok(Channel::new(self.connection, self.hello, self.version))
    }

    /// Tells the peer why not and closes the connection.
    pub fn refuse(mut self, refusal: HelloRefusal) -> Result<(), StreamError> {
        answer(&mut self.connection, &self.raw, (VERSION_MIN, VERSION_MAX), refusal as u16)
    }
}

fn answer(connection: &mut Connection, to: &RawHello, versions: (u16, u16), status: u16) -> Result<(), StreamError> {
    let answer = RawHello { role: Role::Acceptor, version_min: versions.0, version_max: versions.1, status, ..*to };
    connection.writer.write_all(&answer.encode(), false, "answering the hello")
}
