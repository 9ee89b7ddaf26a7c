//! What of the interrupt capabilities is state, beside configuration space.

use wherry_interrupt::saved::SavedVector;

/// MSI-X. Message control is part of configuration space.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedMsix {
    /// The table as the guest reads it: 16 bytes a vector.
    #[prost(bytes = "vec", tag = "1")]
    pub table: Vec<u8>,
    /// The vectors.
    #[prost(message, repeated, tag = "2")]
    pub vectors: Vec<SavedVector>,
}
