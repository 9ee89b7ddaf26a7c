//! The saved state of a vCPU, schema 1. Values are the guest's, as KVM's API gives them (`Documentation/virt/kvm/api.rst`).

use wherry_state::SavedState;

/// One vCPU at rest.
#[derive(Clone, PartialEq, prost::Message)]
pub struct VcpuState {
    /// General registers.
    #[prost(message, optional, tag = "1")]
    pub registers: Option<Registers>,
    /// Segments, control registers, descriptor tables.
    #[prost(message, optional, tag = "2")]
    pub special: Option<SpecialRegisters>,
    /// Extended control registers.
    #[prost(message, repeated, tag = "3")]
    pub xcrs: Vec<Xcr>,
    /// The XSAVE area in its standard format, without zeros at its end.
    #[prost(bytes = "vec", tag = "4")]
    pub xsave: Vec<u8>,
    /// Numbers of the MSRs, each with its value at the same place in `msr_values`. Not the TSC and its deadline.
    #[prost(uint32, repeated, tag = "5")]
    pub msr_numbers: Vec<u32>,
    /// Values of the MSRs.
    #[prost(fixed64, repeated, tag = "6")]
    pub msr_values: Vec<u64>,
    /// The local APIC's register page, 1 KiB.
    #[prost(bytes = "vec", tag = "7")]
    pub lapic: Vec<u8>,
    /// Exceptions, interrupts, NMIs and SMIs under way.
    #[prost(message, optional, tag = "8")]
    pub events: Option<Events>,
    /// `KVM_MP_STATE_*`: runnable, halted, waiting for INIT or SIPI.
    #[prost(uint32, tag = "9")]
    pub mp_state: u32,
    /// Debug registers.
    #[prost(message, optional, tag = "10")]
    pub debug: Option<DebugRegisters>,
    /// Time stamp counter and its deadline.
    #[prost(message, optional, tag = "11")]
    pub tsc: Option<Tsc>,
    /// State of a nested hypervisor, as KVM gives it, if there is one.
    #[prost(bytes = "vec", optional, tag = "12")]
    pub nested: Option<Vec<u8>>,
}

impl SavedState for VcpuState {
    const SCHEMA: u32 = 1;
}

/// General registers.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
#[expect(missing_docs, reason = "the fields are the registers of the same names")]
pub struct Registers {
    #[prost(fixed64, tag = "1")]
    pub rax: u64,
    #[prost(fixed64, tag = "2")]
    pub rbx: u64,
    #[prost(fixed64, tag = "3")]
    pub rcx: u64,
    #[prost(fixed64, tag = "4")]
    pub rdx: u64,
    #[prost(fixed64, tag = "5")]
    pub rsi: u64,
    #[prost(fixed64, tag = "6")]
    pub rdi: u64,
    #[prost(fixed64, tag = "7")]
    pub rsp: u64,
    #[prost(fixed64, tag = "8")]
    pub rbp: u64,
    #[prost(fixed64, tag = "9")]
    pub r8: u64,
    #[prost(fixed64, tag = "10")]
    pub r9: u64,
    #[prost(fixed64, tag = "11")]
    pub r10: u64,
    #[prost(fixed64, tag = "12")]
    pub r11: u64,
    #[prost(fixed64, tag = "13")]
    pub r12: u64,
    #[prost(fixed64, tag = "14")]
    pub r13: u64,
    #[prost(fixed64, tag = "15")]
    pub r14: u64,
    #[prost(fixed64, tag = "16")]
    pub r15: u64,
    #[prost(fixed64, tag = "17")]
    pub rip: u64,
    #[prost(fixed64, tag = "18")]
    pub rflags: u64,
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Segment {
    /// Base address.
    #[prost(uint64, tag = "1")]
    pub base: u64,
    /// Limit in bytes.
    #[prost(uint32, tag = "2")]
    pub limit: u32,
    /// Selector.
    #[prost(uint32, tag = "3")]
    pub selector: u32,
    /// The access rights as in a VMCS: type 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13, D/B 14, G 15, unusable 16.
    #[prost(uint32, tag = "4")]
    pub access: u32,
}

/// A descriptor table register.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Table {
    /// Base address.
    #[prost(uint64, tag = "1")]
    pub base: u64,
    /// Limit in bytes.
    #[prost(uint32, tag = "2")]
    pub limit: u32,
}

/// Segments, control registers, descriptor tables.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SpecialRegisters {
    /// CS, DS, ES, FS, GS, SS, TR, LDT, in this order.
    #[prost(message, repeated, tag = "1")]
    pub segments: Vec<Segment>,
    /// GDTR.
    #[prost(message, optional, tag = "2")]
    pub gdt: Option<Table>,
    /// IDTR.
    #[prost(message, optional, tag = "3")]
    pub idt: Option<Table>,
    /// CR0.
    #[prost(uint64, tag = "4")]
    pub cr0: u64,
    /// CR2.
    #[prost(uint64, tag = "5")]
    pub cr2: u64,
    /// CR3.
    #[prost(uint64, tag = "6")]
    pub cr3: u64,
    /// CR4.
    #[prost(uint64, tag = "7")]
    pub cr4: u64,
    /// CR8.
    #[prost(uint64, tag = "8")]
    pub cr8: u64,
    /// EFER.
    #[prost(uint64, tag = "9")]
    pub efer: u64,
    /// IA32_APIC_BASE.
    #[prost(uint64, tag = "10")]
    pub apic_base: u64,
    /// The four page directory pointers, if the writer could read them and they are in use.
    #[prost(uint64, repeated, tag = "11")]
    pub pdptrs: Vec<u64>,
}

/// An extended control register.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Xcr {
    /// Its number.
    #[prost(uint32, tag = "1")]
    pub number: u32,
    /// Its value.
    #[prost(uint64, tag = "2")]
    pub value: u64,
}

/// What is under way: `struct kvm_vcpu_events`.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Events {
    /// `KVM_VCPUEVENT_VALID_*`.
    #[prost(uint32, tag = "1")]
    pub flags: u32,
    /// An exception is being delivered.
    #[prost(bool, tag = "2")]
    pub exception_injected: bool,
    /// Its vector.
    #[prost(uint32, tag = "3")]
    pub exception_number: u32,
    /// Whether it has an error code.
    #[prost(bool, tag = "4")]
    pub exception_has_error_code: bool,
    /// The error code.
    #[prost(uint32, tag = "5")]
    pub exception_error_code: u32,
    /// An exception is to be delivered.
    #[prost(bool, tag = "6")]
    pub exception_pending: bool,
    /// Whether it has a payload.
    #[prost(bool, tag = "7")]
    pub exception_has_payload: bool,
    /// The payload: the address of a page fault, or DR6.
    #[prost(uint64, tag = "8")]
    pub exception_payload: u64,
    /// An interrupt is being delivered.
    #[prost(bool, tag = "9")]
    pub interrupt_injected: bool,
    /// Its vector.
    #[prost(uint32, tag = "10")]
    pub interrupt_number: u32,
    /// It is a software interrupt.
    #[prost(bool, tag = "11")]
    pub interrupt_soft: bool,
    /// Interrupts are held off for one instruction: bit 0 MOV SS, bit 1 STI.
    #[prost(uint32, tag = "12")]
    pub interrupt_shadow: u32,
    /// An NMI is being delivered.
    #[prost(bool, tag = "13")]
    pub nmi_injected: bool,
    /// NMIs waiting.
    #[prost(uint32, tag = "14")]
    pub nmi_pending: u32,
    /// NMIs are masked.
    #[prost(bool, tag = "15")]
    pub nmi_masked: bool,
    /// Vector of a start-up IPI received.
    #[prost(uint32, tag = "16")]
    pub sipi_vector: u32,
    /// In system management mode.
    #[prost(bool, tag = "17")]
    pub smm: bool,
    /// An SMI waits.
    #[prost(bool, tag = "18")]
    pub smi_pending: bool,
    /// System management mode was entered in an NMI handler.
    #[prost(bool, tag = "19")]
    pub smm_inside_nmi: bool,
    /// An INIT was received in system management mode.
    #[prost(bool, tag = "20")]
    pub smi_latched_init: bool,
    /// A triple fault waits.
    #[prost(bool, tag = "21")]
    pub triple_fault_pending: bool,
}

/// Debug registers.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct DebugRegisters {
    /// DR0 to DR3.
    #[prost(uint64, repeated, tag = "1")]
    pub addresses: Vec<u64>,
    /// DR6.
    #[prost(uint64, tag = "2")]
    pub dr6: u64,
    /// DR7.
    #[prost(uint64, tag = "3")]
    pub dr7: u64,
}

/// Time stamp counter.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Tsc {
    /// Its value at the moment of the clock unit's `host_tsc`, or, where `offset` is absent, when it was read.
    #[prost(fixed64, tag = "1")]
    pub value: u64,
    /// What KVM added to the writer's TSC to make the guest's.
    #[prost(fixed64, optional, tag = "2")]
    pub offset: Option<u64>,
    /// IA32_TSC_DEADLINE: the TSC at which the local APIC's timer fires, 0 for none.
    #[prost(fixed64, tag = "3")]
    pub deadline: u64,
}
