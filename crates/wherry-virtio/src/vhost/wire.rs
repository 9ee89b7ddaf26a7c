//! Messages of vhost-user and the socket they go over. Every message has a deadline, and whatever comes back is checked
//! before it is used: the other side is another process, and hostile.
//!
//! A message is a header of 12 bytes (request, flags, bytes that follow) and its payload, with descriptors beside it.
//! Numbers are those of QEMU's document "Vhost-user Protocol"; the byte order is the host's.

use std::fmt::{self, Debug};
use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use wherry_socket::descriptors;

/// Most bytes of a payload that is taken; no message that a front end reads is longer.
const MOST_PAYLOAD: usize = 4096;
/// Most descriptors that come with one message.
const MOST_DESCRIPTORS: usize = 8;

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Between two attempts to connect where there is no room.
const RETRY: Duration = Duration::from_millis(10);
/// Bytes of a header.
const HEADER: usize = 12;
/// Most messages whose answers are outstanding: both ways have to fit in what a socket takes, or each side would wait for the
/// other to read.
const MOST_POSTED: usize = 16;

/// The request of a back end that its configuration has changed, in the numbers of its own requests.
const CONFIG_CHANGE: u32 = 2;

/// A request of the back end's own, in an error.
#[derive(Clone, Copy)]
struct Own;

impl Debug for Own {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a request of its own")
    }
}

/// What a front end asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetLogBase = 6,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
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
    GetMaxMemSlots = 36,
    AddMemReg = 37,
    RemMemReg = 38,
    SetDeviceStateFd = 42,
    CheckDeviceState = 43,
}

/// Something went wrong between a front end and its back end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VhostError {
    /// Nobody listens there, or not to us.
    #[error("connecting to the vhost-user back end at {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The socket failed.
    #[error("vhost-user back end at {}: {what}: {source}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What was being done.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// It has closed the connection: it has ended, or does not like us.
    #[error("vhost-user back end at {}: it closed the connection at {what}", path.display())]
    Closed {
        /// The socket.
        path: PathBuf,
        /// What was being done.
        what: String,
    },
    /// It does not answer.
    #[error("vhost-user back end at {}: no answer to {what} within {limit:?}", path.display())]
    Deadline {
        /// The socket.
        path: PathBuf,
        /// What it was asked.
        what: String,
        /// How long it had.
        limit: Duration,
    },
    /// It answers what no back end may.
    #[error("vhost-user back end at {}: {what}: {reason}", path.display())]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// What it was asked.
        what: String,
        /// What was wrong.
        reason: String,
    },
    /// It cannot do what is needed.
    #[error("vhost-user back end at {}: {reason}", path.display())]
    Lacks {
        /// The socket.
        path: PathBuf,
        /// What it lacks.
        reason: String,
    },
}

/// An answer.
pub(super) struct Answer {
    pub(super) payload: Vec<u8>,
    pub(super) descriptors: Vec<OwnedFd>,
}

/// A message that is sent together with others, before their answers are taken.
pub(super) struct Posted<'a> {
    pub(super) what: Request,
    pub(super) payload: Vec<u8>,
    pub(super) fd: Option<BorrowedFd<'a>>,
}

/// A connection to a back end.
pub(super) struct Connection {
    stream: Arc<UnixStream>,
    path: PathBuf,
    /// How long each message and each answer may take.
    limit: Duration,
}

impl Connection {
    pub(super) fn open(path: &Path, limit: Duration) -> Result<Self, VhostError> {
        let failed = |source: Errno| VhostError::Connect { path: path.into(), source: source.into() };
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
        let deadline = Instant::now() + limit;
        // A back end serves one front end at a time; while others wait, there is no room for one more.
        loop {
            match rustix::net::connect(&socket, &address) {
                Ok(()) => return Ok(Self { stream: Arc::new(socket.into()), path: path.into(), limit }),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(RETRY),
                Err(error) => return Err(failed(error)),
            }
        }
    }

    /// Over a socket that is connected.
    pub(super) fn over(stream: UnixStream, path: &Path, limit: Duration) -> std::io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream: Arc::new(stream), path: path.into(), limit })
    }

    /// The socket.
    pub(super) fn socket_fd(&self) -> &Arc<UnixStream> {
        &self.stream
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The process at the other end, as the kernel knows it.
    pub(super) fn peer(&self) -> Result<rustix::process::Pid, VhostError> {
        let credentials = rustix::net::sockopt::socket_peercred(&self.stream);
        credentials.map(|c| c.pid).map_err(|e| self.socket("asking who it is", e))
    }

    pub(super) fn limit(&self) -> Duration {
        self.limit
    }

    /// Sends a message that has no answer.
    pub(super) fn tell(&self, what: Request, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), VhostError> {
        self.send(what, VERSION, payload, fds, Instant::now() + self.limit)
    }

    /// Sends a message, and takes its answer.
    pub(super) fn ask(&self, what: Request, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Answer, VhostError> {
        let deadline = Instant::now() + self.limit;
        self.send(what, VERSION, payload, fds, deadline)?;
        self.answer(what, deadline)
    }

    /// Sends messages and takes their answers, in the same order: the back end is woken once for many, and so are we.
    pub(super) fn ask_all(&self, messages: &[Posted<'_>]) -> Result<Vec<Answer>, VhostError> {
        self.post(messages, VERSION)
    }

    /// The same with messages whose answers say whether they were done.
    pub(super) fn order_all(&self, messages: &[Posted<'_>]) -> Result<(), VhostError> {
        let answers = self.post(messages, VERSION | NEED_REPLY)?;
        messages.iter().zip(&answers).try_for_each(|(message, answer)| self.done(message.what, answer))
    }

    fn post(&self, messages: &[Posted<'_>], flags: u32) -> Result<Vec<Answer>, VhostError> {
        let mut answers = Vec::with_capacity(messages.len());
        for some in messages.chunks(MOST_POSTED) {
            for message in some {
                let fds: Vec<BorrowedFd<'_>> = message.fd.into_iter().collect();
                self.send(message.what, flags, &message.payload, &fds, Instant::now() + self.limit)?;
            }
            for message in some {
                answers.push(self.answer(message.what, Instant::now() + self.limit)?);
            }
        }
        Ok(answers)
    }

    fn done(&self, what: Request, answer: &Answer) -> Result<(), VhostError> {
        match self.number(what, answer)? {
            0 => Ok(()),
            code => Err(self.wrong(what, format!("it refused, with {code:#x}"))),
        }
    }

    /// Sends a message whose answer says whether it was done.
    pub(super) fn order(&self, what: Request, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), VhostError> {
        let deadline = Instant::now() + self.limit;
        self.send(what, VERSION | NEED_REPLY, payload, fds, deadline)?;
        self.done(what, &self.answer(what, deadline)?)
    }

    /// The number that an answer is.
    pub(super) fn number(&self, what: Request, answer: &Answer) -> Result<u64, VhostError> {
        match <[u8; 8]>::try_from(&answer.payload[..]) {
            Ok(bytes) => Ok(u64::from_ne_bytes(bytes)),
            Err(_) => Err(self.wrong(what, format!("an answer of {} bytes, where 8 are due", answer.payload.len()))),
        }
    }

    pub(super) fn wrong(&self, what: impl Debug, reason: impl Into<String>) -> VhostError {
        VhostError::Protocol { path: self.path.clone(), what: format!("{what:?}"), reason: reason.into() }
    }

    pub(super) fn lacks(&self, reason: impl Into<String>) -> VhostError {
        VhostError::Lacks { path: self.path.clone(), reason: reason.into() }
    }

    fn socket(&self, what: &str, source: Errno) -> VhostError {
        VhostError::Socket { path: self.path.clone(), what: what.into(), source: source.into() }
    }

    fn send(
        &self,
        what: Request,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<(), VhostError> {
        self.send_numbered(what, what as u32, flags, payload, fds, deadline)
    }

    fn send_numbered(
        &self,
        what: impl Debug + Copy,
        number: u32,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<(), VhostError> {
        let mut message = Vec::with_capacity(HEADER + payload.len());
        for word in [number, flags, payload.len() as u32] {
            message.extend(word.to_ne_bytes());
        }
        message.extend(payload);
        if fds.len() > MOST_DESCRIPTORS {
            return Err(self.lacks(format!("{} descriptors do not fit in one message", fds.len())));
        }
        let mut sent = 0;
        while sent < message.len() {
            // They go with the first byte.
            let with = if sent == 0 { fds } else { &[] };
            match descriptors::send(&self.stream, &[IoSlice::new(&message[sent..])], with) {
                Ok(bytes) => sent += bytes,
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, what, deadline)?,
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(self.closed(what)),
                Err(error) => return Err(self.socket(&format!("sending {what:?}"), error)),
            }
        }
        Ok(())
    }

    fn closed(&self, what: impl Debug) -> VhostError {
        VhostError::Closed { path: self.path.clone(), what: format!("{what:?}") }
    }

    fn answer(&self, what: Request, deadline: Instant) -> Result<Answer, VhostError> {
        let mut descriptors = Vec::new();
        let mut header = [0; HEADER];
        self.fill(what, &mut header, &mut descriptors, deadline)?;
        let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (request, flags, bytes) = (word(0), word(4), word(8) as usize);
        if request != what as u32 {
            return Err(self.wrong(what, format!("it answers request {request}")));
        }
        if flags & 3 != VERSION || flags & REPLY == 0 {
            return Err(self.wrong(what, format!("an answer with flags {flags:#x}")));
        }
        if bytes > MOST_PAYLOAD {
            return Err(self.wrong(what, format!("an answer of {bytes} bytes; {MOST_PAYLOAD} are possible")));
        }
        let mut payload = vec![0; bytes];
        self.fill(what, &mut payload, &mut descriptors, deadline)?;
        Ok(Answer { payload, descriptors })
    }

    /// Takes a request of the back end's own: that the configuration of its device has changed. There is no other that it may
    /// make. False: it makes no more.
    pub(super) fn asked(&self) -> Result<bool, VhostError> {
        let (what, deadline) = (Own, Instant::now() + self.limit);
        let mut descriptors = Vec::new();
        let mut header = [0; HEADER];
        match self.fill(what, &mut header, &mut descriptors, deadline) {
            Err(VhostError::Closed { .. }) => return Ok(false),
            result => result?,
        }
        let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (number, flags, bytes) = (word(0), word(4), word(8));
        if flags & 3 != VERSION || flags & REPLY != 0 {
            return Err(self.wrong(what, format!("request {number} with flags {flags:#x}")));
        }
        if number != CONFIG_CHANGE || bytes != 0 || !descriptors.is_empty() {
            let with = format!("request {number} with {bytes} bytes and {} descriptors", descriptors.len());
            return Err(self.wrong(what, format!("{with}; it may only say that its configuration has changed")));
        }
        if flags & NEED_REPLY != 0 {
            self.send_numbered(what, number, VERSION | REPLY, &0u64.to_ne_bytes(), &[], deadline)?;
        }
        Ok(true)
    }

    /// Reads bytes, and whatever descriptors come with them.
    fn fill(
        &self,
        what: impl Debug + Copy,
        bytes: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
        deadline: Instant,
    ) -> Result<(), VhostError> {
        let mut got = 0;
        while got < bytes.len() {
            match descriptors::receive(&self.stream, &mut bytes[got..], descriptors) {
                Ok(came) => {
                    if came.cut || descriptors.len() > MOST_DESCRIPTORS {
                        return Err(self.wrong(what, format!("more than {MOST_DESCRIPTORS} descriptors in an answer")));
                    }
                    if came.bytes == 0 {
                        return Err(self.closed(what));
                    }
                    got += came.bytes;
                }
                Err(Errno::AGAIN) => self.wait(PollFlags::IN, what, deadline)?,
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Err(self.closed(what)),
                Err(error) => return Err(self.socket(&format!("reading the answer to {what:?}"), error)),
            }
        }
        Ok(())
    }

    fn wait(&self, event: PollFlags, what: impl Debug, deadline: Instant) -> Result<(), VhostError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let (path, what) = (self.path.clone(), format!("{what:?}"));
            return Err(VhostError::Deadline { path, what, limit: self.limit });
        }
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&self.stream, event)], Some(&left)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(self.socket(&format!("waiting at {what:?}"), error)),
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
