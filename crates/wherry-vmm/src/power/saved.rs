//! What the unit `acpi` saves.

use wherry_state::SavedState;

/// Schema 1.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct SavedAcpi {
    /// PM1 status register.
    #[prost(uint32, tag = "1")]
    pub pm1_status: u32,
    /// PM1 enable register.
    #[prost(uint32, tag = "2")]
    pub pm1_enable: u32,
    /// PM1 control register.
    #[prost(uint32, tag = "3")]
    pub pm1_control: u32,
    /// PM timer in its own ticks, not cut to the register's width.
    #[prost(uint64, tag = "4")]
    pub timer: u64,
    /// Reset control register.
    #[prost(uint32, tag = "5")]
    pub reset_control: u32,
    /// `CLOCK_REALTIME` in ns when `timer` was read.
    #[prost(fixed64, tag = "6")]
    pub realtime_ns: u64,
}

impl SavedState for SavedAcpi {
    const SCHEMA: u32 = 1;
}
