//! What a component with state implements.

use std::fmt;
use std::time::Instant;

use crate::{Section, StateError};

/// Names one unit of a machine.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnitId {
    /// What it is, such as `vcpu`.
    pub name: String,
    /// Which one of that name, from 0.
    pub instance: u32,
}

impl UnitId {
    /// The unit of that name and number.
    pub fn new(name: impl Into<String>, instance: u32) -> Self {
        Self { name: name.into(), instance }
    }
}

impl fmt::Display for UnitId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]", self.name, self.instance)
    }
}

/// What a unit has to say when it is asked to save.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Saved {
    /// Its state.
    Section(Section),
    /// It has no state, and says so: it will be given none.
    Nothing,
}

/// A step of a unit failed.
#[derive(Debug, thiserror::Error)]
pub enum UnitError {
    /// The saved state cannot be taken.
    #[error(transparent)]
    State(#[from] StateError),
    /// The step was not finished at its deadline.
    #[error("not finished at its deadline: {0}")]
    Deadline(String),
    /// Anything else.
    #[error("{0}")]
    Failed(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl UnitError {
    /// Wraps any error, or a message.
    pub fn failed(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        UnitError::Failed(error.into())
    }
}

/// A component with state.
///
/// The order of a stop: `drain` of all units (the machine still runs), `begin_stop` of all units against the order of
/// dependencies, `finish_stop` likewise, then `save`. The order of a start: `restore` along the dependencies, then
/// `start`. After a stop that is undone, `start` is called without `restore`. Every method may be called from any
/// thread, but never two at once. There are no default implementations on purpose: a forgotten one would lose state.
pub trait StateUnit: Send + Sync {
    /// Which unit this is; constant.
    fn id(&self) -> UnitId;

    /// Names of the units that must be restored and started before this one, and stopped after it. Units of a name
    /// that the machine does not have are ignored.
    fn depends_on(&self) -> &[&str];

    /// Newest schema this unit reads, and the one it writes; 0 if it saves nothing. Compared at the handshake.
    fn schema(&self) -> u32;

    /// Completes I/O that is under way, while the vCPUs still run, and takes no new. Not required to end at rest; it
    /// shortens what `finish_stop` has to wait for.
    fn drain(&self, deadline: Instant) -> Result<(), UnitError>;

    /// Takes back a `drain` after which no stop follows.
    fn undrain(&self) -> Result<(), UnitError>;

    /// Tells the unit to come to rest, without waiting for it.
    fn begin_stop(&self) -> Result<(), UnitError>;

    /// Waits until the unit is at rest: it touches neither guest memory nor its own state until `start`.
    fn finish_stop(&self, deadline: Instant) -> Result<(), UnitError>;

    /// Gives its state. Called at rest.
    fn save(&self) -> Result<Saved, UnitError>;

    /// Takes state that `save` gave, on another machine or in an earlier version. Called at rest, once, before the
    /// first `start`.
    fn restore(&self, section: &Section) -> Result<(), UnitError>;

    /// Runs, or runs again.
    fn start(&self) -> Result<(), UnitError>;
}
