//! Virtio 1.3 over PCI: the transport, and devices whose rings this process serves.
//!
//! - [`VirtioPci`] is the transport: a PCI function, the registers in its BAR, and the state unit of its device.
//! - [`Device`] is what a device implements. Its rings may as well be served by another process. Such a process can be made
//!   of a device of this crate: then its [`Driver`] is told over vhost-user, and [`InFlight`] outlives the process.
//! - [`chain`] and [`ring`] are for those who serve rings here; [`worker`] is the thread they do it on.
//! - [`blk`], [`net`], [`console`], [`balloon`] and [`rng`] are devices; [`vhost`] are those that another process serves.
//!
//! Contract: whatever a driver does, the VMM lives on. A driver that breaks a rule finds its device in need of a reset,
//! and the log says which rule. Devices come to rest before their state is saved: what is under way has ended, or is
//! carried and done at the destination; it is never lost, and has its effect once.
//!
//! Section numbers are those of virtio 1.3. Nothing here knows KVM.

// The driver of the tests uses this crate from outside and from inside.
#[cfg(test)]
extern crate self as wherry_virtio;
#[cfg(test)]
#[path = "../tests/support/mod.rs"]
mod support;

pub mod balloon;
pub mod blk;
pub mod chain;
pub mod console;
pub mod device;
pub mod net;
pub mod ring;
pub mod rng;
pub mod saved;
mod transport;
pub mod vhost;
pub mod worker;

pub use device::{Activation, Device, Driver, InFlight, Interrupts, Kind, Position, RingGiven, RingSetup, Serving};
pub use transport::{PciParts, TransportError, VirtioPci};
