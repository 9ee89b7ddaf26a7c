//! Somebody both sides can ask.
//!
//! Two hosts alone cannot tell a dead peer from a cut link: that is what in doubt means. With a store that both reach,
//! the commit becomes one transaction there, on (owner, epoch, phase), and in doubt lasts as long as the store is out of
//! reach. The epoch is the fencing token; a lease alone excludes nobody.
//!
//! [`NoArbiter`] is the only one there is. A driver that has one calls [`Arbiter::commit`] where the run is recorded
//! (after the local record, so that a restart knows to ask), and feeds a [`Verdict`] that belongs to a
//! side as a resolution: what an operator asserts, an arbiter knows.

use super::Attempt;
use crate::Side;

/// What an arbiter knows of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// It belongs to that side, for good.
    Belongs(Side),
    /// It has not been decided, or the arbiter does not decide such things.
    Undecided,
}

/// The arbiter could not be asked.
#[derive(Debug, thiserror::Error)]
#[error("asking the arbiter about {attempt}: {source}")]
pub struct ArbiterError {
    /// What was asked about.
    pub attempt: Attempt,
    /// Why there is no answer.
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// Decides for both sides. All calls may block; each has a deadline of its own.
pub trait Arbiter: Send + Sync {
    /// The source gives the VM to the destination. `Belongs(Destination)`: done, at latest by this call.
    /// `Belongs(Source)`: it was taken back before (by a resolution), and the source resumes. `Undecided`: there is no
    /// arbiter, and the local record alone is the point of no return. An error leaves the source in doubt.
    fn commit(&self, attempt: &Attempt) -> Result<Verdict, ArbiterError>;

    /// What has become of the attempt.
    fn verdict(&self, attempt: &Attempt) -> Result<Verdict, ArbiterError>;
}

/// Two hosts and nobody else.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoArbiter;

impl Arbiter for NoArbiter {
    fn commit(&self, _: &Attempt) -> Result<Verdict, ArbiterError> {
        Ok(Verdict::Undecided)
    }

    fn verdict(&self, _: &Attempt) -> Result<Verdict, ArbiterError> {
        Ok(Verdict::Undecided)
    }
}
