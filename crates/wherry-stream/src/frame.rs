//! Frame headers and the small frames: what is decoded before anything is allocated or believed.

use crate::message::MessageError;
use crate::pages::{MAX_BULK_BYTES, MAX_EXTENTS};
use crate::{EXTENT_BYTES, GRANULE};

/// Size of a frame header.
pub const FRAME_HEADER_BYTES: usize = 32;
/// The first four bytes of a frame: `WyFr`.
pub const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"WyFr");
/// Payload of a control frame, at most. The state of a machine goes in one.
pub const MAX_CONTROL_BYTES: u32 = 64 << 20;
/// Payload of a pages frame, at most: extent table and content.
pub const MAX_PAGES_BYTES: u32 = MAX_EXTENTS as u32 * EXTENT_BYTES as u32 + MAX_BULK_BYTES as u32;
/// Payload of a round-end frame.
pub const ROUND_END_BYTES: usize = 8;
/// Payload of an acknowledgement.
pub const ACK_BYTES: usize = 32;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum FrameKind {
    /// A message of the control channel ([`crate::message`]).
    Control = 1,
    /// An extent table and the content of its data extents.
    Pages = 2,
    /// No frame of this round follows on this channel; to be acknowledged when all of it is in memory.
    RoundEnd = 3,
    /// What the receiver of a channel has put into memory.
    Ack = 4,
    /// Nothing; the peer lives.
    KeepAlive = 5,
    /// Granules that the sender needs at once, as a table of extents without content.
    Request = 16,
}

impl FrameKind {
    /// All kinds that version 1 knows.
    pub const ALL: [Self; 6] = [Self::Control, Self::Pages, Self::RoundEnd, Self::Ack, Self::KeepAlive, Self::Request];

    fn from_wire(value: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u16 == value)
    }

    /// Smallest and largest payload in bytes.
    pub fn payload_limits(self) -> (u32, u32) {
        match self {
            Self::Control => (0, MAX_CONTROL_BYTES),
            Self::Pages => (EXTENT_BYTES as u32, MAX_PAGES_BYTES),
            Self::RoundEnd => (ROUND_END_BYTES as u32, ROUND_END_BYTES as u32),
            Self::Ack => (ACK_BYTES as u32, ACK_BYTES as u32),
            Self::KeepAlive => (0, 0),
            Self::Request => (EXTENT_BYTES as u32, (MAX_EXTENTS * EXTENT_BYTES) as u32),
        }
    }
}

/// A header, checked: known kind, length within the limits of the kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the frame is.
    pub kind: FrameKind,
    /// Payload in bytes.
    pub length: u32,
    /// CRC-32C of the payload; of a pages frame, of its extent table only.
    pub payload_crc: u32,
    /// Extents of a pages frame; 0 in all others.
    pub extents: u16,
    /// From 0, one more with each frame of this channel in this direction.
    pub sequence: u64,
}

/// A frame cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The stream is not at a frame.
    #[error(
        "expected a frame with magic {FRAME_MAGIC:#010x}, found {found:#010x}: the stream is out of step or corrupt"
    )]
    Magic {
        /// What came.
        found: u32,
    },
    /// The header's checksum is wrong.
    #[error("frame header has checksum {found:#010x}, its bytes give {expected:#010x}: corrupt")]
    HeaderChecksum {
        /// As sent.
        found: u32,
        /// As computed.
        expected: u32,
    },
    /// The payload's checksum is wrong.
    #[error("{kind:?} frame {sequence} has payload checksum {found:#010x}, its bytes give {expected:#010x}: corrupt")]
    PayloadChecksum {
        /// Kind of frame.
        kind: FrameKind,
        /// Its number.
        sequence: u64,
        /// As sent.
        found: u32,
        /// As computed.
        expected: u32,
    },
    /// The kind is none.
    #[error("unknown frame kind {found}; this Wherry knows 1 to 5 and 16: is the peer newer?")]
    Kind {
        /// What came.
        found: u16,
    },
    /// Flags or reserved bytes that no version defines.
    #[error("{kind:?} frame has {value:#x} in {field}, which this protocol version leaves 0")]
    Reserved {
        /// Kind of frame.
        kind: FrameKind,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The payload is too short or too long for its kind.
    #[error("{kind:?} frame says its payload has {length} bytes; it may have {min} to {max}")]
    Length {
        /// Kind of frame.
        kind: FrameKind,
        /// What it says.
        length: u32,
        /// At least.
        min: u32,
        /// At most.
        max: u32,
    },
    /// A frame is missing, repeated or out of order.
    #[error("{kind:?} frame has sequence number {found}, expected {expected}: a frame is missing or repeated")]
    Sequence {
        /// Kind of frame.
        kind: FrameKind,
        /// What it says.
        found: u64,
        /// What comes next.
        expected: u64,
    },
    /// A pages frame with no extents, or too many.
    #[error("pages frame says it has {found} extents; it may have 1 to {MAX_EXTENTS}")]
    Extents {
        /// What it says.
        found: usize,
    },
    /// An extent cannot be.
    #[error("extent {index} of a pages frame is impossible: {reason}")]
    Extent {
        /// Which.
        index: usize,
        /// Why.
        reason: String,
    },
    /// Table and length disagree.
    #[error(
        "the extents of a pages frame have {table} granules of {GRANULE} bytes of content, but the frame carries {bytes} bytes"
    )]
    Bulk {
        /// By the table.
        table: u64,
        /// By the length.
        bytes: u64,
    },
    /// A control frame holds no message.
    #[error("control frame of {bytes} bytes: {source}")]
    Message {
        /// Its payload.
        bytes: usize,
        /// What was wrong with it.
        source: MessageError,
    },
    /// A frame of that kind does not belong on that channel, or not now.
    #[error("unexpected {found:?} frame: {expected}")]
    Unexpected {
        /// Kind of frame.
        found: FrameKind,
        /// What was expected.
        expected: &'static str,
    },
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

impl FrameHeader {
    /// As bytes.
    pub fn encode(&self) -> [u8; FRAME_HEADER_BYTES] {
        let mut bytes = [0; FRAME_HEADER_BYTES];
        bytes[0..4].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
        bytes[4..6].copy_from_slice(&(self.kind as u16).to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.payload_crc.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..26].copy_from_slice(&self.extents.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..28]);
        bytes[28..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// From bytes. What it returns is bounded: `length` by the kind, `extents` by [`MAX_EXTENTS`].
    pub fn decode(bytes: &[u8; FRAME_HEADER_BYTES]) -> Result<Self, FrameError> {
        let magic = u32_at(bytes, 0);
        if magic != FRAME_MAGIC {
            return Err(FrameError::Magic { found: magic });
        }
        let (found, expected) = (u32_at(bytes, 28), crc32c::crc32c(&bytes[..28]));
        if found != expected {
            return Err(FrameError::HeaderChecksum { found, expected });
        }
        let kind = u16_at(bytes, 4);
        let kind = FrameKind::from_wire(kind).ok_or(FrameError::Kind { found: kind })?;
        for (field, value) in [("flags", u16_at(bytes, 6)), ("reserved bytes", u16_at(bytes, 26))] {
            if value != 0 {
                return Err(FrameError::Reserved { kind, field, value: value.into() });
            }
        }
        let length = u32_at(bytes, 8);
        let (min, max) = kind.payload_limits();
        if !(min..=max).contains(&length) {
            return Err(FrameError::Length { kind, length, min, max });
        }
        let extents = u16_at(bytes, 24);
        if kind != FrameKind::Pages && extents != 0 {
            return Err(FrameError::Reserved { kind, field: "extents", value: extents.into() });
        }
        if kind == FrameKind::Pages {
            let count = usize::from(extents);
            if count == 0 || count > MAX_EXTENTS {
                return Err(FrameError::Extents { found: count });
            }
            let table = extents as u32 * EXTENT_BYTES as u32;
            if length < table {
                return Err(FrameError::Length { kind, length, min: table, max });
            }
        }
        Ok(Self { kind, length, payload_crc: u32_at(bytes, 12), extents, sequence: u64_at(bytes, 16) })
    }

    /// Checks the payload, or the extent table of a pages frame, against the checksum.
    pub(crate) fn check_payload(&self, payload: &[u8]) -> Result<(), FrameError> {
        let expected = crc32c::crc32c(payload);
        if expected == self.payload_crc {
            return Ok(());
        }
        let (kind, sequence, found) = (self.kind, self.sequence, self.payload_crc);
        Err(FrameError::PayloadChecksum { kind, sequence, found, expected })
    }
}

/// The barrier at the end of a round on one channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundEnd {
    /// Which round, from 1.
    pub round: u32,
}

impl RoundEnd {
    /// As bytes.
    pub fn encode(&self) -> [u8; ROUND_END_BYTES] {
        let mut bytes = [0; ROUND_END_BYTES];
        bytes[..4].copy_from_slice(&self.round.to_le_bytes());
        bytes
    }

    /// From bytes.
    pub fn decode(bytes: &[u8; ROUND_END_BYTES]) -> Result<Self, FrameError> {
        match u32_at(bytes, 4) {
            0 => Ok(Self { round: u32_at(bytes, 0) }),
            value => {
                let kind = FrameKind::RoundEnd;
                Err(FrameError::Reserved { kind, field: "reserved bytes", value: value.into() })
            }
        }
    }
}

/// What the receiver of a channel has put into memory so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ack {
    /// Frames received and finished.
    pub frames: u64,
    /// Bytes of those, headers included.
    pub bytes: u64,
    /// The round whose [`RoundEnd`] is acknowledged, or `None` if this is only news.
    pub round: Option<u32>,
    /// The receiver's running checksum at that point; see [`crate::ChannelStats`].
    pub checksum: u32,
}

impl Ack {
    /// As bytes.
    pub fn encode(&self) -> [u8; ACK_BYTES] {
        let mut bytes = [0; ACK_BYTES];
        bytes[0..8].copy_from_slice(&self.frames.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.bytes.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.round.unwrap_or(0).to_le_bytes());
        bytes[20..24].copy_from_slice(&u32::from(self.round.is_some()).to_le_bytes());
        bytes[24..28].copy_from_slice(&self.checksum.to_le_bytes());
        bytes
    }

    /// From bytes.
    pub fn decode(bytes: &[u8; ACK_BYTES]) -> Result<Self, FrameError> {
        let reserved = |field, value: u32| FrameError::Reserved { kind: FrameKind::Ack, field, value: value.into() };
        let round = match (u32_at(bytes, 20), u32_at(bytes, 16)) {
            (0, 0) => None,
            (1, round) => Some(round),
            (0, round) => return Err(reserved("round of an acknowledgement that is for none", round)),
            (other, _) => return Err(reserved("barrier", other)),
        };
        match u32_at(bytes, 28) {
            0 => Ok(Self { frames: u64_at(bytes, 0), bytes: u64_at(bytes, 8), round, checksum: u32_at(bytes, 24) }),
            value => Err(reserved("reserved bytes", value)),
        }
    }
}
