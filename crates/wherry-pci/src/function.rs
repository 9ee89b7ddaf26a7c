//! What a PCI device implements.

use std::fmt;

/// Which function of bus 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FunctionAddress {
    device: u8,
    function: u8,
}

impl FunctionAddress {
    /// Function 0 to 7 of device 0 to 31, or nothing if there is no such address.
    pub const fn new(device: u8, function: u8) -> Option<Self> {
        if device < 32 && function < 8 { Some(Self { device, function }) } else { None }
    }

    /// The address that is packed as in configuration requests: device in bits 7:3, function in bits 2:0.
    pub const fn from_devfn(devfn: u8) -> Self {
        Self { device: devfn >> 3, function: devfn & 7 }
    }

    /// The packed form.
    pub const fn devfn(self) -> u8 {
        self.device << 3 | self.function
    }

    /// Device number, 0 to 31.
    pub const fn device(self) -> u8 {
        self.device
    }
}

impl fmt::Display for FunctionAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00:{:02x}.{}", self.device, self.function)
    }
}

/// One function. There are no default implementations on purpose: a forgotten one would lose state.
pub trait PciFunction: Send + Sync {
    /// Reads 1 to 4 bytes of configuration space at an offset below 4096; the access does not cross an aligned dword.
    fn read_config(&self, offset: u16, data: &mut [u8]);

    /// Writes 1 to 4 bytes, as above.
    fn write_config(&self, offset: u16, data: &[u8]);

    /// Its configuration space for the unit `pci-host`, or nothing if another state unit saves it.
    fn save_config(&self) -> Option<Vec<u8>>;

    /// Takes what [`save_config`](Self::save_config) gave, maps BARs accordingly, or says why it cannot.
    fn restore_config(&self, saved: &[u8]) -> Result<(), String>;
}
