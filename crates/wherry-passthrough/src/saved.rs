//! What of a function is state.

use wherry_interrupt::saved::SavedVector;
use wherry_pci::saved::SavedMsix;
use wherry_state::SavedState;

/// A function: our part of it, and what its owner gave.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedPassthrough {
    /// Our configuration space, without zeros at its end.
    #[prost(bytes = "vec", tag = "1")]
    pub config: Vec<u8>,
    /// MSI-X.
    #[prost(message, optional, tag = "2")]
    pub msix: Option<SavedMsix>,
    /// Vectors of MSI.
    #[prost(message, repeated, tag = "3")]
    pub msi: Vec<SavedVector>,
    /// The state that the owner gave. Schema 1 only: since then it goes in a stream.
    #[prost(bytes = "vec", tag = "4")]
    pub device: Vec<u8>,
    /// Bytes of that stream.
    #[prost(uint64, tag = "5")]
    pub streamed: u64,
}

impl SavedState for SavedPassthrough {
    const SCHEMA: u32 = 2;
}

/// Where the loading of all functions is waited for.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedGathering {
    /// Functions of the machine.
    #[prost(uint32, tag = "1")]
    pub functions: u32,
}

impl SavedState for SavedGathering {
    const SCHEMA: u32 = 1;
}
