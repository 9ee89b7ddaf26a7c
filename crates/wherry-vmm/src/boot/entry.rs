//! How the first vCPU starts: registers as data, for whoever owns the vCPU.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs, kvm_sregs2};

use super::low;

/// Where and how the first vCPU starts. The others wait for a start-up IPI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// PVH: 32-bit protected mode, flat segments, paging off.
    Pvh {
        /// Address of the first instruction.
        rip: u32,
        /// Address of `hvm_start_info`, for `ebx`.
        start_info: u32,
    },
    /// The 64-bit Linux boot protocol: long mode with identity page tables.
    Linux64 {
        /// Address of the first instruction.
        rip: u64,
        /// Address of the zero page, for `rsi`.
        zero_page: u64,
        /// Address of the PML4.
        page_tables: u64,
    },
}

/// The system registers an [`Entry`] asks for. All others keep the value KVM gives at reset.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EntrySregs {
    code: kvm_segment,
    data: kvm_segment,
    task: kvm_segment,
    gdt: kvm_dtable,
    idt: kvm_dtable,
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// The segment descriptors at [`low::GDT`]: null, null, code at selector 0x10, data at 0x18.
pub(super) fn gdt(long_mode: bool) -> [u64; 4] {
    [0, 0, if long_mode { 0x00af_9b00_0000_ffff } else { 0x00cf_9b00_0000_ffff }, 0x00cf_9300_0000_ffff]
}

/// General and system registers for the first vCPU. The caller reads the vCPU's system registers, lets
/// [`EntrySregs::apply`] change them, and writes them back.
pub fn entry_state(entry: &Entry) -> (kvm_regs, EntrySregs) {
    // Bit 1 of the flags is always one; interrupts are off.
    let mut regs = kvm_regs { rflags: 2, ..Default::default() };
    let flat = |selector, type_, db, l| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db,
        s: 1,
        l,
        g: 1,
        ..Default::default()
    };
    let mut sregs = EntrySregs {
        code: flat(0x10, 0xb, 1, 0),
        data: flat(0x18, 3, 1, 0),
        // Busy TSS; VM entry demands one.
        task: kvm_segment { limit: 0x67, type_: 0xb, present: 1, ..Default::default() },
        gdt: kvm_dtable { base: low::GDT, limit: 4 * 8 - 1, ..Default::default() },
        idt: kvm_dtable::default(),
        cr0: CR0_PE | CR0_ET,
        cr3: 0,
        cr4: 0,
        efer: 0,
    };
    match *entry {
        Entry::Pvh { rip, start_info } => {
            regs.rip = rip.into();
            regs.rbx = start_info.into();
        }
        Entry::Linux64 { rip, zero_page, page_tables } => {
            regs.rip = rip;
            regs.rsi = zero_page;
            sregs.code = flat(0x10, 0xb, 0, 1);
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = page_tables;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
        }
    }
    (regs, sregs)
}

macro_rules! apply {
    ($self:ident, $to:ident) => {{
        $to.cs = $self.code;
        for segment in [&mut $to.ds, &mut $to.es, &mut $to.fs, &mut $to.gs, &mut $to.ss] {
            *segment = $self.data;
        }
        $to.tr = $self.task;
        $to.gdt = $self.gdt;
        $to.idt = $self.idt;
        $to.cr0 = $self.cr0;
        $to.cr3 = $self.cr3;
        $to.cr4 = $self.cr4;
        $to.efer = $self.efer;
    }};
}

impl EntrySregs {
    /// Changes what the entry asks for.
    pub fn apply(&self, to: &mut kvm_sregs) {
        apply!(self, to);
    }

    /// The same for the newer structure.
    pub fn apply2(&self, to: &mut kvm_sregs2) {
        apply!(self, to);
    }
}
