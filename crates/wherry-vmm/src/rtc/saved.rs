//! What the unit `rtc` saves.

use wherry_state::SavedState;

/// Schema 1.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct SavedRtc {
    /// The index register.
    #[prost(uint32, tag = "1")]
    pub index: u32,
    /// 128 bytes of CMOS memory; those of the clock itself are meaningless.
    #[prost(bytes = "vec", tag = "2")]
    pub cmos: Vec<u8>,
    /// The guest's time minus UTC, in seconds.
    #[prost(sint64, tag = "3")]
    pub offset: i64,
    /// While the guest sets the clock: the time it stands at, in seconds since 1970.
    #[prost(sint64, optional, tag = "4")]
    pub stopped: Option<i64>,
}

impl SavedState for SavedRtc {
    const SCHEMA: u32 = 1;
}
