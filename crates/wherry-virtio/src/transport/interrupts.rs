//! How a device tells its driver: by MSI-X, or by the interrupt status register and the pin.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use wherry_interrupt::{Intx, Vector};
use wherry_pci::Msix;

use super::common::{DRIVER_OK, NEEDS_RESET, NO_VECTOR};

/// Bits of the interrupt status register: a ring, and the configuration.
const ISR_RING: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// What of the transport device threads use. No lock of the transport is taken for it.
pub(super) struct Shared {
    pub(super) msix: Msix,
    pub(super) intx: Intx,
    pub(super) isr: AtomicU8,
    pub(super) status: AtomicU8,
    pub(super) generation: AtomicU8,
    pub(super) config_vector: AtomicU16,
    pub(super) ring_vectors: Vec<AtomicU16>,
    pub(super) name: String,
}

/// How a device tells its driver. Cloning gives another handle.
#[derive(Clone)]
pub struct Interrupts(pub(super) Arc<Shared>);

impl Interrupts {
    /// Something in this ring was used.
    pub fn ring(&self, index: u16) {
        let vector = self.0.ring_vectors.get(usize::from(index)).map_or(NO_VECTOR, |v| v.load(Ordering::Acquire));
        self.interrupt(vector, ISR_RING);
    }

    /// The configuration has changed.
    pub fn configuration(&self) {
        self.0.generation.fetch_add(1, Ordering::AcqRel);
        self.interrupt(self.0.config_vector.load(Ordering::Acquire), ISR_CONFIG);
    }

    /// The driver has broken a rule (section 2.1.2): the device does nothing more until it is reset.
    pub fn broken(&self, why: &dyn std::fmt::Display) {
        self.needs_reset(why, "its driver has broken a rule; the device needs a reset");
    }

    /// The device cannot go on, through no fault of its driver's: it does nothing more until it is reset.
    pub fn failed(&self, why: &dyn std::fmt::Display) {
        self.needs_reset(why, "the device cannot go on; it needs a reset");
    }

    fn needs_reset(&self, why: &dyn std::fmt::Display, what: &str) {
        let before = self.0.status.fetch_or(NEEDS_RESET, Ordering::AcqRel);
        if before & NEEDS_RESET != 0 {
            return;
        }
        tracing::warn!(device = self.0.name, %why, "{what}");
        if before & DRIVER_OK != 0 {
            self.configuration();
        }
    }

    /// The vector of a ring, for a device in another process: it signals one of its eventfds.
    pub fn ring_vector(&self, index: u16) -> Option<Arc<Vector>> {
        let vector = self.0.ring_vectors.get(usize::from(index))?.load(Ordering::Acquire);
        self.0.msix.vector(vector).cloned()
    }

    /// The pin, for whoever waits for the ends of its interrupts: a thread of the device.
    pub fn pin(&self) -> &Intx {
        &self.0.intx
    }

    fn interrupt(&self, vector: u16, isr: u8) {
        if self.0.msix.enabled() {
            if let Some(vector) = self.0.msix.vector(vector) {
                vector.raise();
            }
            return;
        }
        self.0.isr.fetch_or(isr, Ordering::AcqRel);
        if let Err(error) = self.0.intx.set_level(true) {
            tracing::error!(device = self.0.name, %error, "asserting its interrupt pin");
        }
    }
}
