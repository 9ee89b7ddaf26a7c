//! Configuration space with a type 0 header.

/// Offsets in the header.
mod reg {
    pub const COMMAND: usize = 0x04;
    pub const STATUS: usize = 0x06;
    pub const CACHE_LINE: usize = 0x0c;
    pub const LATENCY: usize = 0x0d;
    pub const TYPE: usize = 0x0e;
    pub const BAR0: usize = 0x10;
    pub const CARDBUS: usize = 0x28;
    pub const SUBSYSTEM: usize = 0x2c;
    pub const ROM: usize = 0x30;
    pub const CAPABILITIES: usize = 0x34;
    pub const INTERRUPT_LINE: usize = 0x3c;
    pub const INTERRUPT_PIN: usize = 0x3d;
    /// First byte that capabilities can have.
    pub const HEADER_END: usize = 0x40;
}

/// Bytes of configuration space that PCI knows, and that PCI Express adds.
const CONVENTIONAL: usize = 256;
const EXTENDED: usize = 4096;

const COMMAND_IO: u16 = 1;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// I/O, memory, bus master, parity, SERR, INTx disable.
const COMMAND_WRITABLE: u16 = COMMAND_IO | COMMAND_MEMORY | COMMAND_BUS_MASTER | 1 << 6 | 1 << 8 | COMMAND_INTX_DISABLE;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const STATUS_INTX: u8 = 1 << 3;
/// Capabilities that fit into the 256 bytes: a list with more goes in a circle.
const MOST_CAPABILITIES: usize = (CONVENTIONAL - reg::HEADER_END) / 4;

/// What a function says it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, sub-class and programming interface.
    pub class: [u8; 3],
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// What kind of addresses a BAR takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes two BAR registers.
    Memory64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
}

/// A configuration space cannot be built or restored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// No such BAR, or it is taken.
    #[error("BAR {0} does not exist or is in use")]
    BadBar(usize),
    /// Sizes are powers of two with limits: 16 bytes to 2 GiB, ports 4 to 256 bytes.
    #[error("BAR {index} cannot have {size:#x} bytes")]
    BadBarSize {
        /// The BAR.
        index: usize,
        /// The size asked for.
        size: u64,
    },
    /// The capability does not fit into what is left of the 256 bytes.
    #[error("capability {0:#04x} does not fit into configuration space")]
    NoRoom(u8),
    /// The mask is not as long as the capability.
    #[error("the write mask of capability {0:#04x} is not as long as its body")]
    BadMask(u8),
    /// Saved state is of another device.
    #[error("saved configuration space has {saved:#04x} at offset {offset:#x}, where this device has {ours:#04x}")]
    OtherDevice {
        /// Where they differ.
        offset: usize,
        /// What was saved.
        saved: u8,
        /// What this device has.
        ours: u8,
    },
    /// Saved state has the wrong length.
    #[error("saved configuration space has {0} bytes, not {EXTENDED}")]
    BadLength(usize),
}

/// What a write changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// The command register or a BAR: mappings may have changed.
    pub mapping: bool,
    /// The command register: bus mastering or INTx may have changed.
    pub command: bool,
}

#[derive(Clone, Copy, Debug)]
struct Bar {
    kind: BarKind,
    size: u64,
}

/// 4 KiB of configuration space, of which a mask says what the guest may write.
#[derive(Clone)]
pub struct ConfigSpace {
    bytes: Box<[u8; EXTENDED]>,
    writable: Box<[u8; EXTENDED]>,
    bars: [Option<Bar>; 6],
    /// Where the next capability goes, and the pointer that will lead to it.
    next: usize,
    link: usize,
}

impl ConfigSpace {
    /// A header without BARs and capabilities.
    pub fn new(identity: &Identity) -> Self {
        let mut config = Self {
            bytes: Box::new([0; EXTENDED]),
            writable: Box::new([0; EXTENDED]),
            bars: [None; 6],
            next: reg::HEADER_END,
            link: reg::CAPABILITIES,
        };
        let [base, sub, interface] = identity.class;
        config.put(0, &identity.vendor.to_le_bytes());
        config.put(2, &identity.device.to_le_bytes());
        config.put(8, &[identity.revision, interface, sub, base]);
        config.put(reg::SUBSYSTEM, &identity.subsystem_vendor.to_le_bytes());
        config.put(reg::SUBSYSTEM + 2, &identity.subsystem.to_le_bytes());
        config.mask(reg::COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        config.mask(reg::CACHE_LINE, &[0xff]);
        config.mask(reg::LATENCY, &[0xff]);
        config.mask(reg::INTERRUPT_LINE, &[0xff]);
        config
    }

    /// The header and the capabilities of a function that somebody else owns, from its own configuration space. BARs, ROM and
    /// command are empty; extended capabilities are left out, and it is the only function of its device.
    pub fn like(device: &[u8]) -> Self {
        let mut config = Self::new(&Identity::default());
        let len = device.len().min(CONVENTIONAL);
        config.put(0, &device[..len]);
        for (at, len) in [(reg::COMMAND, 4), (reg::BAR0, 24), (reg::CARDBUS, 4), (reg::ROM, 4)] {
            config.bytes[at..at + len].fill(0);
        }
        config.bytes[reg::TYPE] = 0;
        let listed = device.get(reg::STATUS).is_some_and(|status| status & STATUS_CAPABILITIES != 0);
        if listed && config.capability_list().next().is_some() {
            config.bytes[reg::STATUS] |= STATUS_CAPABILITIES;
        }
        config
    }

    /// The capabilities, each with its ID and where it is, in the order of the list.
    pub fn capabilities(&self) -> Vec<(u8, u16)> {
        let listed = self.bytes[reg::STATUS] & STATUS_CAPABILITIES != 0;
        if listed { self.capability_list().collect() } else { Vec::new() }
    }

    fn capability_list(&self) -> impl Iterator<Item = (u8, u16)> + '_ {
        let mut pointer = reg::CAPABILITIES;
        let next = move || {
            let at = usize::from(self.bytes[pointer] & !3);
            pointer = at + 1;
            (at >= reg::HEADER_END).then(|| (self.bytes[at], at as u16))
        };
        std::iter::from_fn(next).take(MOST_CAPABILITIES)
    }

    /// Takes capabilities that are not wanted out of the list.
    pub fn retain_capabilities(&mut self, wanted: impl Fn(u8) -> bool) {
        let kept: Vec<_> = self.capabilities().into_iter().filter(|(id, _)| wanted(*id)).collect();
        let mut link = reg::CAPABILITIES;
        for (_, at) in &kept {
            self.bytes[link] = *at as u8;
            link = usize::from(*at) + 1;
        }
        self.bytes[link] = 0;
        if kept.is_empty() {
            self.bytes[reg::STATUS] &= !STATUS_CAPABILITIES;
        }
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn mask(&mut self, at: usize, bytes: &[u8]) {
        self.writable[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// The dword at an offset; bytes behind the end are ones.
    pub fn dword(&self, at: u16) -> u32 {
        let mut bytes = [0; 4];
        self.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// The word at an offset.
    pub fn word(&self, at: u16) -> u16 {
        self.dword(at) as u16
    }

    fn command(&self) -> u16 {
        u16::from_le_bytes([self.bytes[reg::COMMAND], self.bytes[reg::COMMAND + 1]])
    }

    /// Adds a BAR of a power of two bytes.
    pub fn add_bar(&mut self, index: usize, kind: BarKind, size: u64) -> Result<(), ConfigError> {
        let wide = matches!(kind, BarKind::Memory64 { .. });
        let free = |i: usize| {
            let upper_half = i > 0 && matches!(self.bars[i - 1], Some(Bar { kind: BarKind::Memory64 { .. }, .. }));
            self.bars[i].is_none() && !upper_half
        };
        if index + usize::from(wide) >= 6 || !free(index) || wide && !free(index + 1) {
            return Err(ConfigError::BadBar(index));
        }
        let (limits, flags) = match kind {
            BarKind::Io => (4..=256, 1),
            BarKind::Memory32 => (16..=1 << 31, 0),
            BarKind::Memory64 { prefetchable } => (16..=1 << 62, 4 | u8::from(prefetchable) << 3),
        };
        if !size.is_power_of_two() || !limits.contains(&size) {
            return Err(ConfigError::BadBarSize { index, size });
        }
        let at = reg::BAR0 + index * 4;
        let address_bits = !(size - 1);
        self.put(at, &[flags]);
        self.mask(at, &address_bits.to_le_bytes()[..if wide { 8 } else { 4 }]);
        self.bars[index] = Some(Bar { kind, size });
        Ok(())
    }

    /// The BARs there are, with kind and size in bytes.
    pub fn bars(&self) -> impl Iterator<Item = (usize, BarKind, u64)> + '_ {
        self.bars.iter().enumerate().filter_map(|(i, bar)| bar.map(|bar| (i, bar.kind, bar.size)))
    }

    /// Gives a BAR an address, as firmware would. Bits below its size are cut off.
    pub fn set_bar(&mut self, index: usize, address: u64) -> Result<(), ConfigError> {
        let bar = self.bars.get(index).copied().flatten().ok_or(ConfigError::BadBar(index))?;
        let at = reg::BAR0 + index * 4;
        let len = if matches!(bar.kind, BarKind::Memory64 { .. }) { 8 } else { 4 };
        self.write_masked(at, &address.to_le_bytes()[..len]);
        Ok(())
    }

    /// Where a BAR answers now: nowhere while decoding is off, or while it has no address or one from which it would
    /// wrap around.
    pub fn bar_address(&self, index: usize) -> Option<u64> {
        let bar = self.bars.get(index).copied().flatten()?;
        let at = reg::BAR0 + index * 4;
        let low = u64::from(self.dword(at as u16));
        let (enable, address, limit) = match bar.kind {
            BarKind::Io => (COMMAND_IO, low & !3, 1 << 16),
            BarKind::Memory32 => (COMMAND_MEMORY, low & !15, 1 << 32),
            BarKind::Memory64 { .. } => {
                (COMMAND_MEMORY, low & !15 | u64::from(self.dword(at as u16 + 4)) << 32, u64::MAX)
            }
        };
        let fits = address != 0 && address.checked_add(bar.size).is_some_and(|end| end <= limit);
        (self.command() & enable != 0 && fits).then_some(address)
    }

    /// Whether the guest lets the function read and write memory.
    pub fn bus_master(&self) -> bool {
        self.command() & COMMAND_BUS_MASTER != 0
    }

    /// Whether the guest lets the function use its interrupt pin.
    pub fn intx_enabled(&self) -> bool {
        self.command() & COMMAND_INTX_DISABLE == 0
    }

    /// Gives the function an interrupt pin, 1 (INTA) to 4, and tells the guest a line, which only old systems read.
    pub fn set_interrupt(&mut self, pin: u8, line: u8) {
        self.put(reg::INTERRUPT_PIN, &[pin]);
        self.put(reg::INTERRUPT_LINE, &[line]);
    }

    /// Shows in the status register whether the function wants an interrupt by its pin.
    pub fn set_intx_status(&mut self, asserted: bool) {
        let status = &mut self.bytes[reg::STATUS];
        *status = *status & !STATUS_INTX | if asserted { STATUS_INTX } else { 0 };
    }

    /// Puts a capability where the function has one of that kind already, or appends it where it has none. Otherwise as
    /// [`add_capability`](Self::add_capability).
    pub fn replace_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u16, ConfigError> {
        let Some((_, at)) = self.capabilities().into_iter().find(|(there, _)| *there == id) else {
            return self.add_capability(id, body, writable);
        };
        let body_at = usize::from(at) + 2;
        if body.len() != writable.len() {
            return Err(ConfigError::BadMask(id));
        }
        if body_at + body.len() > CONVENTIONAL {
            return Err(ConfigError::NoRoom(id));
        }
        self.put(body_at, body);
        self.mask(body_at, writable);
        Ok(at)
    }

    /// Appends a capability: its body without ID and pointer, and which of its bits the guest may write. Returns the
    /// offset of the capability; the body begins 2 bytes later.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u16, ConfigError> {
        if body.len() != writable.len() {
            return Err(ConfigError::BadMask(id));
        }
        let at = self.next;
        let end = at + 2 + body.len();
        if end > CONVENTIONAL {
            return Err(ConfigError::NoRoom(id));
        }
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.mask(at + 2, writable);
        self.put(self.link, &[at as u8]);
        self.bytes[reg::STATUS] |= STATUS_CAPABILITIES;
        self.link = at + 1;
        self.next = end.next_multiple_of(4);
        Ok(at as u16)
    }

    /// The PCI Express capability of an endpoint integrated into the root complex: no link, no error reporting, and no
    /// function level reset. Its Transactions Pending bit is left to the device.
    pub fn add_express_endpoint(&mut self) -> Result<u16, ConfigError> {
        // Capabilities register: version 2, type 9 (root complex integrated endpoint). 58 bytes of body.
        let mut body = [0; 58];
        body[0] = 0x92;
        // Device control: everything but function level reset.
        let mut writable = [0; 58];
        writable[6..8].copy_from_slice(&0x7fffu16.to_le_bytes());
        self.add_capability(0x10, &body, &writable)
    }

    /// Reads. Bytes behind the end are ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// Writes what is writable.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Written {
        let at = usize::from(offset);
        self.write_masked(at, data);
        let touches = |first: usize, len: usize| at < first + len && first < at + data.len();
        let command = touches(reg::COMMAND, 2);
        Written { mapping: command || touches(reg::BAR0, 24), command }
    }

    fn write_masked(&mut self, at: usize, data: &[u8]) {
        for (i, value) in (at..EXTENDED).zip(data) {
            let mask = self.writable[i];
            self.bytes[i] = self.bytes[i] & !mask | value & mask;
        }
    }

    /// Lets a device change bytes that the guest cannot write, or read them back.
    pub fn bytes_mut(&mut self) -> &mut [u8; EXTENDED] {
        &mut self.bytes
    }

    /// All bytes.
    pub fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Takes what the guest can write from saved bytes. The rest must be equal, but for the INTx status.
    pub fn restore(&mut self, saved: &[u8]) -> Result<(), ConfigError> {
        if saved.len() != EXTENDED {
            return Err(ConfigError::BadLength(saved.len()));
        }
        for (offset, (saved, ours)) in saved.iter().zip(self.bytes.iter()).enumerate() {
            let ignored = self.writable[offset] | if offset == reg::STATUS { STATUS_INTX } else { 0 };
            if (saved ^ ours) & !ignored != 0 {
                return Err(ConfigError::OtherDevice { offset, saved: *saved, ours: *ours });
            }
        }
        self.write_masked(0, saved);
        Ok(())
    }
}
