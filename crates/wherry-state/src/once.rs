//! State is restored once, and before the start.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::UnitError;

/// Refuses a second restore, and one after the start: either would put old state over new.
#[derive(Debug, Default)]
pub struct Once(AtomicU8);

impl Once {
    const NEW: u8 = 0;
    const RESTORED: u8 = 1;
    const STARTED: u8 = 2;

    /// Called first in every `restore`.
    pub fn restoring(&self) -> Result<(), UnitError> {
        match self.0.compare_exchange(Self::NEW, Self::RESTORED, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Ok(()),
            Err(Self::RESTORED) => Err(UnitError::failed("its state was restored before")),
            Err(_) => Err(UnitError::failed("it runs already; its state can only be restored before the first start")),
        }
    }

    /// State may still come: neither restored nor started.
    pub fn is_new(&self) -> bool {
        self.0.load(Ordering::Acquire) == Self::NEW
    }

    /// Called in every `start`: true for the first one after a restore.
    pub fn started(&self) -> bool {
        self.0.swap(Self::STARTED, Ordering::AcqRel) == Self::RESTORED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_is_restored_once_and_before_the_start() {
        let once = Once::default();
        assert!(once.is_new());
        once.restoring().unwrap();
        assert!(!once.is_new());
        assert!(once.restoring().unwrap_err().to_string().contains("before"));
        assert!(once.started() && !once.started());
        let once = Once::default();
        assert!(!once.started());
        assert!(once.restoring().unwrap_err().to_string().contains("runs already"));
    }
}
