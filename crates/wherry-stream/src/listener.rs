//! Listening for the peer.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::net::SocketAddrAny;
use wherry_socket::{SocketError, SocketFile};

use crate::endpoint::poll;
use crate::socket::Socket;
use crate::{Closer, Connection, Endpoint, StreamError, Tls};

/// A listening socket; clones share it. A UNIX socket's file is removed with the last.
#[derive(Clone, Debug)]
pub struct Listener {
    socket: Arc<Socket>,
    local: Endpoint,
    file: Option<Arc<SocketFile>>,
    tls: Option<Tls>,
}

/// Readable when somebody has connected.
impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.fd()
    }
}

impl Listener {
    /// Listens on an endpoint. A file left behind by a UNIX listener that died is replaced; a live one is not.
    pub fn bind(endpoint: &Endpoint) -> Result<Self, StreamError> {
        let failed = |reason: String, source: Option<io::Error>| StreamError::Listen {
            endpoint: endpoint.to_string(),
            reason,
            source,
        };
        let explain = |e: io::Error| {
            let reason = match e.kind() {
                io::ErrorKind::AddrInUse => "the port is in use; choose another, or 0 for any free one".to_owned(),
                io::ErrorKind::AddrNotAvailable => "this host does not have that address".to_owned(),
                io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
                _ => e.to_string(),
            };
            failed(reason, Some(e))
        };
        let (fd, local, file): (OwnedFd, _, _) = match endpoint {
            Endpoint::Tcp { host, port } => {
                let listener = TcpListener::bind((host.as_str(), *port)).map_err(explain)?;
                let local = listener.local_addr().map_err(explain)?.into();
                listener.set_nonblocking(true).map_err(explain)?;
                (listener.into(), local, None)
            }
            Endpoint::Unix(path) => {
                let (listener, file) = SocketFile::bind(path).map_err(|error| {
                    let reason = match &error {
                        SocketError::InUse(_) => {
                            "another process listens on that socket; choose another path".to_owned()
                        }
                        SocketError::NotASocket(_) => {
                            "the path exists and is not a socket; remove it or choose another".to_owned()
                        }
                        SocketError::Os { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                            "its directory does not exist".to_owned()
                        }
                        SocketError::Os { what, source, .. } => format!("{what} it: {source}"),
                    };
                    failed(reason, Some(error.into()))
                })?;
                listener.set_nonblocking(true).map_err(explain)?;
                (listener.into(), endpoint.clone(), Some(Arc::new(file)))
            }
        };
        let tcp = file.is_none();
        Ok(Self { socket: Arc::new(Socket::new(fd, tcp)), local, file, tls: None })
    }

    /// Requires TLS of everybody who connects from now on. See [`Connection::require_tls`].
    pub fn require_tls(&mut self, tls: &Tls) {
        self.tls = Some(tls.clone());
    }

    /// Where it listens, with the port that was chosen.
    pub fn local_endpoint(&self) -> &Endpoint {
        &self.local
    }

    /// A handle that ends listening: a blocked [`Self::accept`] returns [`StreamError::Cancelled`].
    pub fn closer(&self) -> Closer {
        Closer(self.socket.clone())
    }

    /// Waits for the next connection until the deadline.
    pub fn accept(&self, deadline: Instant) -> Result<Connection, StreamError> {
        let begun = Instant::now();
        let name = || format!("listener on {}", self.local);
        let io_error = |doing, source| StreamError::Io { channel: name(), doing, source };
        loop {
            if self.socket.is_closed() {
                return Err(StreamError::Cancelled { channel: name() });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match rustix::net::acceptfrom_with(self.socket.fd(), rustix::net::SocketFlags::CLOEXEC) {
                Ok((fd, address)) => return self.accepted(fd, address),
                // The first waits; of the others, one says that the caller hung up again, and the rest come and go.
                Err(rustix::io::Errno::AGAIN) => {}
                Err(rustix::io::Errno::CONNABORTED | rustix::io::Errno::INTR | rustix::io::Errno::PROTO) => continue,
                Err(_) if self.socket.is_closed() => continue,
                Err(e) => return Err(io_error("accepting a connection", e.into())),
            }
            if left.is_zero() {
                return Err(StreamError::NobodyCame { endpoint: self.local.to_string(), waited: begun.elapsed() });
            }
            // A close that comes between the look above and this wait is seen: shutdown leaves the socket readable.
            let fd = self.socket.fd().as_fd().try_clone_to_owned().map_err(|e| io_error("waiting", e))?;
            poll(&fd, PollFlags::IN, left.min(Duration::from_secs(1))).map_err(|e| io_error("waiting", e))?;
        }
    }

    fn accepted(&self, fd: OwnedFd, address: Option<SocketAddrAny>) -> Result<Connection, StreamError> {
        let peer = address
            .filter(|_| self.file.is_none())
            .and_then(|address| std::net::SocketAddr::try_from(address).ok())
            .map_or_else(|| format!("a client of {}", self.local), |address| Endpoint::from(address).to_string());
        let mut connection = Connection::new(Socket::new(fd, self.file.is_none()), peer)?;
        connection.tls = self.tls.clone();
        Ok(connection)
    }
}
