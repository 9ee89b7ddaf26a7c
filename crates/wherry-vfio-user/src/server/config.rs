//! Configuration space of a device: 256 bytes, of which a driver may change some. Identity, BARs, an interrupt pin and MSI-X;
//! enough for a device of its own kind.

use rustix::io::Errno;

/// Bytes of it.
pub const SIZE: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const PIN: usize = 0x3d;
/// The first capability.
const FIRST: usize = 0x40;
/// Bus master, in the command register.
const BUS_MASTER: u8 = 1 << 2;

/// Configuration space.
#[derive(Clone, Debug)]
pub struct Config {
    bytes: [u8; SIZE],
    /// Bits that a driver may change.
    writable: [u8; SIZE],
    at_reset: [u8; SIZE],
}

impl Config {
    /// A function with one interrupt pin (INTA). The class is as in the specification: class, subclass, interface, from
    /// high to low; not 0.
    pub fn new(vendor: u16, device: u16, class: u32) -> Self {
        let mut this = Self { bytes: [0; SIZE], writable: [0; SIZE], at_reset: [0; SIZE] };
        this.bytes[..2].copy_from_slice(&vendor.to_le_bytes());
        this.bytes[2..4].copy_from_slice(&device.to_le_bytes());
        this.bytes[8..12].copy_from_slice(&(class << 8 | 1).to_le_bytes());
        this.bytes[PIN] = 1;
        // Memory space, bus master; INTx disable.
        this.writable[COMMAND..COMMAND + 2].copy_from_slice(&0x0406_u16.to_le_bytes());
        // Cache line size and interrupt line: what firmware likes to note.
        (this.writable[0x0c], this.writable[0x3c]) = (0xff, 0xff);
        this.at_reset = this.bytes;
        this
    }

    /// A memory BAR of 32 bits; its size is a power of two of 16 bytes or more.
    pub fn with_bar(mut self, index: usize, size: u32) -> Self {
        let at = BAR + 4 * index;
        self.writable[at..at + 4].copy_from_slice(&(!(size.next_power_of_two().max(16) - 1)).to_le_bytes());
        self
    }

    /// Subsystem vendor and subsystem: which of several devices of that kind it is.
    pub fn with_subsystem(mut self, vendor: u16, subsystem: u16) -> Self {
        self.bytes[SUBSYSTEM..SUBSYSTEM + 2].copy_from_slice(&vendor.to_le_bytes());
        self.bytes[SUBSYSTEM + 2..SUBSYSTEM + 4].copy_from_slice(&subsystem.to_le_bytes());
        self.at_reset = self.bytes;
        self
    }

    /// MSI-X, as the only capability: vectors, and where in a BAR its table and its pending bits are.
    pub fn with_msix(mut self, vectors: u16, bar: u8, table: u32, pending: u32) -> Self {
        self.bytes[STATUS] |= 1 << 4;
        self.bytes[CAPABILITIES] = FIRST as u8;
        let at = FIRST;
        self.bytes[at] = 0x11;
        self.bytes[at + 2..at + 4].copy_from_slice(&(vectors - 1).to_le_bytes());
        self.bytes[at + 4..at + 8].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
        self.bytes[at + 8..at + 12].copy_from_slice(&(pending | u32::from(bar)).to_le_bytes());
        // Enable and function mask.
        self.writable[at + 3] = 0xc0;
        self.at_reset = self.bytes;
        self
    }

    /// Reads; bounds are checked here, too.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        let start = usize::try_from(offset).map_err(|_| Errno::INVAL)?;
        let end = start.checked_add(data.len()).ok_or(Errno::INVAL)?;
        data.copy_from_slice(self.bytes.get(start..end).ok_or(Errno::INVAL)?);
        Ok(())
    }

    /// Writes what may be written. A BAR that is written with ones reads as its size.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let start = usize::try_from(offset).map_err(|_| Errno::INVAL)?;
        if start.checked_add(data.len()).is_none_or(|end| end > SIZE) {
            return Err(Errno::INVAL);
        }
        for (at, byte) in (start..).zip(data) {
            self.bytes[at] = self.bytes[at] & !self.writable[at] | byte & self.writable[at];
        }
        Ok(())
    }

    /// As it was at first.
    pub fn reset(&mut self) {
        self.bytes = self.at_reset;
    }

    /// Whether the device may do DMA.
    pub fn is_bus_master(&self) -> bool {
        self.bytes[COMMAND] & BUS_MASTER != 0
    }

    /// All of it, to be saved.
    pub fn bytes(&self) -> &[u8; SIZE] {
        &self.bytes
    }

    /// Loads what was saved; what a driver cannot change must be the same.
    pub fn load(&mut self, bytes: &[u8; SIZE]) -> Result<(), Errno> {
        let same = (0..SIZE).all(|at| (bytes[at] ^ self.at_reset[at]) & !self.writable[at] == 0);
        if !same {
            return Err(Errno::INVAL);
        }
        self.bytes = *bytes;
        Ok(())
    }
}
