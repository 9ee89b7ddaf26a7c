//! What PCI functions are built from, and the buses on which their registers answer.
//!
//! - [`PciFunction`] is what a device implements: its configuration space, and its state.
//! - [`ConfigSpace`] is a type 0 header with BARs and capabilities; [`BarMap`] keeps what the guest does to BARs and the
//!   command register in step with whoever answers at those addresses ([`BarTarget`]).
//! - [`Msix`] and [`Msi`] are the capabilities by which the guest sets the vectors of
//!   [`wherry_interrupt`]; the interrupt pin is that crate's `Intx`.
//! - [`bus`] is an address space with its devices; [`Doorbells`] is the short way for writes that only ring.
//!
//! Contract: what a guest writes is hostile. Configuration accesses reach a function in pieces that do not cross an
//! aligned dword. A function's own lock is taken while it maps and unmaps its BARs, so a [`BarTarget`] must not access
//! configuration space.
//!
//! References are to the PCI Local Bus Specification 3.0 and the PCI Express Base Specification 4.0. Nothing here knows KVM.

mod bar;
pub mod bus;
mod config;
mod doorbell;
mod function;
mod msi;
mod msix;
pub mod saved;

pub use bar::{BarMap, BarTarget, BusBar};
pub use config::{BarKind, ConfigError, ConfigSpace, Identity, Written};
pub use doorbell::{Doorbell, Doorbells};
pub use function::{FunctionAddress, PciFunction};
pub use msi::{Msi, MsiError, MsiForm};
pub use msix::{Msix, MsixError, MsixPlace};
