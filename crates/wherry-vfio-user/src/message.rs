//! Headers of messages, and their numbers. A message is a header of 16 bytes and its payload, with descriptors beside it; the
//! byte order is the host's.

use std::os::fd::OwnedFd;

/// Bytes of a header.
pub const HEADER: usize = 16;
/// Most bytes of data in a message (`max_data_xfer_size`), if a peer does not say otherwise; ours, too.
pub const DEFAULT_TRANSFER: usize = 1 << 20;
/// Most bytes of a payload that is taken: a transfer, and more than any structure around it.
pub const MOST_PAYLOAD: usize = DEFAULT_TRANSFER + 4096;
/// Most descriptors that one message can carry (`SCM_MAX_FD` of Linux).
pub const MOST_DESCRIPTORS: usize = 253;

/// Bits of a header's flags.
pub mod flags {
    /// Mask of the type.
    pub const TYPE: u32 = 0xf;
    /// Type: a command.
    pub const COMMAND: u32 = 0;
    /// Type: a reply.
    pub const REPLY: u32 = 1;
    /// No reply is wanted.
    pub const NO_REPLY: u32 = 1 << 4;
    /// The command failed.
    pub const ERROR: u32 = 1 << 5;
}

macro_rules! commands {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// What a message asks for (chapter "Commands").
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum Command {
            $($(#[$doc])* $name = $number,)*
        }

        impl TryFrom<u16> for Command {
            type Error = u16;

            fn try_from(number: u16) -> Result<Self, u16> {
                match number {
                    $($number => Ok(Self::$name),)*
                    _ => Err(number),
                }
            }
        }
    };
}

commands! {
    /// `VFIO_USER_VERSION`.
    Version = 1,
    /// `VFIO_USER_DMA_MAP`.
    DmaMap = 2,
    /// `VFIO_USER_DMA_UNMAP`.
    DmaUnmap = 3,
    /// `VFIO_USER_DEVICE_GET_INFO`.
    GetInfo = 4,
    /// `VFIO_USER_DEVICE_GET_REGION_INFO`.
    GetRegionInfo = 5,
    /// `VFIO_USER_DEVICE_GET_REGION_IO_FDS`.
    GetRegionIoFds = 6,
    /// `VFIO_USER_DEVICE_GET_IRQ_INFO`.
    GetIrqInfo = 7,
    /// `VFIO_USER_DEVICE_SET_IRQS`.
    SetIrqs = 8,
    /// `VFIO_USER_REGION_READ`.
    RegionRead = 9,
    /// `VFIO_USER_REGION_WRITE`.
    RegionWrite = 10,
    /// `VFIO_USER_DMA_READ`, from the server.
    DmaRead = 11,
    /// `VFIO_USER_DMA_WRITE`, from the server.
    DmaWrite = 12,
    /// `VFIO_USER_DEVICE_RESET`.
    Reset = 13,
    /// `VFIO_USER_REGION_WRITE_MULTI`.
    RegionWriteMulti = 15,
    /// `VFIO_USER_DEVICE_FEATURE`.
    Feature = 16,
    /// `VFIO_USER_MIG_DATA_READ`.
    MigDataRead = 17,
    /// `VFIO_USER_MIG_DATA_WRITE`.
    MigDataWrite = 18,
    /// Our extension `userfaultfd`: faults of the server's memory begin to be served by the client, or no longer are.
    Userfaultfd = 0x8000,
}

/// A header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The sender's number for it; echoed in the reply.
    pub id: u16,
    /// A [`Command`], if it is a known one.
    pub command: u16,
    /// Bytes of the whole message, this header among them.
    pub size: u32,
    /// See [`flags`].
    pub flags: u32,
    /// With [`flags::ERROR`]: an error number, or 0.
    pub error: u32,
}

impl Header {
    /// As bytes.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..2].copy_from_slice(&self.id.to_ne_bytes());
        bytes[2..4].copy_from_slice(&self.command.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.size.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.flags.to_ne_bytes());
        bytes[12..].copy_from_slice(&self.error.to_ne_bytes());
        bytes
    }

    /// From bytes; any bytes are a header.
    pub fn decode(bytes: &[u8; HEADER]) -> Self {
        let half = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Self { id: half(0), command: half(2), size: word(4), flags: word(8), error: word(12) }
    }

    /// What the command is called, for an error.
    pub fn name(&self) -> String {
        Command::try_from(self.command).map_or_else(|n| format!("command {n}"), |command| format!("{command:?}"))
    }
}

/// A message that has come.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// What followed.
    pub payload: Vec<u8>,
    /// What came beside it.
    pub descriptors: Vec<OwnedFd>,
}
