//! Between KVM's structures and the saved ones. Pure: asks neither KVM nor the clock.

use kvm_bindings::{
    KVM_VCPUEVENT_VALID_SIPI_VECTOR, kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs, kvm_sregs2,
    kvm_vcpu_events,
};

use super::saved::{DebugRegisters, Events, Registers, Segment, SpecialRegisters, Table};

/// `KVM_SREGS2_FLAGS_PDPTRS_VALID`.
const PDPTRS_VALID: u64 = 1;

impl From<&kvm_regs> for Registers {
    fn from(r: &kvm_regs) -> Self {
        Self {
            rax: r.rax,
            rbx: r.rbx,
            rcx: r.rcx,
            rdx: r.rdx,
            rsi: r.rsi,
            rdi: r.rdi,
            rsp: r.rsp,
            rbp: r.rbp,
            r8: r.r8,
            r9: r.r9,
            r10: r.r10,
            r11: r.r11,
            r12: r.r12,
            r13: r.r13,
            r14: r.r14,
            r15: r.r15,
            rip: r.rip,
            rflags: r.rflags,
        }
    }
}

impl From<&Registers> for kvm_regs {
    fn from(r: &Registers) -> Self {
        Self {
            rax: r.rax,
            rbx: r.rbx,
            rcx: r.rcx,
            rdx: r.rdx,
            rsi: r.rsi,
            rdi: r.rdi,
            rsp: r.rsp,
            rbp: r.rbp,
            r8: r.r8,
            r9: r.r9,
            r10: r.r10,
            r11: r.r11,
            r12: r.r12,
            r13: r.r13,
            r14: r.r14,
            r15: r.r15,
            rip: r.rip,
            rflags: r.rflags,
        }
    }
}

impl From<&kvm_segment> for Segment {
    fn from(s: &kvm_segment) -> Self {
        let bit = |value: u8, at: u32| u32::from(value & 1) << at;
        let access = u32::from(s.type_ & 15)
            | bit(s.s, 4)
            | u32::from(s.dpl & 3) << 5
            | bit(s.present, 7)
            | bit(s.avl, 12)
            | bit(s.l, 13)
            | bit(s.db, 14)
            | bit(s.g, 15)
            | bit(s.unusable, 16);
        Self { base: s.base, limit: s.limit, selector: s.selector.into(), access }
    }
}

impl From<&Segment> for kvm_segment {
    fn from(s: &Segment) -> Self {
        let bits = |at: u32, mask: u32| (s.access >> at & mask) as u8;
        Self {
            base: s.base,
            limit: s.limit,
            selector: s.selector as u16,
            type_: bits(0, 15),
            s: bits(4, 1),
            dpl: bits(5, 3),
            present: bits(7, 1),
            avl: bits(12, 1),
            l: bits(13, 1),
            db: bits(14, 1),
            g: bits(15, 1),
            unusable: bits(16, 1),
            padding: 0,
        }
    }
}

fn table(t: &kvm_dtable) -> Option<Table> {
    Some(Table { base: t.base, limit: t.limit.into() })
}

fn dtable(t: Option<Table>) -> kvm_dtable {
    let t = t.unwrap_or_default();
    kvm_dtable { base: t.base, limit: t.limit as u16, padding: [0; 3] }
}

impl From<&kvm_sregs2> for SpecialRegisters {
    fn from(s: &kvm_sregs2) -> Self {
        Self {
            segments: [&s.cs, &s.ds, &s.es, &s.fs, &s.gs, &s.ss, &s.tr, &s.ldt].map(Segment::from).to_vec(),
            gdt: table(&s.gdt),
            idt: table(&s.idt),
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            cr8: s.cr8,
            efer: s.efer,
            apic_base: s.apic_base,
            pdptrs: if s.flags & PDPTRS_VALID != 0 { s.pdptrs.to_vec() } else { Vec::new() },
        }
    }
}

/// The part of `kvm_sregs2` that older kernels have. An interrupt that is under way is in the events.
pub(super) fn widen(s: &kvm_sregs) -> kvm_sregs2 {
    kvm_sregs2 {
        cs: s.cs,
        ds: s.ds,
        es: s.es,
        fs: s.fs,
        gs: s.gs,
        ss: s.ss,
        tr: s.tr,
        ldt: s.ldt,
        gdt: s.gdt,
        idt: s.idt,
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        flags: 0,
        pdptrs: [0; 4],
    }
}

/// For older kernels: without the PDPTRs, which KVM then reads from memory.
pub(super) fn narrow(s: &kvm_sregs2) -> kvm_sregs {
    kvm_sregs {
        cs: s.cs,
        ds: s.ds,
        es: s.es,
        fs: s.fs,
        gs: s.gs,
        ss: s.ss,
        tr: s.tr,
        ldt: s.ldt,
        gdt: s.gdt,
        idt: s.idt,
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        interrupt_bitmap: [0; 4],
    }
}

/// KVM's special registers from the saved ones; `None` if there are not eight segments.
pub(super) fn sregs2(s: &SpecialRegisters) -> Option<kvm_sregs2> {
    let segments: [kvm_segment; 8] = s.segments.iter().map(kvm_segment::from).collect::<Vec<_>>().try_into().ok()?;
    let [cs, ds, es, fs, gs, ss, tr, ldt] = segments;
    let pdptrs: Option<[u64; 4]> = s.pdptrs.as_slice().try_into().ok();
    Some(kvm_sregs2 {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr,
        ldt,
        gdt: dtable(s.gdt),
        idt: dtable(s.idt),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        flags: if pdptrs.is_some() { PDPTRS_VALID } else { 0 },
        pdptrs: pdptrs.unwrap_or_default(),
    })
}

impl From<&kvm_vcpu_events> for Events {
    fn from(e: &kvm_vcpu_events) -> Self {
        Self {
            flags: e.flags,
            exception_injected: e.exception.injected != 0,
            exception_number: e.exception.nr.into(),
            exception_has_error_code: e.exception.has_error_code != 0,
            exception_error_code: e.exception.error_code,
            exception_pending: e.exception.pending != 0,
            exception_has_payload: e.exception_has_payload != 0,
            exception_payload: e.exception_payload,
            interrupt_injected: e.interrupt.injected != 0,
            interrupt_number: e.interrupt.nr.into(),
            interrupt_soft: e.interrupt.soft != 0,
            interrupt_shadow: e.interrupt.shadow.into(),
            nmi_injected: e.nmi.injected != 0,
            nmi_pending: e.nmi.pending.into(),
            nmi_masked: e.nmi.masked != 0,
            sipi_vector: e.sipi_vector,
            smm: e.smi.smm != 0,
            smi_pending: e.smi.pending != 0,
            smm_inside_nmi: e.smi.smm_inside_nmi != 0,
            smi_latched_init: e.smi.latched_init != 0,
            triple_fault_pending: e.triple_fault.pending != 0,
        }
    }
}

impl From<&Events> for kvm_vcpu_events {
    fn from(e: &Events) -> Self {
        let flags = e.flags | KVM_VCPUEVENT_VALID_SIPI_VECTOR;
        let mut k = kvm_vcpu_events { flags, sipi_vector: e.sipi_vector, ..Default::default() };
        k.exception.injected = e.exception_injected.into();
        k.exception.nr = e.exception_number as u8;
        k.exception.has_error_code = e.exception_has_error_code.into();
        k.exception.error_code = e.exception_error_code;
        k.exception.pending = e.exception_pending.into();
        k.exception_has_payload = e.exception_has_payload.into();
        k.exception_payload = e.exception_payload;
        k.interrupt.injected = e.interrupt_injected.into();
        k.interrupt.nr = e.interrupt_number as u8;
        k.interrupt.soft = e.interrupt_soft.into();
        k.interrupt.shadow = e.interrupt_shadow as u8;
        k.nmi.injected = e.nmi_injected.into();
        k.nmi.pending = e.nmi_pending as u8;
        k.nmi.masked = e.nmi_masked.into();
        k.smi.smm = e.smm.into();
        k.smi.pending = e.smi_pending.into();
        k.smi.smm_inside_nmi = e.smm_inside_nmi.into();
        k.smi.latched_init = e.smi_latched_init.into();
        k.triple_fault.pending = e.triple_fault_pending.into();
        k
    }
}

impl From<&kvm_debugregs> for DebugRegisters {
    fn from(d: &kvm_debugregs) -> Self {
        Self { addresses: d.db.to_vec(), dr6: d.dr6, dr7: d.dr7 }
    }
}

/// KVM's debug registers from the saved ones; `None` if there are not four addresses.
pub(super) fn debugregs(d: &DebugRegisters) -> Option<kvm_debugregs> {
    let db = d.addresses.as_slice().try_into().ok()?;
    Some(kvm_debugregs { db, dr6: d.dr6, dr7: d.dr7, ..kvm_debugregs::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_keeps_every_bit() {
        for bit in 0..17u32 {
            if (8..12).contains(&bit) {
                continue;
            }
            let saved = Segment { base: u64::MAX, limit: 7, selector: 0xfff8, access: 1 << bit };
            assert_eq!(Segment::from(&kvm_segment::from(&saved)), saved, "bit {bit}");
        }
    }

    #[test]
    fn special_registers_come_back_with_their_pdptrs() {
        let mut s = kvm_sregs2 { cr3: 5, flags: 1, pdptrs: [1, 2, 3, 4], ..Default::default() };
        s.ldt.selector = 9;
        s.idt.limit = 0xfff;
        assert_eq!(sregs2(&SpecialRegisters::from(&s)), Some(s));
        s.flags = 0;
        assert_eq!(sregs2(&SpecialRegisters::from(&s)).map(|s| (s.flags, s.pdptrs)), Some((0, [0; 4])));
        assert_eq!(sregs2(&SpecialRegisters::default()), None);
    }

    #[test]
    fn events_come_back_as_they_were() {
        let mut k = kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_SIPI_VECTOR, sipi_vector: 8, ..Default::default() };
        k.interrupt.injected = 1;
        k.interrupt.nr = 33;
        k.nmi.pending = 2;
        k.exception_payload = 77;
        assert_eq!(kvm_vcpu_events::from(&Events::from(&k)), k);
    }
}
