//! The saved state of the clock, schema 1.

use wherry_state::SavedState;

/// One moment, as the guest's clock, the world's clock and the host's TSC tell it; all three are zero-based as their
/// sources are.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ClockState {
    /// The guest's kvm-clock in ns.
    #[prost(fixed64, tag = "1")]
    pub kvmclock_ns: u64,
    /// The host's `CLOCK_REALTIME` in ns.
    #[prost(fixed64, tag = "2")]
    pub realtime_ns: u64,
    /// The host's TSC.
    #[prost(fixed64, tag = "3")]
    pub host_tsc: u64,
    /// The host's boot id: on the same host since the same boot, TSC offsets stay as they are.
    #[prost(string, tag = "4")]
    pub boot_id: String,
    /// The user has paused the machine: it is not to run after the start.
    #[prost(bool, tag = "5")]
    pub paused_by_user: bool,
}

impl SavedState for ClockState {
    const SCHEMA: u32 = 1;
}
