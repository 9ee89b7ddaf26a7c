//! What can go wrong between the two halves. Every error names the peer, and what it was asked for.

use std::time::Duration;

use rustix::io::Errno;

/// Something went wrong between a client and a server.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VfioUserError {
    /// Nobody listens there, or not to us.
    #[error("connecting to the vfio-user server at {peer}: {source}")]
    Connect {
        /// The socket.
        peer: String,
        /// Why.
        source: Errno,
    },
    /// The socket failed.
    #[error("vfio-user, {peer}: {what}: {source}")]
    Socket {
        /// The other side.
        peer: String,
        /// What was being done.
        what: String,
        /// Why it failed.
        source: Errno,
    },
    /// The connection is closed.
    #[error("vfio-user, {peer}: the connection was closed at {what}")]
    Closed {
        /// The other side.
        peer: String,
        /// What was being done.
        what: String,
    },
    /// It does not answer.
    #[error("vfio-user, {peer}: no answer to {what} within {limit:?}")]
    Deadline {
        /// The other side.
        peer: String,
        /// What it was asked.
        what: String,
        /// How long it had.
        limit: Duration,
    },
    /// It says what the protocol does not allow.
    #[error("vfio-user, {peer}: {what}: {reason}")]
    Protocol {
        /// The other side.
        peer: String,
        /// What it was asked, or what it sent.
        what: String,
        /// What was wrong.
        reason: String,
    },
    /// It answered with an error.
    #[error("vfio-user, {peer}: it refused {what}: {source}")]
    Refused {
        /// The other side.
        peer: String,
        /// What it was asked.
        what: String,
        /// Its reason. `EIO` if it gave none.
        source: Errno,
    },
    /// What another process has left of a connection cannot be used.
    #[error("vfio-user, {peer}, as another process left it: {reason}")]
    Inherited {
        /// The other side.
        peer: String,
        /// What is wrong.
        reason: String,
    },
    /// What was asked for is not possible with this peer; it was not sent.
    #[error("vfio-user, {peer}: {reason}")]
    Lacks {
        /// The other side.
        peer: String,
        /// Why not.
        reason: String,
    },
}

impl VfioUserError {
    /// The error number of a refusal.
    pub fn refused_with(&self) -> Option<Errno> {
        match self {
            Self::Refused { source, .. } => Some(*source),
            _ => None,
        }
    }
}
