//! PCI: one root bus, its functions and the ways to their configuration space.
//!
//! - [`PciRoot`] is bus 0: it finds functions, hands out addresses for BARs, and is the state unit `pci-host`.
//! - [`PciPorts`] (ports 0xCF8 to 0xCFF) and [`Ecam`] are how the guest reaches configuration space.
//! - [`HostBridge`] is function 00:00.0. What functions are built from is in [`wherry_pci`].
//!
//! Contract: what a guest writes is hostile. There is no firmware: BARs have addresses from the start, but decoding is off
//! until the guest switches it on.
//!
//! References are to the PCI Local Bus Specification 3.0 and the PCI Express Base Specification 4.0.

mod access;
mod host_bridge;
mod root;
mod saved;
#[cfg(test)]
mod tests;

pub use access::{Ecam, PciPorts};
pub use host_bridge::HostBridge;
pub use root::{AssignedBars, PciError, PciRoot, PciWindows};
#[cfg(test)]
pub(crate) use saved::{SavedFunction, SavedPciHost};
