//! What an ownership record looks like: a fixed header and a protobuf message, padded to one page with zeros.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | magic `WHERRYOR` |
//! | 8 | 2 | version, little-endian: 1 |
//! | 10 | 2 | role: 1 source, 2 destination |
//! | 12 | 4 | length of the message |
//! | 16 | 4 | CRC-32C of the message |
//! | 20 | 4 | CRC-32C of bytes 0 to 19 |
//! | 24 | length | the message |
//! | | to 4096 | zeros |
//!
//! The size never changes, so that a record can be written over without a new page: see [`Claim`](super::Claim).

use prost::Message as _;

use crate::Side;
use crate::ownership::{Attempt, BadAttempt, Carriage, DestinationRecord, DestinationStage, SourceRecord, SourceStage};

/// Size of every record file.
pub const RECORD_BYTES: usize = 4096;
/// Version that is written, and the only one that is read.
pub const RECORD_VERSION: u16 = 1;

const MAGIC: &[u8; 8] = b"WHERRYOR";
const HEADER: usize = 24;
/// Longest text that is recorded: names and addresses are cut.
const MAX_TEXT: usize = 512;

/// A record of one of the two roles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stored {
    /// Written by a source.
    Source(SourceRecord),
    /// Written by a destination.
    Destination(DestinationRecord),
}

impl Stored {
    /// Which role wrote it.
    pub fn side(&self) -> Side {
        match self {
            Stored::Source(_) => Side::Source,
            Stored::Destination(_) => Side::Destination,
        }
    }

    /// What it is about.
    pub fn attempt(&self) -> &Attempt {
        match self {
            Stored::Source(record) => &record.attempt,
            Stored::Destination(record) => &record.attempt,
        }
    }

    /// What it says, for people.
    pub fn text(&self) -> &'static str {
        match self {
            Stored::Source(record) => match record.stage {
                SourceStage::Intent => "the VM was about to leave this host",
                SourceStage::Run => "the VM was given away, and it is not known whether it runs there",
                SourceStage::Kept => "the VM stayed here, but a destination may still hold an old copy",
                SourceStage::Gone => "the VM runs at the destination",
            },
            Stored::Destination(record) => match record.stage {
                DestinationStage::Intent => "the VM was about to come to this host, and has not run here",
                DestinationStage::Ran => "the VM came to this host and ran, or was just about to",
                DestinationStage::NeverRuns => "the VM was about to come to this host; it never ran and never will",
            },
        }
    }
}

/// A record with what was written beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The record.
    pub stored: Stored,
    /// The other side, as the writer called it.
    pub peer: String,
    /// Boot id of the host that wrote it. Another one than now: every process of that time is dead, and whatever lay on
    /// tmpfs is lost.
    pub boot_id: String,
    /// Process that wrote it.
    pub pid: u32,
    /// Name and version of the program.
    pub program: String,
    /// When, in seconds since 1970.
    pub written: u64,
}

/// Bytes that are no record. Never to be taken for "there is none".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRecord {
    /// Too short or too long.
    #[error("it has {0} bytes, a record has {RECORD_BYTES}")]
    Size(usize),
    /// Something else.
    #[error("it does not begin with the magic of an ownership record")]
    Magic,
    /// Written by a newer program.
    #[error("it has version {0}, this program reads version {RECORD_VERSION}; use the program that wrote it")]
    Version(u16),
    /// Bytes have changed.
    #[error("the checksum of its {0} is wrong")]
    Checksum(&'static str),
    /// The header says what cannot be.
    #[error("its header gives {what} as {value}")]
    Header {
        /// Which field.
        what: &'static str,
        /// Its value.
        value: u32,
    },
    /// The message cannot be decoded.
    #[error("its message cannot be decoded: {0}")]
    Decode(String),
    /// The message says what cannot be.
    #[error("its message gives {what} as {value}")]
    Value {
        /// Which field.
        what: &'static str,
        /// Its value.
        value: u32,
    },
    /// The file's name says another VM or another role than its content.
    #[error("it is about another VM or another role than its name says")]
    Misfiled,
    /// It names no attempt.
    #[error("{0}")]
    Attempt(#[from] BadAttempt),
}

#[derive(Clone, PartialEq, prost::Message)]
struct Saved {
    #[prost(bytes = "vec", tag = "1")]
    vm: Vec<u8>,
    #[prost(uint64, tag = "2")]
    epoch: u64,
    #[prost(bytes = "vec", tag = "3")]
    attempt: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    incarnation: Vec<u8>,
    #[prost(uint32, tag = "5")]
    stage: u32,
    #[prost(uint32, tag = "6")]
    carriage: u32,
    #[prost(bool, tag = "7")]
    unsettled: bool,
    #[prost(string, tag = "8")]
    peer: String,
    #[prost(string, tag = "9")]
    boot_id: String,
    #[prost(uint32, tag = "10")]
    pid: u32,
    #[prost(string, tag = "11")]
    program: String,
    #[prost(uint64, tag = "12")]
    written: u64,
}

/// The bytes of a record file.
pub fn encode(entry: &Entry) -> Vec<u8> {
    let attempt = entry.stored.attempt();
    let (role, stage, carriage, unsettled) = match &entry.stored {
        Stored::Source(r) => (1u16, source_stage(r.stage), r.carriage, r.unsettled),
        Stored::Destination(r) => (2u16, destination_stage(r.stage), r.carriage, false),
    };
    let message = Saved {
        vm: attempt.vm.0.to_vec(),
        epoch: attempt.epoch,
        attempt: attempt.id.0.to_vec(),
        incarnation: attempt.incarnation.0.to_vec(),
        stage,
        carriage: match carriage {
            Carriage::Whole => 1,
            Carriage::PagesFollow => 2,
        },
        unsettled,
        peer: cut(&entry.peer),
        boot_id: cut(&entry.boot_id),
        pid: entry.pid,
        program: cut(&entry.program),
        written: entry.written,
    }
    .encode_to_vec();
    // Three texts of at most MAX_TEXT bytes, and less than 200 bytes of everything else.
    debug_assert!(HEADER + message.len() <= RECORD_BYTES);
    let mut bytes = Vec::with_capacity(RECORD_BYTES);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&RECORD_VERSION.to_le_bytes());
    bytes.extend_from_slice(&role.to_le_bytes());
    bytes.extend_from_slice(&(message.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&crc32c::crc32c(&message).to_le_bytes());
    bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
    bytes.extend_from_slice(&message);
    bytes.resize(RECORD_BYTES, 0);
    bytes
}

/// Reads a record file.
pub fn decode(bytes: &[u8]) -> Result<Entry, BadRecord> {
    if bytes.len() != RECORD_BYTES {
        return Err(BadRecord::Size(bytes.len()));
    }
    let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    if &bytes[..8] != MAGIC {
        return Err(BadRecord::Magic);
    }
    // The version comes before the checksum: a newer format may have another one.
    if u16_at(8) != RECORD_VERSION {
        return Err(BadRecord::Version(u16_at(8)));
    }
    if crc32c::crc32c(&bytes[..20]) != u32_at(20) {
        return Err(BadRecord::Checksum("header"));
    }
    let length = u32_at(12);
    let end = match usize::try_from(length).ok().and_then(|length| HEADER.checked_add(length)) {
        Some(end) if end <= RECORD_BYTES => end,
        _ => return Err(BadRecord::Header { what: "the length", value: length }),
    };
    let message = &bytes[HEADER..end];
    if crc32c::crc32c(message) != u32_at(16) {
        return Err(BadRecord::Checksum("message"));
    }
    if bytes[end..].iter().any(|byte| *byte != 0) {
        return Err(BadRecord::Checksum("padding"));
    }
    let saved = Saved::decode(message).map_err(|e| BadRecord::Decode(e.to_string()))?;
    let attempt = Attempt {
        vm: saved.vm.as_slice().try_into()?,
        epoch: saved.epoch,
        id: saved.attempt.as_slice().try_into()?,
        incarnation: saved.incarnation.as_slice().try_into()?,
    }
    .checked()?;
    let carriage = match saved.carriage {
        1 => Carriage::Whole,
        2 => Carriage::PagesFollow,
        value => return Err(BadRecord::Value { what: "what is carried", value }),
    };
    let bad_stage = BadRecord::Value { what: "the stage", value: saved.stage };
    let stored = match u16_at(10) {
        1 => {
            let stage = match saved.stage {
                1 => SourceStage::Intent,
                2 => SourceStage::Run,
                3 => SourceStage::Kept,
                4 => SourceStage::Gone,
                _ => return Err(bad_stage),
            };
            Stored::Source(SourceRecord { stage, attempt, carriage, unsettled: saved.unsettled })
        }
        2 => {
            let stage = match saved.stage {
                1 => DestinationStage::Intent,
                2 => DestinationStage::Ran,
                3 => DestinationStage::NeverRuns,
                _ => return Err(bad_stage),
            };
            Stored::Destination(DestinationRecord { stage, attempt, carriage })
        }
        role => return Err(BadRecord::Header { what: "the role", value: role.into() }),
    };
    Ok(Entry {
        stored,
        peer: saved.peer,
        boot_id: saved.boot_id,
        pid: saved.pid,
        program: saved.program,
        written: saved.written,
    })
}

fn source_stage(stage: SourceStage) -> u32 {
    match stage {
        SourceStage::Intent => 1,
        SourceStage::Run => 2,
        SourceStage::Kept => 3,
        SourceStage::Gone => 4,
    }
}

fn destination_stage(stage: DestinationStage) -> u32 {
    match stage {
        DestinationStage::Intent => 1,
        DestinationStage::Ran => 2,
        DestinationStage::NeverRuns => 3,
    }
}

fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_TEXT)].to_owned()
}
