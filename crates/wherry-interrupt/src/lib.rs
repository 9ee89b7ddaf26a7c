//! Interrupts of devices: vectors that are masked, pending and routed as the guest says, and the eventfds that raise them.
//!
//! - [`Router`] is what a hypervisor does: inputs, routes from them to processors, eventfds attached to them.
//! - [`Vector`] is one message-signalled interrupt, and [`Vectors`] all of one function: masks, pending bits, and the two
//!   eventfds of which a device signals one or the other.
//! - [`Intx`] is an interrupt pin: level-triggered, shared, asserted again for as long as the device wants service.
//! - [`ForeignIntx`] is the pin of a device in another process, which only that process knows to be asserted.
//! - [`Events`] is where eventfds come from that others hold, and how they outlive the process.
//! - [`saved`] is what of it is state.
//!
//! **An interrupt is never lost; one too many is harmless.** A vector that cannot be delivered (masked, switched off, no
//! route, at rest) becomes pending, and is delivered when that ends. Devices raise interrupts before they come to rest;
//! then [`Vectors::rest`] detaches every eventfd from the hypervisor, which also finishes deliveries under way, and only
//! then may the state of local APICs be saved. [`Vectors::resume`] attaches them again, after those have been restored.
//!
//! Nothing here knows KVM or PCI.

mod event;
#[cfg(any(test, feature = "testing"))]
pub mod fake;
mod foreign;
mod intx;
mod relay;
mod router;
pub mod saved;
mod vector;
mod vectors;

pub use event::{Event, Events};
pub use foreign::ForeignIntx;
pub use intx::Intx;
pub use router::{Input, InterruptError, Message, Router};
pub use vector::{Setting, Signal, Vector};
pub use vectors::Vectors;
