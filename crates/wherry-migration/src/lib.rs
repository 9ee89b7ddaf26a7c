//! The journey of a running VM from one process to another.
//!
//! - [`machine`]: what a VMM gives to the engine; the engine knows no KVM.
//! - [`source::send`](source) and [`destination::receive`](destination): the two ends.
//! - [`Journey`]: the handle that the VMM's API holds meanwhile: cancel, settings, events, the job.
//! - [`progress`]: what the engine tells while it works and at the end, in libvirt's job vocabulary.
//! - [`SourceOptions`], [`DestinationOptions`], [`JourneyError`].
//! - [`testpoint`]: where tests can hold a journey.

mod error;
mod journey;
pub mod machine;
mod options;
pub mod progress;
pub mod testpoint;

pub use error::{Cause, JourneyError};
pub use journey::{Event, EventKind, Journey, Side};
pub use options::{DestinationOptions, MAX_CHANNELS, Mode, SourceOptions, Surprise, Timeouts, default_records};
