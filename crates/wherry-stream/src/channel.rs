//! Channels: typed, numbered, checksummed frames in both directions of a connection.
//!
//! A reader never allocates by a length that the peer claims beyond the limits of its kind, and a large control payload
//! is allocated only as its bytes arrive. After a pages frame the content still lies in the socket: the caller must take
//! it with [`FrameReader::read_bulk`], straight into the memory it belongs to, before the next frame can be read.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::frame::{ACK_BYTES, ROUND_END_BYTES};
use crate::message::{About, Body, Message};
use crate::{
    Ack, ChannelKind, Closer, Connection, Extent, FRAME_HEADER_BYTES, FileRange, FrameError, FrameHeader, FrameKind,
    Hello, IoRange, MAX_BULK_BYTES, MAX_CONTROL_BYTES, ReadHalf, RoundEnd, StreamError, WriteHalf, pages,
};

/// What may lie unsent in the kernel on a data channel, unless told otherwise. Urgent frames pass bulk that waits in our
/// queues, not bulk that the kernel has taken; and what is copied soon after it was written is still in the cache: over
/// loopback this takes a tenth to a fifth of the processor time away (`examples/loopback.rs`).
pub const DATA_UNSENT_LIMIT: u32 = 256 << 10;

/// A connection whose purpose both ends have agreed on.
#[derive(Debug)]
pub struct Channel {
    /// What was declared.
    pub hello: Hello,
    /// Version of the protocol spoken on it.
    pub version: u16,
    /// Receiving direction.
    pub reader: FrameReader,
    /// Sending direction.
    pub writer: FrameWriter,
    peer: String,
}

/// What has passed a channel in one direction. Both ends count alike, so a difference means that something was lost,
/// added or changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChannelStats {
    /// Whole frames.
    pub frames: u64,
    /// Their bytes, headers included.
    pub bytes: u64,
    /// Sequence number of the last frame, `None` before the first.
    pub last_sequence: Option<u64>,
    /// CRC-32C running over the headers and the payloads, without the content of pages frames.
    pub checksum: u32,
}

/// Frames and bytes of one direction, for other threads to look at while it works.
#[derive(Clone, Debug, Default)]
pub struct Meter(Arc<(AtomicU64, AtomicU64)>);

impl Meter {
    /// Whole frames so far.
    pub fn frames(&self) -> u64 {
        self.0.0.load(Ordering::Relaxed)
    }

    /// Bytes so far, headers included.
    pub fn bytes(&self) -> u64 {
        self.0.1.load(Ordering::Relaxed)
    }

    fn show(&self, stats: &ChannelStats) {
        self.0.0.store(stats.frames, Ordering::Relaxed);
        self.0.1.store(stats.bytes, Ordering::Relaxed);
    }
}

impl ChannelStats {
    fn count(&mut self, header: &[u8], payload: &[u8], sequence: u64, bytes: u64) {
        self.checksum = crc32c::crc32c_append(self.checksum, header);
        self.checksum = crc32c::crc32c_append(self.checksum, payload);
        self.frames += 1;
        self.bytes += bytes;
        self.last_sequence = Some(sequence);
    }
}

/// A frame that arrived.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    /// A message of the control channel.
    Message {
        /// Whom it is about.
        about: About,
        /// What it says.
        body: Box<Body>,
    },
    /// Memory. Its content, if any, is to be taken with [`FrameReader::read_bulk`].
    Pages {
        /// Which granules, in the order of the content.
        extents: Vec<Extent>,
        /// Bytes of content that follow.
        bulk: u64,
    },
    /// Barrier at the end of a round.
    RoundEnd(RoundEnd),
    /// Acknowledgement.
    Ack(Ack),
    /// Granules that the peer needs at once; the kind of an extent says nothing here.
    Request(Vec<Extent>),
}

impl Frame {
    /// What it is.
    pub fn kind(&self) -> FrameKind {
        match self {
            Self::Message { .. } => FrameKind::Control,
            Self::Pages { .. } => FrameKind::Pages,
            Self::RoundEnd(_) => FrameKind::RoundEnd,
            Self::Ack(_) => FrameKind::Ack,
            Self::Request(_) => FrameKind::Request,
        }
    }
}

impl Channel {
    pub(crate) fn new(mut connection: Connection, hello: Hello, version: u16) -> Self {
        let peer = connection.peer().to_owned();
        connection.set_name(&format!("{hello} with {peer}"));
        connection.set_deadline(None);
        let (reader, writer) = connection.split();
        if hello.kind == ChannelKind::Data {
            // A bound that cannot be set costs speed, nothing else.
            let _ = writer.set_unsent_limit(DATA_UNSENT_LIMIT);
        }
        Self { hello, version, reader: FrameReader::new(reader), writer: FrameWriter::new(writer), peer }
    }

    /// Who is at the other end, for messages.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The process that connected, if it is on this host (a UNIX socket) and can be seen from here: a pidfd, readable
    /// when that process has died. To be called as long as it cannot have died.
    pub fn peer_process(&self) -> Option<OwnedFd> {
        let credentials = rustix::net::sockopt::socket_peercred(self.reader.as_fd()).ok()?;
        rustix::process::pidfd_open(credentials.pid, rustix::process::PidfdFlags::empty()).ok()
    }

    /// A handle that ends the channel.
    pub fn closer(&self) -> Closer {
        self.reader.half.closer()
    }

    /// Bounds the time in which no byte moves, in both directions.
    pub fn set_idle_limit(&mut self, limit: Duration) {
        self.reader.set_idle_limit(limit);
        self.writer.set_idle_limit(limit);
    }

    /// Separates the directions for two threads.
    pub fn split(self) -> (FrameReader, FrameWriter) {
        (self.reader, self.writer)
    }
}

/// Sends frames.
#[derive(Debug)]
pub struct FrameWriter {
    half: WriteHalf,
    stats: ChannelStats,
    meter: Meter,
    next: u64,
    head: Vec<u8>,
}

impl FrameWriter {
    fn new(half: WriteHalf) -> Self {
        Self { half, stats: ChannelStats::default(), meter: Meter::default(), next: 0, head: Vec::new() }
    }

    /// What has been sent so far.
    pub fn stats(&self) -> ChannelStats {
        self.stats
    }

    /// The same for other threads.
    pub fn meter(&self) -> Meter {
        self.meter.clone()
    }

    /// Its name in errors.
    pub fn name(&self) -> &str {
        self.half.name()
    }

    /// A handle that ends the channel.
    pub fn closer(&self) -> Closer {
        self.half.closer()
    }

    /// Bounds the time in which no byte leaves.
    pub fn set_idle_limit(&mut self, limit: Duration) {
        self.half.set_idle_limit(limit);
    }

    /// Bounds all further writes together; `None` lifts it.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.half.set_deadline(deadline);
    }

    /// See [`WriteHalf::unsent`].
    pub fn unsent(&self) -> Result<u64, StreamError> {
        self.half.unsent()
    }

    /// See [`WriteHalf::set_unsent_limit`].
    pub fn set_unsent_limit(&self, bytes: u32) -> Result<(), StreamError> {
        self.half.set_unsent_limit(bytes)
    }

    /// Sends a message.
    pub fn write_message(&mut self, message: &Message) -> Result<(), StreamError> {
        let payload = message.to_bytes();
        if payload.len() > MAX_CONTROL_BYTES as usize {
            return Err(self.misuse("a message is larger than a control frame may be; nothing was sent"));
        }
        self.write_small(FrameKind::Control, &payload, "sending a message")
    }

    /// Sends the barrier at the end of a round.
    pub fn write_round_end(&mut self, round: u32) -> Result<(), StreamError> {
        self.write_small(FrameKind::RoundEnd, &RoundEnd { round }.encode(), "sending the end of a round")
    }

    /// Sends an acknowledgement.
    pub fn write_ack(&mut self, ack: Ack) -> Result<(), StreamError> {
        self.write_small(FrameKind::Ack, &ack.encode(), "sending an acknowledgement")
    }

    /// Asks for granules.
    pub fn write_request(&mut self, extents: &[Extent]) -> Result<(), StreamError> {
        let mut table = Vec::with_capacity(extents.len() * pages::EXTENT_BYTES);
        pages::encode_table(extents, &mut table)
            .map_err(|source| StreamError::Frame { channel: self.half.name().to_owned(), source })?;
        self.write_small(FrameKind::Request, &table, "asking for pages")
    }

    /// Tells the peer that this side lives. The peer's reader takes no other notice of it.
    pub fn write_keep_alive(&mut self) -> Result<(), StreamError> {
        self.write_small(FrameKind::KeepAlive, &[], "sending a sign of life")
    }

    /// Sends memory: the extents, and the content of the data extents, in their order, from `bulk`. One system call
    /// where `bulk` has less than 1024 separate ranges and the kernel has room.
    pub fn write_pages(&mut self, extents: &[Extent], bulk: &[IoRange]) -> Result<(), StreamError> {
        let bytes = bulk.iter().map(|range| range.len() as u64).sum();
        let (header, wire) = self.begin_pages(extents, bytes)?;
        self.half.write_head_and_ranges(&self.head, bulk, "sending pages")?;
        self.finish(header, wire);
        Ok(())
    }

    /// As [`Self::write_pages`], with the content taken from files by `sendfile`. See [`WriteHalf::send_file`] for what
    /// that means for bytes that change meanwhile.
    pub fn write_pages_from_file(&mut self, extents: &[Extent], bulk: &[FileRange<'_>]) -> Result<(), StreamError> {
        let bytes = bulk.iter().map(|range| range.len).sum();
        let (header, wire) = self.begin_pages(extents, bytes)?;
        self.half.write_all(&self.head, bytes > 0, "sending an extent table")?;
        for range in bulk {
            self.half.send_file(*range, "sending pages")?;
        }
        self.finish(header, wire);
        Ok(())
    }

    fn begin_pages(&mut self, extents: &[Extent], bytes: u64) -> Result<(FrameHeader, u64), StreamError> {
        self.head.clear();
        self.head.resize(FRAME_HEADER_BYTES, 0);
        let said = pages::encode_table(extents, &mut self.head)
            .map_err(|source| StreamError::Frame { channel: self.half.name().to_owned(), source })?;
        if said != bytes {
            return Err(self.misuse("the content does not have the size that the extents say; nothing was sent"));
        }
        if said > MAX_BULK_BYTES {
            return Err(self.misuse("more content than a pages frame may have; nothing was sent"));
        }
        let table = &self.head[FRAME_HEADER_BYTES..];
        let header = FrameHeader {
            kind: FrameKind::Pages,
            length: (table.len() as u64 + bytes) as u32,
            payload_crc: crc32c::crc32c(table),
            extents: extents.len() as u16,
            sequence: self.next,
        };
        let (head, _) = self.head.split_at_mut(FRAME_HEADER_BYTES);
        head.copy_from_slice(&header.encode());
        Ok((header, FRAME_HEADER_BYTES as u64 + u64::from(header.length)))
    }

    fn write_small(&mut self, kind: FrameKind, payload: &[u8], doing: &'static str) -> Result<(), StreamError> {
        let header = FrameHeader {
            kind,
            length: payload.len() as u32,
            payload_crc: crc32c::crc32c(payload),
            extents: 0,
            sequence: self.next,
        };
        self.head.clear();
        self.head.extend_from_slice(&header.encode());
        // A copy of a small payload is cheaper than a second range; of a large one it is not.
        if payload.len() <= 4096 {
            self.head.extend_from_slice(payload);
            self.half.write_all(&self.head, false, doing)?;
        } else {
            self.half.write_head_and_ranges(&self.head, &[IoRange::of(payload)], doing)?;
            self.head.extend_from_slice(payload);
        }
        self.finish(header, self.head.len() as u64);
        self.head.shrink_to(1 << 16);
        Ok(())
    }

    fn finish(&mut self, header: FrameHeader, wire: u64) {
        let (head, payload) = self.head.split_at(FRAME_HEADER_BYTES);
        self.stats.count(head, payload, header.sequence, wire);
        self.meter.show(&self.stats);
        self.next += 1;
    }

    fn misuse(&self, what: &'static str) -> StreamError {
        StreamError::Misuse { channel: self.half.name().to_owned(), what }
    }
}

/// Receives frames.
#[derive(Debug)]
pub struct FrameReader {
    half: ReadHalf,
    stats: ChannelStats,
    meter: Meter,
    next: u64,
    bulk: u64,
    /// Counted when the content of the frame has been taken.
    unfinished: Option<ChannelStats>,
}

/// A control payload is allocated in steps of this size, so that a peer must send what it claims to send.
const CONTROL_STEP: usize = 1 << 20;

/// For waiting on several channels at once; reading past the frames would lose their place.
impl AsFd for FrameReader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.half.as_fd()
    }
}

impl FrameReader {
    fn new(half: ReadHalf) -> Self {
        let (stats, meter) = Default::default();
        Self { half, stats, meter, next: 0, bulk: 0, unfinished: None }
    }

    /// What has been received so far; a pages frame counts when all its content has been taken.
    pub fn stats(&self) -> ChannelStats {
        self.stats
    }

    /// The same for other threads.
    pub fn meter(&self) -> Meter {
        self.meter.clone()
    }

    /// Its name in errors.
    pub fn name(&self) -> &str {
        self.half.name()
    }

    /// A handle that ends the channel.
    pub fn closer(&self) -> Closer {
        self.half.closer()
    }

    /// Bounds the time in which no byte arrives.
    pub fn set_idle_limit(&mut self, limit: Duration) {
        self.half.set_idle_limit(limit);
    }

    /// Bounds all further reads together; `None` lifts it.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.half.set_deadline(deadline);
    }

    /// See [`ReadHalf::set_spin`].
    pub fn set_spin(&mut self, budget: Duration) {
        self.half.set_spin(budget);
    }

    /// The next frame; signs of life are skipped. After [`Frame::Pages`] with content comes [`Self::read_bulk`].
    pub fn read_frame(&mut self) -> Result<Frame, StreamError> {
        if self.bulk > 0 {
            let channel = self.half.name().to_owned();
            return Err(StreamError::Misuse { channel, what: "the content of the last pages frame was not taken" });
        }
        loop {
            if let Some(frame) = self.read_any()? {
                return Ok(frame);
            }
        }
    }

    /// The next message; any other frame is an error.
    pub fn read_message(&mut self) -> Result<(About, Body), StreamError> {
        match self.read_frame()? {
            Frame::Message { about, body } => Ok((about, *body)),
            other => {
                Err(self.wrong(FrameError::Unexpected { found: other.kind(), expected: "a message was to be read" }))
            }
        }
    }

    fn wrong(&self, source: FrameError) -> StreamError {
        StreamError::Frame { channel: self.half.name().to_owned(), source }
    }

    fn read_any(&mut self) -> Result<Option<Frame>, StreamError> {
        let mut head = [0; FRAME_HEADER_BYTES];
        if !self.half.read_exact_or_end(&mut head, "waiting for a frame")? {
            return Err(self.half.closed_by_peer("waiting for a frame", true));
        }
        let header = FrameHeader::decode(&head).map_err(|e| self.wrong(e))?;
        if header.sequence != self.next {
            let (kind, found, expected) = (header.kind, header.sequence, self.next);
            return Err(self.wrong(FrameError::Sequence { kind, found, expected }));
        }
        self.next = self.next.wrapping_add(1);
        let (payload, bulk) = match header.kind {
            FrameKind::Pages => {
                let table = usize::from(header.extents) * pages::EXTENT_BYTES;
                (self.read_payload(table)?, u64::from(header.length) - table as u64)
            }
            _ => (self.read_payload(header.length as usize)?, 0),
        };
        header.check_payload(&payload).map_err(|e| self.wrong(e))?;
        let frame = Self::decode(&header, &payload, bulk).map_err(|e| self.wrong(e))?;
        let mut stats = self.stats;
        stats.count(&head, &payload, header.sequence, FRAME_HEADER_BYTES as u64 + u64::from(header.length));
        self.unfinished = Some(stats);
        self.bulk = bulk;
        self.finish_if_whole();
        Ok(frame)
    }

    fn decode(header: &FrameHeader, payload: &[u8], bulk: u64) -> Result<Option<Frame>, FrameError> {
        let length = || {
            let (min, max) = header.kind.payload_limits();
            FrameError::Length { kind: header.kind, length: header.length, min, max }
        };
        Ok(Some(match header.kind {
            FrameKind::Control => {
                let (about, body) = Message::from_bytes(payload)
                    .map_err(|source| FrameError::Message { bytes: payload.len(), source })?;
                Frame::Message { about, body: Box::new(body) }
            }
            FrameKind::Pages => {
                let mut extents = Vec::with_capacity(usize::from(header.extents));
                pages::decode_table(payload, bulk, &mut extents)?;
                Frame::Pages { extents, bulk }
            }
            FrameKind::RoundEnd => {
                let payload: &[u8; ROUND_END_BYTES] = payload.try_into().map_err(|_| length())?;
                Frame::RoundEnd(RoundEnd::decode(payload)?)
            }
            FrameKind::Ack => {
                let payload: &[u8; ACK_BYTES] = payload.try_into().map_err(|_| length())?;
                Frame::Ack(Ack::decode(payload)?)
            }
            FrameKind::Request => {
                let mut extents = Vec::new();
                pages::decode_extents(payload, &mut extents)?;
                Frame::Request(extents)
            }
            FrameKind::KeepAlive => return Ok(None),
        }))
    }

    fn read_payload(&mut self, length: usize) -> Result<Vec<u8>, StreamError> {
        let mut payload = Vec::new();
        while payload.len() < length {
            let from = payload.len();
            payload.resize(length.min(from + CONTROL_STEP), 0);
            self.half.read_exact(&mut payload[from..], "receiving a frame")?;
        }
        Ok(payload)
    }

    /// Bytes of content of the last pages frame that are still to be taken.
    pub fn bulk_left(&self) -> u64 {
        self.bulk
    }

    /// Takes content of the last pages frame into the ranges, in order. May be called several times for one frame, but
    /// never for more than is left.
    pub fn read_bulk(&mut self, into: &[IoRange]) -> Result<(), StreamError> {
        let bytes: u64 = into.iter().map(|range| range.len() as u64).sum();
        if bytes > self.bulk {
            let channel = self.half.name().to_owned();
            return Err(StreamError::Misuse { channel, what: "more content was to be taken than the frame has" });
        }
        self.half.readv_exact(into, "receiving pages")?;
        self.bulk -= bytes;
        self.finish_if_whole();
        Ok(())
    }

    /// Takes what is left of the content of the last pages frame and forgets it.
    pub fn discard_bulk(&mut self) -> Result<(), StreamError> {
        let mut scratch = vec![0; self.bulk.min(1 << 16) as usize];
        while self.bulk > 0 {
            let step = self.bulk.min(1 << 16) as usize;
            self.half.read_exact(&mut scratch[..step], "receiving pages nobody wants")?;
            self.bulk -= step as u64;
        }
        self.finish_if_whole();
        Ok(())
    }

    fn finish_if_whole(&mut self) {
        if self.bulk == 0
            && let Some(stats) = self.unfinished.take()
        {
            self.stats = stats;
            self.meter.show(&stats);
        }
    }
}
