//! The x86-64 levels (System V psABI, "Micro-Architecture Levels") as masks over what the host has.

use super::features::{Register, WORDS};
use super::{CpuidEntry, value};
use crate::config::CpuModel;

/// What every x86-64 CPU has, and what an operating system uses to run the machine. Shown where the host has it.
const SYSTEM: &[&str] = &[
    // Baseline of the psABI, and the parts of the architecture that go with it.
    "fpu",
    "vme",
    "de",
    "pse",
    "tsc",
    "msr",
    "pae",
    "mce",
    "cx8",
    "apic",
    "sep",
    "mtrr",
    "pge",
    "mca",
    "cmov",
    "pat",
    "pse36",
    "clflush",
    "mmx",
    "fxsr",
    "sse",
    "sse2",
    "syscall",
    "nx",
    "lm",
    "rdtscp",
    "pdpe1gb",
    "cr8_legacy",
    "fxsr_opt",
    "mmxext",
    "mp",
    // Timers and interrupts.
    "x2apic",
    "tsc_deadline_timer",
    "arat",
    "tsc_adjust",
    "invtsc",
    // Protection of the kernel, which has no cost to portability among CPUs of this level.
    "smep",
    "smap",
    "umip",
    "fsgsbase",
    "pcid",
    "invpcid",
    // Guards against speculation: to leave them out would leave the guest open.
    "md_clear",
    "spec_ctrl",
    "intel_stibp",
    "flush_l1d",
    "arch_capabilities",
    "spec_ctrl_ssbd",
    "intel_psfd",
    "rrsba_ctrl",
    "ipred_ctrl",
    "bhi_ctrl",
    "ddpd_u",
    "mcdt_no",
    "amd_ibpb",
    "amd_ibrs",
    "amd_stibp",
    "stibp_always_on",
    "ibrs_same_mode",
    "amd_ssbd",
    "virt_ssbd",
    "amd_ssb_no",
    "amd_psfd",
    "btc_no",
    "ibpb_ret",
    "autoibrs",
    "lfence_always_serializing",
    "null_sel_clr_base",
    "no_nested_data_bp",
    "xsaveerptr",
    // XSAVE, whose components the level decides.
    "xsave",
    "xstate_x87",
    "xstate_sse",
    "xsaveopt",
    "xsavec",
    "xgetbv1",
    // KVM.
    "kvm_clocksource",
    "kvm_nop_io_delay",
    "kvm_clocksource2",
    "kvm_async_pf",
    "kvm_steal_time",
    "kvm_pv_eoi",
    "kvm_pv_unhalt",
    "kvm_pv_tlb_flush",
    "kvm_async_pf_vmexit",
    "kvm_pv_send_ipi",
    "kvm_poll_control",
    "kvm_pv_sched_yield",
    "kvm_async_pf_int",
    "kvm_clocksource_stable",
];
/// What each level adds. A host must have all of it.
const V2: &[&str] = &["cx16", "lahf_lm", "popcnt", "sse3", "sse4_1", "sse4_2", "ssse3"];
const V3: &[&str] = &["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave", "xstate_avx"];
const V4: &[&str] = &[
    "avx512f",
    "avx512bw",
    "avx512cd",
    "avx512dq",
    "avx512vl",
    "xstate_opmask",
    "xstate_zmm_hi256",
    "xstate_hi16_zmm",
];

/// Leaves that a level shows. Others describe what no level has.
fn shown(entry: &CpuidEntry, xcr0: u32) -> bool {
    match entry.function {
        0 | 1 | 2 | 4 | 6 | 0x4000_0000 | 0x4000_0001 | 0x4000_0010 => true,
        7 => entry.index <= 2,
        // A leaf for each state component that XCR0 may have.
        0xd => entry.index < 2 || entry.index < 32 && xcr0 >> entry.index & 1 != 0,
        0x8000_0000..=0x8000_0008 | 0x8000_001d | 0x8000_001e | 0x8000_0021 => true,
        _ => false,
    }
}

/// Reduces the table to what the model shows. Returns the names of what the model must have and the host lacks.
pub(super) fn apply(table: &mut Vec<CpuidEntry>, model: CpuModel) -> Vec<String> {
    let required: Vec<&str> = match model {
        CpuModel::Host => return Vec::new(),
        CpuModel::X86_64V2 => V2.to_vec(),
        CpuModel::X86_64V3 => [V2, V3].concat(),
        CpuModel::X86_64V4 => [V2, V3, V4].concat(),
    };
    let mut lacking = Vec::new();
    for word in WORDS {
        let mask = |names: &[&str]| names.iter().filter_map(|n| word.bit(n)).fold(0, |mask, bit| mask | 1u32 << bit);
        let (required, system) = (mask(&required), mask(SYSTEM));
        let missing = required & !value(table, word.function, word.index, word.register);
        lacking.extend((0..32).filter(|bit| missing >> bit & 1 != 0).map(|bit| word.name(bit)));
        for entry in table.iter_mut().filter(|e| e.function == word.function && (!e.indexed || e.index == word.index)) {
            *entry.register(word.register) &= required | system | !word.features;
        }
    }
    let xcr0 = value(table, 0xd, 0, Register::Eax);
    table.retain(|entry| shown(entry, xcr0));
    // The standard XSAVE area ends with the last component; one of 576 bytes has only x87 and SSE.
    let end = table
        .iter()
        .filter(|e| e.function == 0xd && e.index >= 2)
        .map(|e| e.eax.saturating_add(e.ebx))
        .max()
        .unwrap_or(0)
        .max(576);
    let highest = table.iter().map(|e| e.function).filter(|f| *f < 0x4000_0000).max().unwrap_or(0);
    for entry in table.iter_mut() {
        match (entry.function, entry.index) {
            // Keep room for the topology leaf, which every vCPU gets.
            (0, _) => entry.eax = entry.eax.min(highest.max(0xb)),
            (0xd, 0) => (entry.ebx, entry.ecx) = (end, end),
            (0xd, 1) => entry.ebx = 0,
            (0x8000_0000, _) => entry.eax = entry.eax.min(0x8000_0021),
            _ => {}
        }
    }
    lacking
}
