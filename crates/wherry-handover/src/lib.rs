//! What one process hands over to the one that takes its place on the same host.
//!
//! - [`Registry`]: the descriptors that go over, by name and index. A process that takes over *claims* each of them, or refuses to
//!   start. A [`Shelf`] is what of it belongs to one part of the process.
//! - [`Rest`]: how the thread of a server comes to rest, and what the one in the other process takes.
//! - [`Channel`]: the local socket on which descriptors and state go, in parcels.
//! - [`RunWord`]: the word in shared memory that decides which of the two runs.
//! - [`Urgent`]: a thread that goes before others in the meantime.
//! - [`Launcher`]: a small process that starts the successor, so that one in a sandbox need not.
//!
//! Nothing here knows of a virtual machine: a device process is replaced in the same way. `examples/counter.rs` is a program that
//! replaces itself under its clients.
//!
//! ```text
//!   old process                 launcher                    new process
//!     |  Launcher::launch          |                             |
//!     |--------------------------->|------- starts it ---------->|  its standard input is its end of a Channel
//!     |<-------- pid, pidfd -------|                             |
//!     |  Registry::list: parcels with descriptors                |
//!     |--------------------------------------------------------->|  Registry::arrived, claim, unclaimed
//!     |  RunWord::offer, the state                               |
//!     |--------------------------------------------------------->|  loads it
//!     |                                                          |  RunWord::run: from here on, it runs
//!     |  RunWord::take_back, if that did not happen              |
//! ```
//!
//! Contract: before [`RunWord::run`] everything can be undone, whatever the new process does; after it the old one never runs
//! again. Neither side trusts the other's bytes: all that comes is bounded and checked, and a broken peer is an error that says
//! what was wrong.

mod channel;
mod launcher;
mod registry;
mod rest;
mod shelf;
mod urgent;
mod word;

pub use channel::{Channel, ChannelError, MOST_BODY, MOST_DESCRIPTORS, Parcel};
pub use launcher::{Ended, LaunchError, Launched, Launcher, serve};
pub use registry::{Entry, KeptId, Registry, RegistryError};
pub use rest::{Call, Claim, Copies, Descriptor, Rest, Rested};
pub use shelf::Shelf;
pub use urgent::Urgent;
pub use word::{RunWord, Who, WordError};
