//! Interrupt lines: what a device pulls on, without knowing who carries the interrupt to the vCPUs.

/// A level-triggered interrupt line, such as ACPI's SCI or a PCI INTx pin.
pub trait InterruptLine: Send + Sync {
    /// Asserts or releases the line. Setting the level it has already is harmless; it is done again after a restore,
    /// where the level is not carried.
    fn set_level(&self, asserted: bool);
}
