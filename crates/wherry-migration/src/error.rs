//! How a journey can end without the VM having moved.

use std::io;
use std::time::Duration;

use wherry_memory::{DirtyError, MemoryError};
use wherry_state::UnitsError;
use wherry_stream::StreamError;

/// The end of a journey that did not bring the VM to the other side. Each variant says where the VM is now.
#[derive(Debug, thiserror::Error)]
pub enum JourneyError {
    /// Source: it failed, and the VM runs on here (or is paused, if it was).
    #[error("the migration failed and the VM runs on here: {0}")]
    RunsHere(#[source] Cause),
    /// Source: cancelled, and the VM runs on here.
    #[error("the migration was cancelled; the VM runs on here")]
    Cancelled,
    /// Both ends: the destination cannot run the machine. At the source the VM runs on.
    #[error("the destination refused the VM: {}", .0.join("; "))]
    Refused(Vec<String>),
    /// Destination: it failed; nothing runs here.
    #[error("the incoming migration failed and nothing runs here: {0}")]
    NotHere(#[source] Cause),
    /// Either end: the VM was given away, or may have been, and nobody could say whether the other side has it. It does
    /// not run here and must not be started here unless the other side is known to be dead or fenced.
    #[error(
        "in doubt: {0}. Ask again, or decide with `resolve --as source|destination` when the other side is known to be dead"
    )]
    InDoubt(#[source] Cause),
    /// Either end: the VM runs at the destination and lacks pages, and the link is gone. At the source it is at rest for
    /// good, and its memory is what the destination lacks.
    #[error("paused: the VM runs at the destination without some of its memory: {0}")]
    Paused(#[source] Cause),
    /// Either end: the VM ran at the destination without some of its memory, and what it lacked is gone, or it is.
    #[error("the VM is lost: {0}")]
    Lost(#[source] Cause),
    /// Source: it failed, and the VM could not be started again here.
    #[error("the migration failed ({cause}) and the VM could not be started again here: {undo}")]
    Stuck {
        /// Why the migration failed.
        cause: Box<Cause>,
        /// Why the undo failed.
        undo: String,
    },
}

/// Why a journey failed.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// The connection, or what came over it.
    #[error("{doing}: {source}")]
    Stream {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        source: StreamError,
    },
    /// The guest's faults cannot be served.
    #[error("serving page faults: {0}")]
    Faults(String),
    /// The peer did nothing for too long.
    #[error("the {peer} was silent for {waited:?} while it was to {what}")]
    Silent {
        /// `source` or `destination`.
        peer: &'static str,
        /// What was waited for.
        what: &'static str,
        /// How long.
        waited: Duration,
    },
    /// The peer gave up and said why.
    #[error("the {peer} gave up: {reason}")]
    Peer {
        /// `source` or `destination`.
        peer: &'static str,
        /// Its reason.
        reason: String,
    },
    /// The peer said something that makes no sense there.
    #[error("the {peer} broke the protocol: {what}")]
    Protocol {
        /// `source` or `destination`.
        peer: &'static str,
        /// What was wrong.
        what: String,
    },
    /// The destination cannot run the machine.
    #[error("the destination refused: {}", .0.join("; "))]
    Refused(Vec<String>),
    /// The machine has something that cannot be moved.
    #[error("the VM cannot be moved: {}", .0.join("; "))]
    Blocked(Vec<String>),
    /// The machine has something that cannot be kept over an update.
    #[error("the VM cannot be kept over an update: {}", .0.join("; "))]
    CannotKeep(Vec<String>),
    /// What one process hands over to the next.
    #[error("{0}")]
    Handover(String),
    /// This side was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A dirty source failed twice.
    #[error("what the guest writes cannot be known: {0}")]
    Dirty(#[from] DirtyError),
    /// State units.
    #[error(transparent)]
    Units(#[from] UnitsError),
    /// A unit with a stream did not give or take its state.
    #[error("unit {unit}: {source}")]
    Unit {
        /// The unit, and what it is called.
        unit: String,
        /// Why not.
        source: wherry_state::UnitError,
    },
    /// The machine, outside its units.
    #[error("{doing}: {source}")]
    Machine {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        source: crate::machine::MachineError,
    },
    /// Precopy did not converge.
    #[error(
        "precopy did not converge within {deadline:?}: after {rounds} rounds the blackout would be {predicted:?}, the \
         limit is {limit:?}. Raise --downtime-limit, or give it more bandwidth"
    )]
    NotConverged {
        /// The deadline.
        deadline: Duration,
        /// Rounds made.
        rounds: u32,
        /// Predicted blackout.
        predicted: Duration,
        /// The limit.
        limit: Duration,
    },
    /// The guest wrote too much at the stop, too often.
    #[error("the guest wrote {pages} pages around the stop where {predicted} were predicted, for the fourth time")]
    Surprised {
        /// Pages.
        pages: u64,
        /// Pages predicted.
        predicted: u64,
    },
    /// What arrived is not what was sent.
    #[error("the {what} did not arrive as sent: {detail}")]
    Corrupt {
        /// `state`, `memory`, ...
        what: &'static str,
        /// Where it differs.
        detail: String,
    },
    /// An option that this version or this value does not allow.
    #[error("{0}")]
    Option(String),
    /// The kernel.
    #[error("{doing}: {source}")]
    Os {
        /// What was being done.
        doing: &'static str,
        /// Why the kernel refused.
        source: io::Error,
    },
    /// The ownership record.
    #[error("ownership: {0}")]
    Ownership(String),
    /// A thread of the engine ended in a way that is a bug.
    #[error("engine thread {0} panicked; this is a bug in Wherry")]
    Panicked(String),
    /// Postcopy that can never be finished.
    #[error("{0}")]
    Lost(String),
    /// The link is given up for another one, as the user wished.
    #[error("a new link was asked for")]
    Recover,
    /// The VM has ended while its memory followed.
    #[error("the VM has ended: {0}")]
    VmEnded(String),
    /// Decided by `resolve`.
    #[error("resolved by hand: the VM belongs to the {0}")]
    Resolved(&'static str),
}

impl Cause {
    pub(crate) fn unit(stream: &dyn wherry_state::StateStream, source: wherry_state::UnitError) -> Self {
        Self::Unit { unit: format!("{} ({})", stream.id(), stream.name()), source }
    }
}
