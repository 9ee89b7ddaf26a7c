//! State units of the KVM machine: `vcpu` (one for each), `irqchip`, `pit` and `clock`.
//!
//! Saved types stand apart from what the units work with, in a `saved` module each, with numbered fields. Each schema
//! has a golden file in `golden/`.
//!
//! Restore runs along the dependencies: `clock`, `irqchip`, `pit`, the devices, `vcpu`. vCPUs depend on everything, so
//! they stop first and start last.

pub mod clock;
pub mod irqchip;
pub mod pit;
pub mod vcpu;

pub(crate) use wherry_state::Once;
use wherry_state::{Section, UnitError};

/// An error of a KVM call, for a unit.
pub(crate) fn kvm(what: &'static str) -> impl FnOnce(vmm_sys_util::errno::Error) -> UnitError {
    move |e| UnitError::failed(format!("{what}: {e}"))
}

/// State that has the right form but cannot be meant.
pub(crate) fn bad(section: &Section, reason: impl Into<String>) -> UnitError {
    wherry_state::StateError::Decode { unit: section.id(), reason: reason.into() }.into()
}
