//! Function 00:00.0, which says that there is a PCI host.

use std::sync::{Mutex, MutexGuard, PoisonError};

use wherry_pci::{ConfigSpace, Identity, PciFunction};

/// A host bridge without registers of its own. It has the IDs of a generic PCI Express host bridge, so that no guest
/// expects a chip set.
pub struct HostBridge(Mutex<ConfigSpace>);

impl HostBridge {
    /// The bridge.
    #[expect(clippy::new_without_default, reason = "a device is made, not defaulted")]
    pub fn new() -> Self {
        Self(Mutex::new(ConfigSpace::new(&Identity {
            vendor: 0x1b36,
            device: 0x0008,
            class: [6, 0, 0],
            ..Default::default()
        })))
    }

    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciFunction for HostBridge {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.lock().write(offset, data);
    }

    fn save_config(&self) -> Option<Vec<u8>> {
        Some(self.lock().save())
    }

    fn restore_config(&self, saved: &[u8]) -> Result<(), String> {
        self.lock().restore(saved).map_err(|e| e.to_string())
    }
}
