//! PCI functions of bus 0, through ports 0xCF8 and 0xCFC: each access is a call of ring 0, so this is for set-up only.

use crate::gate;

/// Capability ID of MSI.
pub const MSI_CAPABILITY: u8 = 0x05;

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;

/// A function of bus 0: device in bits 7:3, function in bits 2:0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function(u8);

impl Function {
    /// The functions with this vendor and device ID, function 0 of each device only.
    pub fn find(vendor: u16, device: u16) -> impl Iterator<Item = Self> {
        let id = u32::from(device) << 16 | u32::from(vendor);
        (0..32u8).map(|number| Self(number << 3)).filter(move |function| function.read(0) == id)
    }

    /// Its device number.
    pub fn device(self) -> u8 {
        self.0 >> 3
    }

    /// Reads a dword of configuration space at a multiple of 4 below 256.
    pub fn read(self, offset: u8) -> u32 {
        gate::outl(ADDRESS, 1 << 31 | u32::from(self.0) << 8 | u32::from(offset & 0xfc));
        gate::inl(DATA)
    }

    /// Writes a dword of configuration space.
    pub fn write(self, offset: u8, value: u32) {
        gate::outl(ADDRESS, 1 << 31 | u32::from(self.0) << 8 | u32::from(offset & 0xfc));
        gate::outl(DATA, value);
    }

    /// The input of the I/O APIC that its pin INTA leads to: as its interrupt line says, or where no firmware has filled that in, as
    /// Wherry connects them.
    pub fn pin_input(self) -> u8 {
        match self.read(0x3c) as u8 {
            0 | 0xff => 16 + (self.0 >> 3) % 8,
            line => line,
        }
    }

    /// Lets it answer in memory, and read and write memory.
    pub fn enable(self) {
        // The status register takes ones for clearing; there is nothing to clear.
        self.write(4, self.read(4) & 0xffff | 6);
    }

    /// Offsets of its capabilities with this ID.
    pub fn capabilities(self, id: u8) -> impl Iterator<Item = u8> {
        let mut at = if self.read(4) >> 20 & 1 == 1 { self.read(0x34) as u8 } else { 0 };
        // A list in a circle ends, too.
        let mut left = 48;
        core::iter::from_fn(move || {
            while at >= 0x40 && left > 0 {
                let (here, head) = (at, self.read(at));
                at = (head >> 8) as u8;
                left -= 1;
                if head as u8 == id {
                    return Some(here);
                }
            }
            None
        })
    }

    /// Has MSI raise `vector` and those that follow it, 2 to the power of `log` in all, of the vCPU with this local APIC. Gives the
    /// offset of the capability.
    ///
    /// # Errors
    /// It has no MSI.
    pub fn connect_msi(self, vector: u8, log: u32, apic_id: u32) -> Result<u8, &'static str> {
        let at = self.capabilities(MSI_CAPABILITY).next().ok_or("it has no MSI")?;
        self.write(at + 4, msi_address(apic_id));
        // With 64-bit addresses the high half comes before the data.
        let data = if self.read(at) >> 16 & 0x80 != 0 {
            self.write(at + 8, 0);
            at + 12
        } else {
            at + 8
        };
        self.write(data, vector.into());
        self.write(at, self.read(at) & !(7 << 20) | log << 20 | 1 << 16);
        Ok(at)
    }

    /// Where a memory BAR lies. `None` if it has no address, or one above what is mapped.
    pub fn bar(self, index: u8) -> Option<u64> {
        let low = self.read(0x10 + index * 4);
        let high = if low & 6 == 4 { self.read(0x14 + index * 4) } else { 0 };
        let address = u64::from(low & !15) | u64::from(high) << 32;
        (low & 1 == 0 && address != 0 && address < crate::ram::BOOT_MAPPED).then_some(address)
    }
}

/// The address of a message that interrupts the vCPU with this local APIC.
pub const fn msi_address(apic_id: u32) -> u32 {
    0xfee0_0000 | apic_id << 12
}
