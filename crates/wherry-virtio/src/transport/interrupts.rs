//! How the transport tells a driver: by MSI-X, or by the interrupt status register and the pin.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use wherry_interrupt::{Intx, Vector};
use wherry_pci::Msix;

use super::common::{DRIVER_OK, NEEDS_RESET, NO_VECTOR};
use crate::device::Driver;

/// Bits of the interrupt status register: a ring, and the configuration.
const ISR_RING: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// What of the transport device threads use, as [`Driver`]. No lock of the transport is taken for it.
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

impl Driver for Shared {
    fn ring(&self, index: u16) {
        let vector = self.ring_vectors.get(usize::from(index)).map_or(NO_VECTOR, |v| v.load(Ordering::Acquire));
        self.interrupt(vector, ISR_RING);
    }

    fn configuration(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.interrupt(self.config_vector.load(Ordering::Acquire), ISR_CONFIG);
    }

    fn needs_reset(&self, what: &str, why: &dyn std::fmt::Display) {
        let before = self.status.fetch_or(NEEDS_RESET, Ordering::AcqRel);
        if before & NEEDS_RESET != 0 {
            return;
        }
        tracing::warn!(device = self.name, %why, "{what}");
        if before & DRIVER_OK != 0 {
            self.configuration();
        }
    }

    fn ring_vector(&self, index: u16) -> Option<Arc<Vector>> {
        let vector = self.ring_vectors.get(usize::from(index))?.load(Ordering::Acquire);
        self.msix.vector(vector).cloned()
    }

    fn pin(&self) -> Option<&Intx> {
        Some(&self.intx)
    }
}

impl Shared {
    fn interrupt(&self, vector: u16, isr: u8) {
        if self.msix.enabled() {
            if let Some(vector) = self.msix.vector(vector) {
                vector.raise();
            }
            return;
        }
        self.isr.fetch_or(isr, Ordering::AcqRel);
        if let Err(error) = self.intx.set_level(true) {
            tracing::error!(device = self.name, %error, "asserting its interrupt pin");
        }
    }
}
