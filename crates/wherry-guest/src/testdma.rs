//! The test device for DMA (`wherry device testdma`): its registers, its area in RAM, and what it writes to buffers.
//!
//! This file is compiled into the guest, whose driver it serves, and into the host side, which is the device and its tests. It
//! needs only `core`. docs/testdma.md is the same in prose and tables; a test compares the two.

/// PCI vendor ID.
pub const VENDOR: u16 = 0x1de5;
/// PCI device ID.
pub const DEVICE: u16 = 0x7d3a;
/// Value of [`register::ID`]: `WTDM` in memory order.
pub const ID: u32 = u32::from_le_bytes(*b"WTDM");
/// Value of [`register::VERSION`].
pub const VERSION: u32 = 1;

/// BAR of the registers and of the scratch page.
pub const REGISTERS_BAR: u8 = 0;
/// Its size in bytes.
pub const REGISTERS_BYTES: u64 = 0x2000;
/// Offset in it of the scratch page: memory, which a client can map and which belongs to the device's state.
pub const SCRATCH: u64 = 0x1000;
/// Bytes of the scratch page.
pub const SCRATCH_BYTES: u64 = 0x1000;
/// BAR of the MSI-X table.
pub const MSIX_BAR: u8 = 2;
/// Its size in bytes.
pub const MSIX_BYTES: u64 = 0x1000;
/// Offset in it of the pending bits; the table is at 0.
pub const MSIX_PENDING: u64 = 0x800;

/// Most vectors of MSI-X.
pub const MAX_VECTORS: u32 = 64;
/// Most vectors of MSI.
pub const MAX_MSI_VECTORS: u32 = 32;
/// Most entries of a ring. Fewest: 2. They are a power of two.
pub const MAX_ENTRIES: u32 = 1024;
/// Most bytes of a buffer. Fewest: 16. They are a multiple of 8.
pub const MAX_BUFFER: u32 = 64 << 10;
/// Bytes of the letter of the stop-and-wait form.
pub const LETTER_BYTES: u64 = 256;
/// An interrupt that was not acknowledged for so long is lost.
pub const LOST_NS: u64 = 1_000_000_000;

macro_rules! words {
    ($(#[$head:meta])* $module:ident: $($(#[$doc:meta])* $name:ident = $offset:literal, $bytes:literal;)*) => {
        $(#[$head])*
        pub mod $module {
            $($(#[$doc])* pub const $name: u64 = $offset;)*
            /// Name, offset and bytes of each.
            pub const ALL: &[(&str, u64, u64)] = &[$((stringify!($name), $offset, $bytes)),*];
        }
    };
}

words! {
    /// Offsets of the registers in [`REGISTERS_BAR`]. They are read and written by aligned 32-bit accesses.
    register:
    /// [`ID`]; read-only.
    ID = 0x00, 4;
    /// [`VERSION`]; read-only.
    VERSION = 0x04, 4;
    /// Which interrupts it has: a bit [`super::Interrupt::offer`] for each, and its vectors in bits 15:8; read-only.
    OFFER = 0x08, 4;
    /// What it does: bits of [`super::status`]; read-only.
    STATUS = 0x0c, 4;
    /// What it is to do, a [`super::Form`]. From 0 to another it starts from the beginning; between two others it does not change.
    CONTROL = 0x10, 4;
    /// How it interrupts, a [`super::Interrupt`]; one that it does not have is not taken.
    INTERRUPT = 0x14, 4;
    /// How many vectors it uses in turn, from 1 on.
    VECTORS = 0x18, 4;
    /// INTx: 1 while the pin is up; writing 1 takes it down.
    CAUSE = 0x1c, 4;
    /// Where the area lies, low half.
    AREA = 0x20, 4;
    /// High half.
    AREA_HIGH = 0x24, 4;
    /// Entries of the ring.
    ENTRIES = 0x28, 4;
    /// Seed of what is written, low half.
    SEED = 0x30, 4;
    /// High half.
    SEED_HIGH = 0x34, 4;
    /// Writing anything: there are new buffers, or an acknowledgement. Reads as 0.
    DOORBELL = 0x40, 4;
    /// Buffers filled; this and what follows are read-only, of 64 bits each, and never begin anew but by a reset.
    BUFFERS = 0x80, 8;
    /// Bytes written to buffers.
    BYTES = 0x88, 8;
    /// Interrupts raised.
    SIGNALS = 0x90, 8;
    /// Interrupts that were not acknowledged within a second.
    LOST = 0x98, 8;
    /// The longest time from an interrupt to its acknowledgement, in ns.
    LONGEST_NS = 0xa0, 8;
    /// Accesses of memory that failed; each is tried again until it does not.
    FAULTS = 0xa8, 8;
    /// How often its state was loaded: how far it has travelled.
    LOADS = 0xb0, 8;
}

words! {
    /// Offsets of the words in the area, at a multiple of 4 KiB in RAM. Each has one writer, and all are of 64 bits.
    area:
    /// Driver: buffers posted so far.
    POSTED = 0x00, 8;
    /// Driver: interrupt when so many buffers are complete.
    WANTED = 0x08, 8;
    /// Driver: the last letter that was read.
    ACKNOWLEDGED = 0x10, 8;
    /// Device: buffers completed so far. It shares its page with words of the driver: both sides' writes must reach a copy.
    COMPLETED = 0x40, 8;
    /// Device: the number of the letter.
    SEQUENCE = 0x48, 8;
    /// Device: the letter, in the stop-and-wait form.
    LETTER = 0x80, 256;
}

/// Offset in the area of the descriptors. The completions follow them.
pub const DESCRIPTORS: u64 = 0x1000;
/// Bytes of a descriptor: address (8), length (4), 0 (4).
pub const DESCRIPTOR_BYTES: u64 = 16;
/// Bytes of a completion: sequence number (8), length (4), status (4), which is 0.
pub const COMPLETION_BYTES: u64 = 16;

/// Offset in the area of the completions of a ring.
pub const fn completions(entries: u32) -> u64 {
    DESCRIPTORS + DESCRIPTOR_BYTES * entries as u64
}

/// Bytes of the area of a ring.
pub const fn area_bytes(entries: u32) -> u64 {
    completions(entries) + COMPLETION_BYTES * entries as u64
}

/// Bits of [`register::STATUS`].
pub mod status {
    /// It may do DMA: it was told to start, it is bus master, and it was not brought to rest.
    pub const ACTIVE: u32 = 1 << 0;
    /// The last access of memory failed, and is tried again.
    pub const FAULT: u32 = 1 << 1;
    /// A buffer is half written: the Transactions Pending bit of its PCI Express capability.
    pub const PENDING: u32 = 1 << 2;
}

/// What it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Form {
    /// Nothing.
    Off = 0,
    /// It fills the buffers of a ring.
    Ring = 1,
    /// It writes a letter, interrupts once, and waits for the acknowledgement.
    Wait = 2,
}

impl Form {
    /// The form with this number. `None` for a number that is not one.
    pub const fn from_u32(value: u32) -> Option<Self> {
        Some(match value {
            0 => Self::Off,
            1 => Self::Ring,
            2 => Self::Wait,
            _ => return None,
        })
    }
}

/// How it interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Interrupt {
    /// Not at all.
    None = 0,
    /// By its pin.
    Intx = 1,
    /// By MSI.
    Msi = 2,
    /// By MSI-X.
    Msix = 3,
}

impl Interrupt {
    /// The one with this number. `None` for a number that is not one.
    pub const fn from_u32(value: u32) -> Option<Self> {
        Some(match value {
            0 => Self::None,
            1 => Self::Intx,
            2 => Self::Msi,
            3 => Self::Msix,
            _ => return None,
        })
    }

    /// Its bit in [`register::OFFER`].
    pub const fn offer(self) -> u32 {
        1 << self as u32
    }
}

/// 64-bit word `word` of the buffer or letter with this sequence number. The first is the number itself.
pub const fn buffer_word(seed: u64, sequence: u64, word: usize) -> u64 {
    match word {
        0 => sequence,
        n => {
            let mixed =
                seed ^ sequence.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (n as u64).wrapping_mul(0xd1b5_4a32_d192_ed03);
            let mixed = (mixed ^ mixed >> 32).wrapping_mul(0xe703_7ed1_a0b4_28db);
            mixed ^ mixed >> 29
        }
    }
}
