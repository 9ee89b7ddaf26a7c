//! An established TLS session on a socket: plaintext of ranges in, records out, and back.
//!
//! Two threads use a session, one sending and one receiving. Neither holds the session's lock while it waits for the
//! socket. Whoever waits for a socket to become readable before it reads a frame must not be deceived, so no byte is
//! received ahead of need: for `n` bytes of plaintext at least `n` plus the overhead of the largest records must come,
//! and a frame begins in a record of its own.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, UnbufferedStatus};

use crate::io_range::{FileRange, IoRange};
use crate::socket::{Flags, Socket};

/// Type, version, length.
pub(crate) const RECORD_HEADER: usize = 5;
/// Plaintext of a record, at most (RFC 8446, section 5.1).
const RECORD_PLAIN: usize = 1 << 14;
/// What a record adds to its plaintext: header, inner type, tag.
const RECORD_OVERHEAD: usize = RECORD_HEADER + 1 + 16;
/// Plaintext that is encrypted or awaited at a time.
const STEP: usize = 1 << 18;

/// Which end of the session this is.
pub(crate) enum Side {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

impl std::fmt::Debug for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Client(_) => "client of a TLS session",
            Self::Server(_) => "server of a TLS session",
        })
    }
}

/// The session. Locks are taken in the order `outgoing` or `incoming`, then `state`.
#[derive(Debug)]
pub(crate) struct Session {
    /// Keys, and what was received but not yet understood or taken.
    state: Mutex<State>,
    /// The sender's own: records that the socket has not taken yet.
    outgoing: Mutex<Outgoing>,
    /// The receiver's own: where records arrive.
    incoming: Mutex<Vec<u8>>,
}

#[derive(Debug)]
struct State {
    side: Side,
    /// Records that are not yet understood; between calls, at most one that is not whole.
    received: Vec<u8>,
    /// Bytes of `received` that are done with.
    done: usize,
    plain: Vec<u8>,
    taken: usize,
    /// Records that answer the peer (new keys); they leave before whatever is sent next.
    answers: Vec<u8>,
    ended: bool,
    failed: bool,
}

#[derive(Debug, Default)]
struct Outgoing {
    records: Vec<u8>,
    sent: usize,
    plain: Vec<u8>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere leaves bytes that the peer's checksums refuse; there is nothing to repair.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed(error: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("TLS: {error}"))
}

/// What [`step`] found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    /// It must be called again.
    More,
    /// Nothing more without bytes from the peer; the handshake is not done.
    Blocked,
    /// Nothing more without bytes from the peer; the handshake is done, and what was to be sent is encrypted.
    Established,
    /// The peer has ended the session.
    Ended,
}

/// One step of the session: understands `received`, appends plaintext to `plain` and records to `records`. At rest and
/// established, encrypts `send`.
fn step<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    plain: &mut Vec<u8>,
    records: &mut Vec<u8>,
    send: &[u8],
) -> (usize, io::Result<Found>) {
    let mut discard = status.discard;
    // What is to be discarded must be, also after an error: the session has offsets into what was received.
    let found = status.state.map_err(failed).and_then(|state| understand(state, &mut discard, plain, records, send));
    (discard, found)
}

fn understand<Data>(
    state: ConnectionState<'_, '_, Data>,
    discard: &mut usize,
    plain: &mut Vec<u8>,
    records: &mut Vec<u8>,
    send: &[u8],
) -> io::Result<Found> {
    Ok(match state {
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                let record = record.map_err(failed)?;
                *discard += record.discard;
                plain.extend_from_slice(record.payload);
            }
            Found::More
        }
        ConnectionState::EncodeTlsData(mut data) => {
            let at = records.len();
            records.resize(at + (1 << 17), 0);
            let n = data.encode(&mut records[at..]).map_err(failed)?;
            records.truncate(at + n);
            Found::More
        }
        ConnectionState::TransmitTlsData(data) => {
            // It is in `records`, which leave in order.
            data.done();
            Found::More
        }
        ConnectionState::WriteTraffic(mut traffic) => {
            if !send.is_empty() {
                let at = records.len();
                records.resize(at + send.len() + send.len().div_ceil(RECORD_PLAIN) * RECORD_OVERHEAD + 64, 0);
                let n = traffic.encrypt(send, &mut records[at..]).map_err(failed)?;
                records.truncate(at + n);
            }
            Found::Established
        }
        ConnectionState::BlockedHandshake => Found::Blocked,
        ConnectionState::PeerClosed | ConnectionState::Closed => Found::Ended,
        other => return Err(failed(format!("unexpected state {other:?}"))),
    })
}

impl State {
    /// Goes on until nothing more is possible without bytes from the peer. After an error `records` may hold the alert
    /// that tells the peer, and nothing is possible any more.
    fn advance(&mut self, records: &mut Vec<u8>, send: &[u8]) -> io::Result<Found> {
        if self.failed {
            return Err(failed("the session has failed before"));
        }
        let found = self.advance_to_rest(records, send);
        // Once per call, not once per record: what remains is moved to the front.
        self.received.drain(..self.done);
        self.done = 0;
        found
    }

    fn advance_to_rest(&mut self, records: &mut Vec<u8>, send: &[u8]) -> io::Result<Found> {
        loop {
            let found = self.step(records, send);
            if found.is_err() {
                self.failed = true;
                // One step takes the alert, if there is one; a second might want to send another, which is not allowed.
                let _ = self.step(records, &[]);
            }
            match found? {
                Found::More => {}
                Found::Ended => {
                    self.ended = true;
                    return Ok(Found::Ended);
                }
                rest => return Ok(rest),
            }
        }
    }

    fn step(&mut self, records: &mut Vec<u8>, send: &[u8]) -> io::Result<Found> {
        let (plain, received) = (&mut self.plain, &mut self.received[self.done..]);
        let (discard, found) = match &mut self.side {
            Side::Client(side) => step(side.process_tls_records(received), plain, records, send),
            Side::Server(side) => step(side.process_tls_records(received), plain, records, send),
        };
        self.done += discard;
        found
    }

    /// Moves plaintext into the ranges; returns how much.
    fn take(&mut self, ranges: &[IoRange]) -> usize {
        let before = self.taken;
        for range in ranges {
            if self.taken == self.plain.len() {
                break;
            }
            self.taken += range.copy_from(&self.plain[self.taken..]);
        }
        let moved = self.taken - before;
        if self.taken == self.plain.len() {
            self.plain.clear();
            self.taken = 0;
        }
        moved
    }

    /// How many bytes must still come, at least, before `wanted` bytes of plaintext are there.
    fn must_come(&self, wanted: usize) -> usize {
        let least = |plain: usize| plain + plain.div_ceil(RECORD_PLAIN) * RECORD_OVERHEAD;
        match self.received[..] {
            [_, _, _, high, low, ..] => {
                let record = RECORD_HEADER + usize::from(u16::from_be_bytes([high, low]));
                let plain = record.saturating_sub(RECORD_OVERHEAD);
                record.saturating_sub(self.received.len()).max(1) + least(wanted.saturating_sub(plain))
            }
            _ => least(wanted) - self.received.len(),
        }
    }
}

impl Session {
    pub(crate) fn new(side: Side) -> Self {
        let state = State {
            side,
            received: Vec::new(),
            done: 0,
            plain: Vec::new(),
            taken: 0,
            answers: Vec::new(),
            ended: false,
            failed: false,
        };
        Self { state: Mutex::new(state), outgoing: Mutex::default(), incoming: Mutex::default() }
    }

    /// Goes on with the handshake. Returns what is to be sent, and whether the handshake is done.
    pub(crate) fn handshake(&mut self, received: &mut Vec<u8>) -> (Vec<u8>, io::Result<bool>) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut records = Vec::new();
        state.received.append(received);
        let result = match state.advance(&mut records, &[]) {
            Ok(Found::Ended) => Err(failed("the peer ended the session")),
            Ok(found) => Ok(found == Found::Established),
            Err(e) => Err(e),
        };
        (records, result)
    }

    /// Encrypts from the ranges and sends; see [`Socket::send`]. `Ok(0)` is progress without new plaintext. What was
    /// taken leaves with the following calls or with [`Self::flush`].
    pub(crate) fn send(&self, socket: &Socket, ranges: &[IoRange], flags: Flags) -> io::Result<usize> {
        let mut outgoing = lock(&self.outgoing);
        if outgoing.pending() {
            return outgoing.push(socket, flags).map(|()| 0);
        }
        let mut plain = std::mem::take(&mut outgoing.plain);
        plain.clear();
        for range in ranges {
            if plain.len() == STEP {
                break;
            }
            range.first(STEP - plain.len()).append_to(&mut plain);
        }
        let sealed = self.seal(&mut outgoing, &plain);
        let taken = plain.len();
        outgoing.plain = plain;
        sealed?;
        // What the socket does not take now, it takes later; the plaintext is ours already.
        match outgoing.push(socket, flags) {
            Ok(()) => Ok(taken),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(taken),
            Err(e) => Err(e),
        }
    }

    /// As [`Self::send`], from a file.
    pub(crate) fn send_file(&self, socket: &Socket, range: FileRange<'_>) -> io::Result<usize> {
        let mut outgoing = lock(&self.outgoing);
        if outgoing.pending() {
            // The caller takes 0 for the end of the file; nothing has moved from it yet, so say "again".
            outgoing.push(socket, Flags::default())?;
            return Err(io::ErrorKind::Interrupted.into());
        }
        let mut plain = std::mem::take(&mut outgoing.plain);
        plain.resize(STEP.min(usize::try_from(range.len).unwrap_or(STEP)), 0);
        let sealed =
            rustix::io::pread(range.file, &mut plain[..], range.offset).map_err(io::Error::from).and_then(|n| {
                plain.truncate(n);
                self.seal(&mut outgoing, &plain).map(|()| n)
            });
        outgoing.plain = plain;
        let taken = sealed?;
        match outgoing.push(socket, Flags::default()) {
            Err(e) if !matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Err(e),
            _ => Ok(taken),
        }
    }

    fn seal(&self, outgoing: &mut Outgoing, plain: &[u8]) -> io::Result<()> {
        let mut state = lock(&self.state);
        outgoing.records.append(&mut state.answers);
        match state.advance(&mut outgoing.records, plain)? {
            Found::Established => Ok(()),
            _ => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Bytes that were taken and have not left.
    pub(crate) fn unsent(&self) -> usize {
        let outgoing = lock(&self.outgoing);
        outgoing.records.len() - outgoing.sent
    }

    /// Sends what was taken and has not left.
    pub(crate) fn flush(&self, socket: &Socket) -> io::Result<()> {
        lock(&self.outgoing).push(socket, Flags::default())
    }

    /// Receives plaintext into the ranges; see [`Socket::receive`]. `Interrupted`: bytes came, but no whole record.
    pub(crate) fn receive(&self, socket: &Socket, ranges: &[IoRange], flags: Flags) -> io::Result<usize> {
        let wanted = ranges.iter().map(|range| range.len()).sum::<usize>();
        let mut incoming = lock(&self.incoming);
        let must_come = {
            let mut state = lock(&self.state);
            match state.take(ranges) {
                0 if state.ended => return Ok(0),
                0 => state.must_come(wanted.min(STEP)),
                n => return Ok(n),
            }
        };
        incoming.resize(must_come, 0);
        let n = socket.receive_raw(&[IoRange::of_mut(&mut incoming)], flags)?;
        if n == 0 {
            return Ok(0);
        }
        incoming.truncate(n);
        let mut state = lock(&self.state);
        if state.received.is_empty() {
            std::mem::swap(&mut state.received, &mut *incoming);
        } else {
            state.received.append(&mut incoming);
        }
        let mut answers = std::mem::take(&mut state.answers);
        let advanced = state.advance(&mut answers, &[]);
        state.answers = answers;
        advanced?;
        match state.take(ranges) {
            0 if state.ended => Ok(0),
            0 => Err(io::ErrorKind::Interrupted.into()),
            n => Ok(n),
        }
    }
}

impl Outgoing {
    fn pending(&self) -> bool {
        self.sent < self.records.len()
    }

    /// One call to the socket.
    fn push(&mut self, socket: &Socket, flags: Flags) -> io::Result<()> {
        if self.pending() {
            self.sent += socket.send_raw(&[IoRange::of(&self.records[self.sent..])], flags)?;
        }
        if !self.pending() {
            self.records.clear();
            self.sent = 0;
        }
        Ok(())
    }
}
