//! One socket, on which messages go in both directions: requests and replies of this side, commands and answers of the other.
//!
//! **Who waits, reads.** A thread that waits for a reply, or for the next command, reads the socket if nobody does, and files what
//! comes for others: replies by their number, commands in a queue. So the peer's own commands may stand between our request and its
//! reply, and any thread may ask. A message that is half received when its reader's deadline passes stays in the inbox, and the
//! next reader goes on with it.
//!
//! **A link comes to rest** between two requests ([`Link::rest`]), so that another process can go on with it: nothing of ours is on its
//! way then, every command that has come is answered, and what has come of a message that is not whole is [`SavedLink`]. A link that
//! rests belongs to whoever goes on with it, so it is not shut down.
//!
//! Each message goes out in **one** call, since libvfio-user takes header and body with one `recv` each. Reads never go beyond the end
//! of a message, so descriptors belong to the message whose bytes they came with.

mod saved;

use std::collections::{HashMap, VecDeque};
use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{Shutdown, sockopt};
use wherry_socket::descriptors;

use crate::error::VfioUserError;
use crate::message::{Command, HEADER, Header, MOST_DESCRIPTORS, MOST_PAYLOAD, Message, flags};
pub(crate) use saved::SavedLink;

/// Of a socket's buffer: with the default one, libvfio-user fails at messages of 256 KiB and more.
const SEND_BUFFER: usize = 4 << 20;
/// Commands that wait here for whoever takes them.
const MOST_COMMANDS: usize = 256;
/// Bytes of their payloads.
const MOST_WAITING: usize = 4 << 20;
/// Requests that were given up, and whose replies may still come.
const MOST_ABANDONED: usize = 1024;

/// What has come on a link.
#[derive(Debug)]
pub(crate) enum Incoming {
    /// A message.
    Command(Message),
    /// A command whose body was not taken: it was longer than any message is. It was read and thrown away.
    Oversized(Header),
}

impl Incoming {
    fn bytes(&self) -> usize {
        match self {
            Self::Command(message) => message.payload.len(),
            Self::Oversized(_) => 0,
        }
    }
}

/// A request of ours.
enum Request {
    Asked,
    Answered(Message),
    /// Nobody waits for it; its number is not used again before its reply has come.
    Abandoned,
}

/// Why nothing more comes.
#[derive(Clone, Debug)]
enum Over {
    Closed,
    Socket(Errno),
    /// The peer broke the protocol; in which message, and how. The header is there if it can still be answered.
    Broken(String, String, Option<Header>),
}

/// A message of which something has come.
#[derive(Default)]
struct Partial {
    header: [u8; HEADER],
    headed: usize,
    body: Vec<u8>,
    bodied: usize,
    descriptors: Vec<OwnedFd>,
    too_many: bool,
    since: Option<Instant>,
}

#[derive(Default)]
struct Inbox {
    reading: bool,
    /// A command was taken, and not the next one yet.
    serving: bool,
    /// Nothing new is begun.
    rests: bool,
    partial: Partial,
    requests: HashMap<u16, Request>,
    abandoned: usize,
    commands: VecDeque<Incoming>,
    over: Option<Over>,
    next: u16,
}

/// What a wait on the socket ended with.
#[derive(PartialEq, Eq)]
enum Waited {
    Ready,
    Late,
    /// Whoever reads is to look why.
    Called,
}

pub(crate) struct Link {
    stream: UnixStream,
    /// Calls whoever waits for the socket.
    call: OwnedFd,
    peer: String,
    /// How long the rest of a message may take when its first byte has come, and a message to be sent.
    limit: Duration,
    /// A reply that was not asked for ends the connection (a client's way), or is dropped (a server's).
    strict: bool,
    /// Held while a message is sent: they do not mix. Never taken together with the inbox.
    outgoing: Mutex<()>,
    inbox: Mutex<Inbox>,
    changed: Condvar,
}

impl Link {
    pub(crate) fn new(stream: UnixStream, peer: &str, limit: Duration, strict: bool) -> std::io::Result<Self> {
        stream.set_nonblocking(true)?;
        // Beyond the system's limit only with privilege; without it, as much as there is.
        if sockopt::set_socket_send_buffer_size_force(&stream, SEND_BUFFER).is_err() {
            sockopt::set_socket_send_buffer_size(&stream, SEND_BUFFER)?;
        }
        let call = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (outgoing, inbox, changed) = Default::default();
        Ok(Self { stream, call, peer: peer.into(), limit, strict, outgoing, inbox, changed })
    }

    /// Most bytes that go into the socket in one piece. The kernel counts its own overhead, too.
    pub(crate) fn piece(&self) -> usize {
        sockopt::socket_send_buffer_size(&self.stream).map_or(4096, |bytes| (bytes / 4).max(4096))
    }

    pub(crate) fn peer(&self) -> &str {
        &self.peer
    }

    /// Ends the connection: whoever waits on it is told.
    pub(crate) fn close(&self) {
        let mut inbox = self.inbox();
        if !inbox.rests {
            let _ = rustix::net::shutdown(&self.stream, Shutdown::Both);
        }
        inbox.over.get_or_insert(Over::Closed);
        self.changed.notify_all();
    }

    /// Ends the connection so that the peer can read what was sent last: a socket that is closed with unread input would take
    /// that from it.
    pub(crate) fn close_politely(&self, limit: Duration) {
        let _ = rustix::net::shutdown(&self.stream, Shutdown::Write);
        let deadline = Instant::now() + limit;
        let mut waste = vec![0; 64 << 10];
        loop {
            match descriptors::receive(&self.stream, &mut waste, &mut Vec::new()) {
                Ok(came) if came.bytes == 0 => break,
                // Who goes on sending is not listened to for ever.
                Ok(_) if Instant::now() >= deadline => break,
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => match self.wait(PollFlags::IN, Some(deadline)) {
                    Ok(Waited::Ready) => {}
                    _ => break,
                },
                Err(_) => break,
            }
        }
        self.close();
    }

    /// Asks, and waits for the reply. A refusal is an error.
    pub(crate) fn ask(
        &self,
        command: Command,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<Message, VfioUserError> {
        let what = format!("{command:?}");
        let deadline = Instant::now() + limit;
        let id = self.reserve(&what, deadline, limit)?;
        let header = Header { id, command: command as u16, size: 0, flags: flags::COMMAND, error: 0 };
        let answer = self.send_by(header, payload, fds, deadline, limit).and_then(|()| {
            self.wait_for(&what, Some((deadline, limit)), false, |inbox| match inbox.requests.get(&id) {
                Some(Request::Answered(_)) => match inbox.requests.remove(&id) {
                    Some(Request::Answered(message)) => Some(message),
                    _ => None,
                },
                _ => None,
            })
        });
        let message = match answer {
            Ok(message) => message,
            Err(error) => {
                let mut inbox = self.inbox();
                inbox.requests.insert(id, Request::Abandoned);
                inbox.abandoned += 1;
                return Err(error);
            }
        };
        if message.header.command != command as u16 {
            return Err(self.wrong(&what, format!("the reply is one to {}", message.header.name())));
        }
        match message.header.flags & flags::ERROR {
            0 => Ok(message),
            _ => {
                let source = match i32::try_from(message.header.error) {
                    Ok(number @ 1..4096) => Errno::from_raw_os_error(number),
                    _ => Errno::IO,
                };
                Err(VfioUserError::Refused { peer: self.peer.clone(), what, source })
            }
        }
    }

    /// The next command of the peer; `None` when nothing has come by the deadline.
    pub(crate) fn command(&self, deadline: Option<Instant>) -> Result<Option<Incoming>, VfioUserError> {
        let deadline = deadline.map(|at| (at, Duration::ZERO));
        self.inbox().serving = false;
        self.changed.notify_all();
        let next = |inbox: &mut Inbox| {
            let next = inbox.commands.pop_front();
            inbox.serving = next.is_some();
            next
        };
        match self.wait_for("the next command", deadline, true, next) {
            Ok(incoming) => Ok(Some(incoming)),
            Err(VfioUserError::Deadline { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The next command of the peer; `None` when none is there and `called` says that something else is to be done, which is looked
    /// at after each [`call`](Self::call).
    pub(crate) fn command_unless(&self, called: impl Fn() -> bool) -> Result<Option<Incoming>, VfioUserError> {
        self.inbox().serving = false;
        self.changed.notify_all();
        self.wait_for("the next command", None, false, |inbox| match inbox.commands.pop_front() {
            Some(next) => {
                inbox.serving = true;
                Some(Some(next))
            }
            None => (inbox.over.is_none() && called()).then_some(None),
        })
    }

    /// Has whoever waits for the socket look whether something else is to be done.
    pub(crate) fn call(&self) {
        // It is full only if nobody has read it, who then will.
        let _ = rustix::io::write(&self.call, &1u64.to_ne_bytes());
    }

    /// If the peer broke the protocol: the header of the message, if it can be answered.
    pub(crate) fn broken(&self) -> Option<Header> {
        match &self.inbox().over {
            Some(Over::Broken(_, _, header)) => *header,
            _ => None,
        }
    }

    /// Sends a message; its size is filled in.
    pub(crate) fn send(&self, header: Header, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), VfioUserError> {
        self.send_by(header, payload, fds, Instant::now() + self.limit, self.limit)
    }

    fn send_by(
        &self,
        mut header: Header,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
        limit: Duration,
    ) -> Result<(), VfioUserError> {
        header.size = (HEADER + payload.len()) as u32;
        let mut bytes = Vec::with_capacity(HEADER + payload.len());
        bytes.extend(header.encode());
        bytes.extend(payload);
        if fds.len() > MOST_DESCRIPTORS {
            let reason = format!("{} descriptors do not fit in one message", fds.len());
            return Err(VfioUserError::Lacks { peer: self.peer.clone(), reason });
        }
        let turn = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sent = 0;
        while sent < bytes.len() {
            // They go with the first byte.
            let with = if sent == 0 { fds } else { &[] };
            match descriptors::send(&self.stream, &[IoSlice::new(&bytes[sent..])], with) {
                Ok(count) => sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => match self.wait(PollFlags::OUT, Some(deadline)) {
                    Ok(Waited::Ready | Waited::Called) => {}
                    Ok(Waited::Late) => {
                        // Half of a message is out: nothing can follow it.
                        if sent > 0 {
                            self.close();
                        }
                        return Err(VfioUserError::Deadline { peer: self.peer.clone(), what: header.name(), limit });
                    }
                    Err(source) => return Err(self.socket(&header.name(), source)),
                },
                Err(Errno::PIPE | Errno::CONNRESET) => {
                    drop(turn);
                    // Whoever reads may not have noticed yet.
                    self.inbox().over.get_or_insert(Over::Closed);
                    self.changed.notify_all();
                    return Err(self.closed(&header.name()));
                }
                Err(source) => return Err(self.socket(&header.name(), source)),
            }
        }
        Ok(())
    }

    pub(crate) fn wrong(&self, what: &str, reason: impl Into<String>) -> VfioUserError {
        VfioUserError::Protocol { peer: self.peer.clone(), what: what.into(), reason: reason.into() }
    }

    fn closed(&self, what: &str) -> VfioUserError {
        VfioUserError::Closed { peer: self.peer.clone(), what: what.into() }
    }

    fn socket(&self, what: &str, source: Errno) -> VfioUserError {
        VfioUserError::Socket { peer: self.peer.clone(), what: what.into(), source }
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number for a request that no other one has.
    fn reserve(&self, what: &str, deadline: Instant, limit: Duration) -> Result<u16, VfioUserError> {
        let mut inbox = self.inbox();
        while inbox.rests && inbox.over.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(VfioUserError::Deadline { peer: self.peer.clone(), what: what.into(), limit });
            }
            inbox = self.changed.wait_timeout(inbox, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        if inbox.abandoned > MOST_ABANDONED || inbox.requests.len() > 2 * MOST_ABANDONED {
            return Err(self.wrong(what, format!("{} earlier requests have no reply", inbox.requests.len())));
        }
        while inbox.requests.contains_key(&inbox.next) {
            inbox.next = inbox.next.wrapping_add(1);
        }
        let id = inbox.next;
        inbox.next = id.wrapping_add(1);
        inbox.requests.insert(id, Request::Asked);
        Ok(id)
    }

    /// Reads, or has others read, until what is waited for is in the inbox. Who `pauses` does not read while the link is to rest.
    fn wait_for<T>(
        &self,
        what: &str,
        deadline: Option<(Instant, Duration)>,
        pauses: bool,
        mut take: impl FnMut(&mut Inbox) -> Option<T>,
    ) -> Result<T, VfioUserError> {
        let mut inbox = self.inbox();
        loop {
            if let Some(found) = take(&mut inbox) {
                return Ok(found);
            }
            match &inbox.over {
                None => {}
                Some(Over::Closed) => return Err(self.closed(what)),
                Some(Over::Socket(source)) => return Err(self.socket(what, *source)),
                Some(Over::Broken(what, reason, _)) => return Err(self.wrong(what, reason.clone())),
            }
            let now = Instant::now();
            if let Some((at, limit)) = deadline
                && now >= at
            {
                return Err(VfioUserError::Deadline { peer: self.peer.clone(), what: what.into(), limit });
            }
            if inbox.reading || pauses && inbox.rests {
                let wait = deadline.map_or(Duration::from_secs(60), |(at, _)| at - now);
                inbox = self.changed.wait_timeout(inbox, wait).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            inbox.reading = true;
            let mut partial = std::mem::take(&mut inbox.partial);
            drop(inbox);
            let outcome = self.read(&mut partial, deadline.map(|(at, _)| at));
            inbox = self.inbox();
            inbox.reading = false;
            inbox.partial = partial;
            let filed = match outcome {
                Ok(Some(incoming)) => self.file(&mut inbox, incoming),
                Ok(None) => Ok(()),
                Err(over) => Err(over),
            };
            if let Err(over) = filed {
                inbox.over.get_or_insert(over);
            }
            self.changed.notify_all();
        }
    }

    fn file(&self, inbox: &mut Inbox, incoming: Incoming) -> Result<(), Over> {
        let header = match &incoming {
            Incoming::Command(message) => message.header,
            Incoming::Oversized(header) => *header,
        };
        if header.flags & flags::TYPE != flags::REPLY {
            let waiting: usize = inbox.commands.iter().map(Incoming::bytes).sum();
            if inbox.commands.len() >= MOST_COMMANDS || waiting + incoming.bytes() > MOST_WAITING {
                let reason = format!("{} commands wait already", inbox.commands.len());
                return Err(Over::Broken(header.name(), reason, None));
            }
            inbox.commands.push_back(incoming);
            return Ok(());
        }
        let message = match incoming {
            Incoming::Command(message) => message,
            Incoming::Oversized(header) => {
                return Err(Over::Broken(header.name(), format!("a reply of {} bytes", header.size), None));
            }
        };
        match inbox.requests.get(&header.id) {
            Some(Request::Asked) => {
                inbox.requests.insert(header.id, Request::Answered(message));
            }
            Some(Request::Abandoned) => {
                inbox.requests.remove(&header.id);
                inbox.abandoned -= 1;
            }
            _ if self.strict => {
                let reason = format!("a reply to message {}, which was not sent", header.id);
                return Err(Over::Broken(header.name(), reason, None));
            }
            _ => {}
        }
        Ok(())
    }

    /// Goes on with the message that is coming; `None` if it is not whole by the deadline.
    fn read(&self, partial: &mut Partial, deadline: Option<Instant>) -> Result<Option<Incoming>, Over> {
        while partial.headed < HEADER {
            let headed = partial.headed;
            let mut bytes = partial.header;
            match self.receive(&mut bytes[headed..], partial, deadline)? {
                None => return Ok(None),
                Some(count) => {
                    partial.header = bytes;
                    partial.headed += count;
                }
            }
        }
        let header = Header::decode(&partial.header);
        let Some(length) = (header.size as usize).checked_sub(HEADER) else {
            // Where the next message starts, nobody knows.
            return Err(Over::Broken(header.name(), format!("a message of {} bytes", header.size), Some(header)));
        };
        let taken = length <= MOST_PAYLOAD;
        let mut waste = Vec::new();
        while partial.bodied < length {
            let bodied = partial.bodied;
            let mut body = std::mem::take(&mut partial.body);
            let received = if taken {
                body.resize(length, 0);
                self.receive(&mut body[bodied..], partial, deadline)
            } else {
                waste.resize((length - bodied).min(64 << 10), 0);
                self.receive(&mut waste, partial, deadline)
            };
            partial.body = body;
            match received? {
                None => return Ok(None),
                Some(count) => partial.bodied += count,
            }
        }
        let whole = std::mem::take(partial);
        if !taken {
            return Ok(Some(Incoming::Oversized(header)));
        }
        if whole.too_many {
            let reason = format!("more than {MOST_DESCRIPTORS} descriptors");
            return Err(Over::Broken(header.name(), reason, Some(header)));
        }
        Ok(Some(Incoming::Command(Message { header, payload: whole.body, descriptors: whole.descriptors })))
    }

    /// Some bytes, and the descriptors that come with them.
    fn receive(
        &self,
        bytes: &mut [u8],
        partial: &mut Partial,
        deadline: Option<Instant>,
    ) -> Result<Option<usize>, Over> {
        loop {
            match descriptors::receive(&self.stream, bytes, &mut partial.descriptors) {
                Ok(came) => {
                    partial.too_many |= came.cut || partial.descriptors.len() > MOST_DESCRIPTORS;
                    if came.bytes == 0 {
                        return Err(Over::Closed);
                    }
                    partial.since.get_or_insert_with(Instant::now);
                    return Ok(Some(came.bytes));
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let cut = partial.since.map(|since| since + self.limit);
                    let until = match (deadline, cut) {
                        (Some(a), Some(b)) => Some(a.min(b)),
                        (a, b) => a.or(b),
                    };
                    match self.wait(PollFlags::IN, until).map_err(Over::Socket)? {
                        Waited::Ready => continue,
                        Waited::Called => return Ok(None),
                        Waited::Late => {}
                    }
                    if cut.is_some_and(|cut| Instant::now() >= cut) {
                        let reason = format!("the rest of a message did not come within {:?}", self.limit);
                        return Err(Over::Broken("a message".into(), reason, None));
                    }
                    return Ok(None);
                }
                Err(Errno::CONNRESET) => return Err(Over::Closed),
                Err(source) => return Err(Over::Socket(source)),
            }
        }
    }

    /// Waits for the socket, until the deadline.
    fn wait(&self, event: PollFlags, deadline: Option<Instant>) -> Result<Waited, Errno> {
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Ok(Waited::Late);
        }
        let left = left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
        // Who sends cannot be called: half of a message may be out.
        let calls = if event == PollFlags::IN { PollFlags::IN } else { PollFlags::empty() };
        let mut both = [PollFd::new(&self.stream, event), PollFd::new(&self.call, calls)];
        match poll(&mut both, left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        if both[1].revents().contains(PollFlags::IN) && rustix::io::read(&self.call, &mut [0; 8]).is_ok() {
            return Ok(Waited::Called);
        }
        // The caller looks again, and comes back if it was for nothing.
        Ok(Waited::Ready)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
