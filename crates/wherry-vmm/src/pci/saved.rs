//! What the unit `pci-host` saves.

use wherry_state::SavedState;

/// Schema 1.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct SavedPciHost {
    /// CONFIG_ADDRESS, port 0xCF8.
    #[prost(uint32, tag = "1")]
    pub config_address: u32,
    /// Functions whose configuration space is saved here, in ascending order.
    #[prost(message, repeated, tag = "2")]
    pub functions: Vec<SavedFunction>,
}

/// One function.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct SavedFunction {
    /// Device in bits 7:3, function in bits 2:0.
    #[prost(uint32, tag = "1")]
    pub devfn: u32,
    /// Its configuration space; zeros at the end are left out.
    #[prost(bytes = "vec", tag = "2")]
    pub config: Vec<u8>,
    /// Length of the configuration space.
    #[prost(uint32, tag = "3")]
    pub length: u32,
}

impl SavedState for SavedPciHost {
    const SCHEMA: u32 = 1;
}
