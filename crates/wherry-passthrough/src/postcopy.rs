//! A device that takes part in postcopy: its faults are served beside those of the guest.
//!
//! While the destination is built all memory is mapped as if it were there; the device does not touch it before it has all of
//! its state. If memory is to follow then, it is mapped anew: the device makes a userfaultfd, registers what it maps for missing
//! pages before it answers, and says where it has it; then its faults are a source of the service. When all memory is there,
//! the device is told, and is no source any more.

use std::sync::{Arc, Mutex, PoisonError};

use wherry_fault::{FaultService, Mapping, SourceId, Userfault, Way};
use wherry_memory::Ram;

use crate::owner::Owner;

/// Faults of one device.
pub(crate) struct Sharer {
    ram: Arc<Ram>,
    faults: Option<Arc<FaultService>>,
    source: Mutex<Option<SourceId>>,
}

impl Sharer {
    pub(crate) fn new(ram: Arc<Ram>, faults: Option<Arc<FaultService>>) -> Self {
        Self { ram, faults, source: Mutex::new(None) }
    }

    /// The machine's memory.
    pub(crate) fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// Memory may follow, and some of it is missing.
    fn following(&self) -> Option<&Arc<FaultService>> {
        self.faults.as_ref().filter(|faults| faults.has_started() && !faults.is_complete())
    }

    /// Shows a device that is at rest the memory that is not all there, if that is so.
    pub(crate) fn share(&self, owner: &dyn Owner) -> Result<(), String> {
        let Some(faults) = self.following() else { return Ok(()) };
        for block in self.ram.blocks() {
            let spec = block.spec();
            owner.unmap_dma(spec.guest_base, spec.size).map_err(|e| e.to_string())?;
            // It would see pages that are half received, and old ones of precopy.
            faults.set_way(spec.id, Way::Copy).map_err(|e| e.to_string())?;
        }
        let userfault = Userfault::adopt(owner.begin_faults().map_err(|e| e.to_string())?);
        let userfault = userfault.map_err(|e| format!("{}: its userfaultfd: {e}", owner.name()))?;
        let map = |block: &Arc<wherry_memory::Block>| {
            let spec = block.spec();
            let base = owner.map_missing(spec.guest_base, spec.size, block, 0).map_err(|e| e.to_string())?;
            Ok(Mapping { base, len: spec.size, block: spec.id, offset: 0 })
        };
        let mappings = self.ram.blocks().iter().map(map).collect::<Result<Vec<_>, String>>()?;
        let source = faults.add_source(owner.name(), userfault, mappings).map_err(|e| e.to_string())?;
        *self.source.lock().unwrap_or_else(PoisonError::into_inner) = Some(source);
        Ok(())
    }

    /// Whether the device's faults are served now.
    pub(crate) fn is_sharing(&self) -> bool {
        self.source.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Tells the device when all memory is there.
    pub(crate) fn look(&self, owner: &dyn Owner) {
        let Some(faults) = self.faults.as_ref().filter(|faults| faults.is_complete()) else { return };
        let Some(source) = self.source.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        if let Err(error) = owner.end_faults() {
            tracing::warn!(%error, "telling a device that all memory is there");
        }
        let _ = faults.remove_source(source);
    }

    /// The device has gone, or is let go.
    pub(crate) fn end(&self) {
        let source = self.source.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let (Some(faults), Some(source)) = (&self.faults, source) {
            let _ = faults.remove_source(source);
        }
    }
}
