//! What can go wrong between a back end and its front end.

use std::io;

use wherry_socket::SocketError;

/// A back end cannot serve, or not any more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// The socket cannot be listened on.
    #[error(transparent)]
    Listen(#[from] SocketError),
    /// A system call failed.
    #[error("{what}: {source}")]
    Os {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The front end has sent what no front end may.
    #[error("{0}")]
    Protocol(String),
    /// The front end has gone while memory was not all there, and the device waits for a page that will not come: the process
    /// has to end, without waiting for the device.
    #[error("the front end has gone before all memory was there, and the device cannot come to rest: {0}")]
    Abandoned(String),
    /// It was at rest for another process, which did not take over, and cannot go on.
    #[error("serving on, where no other process has: {0}")]
    GoOn(String),
    /// A request that cannot be done, and has no answer that could say so.
    #[error("{request}: {reason}")]
    Refused {
        /// The request.
        request: String,
        /// Why not.
        reason: String,
    },
}

impl BackendError {
    pub(crate) fn os(what: &'static str) -> impl Fn(rustix::io::Errno) -> Self {
        move |source| Self::Os { what, source: source.into() }
    }
}
