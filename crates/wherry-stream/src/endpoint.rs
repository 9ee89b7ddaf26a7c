//! Where a peer is: `tcp:HOST:PORT` or `unix:PATH`.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::socket::Socket;
use crate::{Connection, StreamError};

/// A path of a UNIX socket may have this many bytes (`sun_path` without its final 0).
const MAX_UNIX_PATH: usize = 107;
/// A host name may have this many bytes (RFC 1035).
const MAX_HOST: usize = 253;

/// Where a peer listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// TCP.
    Tcp {
        /// Name or address; an IPv6 address without its brackets.
        host: String,
        /// Port; 0 lets a listener choose.
        port: u16,
    },
    /// A UNIX stream socket.
    Unix(PathBuf),
}

/// The text is no endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// Neither `tcp:` nor `unix:`.
    #[error("{0:?} is no endpoint: expected tcp:HOST:PORT or unix:PATH")]
    Scheme(String),
    /// No port, or an impossible one.
    #[error("{0:?} has no port: expected tcp:HOST:PORT with a port from 0 to 65535")]
    Port(String),
    /// No host, or an impossible one.
    #[error("{0:?} has no usable host: expected tcp:HOST:PORT, with an IPv6 address in brackets")]
    Host(String),
    /// No path, or an impossible one.
    #[error("{0:?} has no usable path: expected unix:PATH with at most {MAX_UNIX_PATH} bytes and no NUL")]
    Path(String),
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let quoted = || text.chars().take(300).collect::<String>();
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() || path.len() > MAX_UNIX_PATH || path.contains('\0') {
                return Err(EndpointError::Path(quoted()));
            }
            return Ok(Self::Unix(path.into()));
        }
        let Some(rest) = text.strip_prefix("tcp:") else { return Err(EndpointError::Scheme(quoted())) };
        let (host, port) = rest.rsplit_once(':').ok_or_else(|| EndpointError::Port(quoted()))?;
        if port.is_empty() || !port.bytes().all(|b| b.is_ascii_digit()) {
            return Err(EndpointError::Port(quoted()));
        }
        let port = port.parse().map_err(|_| EndpointError::Port(quoted()))?;
        let host = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            Some(inner) => {
                let address = inner.split_once('%').map_or(inner, |(address, _zone)| address);
                address.parse::<Ipv6Addr>().map_err(|_| EndpointError::Host(quoted()))?;
                inner
            }
            None => {
                let fits = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
                if host.is_empty() || host.len() > MAX_HOST || !host.bytes().all(fits) {
                    return Err(EndpointError::Host(quoted()));
                }
                host
            }
        };
        Ok(Self::Tcp { host: host.to_owned(), port })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp { host: address.ip().to_string(), port: address.port() }
    }
}

impl Endpoint {
    /// Connects. Tries every address of a name in turn; all of it, name resolution included, ends by the deadline.
    pub fn connect(&self, deadline: Instant) -> Result<Connection, StreamError> {
        self.connect_unless(deadline, &|| false)
    }

    /// As [`Self::connect`], and gives up soon after `cancelled` says so (it is asked every 20 ms).
    pub fn connect_unless(&self, deadline: Instant, cancelled: &dyn Fn() -> bool) -> Result<Connection, StreamError> {
        let (fd, tcp) = match self {
            Self::Tcp { port: 0, .. } => return Err(self.refused("port 0 cannot be connected to", None)),
            Self::Tcp { host, port } => {
                let mut last = None;
                let mut fd = None;
                for address in self.resolve(host, *port, deadline, cancelled)? {
                    match self.connect_tcp(address, deadline, cancelled) {
                        Ok(connected) => {
                            fd = Some(connected);
                            break;
                        }
                        Err(e @ StreamError::Cancelled { .. }) => return Err(e),
                        Err(e) => last = Some(e),
                    }
                }
                match (fd, last) {
                    (Some(fd), _) => (fd, true),
                    (None, Some(e)) => return Err(e),
                    (None, None) => return Err(self.refused("the name has no address", None)),
                }
            }
            Self::Unix(_) => (self.connect_unix(deadline, cancelled)?, false),
        };
        let mut connection = Connection::new(Socket::new(fd, tcp), self.to_string())?;
        if let Self::Tcp { host, .. } = self {
            connection.host = Some(host.clone());
        }
        Ok(connection)
    }

    fn refused(&self, reason: impl Into<String>, source: Option<io::Error>) -> StreamError {
        StreamError::Connect { endpoint: self.to_string(), reason: reason.into(), source }
    }

    fn late(&self) -> StreamError {
        self.refused("no answer within the deadline; is the host reachable and the port not filtered?", None)
    }

    fn cancelled(&self) -> StreamError {
        StreamError::Cancelled { channel: format!("connection to {self}") }
    }

    /// The system's resolver takes no deadline, so it runs in a thread of its own, which ends when the resolver does.
    fn resolve(
        &self,
        host: &str,
        port: u16,
        deadline: Instant,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Vec<SocketAddr>, StreamError> {
        if let Ok(address) = host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, port)]);
        }
        let (sender, receiver) = mpsc::channel();
        let host = host.to_owned();
        std::thread::Builder::new()
            .name("resolver".into())
            .spawn(move || {
                let addresses = (host.as_str(), port).to_socket_addrs().map(Iterator::collect::<Vec<_>>);
                // The one who asked may have given up.
                let _ = sender.send(addresses);
            })
            .map_err(|e| self.refused("no thread for the name resolver", Some(e)))?;
        loop {
            let slice = deadline.saturating_duration_since(Instant::now()).min(SLICE);
            match receiver.recv_timeout(slice) {
                Ok(Ok(addresses)) => return Ok(addresses),
                Ok(Err(e)) => return Err(self.refused(format!("the host name does not resolve: {e}"), Some(e))),
                Err(_) if cancelled() => return Err(self.cancelled()),
                Err(_) if Instant::now() >= deadline => {
                    return Err(self.refused("the host name was not resolved within the deadline", None));
                }
                Err(_) => {}
            }
        }
    }

    fn connect_tcp(
        &self,
        address: SocketAddr,
        deadline: Instant,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<OwnedFd, StreamError> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = rustix::net::socket_with(family, SocketType::STREAM, flags, None)
            .map_err(|e| self.refused(format!("no socket: {e}"), Some(e.into())))?;
        match rustix::net::connect(&fd, &address) {
            Ok(()) => {}
            Err(rustix::io::Errno::INPROGRESS) => self.await_connect(&fd, deadline, cancelled)?,
            Err(e) => return Err(self.explain(e.into())),
        }
        let stream = TcpStream::from(fd);
        stream.set_nonblocking(false).map_err(|e| self.refused(e.to_string(), Some(e)))?;
        Ok(stream.into())
    }

    fn await_connect(&self, fd: &OwnedFd, deadline: Instant, cancelled: &dyn Fn() -> bool) -> Result<(), StreamError> {
        while !self.poll_slice(fd, PollFlags::OUT, deadline, cancelled)? {}
        match rustix::net::sockopt::socket_error(fd) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) | Err(e) => Err(self.explain(e.into())),
        }
    }

    fn poll_slice(
        &self,
        fd: &OwnedFd,
        flags: PollFlags,
        deadline: Instant,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<bool, StreamError> {
        if cancelled() {
            return Err(self.cancelled());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(self.late());
        }
        match poll(fd, flags, left.min(SLICE)) {
            Ok(ready) => Ok(ready),
            Err(e) => Err(self.refused(format!("poll failed: {e}"), Some(e))),
        }
    }

    /// A UNIX connect succeeds at once or waits for room in the listener's queue, where it can only be retried.
    fn connect_unix(&self, deadline: Instant, cancelled: &dyn Fn() -> bool) -> Result<OwnedFd, StreamError> {
        let Self::Unix(path) = self else { return Err(self.refused("not a UNIX endpoint", None)) };
        let address = SocketAddrUnix::new(path).map_err(|e| self.refused("the path is too long", Some(e.into())))?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|e| self.refused(format!("no socket: {e}"), Some(e.into())))?;
        loop {
            match rustix::net::connect(&fd, &address) {
                Ok(()) => break,
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(e) => return Err(self.explain(e.into())),
            }
            if cancelled() {
                return Err(self.cancelled());
            }
            if Instant::now() >= deadline {
                return Err(self.late());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        rustix::io::ioctl_fionbio(&fd, false).map_err(|e| self.refused(e.to_string(), Some(e.into())))?;
        Ok(fd)
    }

    fn explain(&self, error: io::Error) -> StreamError {
        let reason = match error.kind() {
            io::ErrorKind::ConnectionRefused => "nobody listens there; start the destination first".to_owned(),
            io::ErrorKind::NotFound => "there is no such socket; start the destination first".to_owned(),
            io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
            io::ErrorKind::TimedOut => return self.late(),
            _ => error.to_string(),
        };
        self.refused(reason, Some(error))
    }
}

/// How often a waiting connect looks whether it was cancelled.
const SLICE: Duration = Duration::from_millis(20);

/// Waits for an event on a descriptor; `Ok(false)` if none came in time.
pub(crate) fn poll(fd: &OwnedFd, flags: PollFlags, timeout: Duration) -> io::Result<bool> {
    let timeout = Timespec::try_from(timeout).map_err(|_| io::ErrorKind::InvalidInput)?;
    match rustix::event::poll(&mut [PollFd::new(fd, flags)], Some(&timeout)) {
        Ok(n) => Ok(n > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(e) => Err(e.into()),
    }
}
