//! Who owns the VM: the two-phase hand-over between a source and a destination that may both crash, over a network that
//! may lose, repeat and delay whatever it carries.
//!
//! [`SourceOwner`] and [`DestinationOwner`] are pure: no I/O, no clock, no randomness. `step(input)` takes one thing that
//! happened and returns what must be done about it, in order. The model in `tests/ownership_model.rs` checks these very
//! types: never two running; never none that can run while a complete copy is left.
//!
//! ```text
//!   source                                              destination
//!     | Begin: intent recorded                             | Begin: intent recorded
//!     | ================ memory, rounds ================== |
//!     | Stopped; Offer                                  -> |  loads everything
//!     |  <- Ready                                          |  keeps its state from here on, whatever happens
//!     | releases the locks, RECORDS THE RUN                |
//!     |  = the point of no return =                        |
//!     | Run                                             -> |  takes the locks, records, starts
//!     |  <- Running     (or NotRun: it promises never to)  |
//!     | gives up its copy; Confirm                      -> |  forgets its record
//!     |                                                    |
//!     | Query (in doubt, on any new connection)         -> |
//!     |  <- Ready | Running | NotRun | Aborted | Unknown   |  its last word; Unknown decides nothing
//!     | Abort (only while no run is recorded)           -> |  discards its copy
//!     |  <- Aborted                                        |
//! ```
//!
//! # For the engine
//!
//! Use [`SourceDriver`] and [`DestinationDriver`]: they hold an owner and its [`Claim`](crate::records::Claim) (the
//! record file and its lock), write and remove the records, and call your [`SourceHost`] or [`DestinationHost`] for the
//! rest. Feed every message, timeout and loss of the link as it happens:
//!
//! ```text
//! let records = Records::open(&options.records)?;
//! let claim = records.claim(vm, Side::Source)?;                        // refused while another process holds it
//! let mut owner = SourceDriver::begin(claim, attempt, &peer, &mut host)?;   // records the intent
//!   ... rounds ...; stop everything
//! owner.feed(SourceInput::Stopped, &mut host);
//!   ... last pages; then, with the offer's contents at hand for `host.send(Word::Offer)` ...
//! owner.feed(SourceInput::Offer(Carriage::Whole), &mut host);
//! owner.feed(SourceInput::Message(message), &mut host);                // Ready -> release_locks, record, send(Run)
//! match owner.state() { SourceState::Gone => ..., SourceState::Kept { .. } => ..., SourceState::InDoubt => ... }
//! ```
//!
//! The destination is the same with [`DestinationDriver::begin`]; [`DestinationHost::load`] only *begins* the load (or
//! does it at once), and its end is fed as `Loaded` or `LoadFailed`. Drop the driver, and with it the claim, when
//! [`is_over`](SourceDriver::is_over): another process of the host may then migrate the same VM.
//!
//! A process that starts and finds records of a VM goes on with [`SourceDriver::restarted`] or
//! [`DestinationDriver::restarted`], which hold no VM and only answer, ask and let the operator resolve.
//! [`Records::may_boot`](crate::records::Records::may_boot) is asked before a VM with a known identity is booted.

mod arbiter;
mod destination;
mod driver;
mod id;
mod source;
mod word;

pub use arbiter::{Arbiter, ArbiterError, NoArbiter, Verdict};
pub use destination::{
    DestinationEffect, DestinationInput, DestinationOwner, DestinationRecord, DestinationStage, DestinationState,
};
pub use driver::{BeginError, DestinationDriver, DestinationHost, SourceDriver, SourceHost, StartError};
pub use id::{Attempt, AttemptId, BadAttempt, Carriage, Incarnation, VmId};
pub use source::{SourceEffect, SourceInput, SourceOwner, SourceRecord, SourceStage, SourceState};
pub use word::{Finding, Message, Notice, Word};
