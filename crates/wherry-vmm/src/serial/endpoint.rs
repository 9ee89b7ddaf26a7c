//! What the outside of the port can be.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use wherry_handover::{KeptId, Registry, RegistryError};
use wherry_socket::SocketFile;

use super::terminal::{EscapeFilter, RawMode, is_ours};
use super::{EscapeHandler, SerialError};
use crate::config::SerialTarget;

/// The outside. All reads and writes are made after `poll` said that they do not block.
pub(super) enum Endpoint {
    /// Two streams, and the terminal they may be.
    Streams {
        /// Gone when its end was read.
        input: Option<Arc<OwnedFd>>,
        /// Gone when nobody reads it any more.
        output: Option<Arc<OwnedFd>>,
        /// Filters what is typed at a terminal.
        filter: Option<EscapeFilter>,
        /// Puts the terminal back when it is dropped, unless it is another process's.
        _raw: Option<RawMode>,
    },
    /// A listening socket and the client that came last.
    Socket {
        /// The socket.
        listener: Arc<UnixListener>,
        /// Its file, which goes with it.
        _file: SocketFile,
        /// The client.
        client: Option<Client>,
    },
    /// Output is dropped, and there is no input.
    Null,
}

/// A client of the socket.
pub(super) struct Client {
    pub stream: Arc<UnixStream>,
    /// It may still send.
    pub sends: bool,
}

/// What is kept over an update.
const INPUT: &str = "serial/input";
const OUTPUT: &str = "serial/output";
const LISTENER: &str = "serial/listener";
const CLIENT: &str = "serial/client";

impl Client {
    /// A client that has come, or that the predecessor of this process had. It goes over in its turn.
    pub fn new(stream: UnixStream, registry: &Registry) -> Result<Self, RegistryError> {
        Ok(Self { stream: registry.add(KeptId::new(CLIENT, 0), stream)?, sends: true })
    }
}

impl Endpoint {
    /// Opens what the user chose, or takes what the predecessor of this process has opened.
    pub fn open(
        target: &SerialTarget,
        escape: Option<EscapeHandler>,
        registry: &Arc<Registry>,
    ) -> Result<Self, SerialError> {
        let id = |name| KeptId::new(name, 0);
        let kept = |name, fd: OwnedFd| registry.add(id(name), fd);
        let came = |name| registry.claim(&id(name));
        match target {
            SerialTarget::Null => Ok(Endpoint::Null),
            SerialTarget::Socket(path) => {
                let (listener, file) = match registry.succeeds() {
                    true => (UnixListener::from(registry.inherit(&id(LISTENER))?), SocketFile::adopt(path)?),
                    false => SocketFile::bind(path)?,
                };
                listener.set_nonblocking(true).map_err(SerialError::os("listening"))?;
                let listener = registry.add(id(LISTENER), listener)?;
                let client = came(CLIENT).map(|client| Client::new(client.into(), registry)).transpose()?;
                Ok(Endpoint::Socket { listener, _file: file, client })
            }
            // What had come to its end there has none here, either.
            SerialTarget::File(_) | SerialTarget::Stdio if registry.succeeds() => {
                let input = came(INPUT).map(|fd| kept(INPUT, fd)).transpose()?;
                let output = came(OUTPUT).map(|fd| kept(OUTPUT, fd)).transpose()?;
                if let Some(input) = &input {
                    // For the machine that is booted here after a reset: what this process was started with was its channel.
                    rustix::stdio::dup2_stdin(input).map_err(|e| SerialError::os("taking standard input")(e.into()))?;
                }
                Self::streams(input, output, escape, registry)
            }
            SerialTarget::File(path) => {
                let wrap = |source| SerialError::Path { what: "creating", path: path.clone(), source };
                let file = kept(OUTPUT, File::create(path).map_err(wrap)?.into())?;
                Self::streams(None, Some(file), None, registry)
            }
            SerialTarget::Stdio => {
                // Duplicates: closing them leaves the process's own open.
                let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map_err(SerialError::os("taking standard I/O"));
                // A closed standard input is no input, nor is the terminal to a job in the background.
                let input = own(io::stdin().as_fd()).ok().filter(is_ours).map(|fd| kept(INPUT, fd)).transpose()?;
                let output = kept(OUTPUT, own(io::stdout().as_fd())?)?;
                Self::streams(input, Some(output), escape, registry)
            }
        }
    }

    /// Two streams; if the first is a terminal, it is switched to raw mode.
    pub fn streams(
        input: Option<Arc<OwnedFd>>,
        output: Option<Arc<OwnedFd>>,
        escape: Option<EscapeHandler>,
        registry: &Arc<Registry>,
    ) -> Result<Self, SerialError> {
        let raw = match &input {
            Some(fd) => RawMode::enter(fd, registry).map_err(SerialError::os("switching the terminal to raw mode"))?,
            None => {
                RawMode::forget(registry);
                None
            }
        };
        let filter = raw.is_some().then(|| EscapeFilter::new(escape));
        Ok(Endpoint::Streams { input, output, filter, _raw: raw })
    }

    /// Whether the first half of a way out was typed.
    pub fn escaping(&mut self) -> Option<&mut bool> {
        match self {
            Self::Streams { filter: Some(filter), .. } => Some(&mut filter.armed),
            _ => None,
        }
    }
}
