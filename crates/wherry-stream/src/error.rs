//! What can go wrong on a channel.

use std::io;
use std::time::Duration;

use crate::{FrameError, HelloError, TlsError};

/// A channel cannot be used any more. Each variant names the channel and says what was being done.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// No connection could be made.
    #[error("cannot connect to {endpoint}: {reason}")]
    Connect {
        /// Where to.
        endpoint: String,
        /// Why not, and what to try.
        reason: String,
        /// The system's answer, if it gave one.
        source: Option<io::Error>,
    },
    /// The listener cannot be made.
    #[error("cannot listen on {endpoint}: {reason}")]
    Listen {
        /// Where.
        endpoint: String,
        /// Why not, and what to try.
        reason: String,
        /// The system's answer, if it gave one.
        source: Option<io::Error>,
    },
    /// Nobody came in time.
    #[error("nobody connected to {endpoint} within {waited:.1?}")]
    NobodyCame {
        /// Where it listened.
        endpoint: String,
        /// For how long.
        waited: Duration,
    },
    /// The system reported a failure.
    #[error("{channel}: {doing} failed: {source}")]
    Io {
        /// The channel.
        channel: String,
        /// What was being done.
        doing: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The peer moved no byte for as long as the idle limit, or the deadline of the operation has passed.
    #[error("{channel}: peer silent for {:.1} s while {doing}", .waited.as_secs_f64())]
    Silent {
        /// The channel.
        channel: String,
        /// What was being done.
        doing: &'static str,
        /// How long nothing moved.
        waited: Duration,
    },
    /// The deadline of the operation has passed although bytes were still moving.
    #[error("{channel}: not finished by its deadline: {doing}")]
    Deadline {
        /// The channel.
        channel: String,
        /// What was being done.
        doing: &'static str,
    },
    /// The peer closed the connection.
    #[error("{channel}: peer closed the connection {}", if *.between_frames { "between frames".to_owned() } else { format!("while {doing}") })]
    PeerClosed {
        /// The channel.
        channel: String,
        /// What was being done.
        doing: &'static str,
        /// Nothing was cut off: the stream ended after a whole frame.
        between_frames: bool,
    },
    /// This side closed the channel by its [`Closer`](crate::Closer).
    #[error("{channel}: closed by this side")]
    Cancelled {
        /// The channel.
        channel: String,
    },
    /// The peer has not proved itself, or this side cannot.
    #[error("{channel}: {source}")]
    Tls {
        /// The channel.
        channel: String,
        /// What was wrong.
        source: TlsError,
    },
    /// The peer is not one to talk to.
    #[error("{channel}: {source}")]
    Hello {
        /// The channel.
        channel: String,
        /// What was wrong with its first bytes.
        source: HelloError,
    },
    /// The peer sent a frame that cannot be.
    #[error("{channel}: {source}")]
    Frame {
        /// The channel.
        channel: String,
        /// What was wrong with it.
        source: FrameError,
    },
    /// This side used the channel wrongly; nothing was sent.
    #[error("{channel}: {what}")]
    Misuse {
        /// The channel.
        channel: String,
        /// What the caller did.
        what: &'static str,
    },
}

impl StreamError {
    /// Whether the error is this side's own doing by a [`Closer`](crate::Closer).
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Cancelled { .. })
    }

    /// Whether the link was lost or went silent, as opposed to a peer that spoke wrongly: a new connection may help.
    pub fn is_link_lost(&self) -> bool {
        matches!(self, Self::Io { .. } | Self::Silent { .. } | Self::Deadline { .. } | Self::PeerClosed { .. })
    }
}
