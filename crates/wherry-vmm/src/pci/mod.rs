//! PCI: one root bus, its functions and the ways to their configuration space.
//!
//! - [`PciFunction`] is what a device implements: its configuration space, and its state.
//! - [`ConfigSpace`] is a type 0 header with BARs and capabilities that devices are built from; [`BarMap`] keeps what
//!   the guest does to BARs and the command register in step with whoever answers at those addresses ([`BarTarget`]).
//! - [`PciRoot`] is bus 0: it finds functions, hands out addresses for BARs, and is the state unit `pci-host`.
//! - [`PciPorts`] (ports 0xCF8 to 0xCFF) and [`Ecam`] are how the guest reaches configuration space.
//! - [`host_bridge`] is function 00:00.0.
//!
//! Contract: what a guest writes is hostile. Configuration accesses reach a function in pieces that do not cross an
//! aligned dword. A function's own lock is taken while it maps and unmaps its BARs, so a [`BarTarget`] must not access
//! configuration space. There is no firmware: BARs have addresses from the start, but decoding is off until the guest
//! switches it on.
//!
//! References are to the PCI Local Bus Specification 3.0 and the PCI Express Base Specification 4.0.

mod access;
mod bar;
mod config;
mod function;
mod host_bridge;
mod root;
mod saved;
#[cfg(test)]
mod tests;

pub use access::{Ecam, PciPorts};
pub use bar::{BarMap, BarTarget, BusBar};
pub use config::{BarKind, ConfigError, ConfigSpace, Identity, Written};
pub use function::{FunctionAddress, PciFunction};
pub use host_bridge::HostBridge;
pub use root::{PciError, PciRoot, PciWindows};
#[cfg(test)]
pub(crate) use saved::{SavedFunction, SavedPciHost};
