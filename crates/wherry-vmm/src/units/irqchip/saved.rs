//! The saved state of the interrupt controllers that all vCPUs share, schema 1.

use wherry_state::SavedState;

/// Both PICs and the IOAPIC.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct IrqchipState {
    /// The first PIC.
    #[prost(message, optional, tag = "1")]
    pub pic_master: Option<Pic>,
    /// The second PIC.
    #[prost(message, optional, tag = "2")]
    pub pic_slave: Option<Pic>,
    /// The IOAPIC.
    #[prost(message, optional, tag = "3")]
    pub ioapic: Option<Ioapic>,
}

impl SavedState for IrqchipState {
    const SCHEMA: u32 = 1;
}

/// An i8259: `struct kvm_pic_state`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
#[expect(missing_docs, reason = "the fields are those of struct kvm_pic_state")]
pub struct Pic {
    #[prost(uint32, tag = "1")]
    pub last_irr: u32,
    #[prost(uint32, tag = "2")]
    pub irr: u32,
    #[prost(uint32, tag = "3")]
    pub imr: u32,
    #[prost(uint32, tag = "4")]
    pub isr: u32,
    #[prost(uint32, tag = "5")]
    pub priority_add: u32,
    #[prost(uint32, tag = "6")]
    pub irq_base: u32,
    #[prost(uint32, tag = "7")]
    pub read_reg_select: u32,
    #[prost(uint32, tag = "8")]
    pub poll: u32,
    #[prost(uint32, tag = "9")]
    pub special_mask: u32,
    #[prost(uint32, tag = "10")]
    pub init_state: u32,
    #[prost(uint32, tag = "11")]
    pub auto_eoi: u32,
    #[prost(uint32, tag = "12")]
    pub rotate_on_auto_eoi: u32,
    #[prost(uint32, tag = "13")]
    pub special_fully_nested_mode: u32,
    #[prost(uint32, tag = "14")]
    pub init4: u32,
    #[prost(uint32, tag = "15")]
    pub elcr: u32,
    #[prost(uint32, tag = "16")]
    pub elcr_mask: u32,
}

/// The IOAPIC.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Ioapic {
    /// Base address.
    #[prost(uint64, tag = "1")]
    pub base_address: u64,
    /// Register select.
    #[prost(uint32, tag = "2")]
    pub select: u32,
    /// Id.
    #[prost(uint32, tag = "3")]
    pub id: u32,
    /// Pins with a request.
    #[prost(uint32, tag = "4")]
    pub irr: u32,
    /// The 24 redirection entries.
    #[prost(fixed64, repeated, tag = "5")]
    pub redirections: Vec<u64>,
}
