//! The journey of a running VM from one process to another.
//!
//! - [`machine`]: what a VMM gives to the engine; the engine knows no KVM.
//! - [`source::send`](source) and [`destination::receive`](destination): the two ends.
//! - [`Journey`]: the handle that the VMM's API holds meanwhile: cancel, settings, events, the job.
//! - [`progress`]: what the engine tells while it works and at the end, in libvirt's job vocabulary.
//! - [`SourceOptions`], [`DestinationOptions`], [`JourneyError`].
//! - [`ownership`]: who has the VM when both sides may crash and the network may lose, repeat and delay; a pure state
//!   machine, model-checked. [`records`]: what a host writes down about it.
//! - [`update`]: the same journey to another process of this host, which keeps the memory and the descriptors.
//! - [`testpoint`]: where tests can hold a journey.

mod bandwidth;
pub mod bench;
pub mod destination;
mod dirty;
pub mod epoch;
mod error;
mod features;
mod figures;
mod journey;
mod link;
pub mod machine;
mod options;
pub mod ownership;
mod predict;
mod priority;
pub mod progress;
pub mod records;
pub mod source;
pub mod testpoint;
pub mod update;
mod verify;
mod zero;

pub use error::{Cause, JourneyError};
pub use journey::{Event, EventKind, Journey, Side};
pub use options::{DestinationOptions, MAX_CHANNELS, Mode, SourceOptions, Surprise, Timeouts, default_records};
