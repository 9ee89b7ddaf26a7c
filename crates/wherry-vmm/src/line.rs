//! Interrupt lines: what a device pulls on, without knowing who carries the interrupt to the vCPUs.

use std::sync::{Arc, Mutex, PoisonError};

/// A level-triggered interrupt line, such as ACPI's SCI or a PCI INTx pin.
pub trait InterruptLine: Send + Sync {
    /// Asserts or releases the line. Setting the level it has already is harmless; it is done again after a restore,
    /// where the level is not carried.
    fn set_level(&self, asserted: bool);
}

/// A line that several devices pull on: it is asserted as long as one of them asserts it.
pub struct SharedLine {
    line: Arc<dyn InterruptLine>,
    /// A bit for each that asserts it. Held while the line is set, so that its level is that of the last change.
    asserted: Mutex<u32>,
}

/// One device's end of a shared line.
struct Tap {
    shared: Arc<SharedLine>,
    bit: u32,
}

impl SharedLine {
    /// Shares a line.
    pub fn new(line: Arc<dyn InterruptLine>) -> Arc<Self> {
        Arc::new(Self { line, asserted: Mutex::default() })
    }

    /// The end number `number`, 0 to 31. Each device has one of its own.
    pub fn tap(self: &Arc<Self>, number: u32) -> Arc<dyn InterruptLine> {
        Arc::new(Tap { shared: self.clone(), bit: 1 << (number % 32) })
    }
}

impl InterruptLine for Tap {
    fn set_level(&self, asserted: bool) {
        let mut all = self.shared.asserted.lock().unwrap_or_else(PoisonError::into_inner);
        *all = if asserted { *all | self.bit } else { *all & !self.bit };
        self.shared.line.set_level(*all != 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    struct Level(AtomicBool);

    impl InterruptLine for Level {
        fn set_level(&self, asserted: bool) {
            self.0.store(asserted, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_shared_line_is_asserted_as_long_as_one_device_asserts_it() {
        let level = Arc::new(Level(AtomicBool::new(false)));
        let shared = SharedLine::new(level.clone());
        let (one, other) = (shared.tap(0), shared.tap(1));
        let is_asserted = || level.0.load(Ordering::SeqCst);
        one.set_level(true);
        other.set_level(true);
        one.set_level(false);
        assert!(is_asserted());
        one.set_level(false);
        assert!(is_asserted());
        other.set_level(false);
        assert!(!is_asserted());
    }
}
