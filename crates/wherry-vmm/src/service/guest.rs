//! What the service needs of a machine and of a journey. The real ones are in [`super::kvm`]; tests bring their own.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use wherry_migration::Side;
use wherry_migration::progress::{Job, Phase};
use wherry_stream::Endpoint;

use super::ServiceError;
use crate::api::types::{BalloonInfo, DeviceInfo, Hardware, MigrationRequest, UpdateRequest};

/// Why a guest no longer runs, on its own account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// Its user has left it by its console.
    Quit,
    /// The guest cannot go on (triple fault, shutdown, a vCPU failed); the text says which vCPU and why.
    Crash(String),
}

/// Any error of a machine, for a person.
pub type GuestError = Box<dyn std::error::Error + Send + Sync>;

/// Lists the devices of a machine as they stand, for as long as there is one. Answers at once.
pub type DeviceLister = Arc<dyn Fn() -> Vec<DeviceInfo> + Send + Sync>;

/// A device that a guest was asked to let go.
pub trait Unplugging: Send {
    /// Waits until it is gone. `Err` names it and says why it is not; if the guest has not answered in time, it stays.
    fn wait(self: Box<Self>, limit: Duration) -> Result<DeviceInfo, ServiceError>;
}

/// A machine that the service holds. Dropping it ends it and gives its RAM back.
pub trait Guest: Any + Send {
    /// Its unchanging facts.
    fn hardware(&self) -> Hardware;

    /// Brings all vCPUs to rest by the deadline, or lets them run on and says why.
    fn pause(&mut self, limit: Duration) -> Result<(), GuestError>;

    /// Lets the vCPUs run.
    fn resume(&mut self) -> Result<(), GuestError>;

    /// Whether the user has paused it.
    fn is_paused(&self) -> bool;

    /// How its balloon stands, after asking the guest to be content with so many bytes of RAM, if they are given.
    fn balloon(&mut self, size: Option<u64>) -> Result<BalloonInfo, ServiceError>;

    /// Its devices.
    fn devices(&self) -> DeviceLister;

    /// Plugs a device, given as on the command line. It has it when this returns.
    fn plug(&mut self, device: &str) -> Result<DeviceInfo, ServiceError>;

    /// Asks the guest to let a device go.
    fn unplug(&mut self, name: &str) -> Result<Box<dyn Unplugging>, ServiceError>;

    /// Calls `notify` when the guest ends on its own account, at once if it has. Replaces the one given before.
    fn on_exit(&self, notify: Box<dyn FnOnce(Exit) + Send>);
}

/// A journey that is under way or over, as seen from beside it. All methods answer at once.
pub trait Journey: Send + Sync {
    /// Where it stands.
    fn job(&self) -> Job;

    /// The phases it has been in, in order, each entry as often as it was entered.
    fn phases(&self) -> Vec<Phase>;

    /// Asks it to end with the VM at the source. `Err` says why that is no longer possible.
    fn cancel(&self) -> Result<(), String>;

    /// Decides a journey that is in doubt. `Err` says why it cannot be decided so.
    fn resolve(&self, side: Side) -> Result<(), String>;

    /// Has what is left follow the switch, now. `Err` says why it will not.
    fn switch(&self) -> Result<(), String>;

    /// Source: takes up a link that was lost while memory follows, over another address if one is given. `Err` says why
    /// not.
    fn recover(&self, to: Option<Endpoint>) -> Result<(), String>;

    /// Destination: waits for the source at another place. `Err` says why not.
    fn recover_at(&self, listen: &Endpoint) -> Result<(), String>;

    /// The VM that runs here has ended while its memory follows, and is gone.
    fn vm_ended(&self, why: &str);
}

/// How an outgoing journey ended.
pub enum Sent {
    /// The VM runs at the destination.
    Gone,
    /// The VM is here, in the state it was in before; the journey's job says why.
    Kept(Box<dyn Guest>),
    /// The VM cannot be run here any more.
    Lost {
        /// Why.
        why: String,
        /// Whether it may run at the other end.
        in_doubt: bool,
    },
}

/// How an incoming journey ended.
pub enum Received {
    /// The VM is here.
    Arrived(Box<dyn Guest>),
    /// The VM that has run here for a while has all of its memory now.
    Whole,
    /// It stayed where it was; the text says why. Nothing is left of it here.
    Refused(String),
    /// The VM was ours and could not be run.
    Lost {
        /// Why.
        why: String,
        /// Whether it may run at the other end.
        in_doubt: bool,
    },
}

/// An outgoing journey that is ready to begin.
pub trait Departure: Send {
    /// The view from beside.
    fn journey(&self) -> Arc<dyn Journey>;

    /// Carries the VM away. Blocks until it is decided where the VM is, `in doubt` included.
    fn run(self: Box<Self>, guest: Box<dyn Guest>) -> Sent;
}

/// Starts outgoing journeys.
pub trait Engine: Send + Sync {
    /// Checks the request; the error is for a person.
    fn depart(&self, request: &MigrationRequest) -> Result<Box<dyn Departure>, String>;

    /// Prepares to replace this process; the error is for a person.
    fn update(&self, request: &UpdateRequest) -> Result<Box<dyn Replacement>, String>;
}

/// How an update ended.
pub enum Updated {
    /// The VM is the new process's, and this one is to end.
    Replaced {
        /// The new process.
        pid: u32,
        /// What is wrong with it, if anything is.
        trouble: Option<String>,
    },
    /// The VM is here, in the state it was in before.
    Kept {
        /// It.
        guest: Box<dyn Guest>,
        /// Why.
        why: String,
        /// It cannot be done as the VM is; otherwise it was tried, and failed.
        refused: bool,
    },
    /// The VM cannot be run here any more, nor, as far as is known, there.
    Lost {
        /// Why.
        why: String,
    },
}

/// An update that is ready to begin.
pub trait Replacement: Send {
    /// The view from beside.
    fn journey(&self) -> Arc<dyn Journey>;

    /// Has a new process take the VM over. Blocks until it is decided which of the two has it. `hold` is called with true before the
    /// VM stops: nobody new is served until it is called with false, or this process has ended.
    fn run(self: Box<Self>, guest: Box<dyn Guest>, hold: &dyn Fn(bool)) -> Updated;
}
