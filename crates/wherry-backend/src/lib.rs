//! Back ends of vhost-user: processes that serve the rings of a virtio device for the VMM of another process.
//!
//! - [`Server`] listens, and serves one front end after the other; [`serve`] serves one over a socket that is connected.
//! - [`Device`] is what a device implements; [`RingGiven`] is a ring that it is to serve, [`Driver`] how the guest is told.
//! - [`InFlight`] notes which requests are under way, in memory that the front end keeps: a process that takes over goes on
//!   with them.
//! - [`kept`]: how another process goes on with a front end that stays connected; `saved` is what it is told.
//! - `wire` are messages, `payload` what is in them, `session` what they do, `memory` guest memory, `log` what was written to it, `faults` how memory
//!   is used that is not there yet, `state` how the state of a device travels.
//!
//! Everything of the protocol that concerns a device of this kind is here: tables and slots of memory, the dirty log, which is
//! switched on and off and covers regions that come later, requests under way, the state of the device, and postcopy with
//! `LISTEN` before or after the first memory. The protocol is that of QEMU's document "Vhost-user Protocol".
//!
//! Contract: what a front end sends is checked before it is used. One that breaks a rule is told so where the protocol has an
//! answer, and loses its connection where it has none; the log says why. The next one is served then. A device touches guest
//! memory only between [`Device::serve`] and the end of [`Device::rest`].

mod channel;
mod device;
mod error;
mod faults;
mod features;
mod inflight;
pub mod kept;
mod log;
mod memory;
mod payload;
mod saved;
mod server;
mod session;
mod state;
mod wire;

pub use device::{Device, Driver, RingGiven};
pub use error::BackendError;
pub use inflight::InFlight;
pub use server::{Server, serve};
