//! What the outside of the port can be.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use wherry_socket::SocketFile;

use super::terminal::{EscapeFilter, RawMode, is_ours};
use super::{EscapeHandler, SerialError};
use crate::config::SerialTarget;

/// The outside. All reads and writes are made after `poll` said that they do not block.
pub(super) enum Endpoint {
    /// Two streams, and the terminal they may be.
    Streams {
        /// Gone when its end was read.
        input: Option<OwnedFd>,
        /// Gone when nobody reads it any more.
        output: Option<OwnedFd>,
        /// Filters what is typed at a terminal.
        filter: Option<EscapeFilter>,
        /// Puts the terminal back when it is dropped.
        _raw: Option<RawMode>,
    },
    /// A listening socket and the client that came last.
    Socket {
        /// The socket.
        listener: UnixListener,
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
    pub stream: UnixStream,
    /// It may still send.
    pub sends: bool,
}

impl Endpoint {
    /// Opens what the user chose.
    pub fn open(target: &SerialTarget, escape: Option<EscapeHandler>) -> Result<Self, SerialError> {
        match target {
            SerialTarget::Null => Ok(Endpoint::Null),
            SerialTarget::File(path) => {
                let wrap = |source| SerialError::Path { what: "creating", path: path.clone(), source };
                Ok(Self::streams(None, Some(File::create(path).map_err(wrap)?.into()), None)?)
            }
            SerialTarget::Socket(path) => {
                let (listener, file) = SocketFile::bind(path)?;
                listener.set_nonblocking(true).map_err(SerialError::os("listening"))?;
                Ok(Endpoint::Socket { listener, _file: file, client: None })
            }
            SerialTarget::Stdio => {
                // Duplicates: closing them leaves the process's own open.
                let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map_err(SerialError::os("taking standard I/O"));
                // A closed standard input is no input, nor is the terminal to a job in the background.
                let input = own(io::stdin().as_fd()).ok().filter(is_ours);
                Self::streams(input, Some(own(io::stdout().as_fd())?), escape)
            }
        }
    }

    /// Two streams; if the first is a terminal, it is switched to raw mode.
    pub fn streams(
        input: Option<OwnedFd>,
        output: Option<OwnedFd>,
        escape: Option<EscapeHandler>,
    ) -> Result<Self, SerialError> {
        let raw = match &input {
            Some(fd) => RawMode::enter(fd).map_err(SerialError::os("switching the terminal to raw mode"))?,
            None => None,
        };
        let filter = raw.is_some().then(|| EscapeFilter::new(escape));
        Ok(Endpoint::Streams { input, output, filter, _raw: raw })
    }
}
