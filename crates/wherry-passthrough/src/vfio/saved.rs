//! How another process goes on with a function of this host; descriptors go beside it.

/// What the function hangs on.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct SavedHold {
    /// Its group, if it was opened by that.
    #[prost(uint32, optional, tag = "1")]
    pub(super) group: Option<u32>,
    /// The number of the machine's address space, with iommufd.
    #[prost(uint32, optional, tag = "2")]
    pub(super) iommufd: Option<u32>,
    /// The number of the function's page table, if it has one of its own.
    #[prost(uint32, optional, tag = "3")]
    pub(super) table: Option<u32>,
    /// Where its configuration space begins in its file.
    #[prost(uint64, tag = "4")]
    pub(super) config: u64,
    /// Where each BAR begins in it.
    #[prost(uint64, repeated, tag = "5")]
    pub(super) bars: Vec<u64>,
    /// It is reset by its bus.
    #[prost(bool, tag = "6")]
    pub(super) hot_reset: bool,
    /// It signals errors.
    #[prost(bool, tag = "7")]
    pub(super) errors: bool,
    /// It signals that the host wants it back.
    #[prost(bool, tag = "8")]
    pub(super) requests: bool,
    /// It can tell by itself what it writes; else the IOMMU does, if anybody.
    #[prost(bool, tag = "9")]
    pub(super) logs: bool,
}
