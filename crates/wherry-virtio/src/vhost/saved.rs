//! How another process goes on with a back end, in a live update. Descriptors go beside it.

/// What a device of another process is to the next process of its machine.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedBackend {
    /// The connection; absent if there is none now.
    #[prost(message, optional, tag = "1")]
    pub(crate) front: Option<SavedFront>,
    /// The back end has gone, and the next one is being looked for.
    #[prost(bool, tag = "2")]
    pub(crate) missing: bool,
    /// How the memory is described in which back ends note what is under way; empty if there is none.
    #[prost(bytes = "vec", tag = "3")]
    pub(crate) in_flight: Vec<u8>,
    /// Rings that the driver has enabled.
    #[prost(message, repeated, tag = "4")]
    pub(crate) rings: Vec<SavedServed>,
}

/// What was agreed on with a back end.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct SavedFront {
    /// What the device can do.
    #[prost(fixed64, tag = "1")]
    pub(crate) features: u64,
    /// Features of the protocol in use.
    #[prost(fixed64, tag = "2")]
    pub(crate) protocol: u64,
    /// Rings that it can serve.
    #[prost(uint64, tag = "3")]
    pub(crate) queues: u64,
    /// Regions that it has room for.
    #[prost(uint64, tag = "4")]
    pub(crate) room: u64,
    /// All of memory was shown to it region by region.
    #[prost(bool, tag = "5")]
    pub(crate) shown: bool,
    /// There is a socket for its own requests.
    #[prost(bool, tag = "6")]
    pub(crate) channel: bool,
}

/// A ring.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct SavedServed {
    /// Its number.
    #[prost(uint32, tag = "1")]
    pub(crate) index: u32,
    /// The back end serves it.
    #[prost(bool, tag = "2")]
    pub(crate) started: bool,
    /// It signals an eventfd of this process, because the guest has no vector for it.
    #[prost(bool, tag = "3")]
    pub(crate) relayed: bool,
}

/// One with something in every field, for golden files.
#[doc(hidden)]
pub fn example() -> SavedBackend {
    let front =
        SavedFront { features: 1 << 32 | 5, protocol: 0x1_2345, queues: 4, room: 32, shown: true, channel: true };
    let ring = |index| SavedServed { index, started: index == 0, relayed: true };
    SavedBackend { front: Some(front), missing: true, in_flight: (1..=20).collect(), rings: vec![ring(0), ring(1)] }
}
