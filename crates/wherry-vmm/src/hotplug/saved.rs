//! What the unit `pci-hotplug` saves.

use wherry_state::SavedState;

/// Schema 1. A bit for each slot, which is the device number of bus 0.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct SavedHotplug {
    /// Status register of the general-purpose events.
    #[prost(uint32, tag = "1")]
    pub gpe_status: u32,
    /// Enable register of the general-purpose events.
    #[prost(uint32, tag = "2")]
    pub gpe_enable: u32,
    /// Slots with a new device that the guest has not been told of.
    #[prost(uint32, tag = "3")]
    pub up: u32,
    /// Slots that the guest is to let go, and has not been told of.
    #[prost(uint32, tag = "4")]
    pub down: u32,
    /// Slots that the guest has let go, and whose devices are still to be taken away.
    #[prost(uint32, tag = "5")]
    pub ejected: u32,
}

impl SavedState for SavedHotplug {
    const SCHEMA: u32 = 1;
}
