//! The journey of a running VM from one process to the next on the same host: live update.
//!
//! - [`hand_over`]: the old process.
//! - [`take_over`]: the new one.
//! - [`hand_over_by_exec`], [`take_over_executed`]: the same, where the new program is executed in the old process.
//! - [`message`]: what they say to each other.
//!
//! No page moves, and no descriptor is opened again: the memory and all that the devices are connected to go over as they are
//! ([`wherry_handover`]). So all that takes time is done before the guest stops, and what is left is to stop, save, load and start.
//!
//! ```text
//!   old process                                             new process
//!     |<------------------------------------------ Hello ------|
//!     |---- Describe: the machine, the word, the memory ------>|
//!     |---- Kept: what its devices are connected to ---------->|  builds the machine with them
//!     |<---------------------------------- Built | Refused ----|
//!   drains its devices
//!     |---- Poise -------------------------------------------->|  waits without sleeping
//!   stops; blackout begins
//!     |---- Kept, Gone: what has changed since --------------->|
//!   word: OFFERED
//!     |---- State -------------------------------------------->|  restores
//!     |                                                        |  word: RUNS; starts; blackout is over
//!     |<------------------------------------------ Running ----|
//!   ends, and lets go of nothing by itself
//! ```
//!
//! Contract: who runs is decided by the word alone ([`wherry_handover::RunWord`]). Until the new process has swapped it, any failure
//! of either side leaves the VM with the old process, as if nothing had happened; if that one has died, the VM has died with it,
//! unless the whole state had been passed: then the new process runs it. After the swap the old process never runs it again.

mod exec;
pub mod message;
mod new;
mod old;

use std::sync::Arc;
use std::time::Duration;

use wherry_handover::{ChannelError, Registry};

use crate::error::Cause;
use crate::machine::{Machine, MachineDescription, Refusal};

pub use exec::hand_over_by_exec;
pub use new::{take_over, take_over_executed};
pub use old::{HandOver, hand_over};

/// How long each step may take.
#[derive(Clone, Debug)]
pub struct UpdateOptions {
    /// For the new process to say the first word.
    pub hello: Duration,
    /// For it to build the machine.
    pub build: Duration,
    /// For I/O to drain, before the blackout.
    pub drain: Duration,
    /// For all sharers to come to rest.
    pub stop: Duration,
    /// For the new process to load the state and to run. The guest stands still that long when it hangs.
    pub load: Duration,
}

impl Default for UpdateOptions {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { hello: seconds(10), build: seconds(60), drain: seconds(5), stop: seconds(5), load: seconds(5) }
    }
}

/// A machine whose process can be replaced under it.
pub trait Keep: Machine {
    /// The descriptors that go over, but for its RAM.
    fn registry(&self) -> &Arc<Registry>;

    /// What of it cannot be kept, each with what would lift that; empty if all can. Asked before anything begins.
    fn cannot_keep(&self) -> Vec<String>;
}

/// Whether the machine's process can be replaced now: before a new one is started, and once more when it is there.
pub fn check(machine: &(impl Keep + ?Sized)) -> Result<(), UpdateError> {
    check_cause(machine).map_err(UpdateError::RunsHere)
}

fn check_cause(machine: &(impl Keep + ?Sized)) -> Result<(), Cause> {
    let mut reasons = machine.cannot_keep();
    if crate::destination::has_witness() {
        reasons.push(
            "the news that it has come here: its source may not know yet, and only this process can tell it; wait until the \
             source has asked, or for ten minutes"
                .into(),
        );
    }
    if reasons.is_empty() { Ok(()) } else { Err(Cause::CannotKeep(reasons)) }
}

/// Builds the machine in the new process.
pub trait Successor {
    /// Builds it as described, with the descriptors that have come: its RAM is `ram`, by number of the block. What nobody claims is
    /// refused by whoever calls this. `host` is what the old process said beside the machine.
    fn build(
        &self,
        description: &MachineDescription,
        registry: &Arc<Registry>,
        host: &[u8],
    ) -> Result<Arc<dyn Machine>, Refusal>;
}

/// Name of the descriptors of RAM.
pub const RAM: &str = "ram";
/// Name of the descriptor of the word that decides who runs.
pub(crate) const WORD: &str = "run-word";
/// There is one attempt for each word.
pub(crate) const ATTEMPT: u32 = 1;

/// An update that did not replace the process. Each variant says where the VM is now.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// Old process: it failed, and the VM runs on in it (or is paused, if it was).
    #[error("the update failed and the VM runs on as before: {0}")]
    RunsHere(#[source] Cause),
    /// Old process: cancelled, and the VM runs on in it.
    #[error("the update was cancelled; the VM runs on as before")]
    Cancelled,
    /// Either: the new one cannot run the machine. The VM runs on in the old one.
    #[error("the new process refused the VM: {}", .0.join("; "))]
    Refused(Vec<String>),
    /// Old process: it failed, and the VM could not be started again.
    #[error("the update failed ({cause}) and the VM could not be started again: {undo}")]
    Stuck {
        /// Why the update failed.
        cause: Box<Cause>,
        /// Why the undo failed.
        undo: String,
    },
    /// Old process: the VM went over, or nobody can say whether it did, and the new process has failed.
    #[error("the VM is lost: {0}")]
    Lost(String),
    /// New process: nothing runs in it.
    #[error("taking over failed, and nothing runs here: {0}")]
    NotHere(#[source] Cause),
}

impl From<ChannelError> for Cause {
    fn from(error: ChannelError) -> Self {
        Self::Handover(error.to_string())
    }
}
