//! The two ways to configuration space: ports, and a window of memory.

use std::sync::Arc;

use super::root::PciRoot;
use crate::power::ResetControl;
use wherry_pci::bus::BusDevice;

/// Configuration mechanism 1 (PCI 3.0, section 3.2.2.3.2), for ports 0xCF8 to 0xCFF. The reset control register is at
/// 0xCF9, where CONFIG_ADDRESS takes no bytes, only dwords.
pub struct PciPorts {
    root: Arc<PciRoot>,
    reset: Arc<ResetControl>,
}

/// Port of CONFIG_ADDRESS, and first of those to insert [`PciPorts`] at.
const CONFIG_ADDRESS: u64 = 0xcf8;
const ENABLE: u32 = 1 << 31;

impl PciPorts {
    /// First port.
    pub const BASE: u64 = CONFIG_ADDRESS;
    /// Number of ports.
    pub const LEN: u64 = 8;

    /// Ports to this bus and this reset register.
    pub fn new(root: Arc<PciRoot>, reset: Arc<ResetControl>) -> Self {
        Self { root, reset }
    }

    /// What CONFIG_ADDRESS selects: bus, devfn, and the offset of the byte at this data port.
    fn selected(&self, offset: u64) -> Option<(u8, u8, u16)> {
        let address = *self.root.config_address();
        let [register, devfn, bus, _] = address.to_le_bytes();
        (address & ENABLE != 0).then_some((bus, devfn, u16::from(register & 0xfc) | (offset & 3) as u16))
    }
}

impl BusDevice for PciPorts {
    fn read(&self, _base: u64, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (4.., _) => match self.selected(offset) {
                Some((bus, devfn, at)) => self.root.read_config(bus, devfn, at, data),
                None => data.fill(0xff),
            },
            (0, 4) => data.copy_from_slice(&self.root.config_address().to_le_bytes()),
            (1, 1) => data[0] = self.reset.read(),
            _ => data.fill(0xff),
        }
    }

    fn write(&self, _base: u64, offset: u64, data: &[u8]) {
        match (offset, data) {
            (4.., _) => {
                if let Some((bus, devfn, at)) = self.selected(offset) {
                    self.root.write_config(bus, devfn, at, data);
                }
            }
            // Reserved bits read back as 0.
            (0, &[a, b, c, d]) => *self.root.config_address() = u32::from_le_bytes([a & 0xfc, b, c, d & 0x80]),
            (1, &[value]) => self.reset.write(value),
            _ => {}
        }
    }
}

/// The memory window (PCI Express 4.0, section 7.2.2): 4 KiB a function, 1 MiB a bus.
pub struct Ecam(Arc<PciRoot>);

impl Ecam {
    /// A window to this bus.
    pub fn new(root: Arc<PciRoot>) -> Self {
        Self(root)
    }
}

impl BusDevice for Ecam {
    fn read(&self, _base: u64, offset: u64, data: &mut [u8]) {
        self.0.read_config((offset >> 20) as u8, (offset >> 12) as u8, offset as u16 & 0xfff, data);
    }

    fn write(&self, _base: u64, offset: u64, data: &[u8]) {
        self.0.write_config((offset >> 20) as u8, (offset >> 12) as u8, offset as u16 & 0xfff, data);
    }
}
