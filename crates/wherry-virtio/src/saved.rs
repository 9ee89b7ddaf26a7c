//! What the units of virtio devices save. The same transport for all of them, and the device's own beside it.

use wherry_interrupt::saved::SavedVector;
use wherry_pci::saved::SavedMsix;
use wherry_state::SavedState;

use crate::vhost::saved::SavedBackend;

/// The transport: what the driver has set, and how far its rings have been served.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedTransport {
    /// Configuration space; zeros at the end are left out.
    #[prost(bytes = "vec", tag = "1")]
    pub config: Vec<u8>,
    /// Table and vectors.
    #[prost(message, optional, tag = "2")]
    pub msix: Option<SavedMsix>,
    /// Which half of the device's features is shown.
    #[prost(uint32, tag = "3")]
    pub device_feature_select: u32,
    /// Which half of the driver's features is written.
    #[prost(uint32, tag = "4")]
    pub driver_feature_select: u32,
    /// What the device offered.
    #[prost(fixed64, tag = "5")]
    pub offered: u64,
    /// What the driver has taken.
    #[prost(fixed64, tag = "6")]
    pub accepted: u64,
    /// Device status.
    #[prost(uint32, tag = "7")]
    pub status: u32,
    /// Interrupt status.
    #[prost(uint32, tag = "8")]
    pub isr: u32,
    /// Number of the configuration.
    #[prost(uint32, tag = "9")]
    pub generation: u32,
    /// Which ring is shown.
    #[prost(uint32, tag = "10")]
    pub queue_select: u32,
    /// Vector of configuration changes.
    #[prost(uint32, tag = "11")]
    pub config_vector: u32,
    /// The rings.
    #[prost(message, repeated, tag = "12")]
    pub rings: Vec<SavedRing>,
}

/// One ring.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct SavedRing {
    /// Entries.
    #[prost(uint32, tag = "1")]
    pub size: u32,
    /// Its vector.
    #[prost(uint32, tag = "2")]
    pub vector: u32,
    /// The driver has enabled it.
    #[prost(bool, tag = "3")]
    pub enabled: bool,
    /// Address of the descriptor table.
    #[prost(fixed64, tag = "4")]
    pub descriptors: u64,
    /// Address of the available ring.
    #[prost(fixed64, tag = "5")]
    pub available: u64,
    /// Address of the used ring.
    #[prost(fixed64, tag = "6")]
    pub used: u64,
    /// Next entry of the available ring to take.
    #[prost(uint32, tag = "7")]
    pub next_available: u32,
    /// Next entry of the used ring to fill.
    #[prost(uint32, tag = "8")]
    pub next_used: u32,
}

/// Unit `virtio-blk`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedBlk {
    /// The transport.
    #[prost(message, optional, tag = "1")]
    pub transport: Option<SavedTransport>,
    /// Sectors of 512 bytes that the guest sees.
    #[prost(uint64, tag = "2")]
    pub sectors: u64,
    /// Heads of requests that were taken and had no effect yet, oldest first: they are done at the destination.
    #[prost(uint32, repeated, tag = "3")]
    pub in_flight: Vec<u32>,
}

impl SavedState for SavedBlk {
    const SCHEMA: u32 = 1;
}

/// Unit `virtio-net`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedNet {
    /// The transport.
    #[prost(message, optional, tag = "1")]
    pub transport: Option<SavedTransport>,
    /// The guest's address, 6 bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub mac: Vec<u8>,
    /// Offloads of the driver that are on: bits of features.
    #[prost(fixed64, tag = "3")]
    pub offloads: u64,
    /// The driver has been asked to announce itself, and has not answered.
    #[prost(bool, tag = "4")]
    pub announcing: bool,
    /// A packet behind its header that was received and waits for buffers; empty if none does.
    #[prost(bytes = "vec", tag = "5")]
    pub packet: Vec<u8>,
    /// Heads of the buffers that were taken for it.
    #[prost(uint32, repeated, tag = "6")]
    pub buffers: Vec<u32>,
}

impl SavedState for SavedNet {
    const SCHEMA: u32 = 1;
}

/// Unit `virtio-console`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedConsole {
    /// The transport.
    #[prost(message, optional, tag = "1")]
    pub transport: Option<SavedTransport>,
    /// Input that the guest has not taken yet.
    #[prost(bytes = "vec", tag = "2")]
    pub input: Vec<u8>,
    /// Output that nobody outside has taken yet.
    #[prost(bytes = "vec", tag = "3")]
    pub output: Vec<u8>,
    /// Bytes of the next buffer of output that were taken already: they are in `output`, or outside.
    #[prost(uint32, tag = "4")]
    pub begun: u32,
}

impl SavedState for SavedConsole {
    const SCHEMA: u32 = 1;
}

/// Unit `virtio-balloon`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedBalloon {
    /// The transport.
    #[prost(message, optional, tag = "1")]
    pub transport: Option<SavedTransport>,
    /// Pages that the guest is asked to have in it.
    #[prost(uint32, tag = "2")]
    pub wanted: u32,
    /// Pages that the guest says it has in it.
    #[prost(uint32, tag = "3")]
    pub actual: u32,
    /// Command of free page hinting: 0 stop, 1 done, others ask.
    #[prost(uint32, tag = "4")]
    pub command: u32,
    /// The last command that asked.
    #[prost(uint32, tag = "5")]
    pub last_command: u32,
    /// Head of the buffer of statistics that waits until new ones are wanted.
    #[prost(uint32, optional, tag = "6")]
    pub statistics: Option<u32>,
    /// Pages in it that could not be given back to the host yet.
    #[prost(message, repeated, tag = "7")]
    pub waiting: Vec<SavedPages>,
}

/// A run of pages of 4 KiB.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct SavedPages {
    /// Number of the RAM block.
    #[prost(uint32, tag = "1")]
    pub block: u32,
    /// First page.
    #[prost(uint64, tag = "2")]
    pub first: u64,
    /// How many.
    #[prost(uint64, tag = "3")]
    pub count: u64,
}

impl SavedState for SavedBalloon {
    const SCHEMA: u32 = 1;
}

/// Unit `virtio-rng`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedRng {
    /// The transport.
    #[prost(message, optional, tag = "1")]
    pub transport: Option<SavedTransport>,
}

impl SavedState for SavedRng {
    const SCHEMA: u32 = 1;
}

/// Units `vhost-user-blk` and `vhost-user`: devices that another process serves.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedVhostUser {
    /// The transport.
    #[prost(message, optional, tag = "1")]
    pub transport: Option<SavedTransport>,
    /// Number of the device type.
    #[prost(uint32, tag = "2")]
    pub id: u32,
    /// Its configuration, as the guest sees it.
    #[prost(bytes = "vec", tag = "3")]
    pub config: Vec<u8>,
    /// What that process has given to be taken to its like; empty if it keeps nothing, or gives nothing. From schema 2 on.
    #[prost(bytes = "vec", tag = "4")]
    pub back_end: Vec<u8>,
    /// In a live update: how the next process goes on with that process, whose rings are served on. A program that does not know of
    /// this has no use for the connection either, and refuses it before the machine stops.
    #[prost(message, optional, tag = "5")]
    pub kept: Option<SavedBackend>,
}

impl SavedState for SavedVhostUser {
    const SCHEMA: u32 = 2;
}

/// A transport with something in every field, for golden files.
#[doc(hidden)]
pub fn example() -> SavedTransport {
    let vector = |n: u32| SavedVector { address: 0xfee0_0000, data: 0x40 + n, open: n == 0, pending: n == 1 };
    let ring = |n: u32| SavedRing {
        size: 128 << n,
        vector: n,
        enabled: true,
        descriptors: 0x10_0000 + u64::from(n),
        available: 0x20_0000,
        used: 0x30_0000,
        next_available: 0xfff0 + n,
        next_used: 7 + n,
    };
    SavedTransport {
        config: (0..=255).collect(),
        msix: Some(SavedMsix { table: (0..32).collect(), vectors: vec![vector(0), vector(1)] }),
        device_feature_select: 1,
        driver_feature_select: 2,
        offered: 0x1_3000_0004,
        accepted: 0x1_2000_0000,
        status: 15,
        isr: 1,
        generation: 3,
        queue_select: 4,
        config_vector: 0xffff,
        rings: vec![ring(0), ring(1)],
    }
}
