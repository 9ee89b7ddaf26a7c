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

use std::sync::atomic::{AtomicU8, Ordering};

use wherry_state::{Section, UnitError};

/// Refuses a second restore, and one after the start: either would put old state over new.
#[derive(Debug, Default)]
pub(crate) struct Once(AtomicU8);

impl Once {
    const NEW: u8 = 0;
    const RESTORED: u8 = 1;
    const STARTED: u8 = 2;

    /// Called first in every `restore`.
    pub(crate) fn restoring(&self) -> Result<(), UnitError> {
        match self.0.compare_exchange(Self::NEW, Self::RESTORED, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Ok(()),
            Err(Self::RESTORED) => Err(UnitError::failed("its state was restored before")),
            Err(_) => Err(UnitError::failed("it runs already; its state can only be restored before the first start")),
        }
    }

    /// Called in every `start`.
    pub(crate) fn started(&self) {
        self.0.store(Self::STARTED, Ordering::Release);
    }
}

/// An error of a KVM call, for a unit.
pub(crate) fn kvm(what: &'static str) -> impl FnOnce(vmm_sys_util::errno::Error) -> UnitError {
    move |e| UnitError::failed(format!("{what}: {e}"))
}

/// State that has the right form but cannot be meant.
pub(crate) fn bad(section: &Section, reason: impl Into<String>) -> UnitError {
    wherry_state::StateError::Decode { unit: section.id(), reason: reason.into() }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_is_restored_once_and_before_the_start() {
        let once = Once::default();
        once.restoring().unwrap();
        assert!(once.restoring().unwrap_err().to_string().contains("before"));
        let once = Once::default();
        once.started();
        assert!(once.restoring().unwrap_err().to_string().contains("runs already"));
    }
}
