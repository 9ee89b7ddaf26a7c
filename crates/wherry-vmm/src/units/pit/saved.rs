//! The saved state of the PIT, schema 1: `struct kvm_pit_state2` with times that do not depend on the host.

use wherry_state::SavedState;

/// The PIT.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PitState {
    /// The three channels.
    #[prost(message, repeated, tag = "1")]
    pub channels: Vec<PitChannel>,
    /// `KVM_PIT_FLAGS_*`.
    #[prost(uint32, tag = "2")]
    pub flags: u32,
}

impl SavedState for PitState {
    const SCHEMA: u32 = 1;
}

/// A channel.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PitChannel {
    /// Reload value, 1 to 65536.
    #[prost(uint32, tag = "1")]
    pub count: u32,
    /// Latched count.
    #[prost(uint32, tag = "2")]
    pub latched_count: u32,
    /// How many bytes of it are to be read.
    #[prost(uint32, tag = "3")]
    pub count_latched: u32,
    /// A status is latched.
    #[prost(uint32, tag = "4")]
    pub status_latched: u32,
    /// The latched status.
    #[prost(uint32, tag = "5")]
    pub status: u32,
    /// Which byte is read next.
    #[prost(uint32, tag = "6")]
    pub read_state: u32,
    /// Which byte is written next.
    #[prost(uint32, tag = "7")]
    pub write_state: u32,
    /// The first byte of a count that is being written.
    #[prost(uint32, tag = "8")]
    pub write_latch: u32,
    /// Access mode.
    #[prost(uint32, tag = "9")]
    pub rw_mode: u32,
    /// Counting mode.
    #[prost(uint32, tag = "10")]
    pub mode: u32,
    /// BCD counting.
    #[prost(uint32, tag = "11")]
    pub bcd: u32,
    /// Gate input.
    #[prost(uint32, tag = "12")]
    pub gate: u32,
    /// How long ago the count was loaded, in ns.
    #[prost(sint64, tag = "13")]
    pub loaded_ns_ago: i64,
}
