//! vfio-user: a PCI device that another process emulates, reached over a UNIX socket.
//!
//! Both halves of the protocol are here, and nothing else of Wherry is needed for them:
//!
//! - [`Client`] is the side of the VMM. Every request has a deadline; what comes back is checked before it is used. What the
//!   device asks for meanwhile (DMA by message) is served by a [`DmaHandler`] on a thread of the client.
//! - [`Server`] is the side of the device: it takes one client after the other, and drives a [`Device`]. A client may send what
//!   it likes: the server answers with an error or gives that client up, and the device keeps its state. A device reaches the
//!   client's memory and interrupts through its [`Bus`], from any thread.
//! - [`message`] and [`payload`] are the messages as bytes, [`capabilities`] is what the two agree on at the start.
//!
//! ```text
//!   client                                              server
//!     | VERSION, capabilities ------------------------->  |   its capabilities, perhaps a twin socket
//!     | DMA_MAP, a descriptor ------------------------->  |   maps the client's memory
//!     | GET_INFO, GET_REGION_INFO, GET_IRQ_INFO ------->  |   descriptors of regions that can be mapped
//!     | SET_IRQS, eventfds ---------------------------->  |
//!     | REGION_READ, REGION_WRITE --------------------->  |   the device
//!     |  <----------------- DMA_READ, DMA_WRITE           |   where memory came without a descriptor: on the twin socket,
//!     |                                                   |   or on this one, between a request and its reply
//! ```
//!
//! The protocol is QEMU's document "vfio-user Protocol Specification" (docs/interop/vfio-user.rst), version 0.1 as
//! libvfio-user speaks it; structures and numbers are those of `linux/vfio.h`. What differs between the document and its peers, and
//! our extensions, are in docs/vfio-user.md.
#![forbid(unsafe_code)]

pub mod capabilities;
pub mod client;
pub mod error;
mod link;
pub mod message;
pub mod payload;
pub mod server;
pub mod states;

pub use client::{Client, DmaHandler, Options};
pub use error::VfioUserError;
pub use server::{Bus, Description, Device, Image, Migration, Server, Stop};
pub use states::State;
