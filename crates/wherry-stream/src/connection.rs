//! Connections: a stream socket whose every read and write ends, by success, idle limit, deadline or a [`Closer`].
//!
//! The socket is blocking, with `SO_RCVTIMEO` and `SO_SNDTIMEO`: one system call moves a whole frame, and no thread
//! waits for ever. The idle limit bounds the time in which *no byte* moves; a deadline bounds a whole operation.
//! One thread owns the [`ReadHalf`] and one the [`WriteHalf`].

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::io_range::{FileRange, IoRange, Pending};
use crate::socket::{Flags, Path, Socket};
use crate::tls_session::Session;
use crate::{Endpoint, StreamError, Tls};

/// Nothing moved for that long: the peer is taken for dead, unless told otherwise by [`Connection::set_idle_limit`].
pub(crate) const DEFAULT_IDLE_LIMIT: Duration = Duration::from_secs(30);

/// A connected stream socket that carries no meaning yet; a [`Hello`](crate::Hello) makes it a
/// [`Channel`](crate::Channel).
#[derive(Debug)]
pub struct Connection {
    pub(crate) reader: ReadHalf,
    pub(crate) writer: WriteHalf,
    pub(crate) tls: Option<Tls>,
    /// What was connected to, to be found in the peer's certificate.
    pub(crate) host: Option<String>,
    peer: String,
}

/// Ends a connection from any thread: what blocks in a read or write of it returns [`StreamError::Cancelled`].
#[derive(Clone, Debug)]
pub struct Closer(pub(crate) Arc<Socket>);

impl Closer {
    /// Ends the connection, at once and for good. May be called often.
    pub fn close(&self) {
        self.0.close();
    }

    /// What the kernel knows of the way to the peer; `None` unless it is TCP.
    pub fn path(&self) -> Option<Path> {
        self.0.path()
    }

    /// Bounds what may be on its way at once, in bytes, roughly; what a queue in the network holds is part of it.
    pub fn set_window(&self, bytes: usize) -> io::Result<()> {
        self.0.set_send_buffer(bytes)
    }

    /// See [`WriteHalf::unsent`]; for looking on while another thread sends.
    pub fn unsent(&self) -> io::Result<u64> {
        self.0.unsent()
    }
}

/// What both halves know.
#[derive(Debug)]
struct Half {
    socket: Arc<Socket>,
    name: Arc<str>,
    idle_limit: Duration,
    deadline: Option<Instant>,
    /// The timeout the kernel was last told.
    armed: Option<Duration>,
}

/// The receiving half.
#[derive(Debug)]
pub struct ReadHalf {
    half: Half,
    spin: Duration,
    pending: Pending,
}

/// The sending half.
#[derive(Debug)]
pub struct WriteHalf {
    half: Half,
    pending: Pending,
}

/// What a failed call means.
enum Trouble {
    Again,
    Fatal(StreamError),
}

impl Half {
    fn new(socket: Arc<Socket>, name: Arc<str>) -> Self {
        Self { socket, name, idle_limit: DEFAULT_IDLE_LIMIT, deadline: None, armed: None }
    }

    /// The timeout for the next call, if the kernel must be told another than it has.
    fn timeout(&mut self, doing: &'static str) -> Result<Option<Duration>, StreamError> {
        if self.socket.is_closed() {
            return Err(self.cancelled());
        }
        let mut timeout = self.idle_limit;
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(StreamError::Deadline { channel: self.name.to_string(), doing });
            }
            timeout = timeout.min(left);
        }
        // The kernel takes 0 for "no timeout" and counts in jiffies.
        let timeout = timeout.max(Duration::from_millis(1));
        Ok((self.armed.replace(timeout) != Some(timeout)).then_some(timeout))
    }

    fn cancelled(&self) -> StreamError {
        StreamError::Cancelled { channel: self.name.to_string() }
    }

    fn io(&self, doing: &'static str, source: io::Error) -> StreamError {
        StreamError::Io { channel: self.name.to_string(), doing, source }
    }

    fn closed_by_peer(&self, doing: &'static str, between_frames: bool) -> StreamError {
        if self.socket.is_closed() {
            return self.cancelled();
        }
        StreamError::PeerClosed { channel: self.name.to_string(), doing, between_frames }
    }

    /// Sorts a failed call: try again, or give up. `since` is when a byte last moved.
    fn judge(&self, error: io::Error, doing: &'static str, since: Instant) -> Trouble {
        use io::ErrorKind as Kind;
        if self.socket.is_closed() {
            return Trouble::Fatal(self.cancelled());
        }
        match error.kind() {
            Kind::Interrupted => {}
            Kind::WouldBlock => {}
            Kind::BrokenPipe | Kind::ConnectionReset | Kind::ConnectionAborted => {
                return Trouble::Fatal(self.closed_by_peer(doing, false));
            }
            _ => return Trouble::Fatal(self.io(doing, error)),
        }
        let waited = since.elapsed();
        let late = self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        if waited >= self.idle_limit || late {
            return Trouble::Fatal(StreamError::Silent { channel: self.name.to_string(), doing, waited });
        }
        Trouble::Again
    }
}

impl Connection {
    pub(crate) fn new(socket: Socket, peer: String) -> Result<Self, StreamError> {
        let name: Arc<str> = format!("connection with {peer}").into();
        if socket.is_tcp() {
            // Small frames are answers someone waits for; bulk is sent in large calls and gains nothing from delay.
            rustix::net::sockopt::set_tcp_nodelay(socket.fd(), true).map_err(|e| StreamError::Io {
                channel: name.to_string(),
                doing: "setting TCP_NODELAY",
                source: e.into(),
            })?;
        }
        let socket = Arc::new(socket);
        let reader = ReadHalf {
            half: Half::new(socket.clone(), name.clone()),
            spin: Duration::ZERO,
            pending: Pending::default(),
        };
        let writer = WriteHalf { half: Half::new(socket, name), pending: Pending::default() };
        Ok(Self { reader, writer, tls: None, host: None, peer })
    }

    /// Takes over a connected TCP socket. `peer` is its name in messages.
    pub fn from_tcp(stream: TcpStream, peer: &str) -> Result<Self, StreamError> {
        Self::from_blocking(stream.set_nonblocking(false), stream.into(), true, peer)
    }

    /// Takes over a connected UNIX socket. `peer` is its name in messages.
    pub fn from_unix(stream: UnixStream, peer: &str) -> Result<Self, StreamError> {
        Self::from_blocking(stream.set_nonblocking(false), stream.into(), false, peer)
    }

    fn from_blocking(made: io::Result<()>, fd: OwnedFd, tcp: bool, peer: &str) -> Result<Self, StreamError> {
        made.map_err(|source| StreamError::Io {
            channel: format!("connection with {peer}"),
            doing: "making the socket block",
            source,
        })?;
        Self::new(Socket::new(fd, tcp), peer.to_owned())
    }

    /// Connects to an endpoint. See [`Endpoint::connect`].
    pub fn connect(endpoint: &Endpoint, deadline: Instant) -> Result<Self, StreamError> {
        endpoint.connect(deadline)
    }

    /// Who is at the other end, for messages.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Names the connection in errors from now on.
    pub fn set_name(&mut self, name: &str) {
        let name: Arc<str> = name.into();
        self.reader.half.name = name.clone();
        self.writer.half.name = name;
    }

    /// Its name in errors.
    pub fn name(&self) -> &str {
        &self.reader.half.name
    }

    /// A handle that ends this connection.
    pub fn closer(&self) -> Closer {
        Closer(self.reader.half.socket.clone())
    }

    /// Bounds the time in which no byte moves, in both directions. A peer that stops in the middle of a large read is
    /// noticed within twice that time, because one call waits for all of it.
    pub fn set_idle_limit(&mut self, limit: Duration) {
        self.reader.set_idle_limit(limit);
        self.writer.set_idle_limit(limit);
    }

    /// Bounds all operations together, in both directions; `None` lifts it.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.reader.set_deadline(deadline);
        self.writer.set_deadline(deadline);
    }

    /// Asks for kernel buffers of these sizes in bytes; the kernel bounds them (`net.core.wmem_max`, `rmem_max`) and no
    /// longer tunes them itself. `None` leaves one as it is.
    pub fn set_buffers(&self, send: Option<usize>, receive: Option<usize>) -> Result<(), StreamError> {
        let half = &self.reader.half;
        if let Some(bytes) = send {
            rustix::net::sockopt::set_socket_send_buffer_size(half.socket.fd(), bytes)
                .map_err(|e| half.io("setting SO_SNDBUF", e.into()))?;
        }
        if let Some(bytes) = receive {
            rustix::net::sockopt::set_socket_recv_buffer_size(half.socket.fd(), bytes)
                .map_err(|e| half.io("setting SO_RCVBUF", e.into()))?;
        }
        Ok(())
    }

    pub(crate) fn set_session(&mut self, session: Session) {
        self.reader.half.socket.set_session(session);
    }

    /// Separates the halves for two threads. TLS that is required must have been made: by a hello.
    pub fn split(self) -> (ReadHalf, WriteHalf) {
        (self.reader, self.writer)
    }
}

impl ReadHalf {
    /// Bounds the time in which no byte arrives.
    pub fn set_idle_limit(&mut self, limit: Duration) {
        self.half.idle_limit = limit;
    }

    /// Bounds all further reads together; `None` lifts it.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.half.deadline = deadline;
    }

    /// Before a read sleeps, it looks again and again for this long whether bytes have come. Waking a sleeper costs tens
    /// of microseconds to milliseconds; a switchover has no time for that. Zero ends it.
    pub fn set_spin(&mut self, budget: Duration) {
        self.spin = budget;
    }

    /// A handle that ends this connection.
    pub fn closer(&self) -> Closer {
        Closer(self.half.socket.clone())
    }

    /// Its name in errors.
    pub fn name(&self) -> &str {
        &self.half.name
    }

    /// Fills the buffer.
    pub fn read_exact(&mut self, buffer: &mut [u8], doing: &'static str) -> Result<(), StreamError> {
        self.readv_exact(&[IoRange::of_mut(buffer)], doing)
    }

    /// Fills the buffer; `Ok(false)` if the peer had closed the connection before the first byte.
    pub fn read_exact_or_end(&mut self, buffer: &mut [u8], doing: &'static str) -> Result<bool, StreamError> {
        self.pending.clear();
        self.pending.push(IoRange::of_mut(buffer));
        self.fill(doing, true)
    }

    /// Fills the ranges in order, with one system call where the bytes are there and the ranges are no more than 1024.
    pub fn readv_exact(&mut self, ranges: &[IoRange], doing: &'static str) -> Result<(), StreamError> {
        self.pending.clear();
        for range in ranges {
            self.pending.push(*range);
        }
        self.fill(doing, false).map(|_| ())
    }

    /// [`Self::read_exact`] that looks for up to `budget` before it sleeps. See [`Self::set_spin`].
    pub fn read_spinning(
        &mut self,
        buffer: &mut [u8],
        budget: Duration,
        doing: &'static str,
    ) -> Result<(), StreamError> {
        let before = std::mem::replace(&mut self.spin, budget);
        let result = self.read_exact(buffer, doing);
        self.spin = before;
        result
    }

    fn fill(&mut self, doing: &'static str, end_is_fine: bool) -> Result<bool, StreamError> {
        let mut begun = false;
        let mut moved = Instant::now();
        while self.pending.bytes() > 0 {
            if let Some(timeout) = self.half.timeout(doing)? {
                self.half.socket.set_receive_timeout(timeout).map_err(|e| self.half.io("setting SO_RCVTIMEO", e))?;
            }
            let (batch, _) = self.pending.batch();
            let spinning = !self.spin.is_zero() && moved.elapsed() < self.spin;
            let flags = Flags { nonblocking: spinning, all: true, more: false };
            match self.half.socket.receive(batch, flags) {
                Ok(0) if end_is_fine && !begun && !self.half.socket.is_closed() => return Ok(false),
                Ok(0) => return Err(self.half.closed_by_peer(doing, false)),
                Ok(n) => {
                    self.pending.advance(n);
                    begun = true;
                    moved = Instant::now();
                }
                Err(e) => match self.half.judge(e, doing, moved) {
                    Trouble::Again if spinning => std::thread::yield_now(),
                    Trouble::Again => {}
                    Trouble::Fatal(e) => return Err(e),
                },
            }
        }
        Ok(true)
    }

    pub(crate) fn closed_by_peer(&self, doing: &'static str, between_frames: bool) -> StreamError {
        self.half.closed_by_peer(doing, between_frames)
    }
}

/// For waiting on several connections at once; reading past this half would lose its place.
impl AsFd for ReadHalf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.half.socket.fd()
    }
}

impl WriteHalf {
    /// Bounds the time in which no byte leaves.
    pub fn set_idle_limit(&mut self, limit: Duration) {
        self.half.idle_limit = limit;
    }

    /// Bounds all further writes together; `None` lifts it.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.half.deadline = deadline;
    }

    /// A handle that ends this connection.
    pub fn closer(&self) -> Closer {
        Closer(self.half.socket.clone())
    }

    /// Its name in errors.
    pub fn name(&self) -> &str {
        &self.half.name
    }

    /// Bytes that the kernel still holds: not acknowledged by the peer (TCP), or not read by it (UNIX, with overhead).
    pub fn unsent(&self) -> Result<u64, StreamError> {
        self.half.socket.unsent().map_err(|e| self.half.io("reading SIOCOUTQ", e))
    }

    /// Bounds what may lie unsent in the kernel before a write blocks, so that an urgent frame on another channel need
    /// not wait behind bulk (`TCP_NOTSENT_LOWAT`). UNIX sockets have no such limit and nothing happens.
    pub fn set_unsent_limit(&self, bytes: u32) -> Result<(), StreamError> {
        if !self.half.socket.is_tcp() {
            return Ok(());
        }
        self.half.socket.set_unsent_limit(bytes).map_err(|e| self.half.io("setting TCP_NOTSENT_LOWAT", e))
    }

    /// Sends all bytes. `more`: something follows at once.
    pub fn write_all(&mut self, bytes: &[u8], more: bool, doing: &'static str) -> Result<(), StreamError> {
        self.writev_all(&[IoRange::of(bytes)], more, doing)
    }

    /// Sends all ranges in order, with one system call where there is room and the ranges are no more than 1024.
    /// `more`: something follows at once.
    pub fn writev_all(&mut self, ranges: &[IoRange], more: bool, doing: &'static str) -> Result<(), StreamError> {
        self.pending.clear();
        for range in ranges {
            self.pending.push(*range);
        }
        self.drain(more, doing)
    }

    /// As [`Self::writev_all`], with bytes of this process before the ranges.
    pub(crate) fn write_head_and_ranges(
        &mut self,
        head: &[u8],
        ranges: &[IoRange],
        doing: &'static str,
    ) -> Result<(), StreamError> {
        self.pending.clear();
        self.pending.push(IoRange::of(head));
        for range in ranges {
            self.pending.push(*range);
        }
        self.drain(false, doing)
    }

    fn drain(&mut self, more: bool, doing: &'static str) -> Result<(), StreamError> {
        let mut moved = Instant::now();
        while self.pending.bytes() > 0 {
            self.arm(doing)?;
            let (batch, last) = self.pending.batch();
            match self.half.socket.send(batch, Flags { more: more || !last, ..Flags::default() }) {
                Ok(n) => {
                    self.pending.advance(n);
                    moved = Instant::now();
                }
                Err(e) => match self.half.judge(e, doing, moved) {
                    Trouble::Again => {}
                    Trouble::Fatal(e) => return Err(e),
                },
            }
        }
        self.flush(moved, doing)
    }

    /// Sends what a TLS session has taken and not yet sent.
    fn flush(&mut self, mut moved: Instant, doing: &'static str) -> Result<(), StreamError> {
        while self.half.socket.must_flush() {
            self.arm(doing)?;
            match self.half.socket.flush() {
                Ok(()) => moved = Instant::now(),
                Err(e) => match self.half.judge(e, doing, moved) {
                    Trouble::Again => {}
                    Trouble::Fatal(e) => return Err(e),
                },
            }
        }
        Ok(())
    }

    /// Sends a piece of a file without passing it through this process. The bytes may be taken from the file as late as
    /// the peer reads them: what changes meanwhile arrives changed.
    pub fn send_file(&mut self, mut range: FileRange<'_>, doing: &'static str) -> Result<(), StreamError> {
        let mut moved = Instant::now();
        while range.len > 0 {
            self.arm(doing)?;
            match self.half.socket.send_file(range) {
                Ok(0) => {
                    let source = io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends before the range to send");
                    return Err(self.half.io(doing, source));
                }
                Ok(n) => {
                    range.offset += n as u64;
                    range.len -= (n as u64).min(range.len);
                    moved = Instant::now();
                }
                Err(e) => match self.half.judge(e, doing, moved) {
                    Trouble::Again => {}
                    Trouble::Fatal(e) => return Err(e),
                },
            }
        }
        self.flush(moved, doing)
    }

    fn arm(&mut self, doing: &'static str) -> Result<(), StreamError> {
        if let Some(timeout) = self.half.timeout(doing)? {
            self.half.socket.set_send_timeout(timeout).map_err(|e| self.half.io("setting SO_SNDTIMEO", e))?;
        }
        Ok(())
    }
}
