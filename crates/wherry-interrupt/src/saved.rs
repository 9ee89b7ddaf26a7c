//! What of interrupts is state. It is part of the state of the device they belong to.

use crate::{Message, Setting, Vector};

/// One vector. Which eventfd its device signals follows from `open`.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct SavedVector {
    /// Address of its message.
    #[prost(fixed64, tag = "1")]
    pub address: u64,
    /// Data of its message.
    #[prost(fixed32, tag = "2")]
    pub data: u32,
    /// It may interrupt.
    #[prost(bool, tag = "3")]
    pub open: bool,
    /// It waits to be delivered.
    #[prost(bool, tag = "4")]
    pub pending: bool,
}

impl SavedVector {
    pub(crate) fn of(vector: &Vector) -> Self {
        let (Setting { message, open }, pending) = vector.setting_and_pending();
        Self { address: message.address, data: message.data, open, pending }
    }

    pub(crate) fn setting(&self) -> Setting {
        Setting { message: Message { address: self.address, data: self.data }, open: self.open }
    }
}
