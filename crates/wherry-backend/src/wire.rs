//! Messages of vhost-user, as a back end reads and answers them.
//!
//! A message is a header of 12 bytes (request, flags, bytes that follow) and its payload, with descriptors beside it. Numbers
//! are those of QEMU's document "Vhost-user Protocol"; the byte order is the host's.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vmm_sys_util::eventfd::EventFd;
use wherry_handover::Rest;
use wherry_socket::descriptors;

use crate::BackendError;

/// Most bytes of a payload that is taken; no message of the protocol is longer.
const MOST_PAYLOAD: usize = 4096;
/// Most descriptors of a message: those of a whole table of memory.
const MOST_DESCRIPTORS: usize = 8;
/// How long the rest of a message may take, and an answer to leave.
const LIMIT: Duration = Duration::from_secs(10);
/// Bytes of a header.
const HEADER: usize = 12;

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

macro_rules! requests {
    ($($name:ident = $number:literal),+ $(,)?) => {
        /// What a front end asks for.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Request { $($name),+ }

        impl Request {
            /// The request with this number, if it is one.
            pub(crate) fn of(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)+
                    _ => None,
                }
            }
        }
    };
}

requests! {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    ResetOwner = 4,
    SetMemTable = 5,
    SetLogBase = 6,
    SetLogFd = 7,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    SetVringErr = 14,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    SendRarp = 19,
    SetBackendReqFd = 21,
    GetConfig = 24,
    SetConfig = 25,
    PostcopyAdvise = 28,
    PostcopyListen = 29,
    PostcopyEnd = 30,
    GetInflightFd = 31,
    SetInflightFd = 32,
    ResetDevice = 34,
    GetMaxMemSlots = 36,
    AddMemReg = 37,
    RemMemReg = 38,
    SetDeviceStateFd = 42,
    CheckDeviceState = 43,
}

/// A message, whole.
#[derive(Debug)]
pub(crate) struct Message {
    /// Number of the request.
    pub(crate) number: u32,
    /// It wants to know whether it was done.
    pub(crate) needs_reply: bool,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Message {
    /// The whole payload as numbers of 64 bits; an error if it has another length.
    pub(crate) fn words<const N: usize>(&self) -> Result<[u64; N], String> {
        let (words, rest) = self.payload.as_chunks::<8>();
        match <[[u8; 8]; N]>::try_from(words) {
            Ok(words) if rest.is_empty() => Ok(words.map(u64::from_ne_bytes)),
            _ => Err(format!("a payload of {} bytes, where {} are due", self.payload.len(), 8 * N)),
        }
    }

    /// The payload as two numbers of 32 bits: a ring and a value.
    pub(crate) fn pair(&self) -> Result<(u32, u32), String> {
        let [word] = self.words()?;
        let bytes = word.to_ne_bytes();
        let half = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Ok((half(0), half(4)))
    }

    /// The one descriptor that is due with it.
    pub(crate) fn descriptor(&mut self) -> Result<OwnedFd, String> {
        match (self.fds.pop(), self.fds.len()) {
            (Some(fd), 0) => Ok(fd),
            (_, more) => Err(format!("{more} descriptors beside one that is due")),
        }
    }
}

/// What a back end waits for.
pub(crate) enum Event {
    /// A message may be read, or the end has come.
    Message,
    /// These of the bells were rung; nothing was read of them.
    Rung(Vec<usize>),
    /// The device has said that its configuration is another one.
    Changed,
    /// It is to come to rest.
    Called,
}

/// What a front end has sent.
pub(crate) enum Read {
    Message(Message),
    /// Not all of a message, and the back end is to come to rest.
    Called,
    /// Nothing more: the front end has gone, or the process is to end.
    Over,
}

/// Why a wait has ended.
#[derive(PartialEq, Eq)]
enum Ready {
    Socket,
    Called,
    Quit,
}

/// What has come of a message.
#[derive(Debug, Default)]
pub(crate) struct Partial {
    /// Of its header, and then of its payload.
    pub(crate) bytes: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
    /// When its first byte had come here.
    since: Option<Instant>,
}

impl Partial {
    /// What another process had got of it.
    pub(crate) fn of(bytes: Vec<u8>, fds: Vec<OwnedFd>) -> Result<Self, BackendError> {
        let since = (!bytes.is_empty()).then(Instant::now);
        let this = Self { bytes, fds, since };
        let due = this.missing()?;
        if due == 0 || this.bytes.is_empty() && !this.fds.is_empty() || this.fds.len() > MOST_DESCRIPTORS {
            let (bytes, fds) = (this.bytes.len(), this.fds.len());
            return Err(BackendError::Protocol(format!(
                "{bytes} bytes and {fds} descriptors are no part of a message"
            )));
        }
        Ok(this)
    }

    fn word(&self, at: usize) -> u32 {
        let word = self.bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        word.map_or(0, u32::from_ne_bytes)
    }

    /// Bytes that are to be read next: of the header, or else of the payload. None are missing of a message that is whole.
    fn missing(&self) -> Result<usize, BackendError> {
        let Some(payload) = self.bytes.len().checked_sub(HEADER) else { return Ok(HEADER - self.bytes.len()) };
        let (number, flags, bytes) = (self.word(0), self.word(4), self.word(8) as usize);
        let wrong = |what: String| BackendError::Protocol(format!("request {number}: {what}"));
        if flags & 3 != VERSION || flags & REPLY != 0 {
            return Err(wrong(format!("flags {flags:#x}")));
        }
        if bytes > MOST_PAYLOAD {
            return Err(wrong(format!("a payload of {bytes} bytes; {MOST_PAYLOAD} are possible")));
        }
        bytes.checked_sub(payload).ok_or_else(|| wrong(format!("{payload} bytes of a payload of {bytes}")))
    }

    /// It is whole.
    fn take(&mut self) -> Message {
        let Self { mut bytes, fds, .. } = std::mem::take(self);
        let head = Self { bytes: bytes.clone(), ..Self::default() };
        let (number, flags) = (head.word(0), head.word(4));
        Message { number, needs_reply: flags & NEED_REPLY != 0, payload: bytes.split_off(HEADER), fds }
    }
}

/// A connection to a front end.
pub(crate) struct Connection<'a> {
    stream: UnixStream,
    /// Readable when the process is to end.
    quit: &'a EventFd,
    /// What has the back end come to rest, if anything has.
    rest: Option<&'a Rest>,
    partial: Partial,
}

impl<'a> Connection<'a> {
    pub(crate) fn new(stream: UnixStream, quit: &'a EventFd, rest: Option<&'a Rest>) -> Result<Self, BackendError> {
        stream.set_nonblocking(true).map_err(|source| BackendError::Os { what: "preparing a connection", source })?;
        Ok(Self { stream, quit, rest, partial: Partial::default() })
    }

    /// What has come of the next message.
    pub(crate) fn partial(&self) -> &Partial {
        &self.partial
    }

    /// Goes on with a message of which another process has read a part.
    pub(crate) fn set_partial(&mut self, partial: Partial) {
        self.partial = partial;
    }

    /// What the back end is to come to rest by, if it is to.
    pub(crate) fn called(&self) -> Option<&'a Rest> {
        self.rest.filter(|rest| rest.is_wanted())
    }

    /// Says why the back end cannot go over to another process now, if it cannot.
    pub(crate) fn note_obstacle(&self, why: Option<String>) {
        if let Some(rest) = self.rest {
            rest.note_obstacle(why);
        }
    }

    /// Whether it is called, when it seems so: it may have been before.
    fn is_called(&self) -> bool {
        let called = self.called().is_some();
        if let (false, Some(rest)) = (called, self.rest) {
            rest.heard();
        }
        called
    }

    /// Waits for a message, for a change of the configuration if there may be one, for bells, or to be called.
    pub(crate) fn wait(
        &self,
        bells: &[Option<Arc<EventFd>>],
        changed: Option<&EventFd>,
    ) -> Result<Event, BackendError> {
        loop {
            let mut events = vec![
                PollFd::new(&self.stream, PollFlags::IN),
                PollFd::from_borrowed_fd(borrow(self.quit), PollFlags::IN),
            ];
            let there = || bells.iter().enumerate().filter_map(|(n, bell)| Some((n, bell.as_deref()?)));
            events.extend(there().map(|(_, bell)| PollFd::from_borrowed_fd(borrow(bell), PollFlags::IN)));
            let others = events.len();
            events.extend(changed.map(|changed| PollFd::from_borrowed_fd(borrow(changed), PollFlags::IN)));
            events.extend(self.rest.map(|rest| PollFd::new(rest.event(), PollFlags::IN)));
            match poll(&mut events, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(BackendError::os("waiting for a message")(error)),
            }
            let is_ready = |event: &PollFd<'_>| !event.revents().is_empty();
            if self.rest.is_some() && events.last().is_some_and(is_ready) && self.is_called() {
                return Ok(Event::Called);
            }
            if events[..2].iter().any(is_ready) {
                return Ok(Event::Message);
            }
            if let Some(changed) = changed
                && is_ready(&events[others])
            {
                let _ = changed.read();
                return Ok(Event::Changed);
            }
            let rung = there().zip(&events[2..]).filter(|(_, event)| is_ready(event));
            let rung: Vec<_> = rung.map(|((n, _), _)| n).collect();
            if !rung.is_empty() {
                return Ok(Event::Rung(rung));
            }
        }
    }

    /// The next message.
    pub(crate) fn read(&mut self) -> Result<Read, BackendError> {
        loop {
            let missing = self.partial.missing()?;
            if missing == 0 {
                return Ok(Read::Message(self.partial.take()));
            }
            let mut piece = vec![0; missing];
            match descriptors::receive(&self.stream, &mut piece, &mut self.partial.fds) {
                Ok(came) => {
                    if came.cut || self.partial.fds.len() > MOST_DESCRIPTORS {
                        let most = MOST_DESCRIPTORS;
                        return Err(BackendError::Protocol(format!("more than {most} descriptors with a message")));
                    }
                    match came.bytes {
                        0 if self.partial.bytes.is_empty() => return Ok(Read::Over),
                        0 => return Err(BackendError::Protocol("it went in the middle of a message".into())),
                        more => self.partial.bytes.extend(&piece[..more]),
                    }
                    self.partial.since.get_or_insert_with(Instant::now);
                }
                Err(Errno::AGAIN) => {
                    let deadline = self.partial.since.map(|since| since + LIMIT);
                    match self.ready(PollFlags::IN, self.rest, deadline)? {
                        Ready::Socket => {}
                        Ready::Called => return Ok(Read::Called),
                        Ready::Quit => return Ok(Read::Over),
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Ok(Read::Over),
                Err(error) => return Err(BackendError::os("reading a message")(error)),
            }
        }
    }

    /// Answers a request.
    pub(crate) fn reply(&self, number: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), BackendError> {
        let mut message = Vec::with_capacity(HEADER + payload.len());
        for word in [number, VERSION | REPLY, payload.len() as u32] {
            message.extend(word.to_ne_bytes());
        }
        message.extend(payload);
        let deadline = Some(Instant::now() + LIMIT);
        let mut sent = 0;
        while sent < message.len() {
            // They go with the first byte.
            let with = if sent == 0 { fds } else { &[] };
            match descriptors::send(&self.stream, &[IoSlice::new(&message[sent..])], with) {
                Ok(bytes) => sent += bytes,
                Err(Errno::AGAIN) => {
                    // A back end comes to rest between two messages: what is answered is answered whole.
                    if self.ready(PollFlags::OUT, None, deadline)? == Ready::Quit {
                        return Ok(());
                    }
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(BackendError::os("answering")(error)),
            }
        }
        Ok(())
    }

    /// Waits until the socket is ready, or, for whoever comes to rest then, until that is wanted.
    fn ready(&self, event: PollFlags, rest: Option<&Rest>, deadline: Option<Instant>) -> Result<Ready, BackendError> {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Err(BackendError::Protocol(format!("the rest of a message does not come or go within {LIMIT:?}")));
        }
        let left = left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
        let quit = borrow(self.quit);
        let mut events = vec![PollFd::new(&self.stream, event), PollFd::from_borrowed_fd(quit, PollFlags::IN)];
        events.extend(rest.map(|rest| PollFd::new(rest.event(), PollFlags::IN)));
        match poll(&mut events, left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(BackendError::os("waiting for a message")(error)),
        }
        if !events[1].revents().is_empty() {
            return Ok(Ready::Quit);
        }
        let called = events.get(2).is_some_and(|event| !event.revents().is_empty());
        Ok(if called && self.is_called() { Ready::Called } else { Ready::Socket })
    }
}

impl AsFd for Connection<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// An eventfd as a descriptor.
#[expect(unsafe_code, reason = "the type has no other way to lend its descriptor")]
pub(crate) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: it is open as long as the value that is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
