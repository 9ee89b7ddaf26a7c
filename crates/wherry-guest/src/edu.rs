//! QEMU's educational device, as its driver sees it: a conventional PCI function that does DMA and interrupts by MSI or its pin.
//!
//! This file is compiled into the guest, whose driver it serves, and into the host side, which looks for the device. It needs only
//! `core`. The source of the numbers is docs/specs/edu.rst of QEMU.

/// PCI vendor ID.
pub const VENDOR: u16 = 0x1234;
/// PCI device ID.
pub const DEVICE: u16 = 0x11e8;
/// BAR of the registers.
pub const REGISTERS_BAR: u8 = 0;
/// Its size in bytes.
pub const REGISTERS_BYTES: u64 = 1 << 20;
/// Low half of [`register::ID`]; the high half is a version.
pub const ID: u32 = 0xed;
/// Where its own memory begins, as addresses of DMA say.
pub const BUFFER: u32 = 0x4_0000;
/// Bytes of that memory.
pub const BUFFER_BYTES: u32 = 4096;
/// It reaches RAM below this address only, unless its machine tells it otherwise.
pub const REACH: u64 = 1 << 28;

/// Offsets of registers in [`REGISTERS_BAR`]: aligned accesses of 32 bits.
pub mod register {
    /// [`super::ID`] and version; read-only.
    pub const ID: u64 = 0x00;
    /// What is written is read back inverted.
    pub const LIVENESS: u64 = 0x04;
    /// A number; what is read when [`super::status::COMPUTING`] has gone is its factorial, modulo 2^32.
    pub const FACTORIAL: u64 = 0x08;
    /// Bits of [`super::status`].
    pub const STATUS: u64 = 0x20;
    /// What was raised and not acknowledged: bits that whoever raises chooses, or of [`super::cause`]; read-only.
    pub const RAISED: u64 = 0x24;
    /// Adds bits to [`RAISED`], and interrupts.
    pub const RAISE: u64 = 0x60;
    /// Takes bits from [`RAISED`]; the pin goes down with the last.
    pub const ACKNOWLEDGE: u64 = 0x64;
    /// DMA: address to read from. Not written while DMA is under way, as the next two.
    pub const SOURCE: u64 = 0x80;
    /// DMA: address to write to.
    pub const DESTINATION: u64 = 0x88;
    /// DMA: bytes.
    pub const COUNT: u64 = 0x90;
    /// DMA: bits of [`super::command`]. It is done 100 ms after it was started.
    pub const COMMAND: u64 = 0x98;
}

/// Bits of [`register::STATUS`].
pub mod status {
    /// A factorial is being computed; read-only.
    pub const COMPUTING: u32 = 1 << 0;
    /// Interrupt when it has been.
    pub const INTERRUPT: u32 = 1 << 7;
}

/// Bits of [`register::RAISED`] that the device sets by itself.
pub mod cause {
    /// A factorial has been computed.
    pub const FACTORIAL: u32 = 1 << 0;
    /// DMA has been done.
    pub const DMA: u32 = 1 << 8;
}

/// Bits of [`register::COMMAND`].
pub mod command {
    /// Do it; set while it is under way.
    pub const START: u32 = 1 << 0;
    /// From the device to RAM, rather than the other way.
    pub const TO_RAM: u32 = 1 << 1;
    /// Interrupt when it is done.
    pub const INTERRUPT: u32 = 1 << 2;
}
