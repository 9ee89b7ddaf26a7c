//! What the guest's CPUs are: the CPUID table of a machine, made once where it is first started and carried with it.
//!
//! A destination does not make its own table: it compares the one it is sent with what its host can do
//! ([`lacking`]) and uses it unchanged. Only what differs from vCPU to vCPU (APIC ids, topology) is put in at each end,
//! by [`for_vcpu`], so the table on the wire is that of no vCPU in particular.
//!
//! `host` shows all that KVM can give. The x86-64 levels show the instructions of the level, what an operating system
//! needs to run a machine, and whatever the host has to guard against speculation: leaving that out would leave the guest open.

mod features;
mod levels;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use self::features::{Register, WORDS};
use crate::config::CpuModel;
use crate::vm::{Host, VmError};

/// An entry of a CPUID table, as it is sent to a destination.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct CpuidEntry {
    /// EAX on input.
    #[prost(uint32, tag = "1")]
    pub function: u32,
    /// ECX on input, where it matters.
    #[prost(uint32, tag = "2")]
    pub index: u32,
    /// `index` matters.
    #[prost(bool, tag = "3")]
    pub indexed: bool,
    /// EAX on output.
    #[prost(fixed32, tag = "4")]
    pub eax: u32,
    /// EBX on output.
    #[prost(fixed32, tag = "5")]
    pub ebx: u32,
    /// ECX on output.
    #[prost(fixed32, tag = "6")]
    pub ecx: u32,
    /// EDX on output.
    #[prost(fixed32, tag = "7")]
    pub edx: u32,
}

/// Leaf of KVM's signature and of the highest hypervisor leaf.
const HYPERVISOR: u32 = 0x4000_0000;
/// Leaf of the TSC's and the local APIC timer's frequency in kHz.
const HYPERVISOR_TIMING: u32 = 0x4000_0010;
/// KVM's local APIC timer counts nanoseconds.
const APIC_TIMER_KHZ: u32 = 1_000_000;

impl CpuidEntry {
    fn of(entry: &kvm_cpuid_entry2) -> Self {
        Self {
            function: entry.function,
            index: entry.index,
            indexed: entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
        }
    }

    fn to_kvm(self) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function: self.function,
            index: self.index,
            flags: if self.indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax: self.eax,
            ebx: self.ebx,
            ecx: self.ecx,
            edx: self.edx,
            padding: [0; 3],
        }
    }

    fn register(&mut self, register: Register) -> &mut u32 {
        match register {
            Register::Eax => &mut self.eax,
            Register::Ebx => &mut self.ebx,
            Register::Ecx => &mut self.ecx,
            Register::Edx => &mut self.edx,
        }
    }
}

/// Finds a leaf.
fn find(table: &[CpuidEntry], function: u32, index: u32) -> Option<CpuidEntry> {
    table.iter().find(|e| e.function == function && (!e.indexed || e.index == index)).copied()
}

fn value(table: &[CpuidEntry], function: u32, index: u32, register: Register) -> u32 {
    find(table, function, index).map_or(0, |mut entry| *entry.register(register))
}

/// All that this host can show, in our form: what KVM supports, and what it leaves to us to add.
fn host_table(host: &Host) -> Vec<CpuidEntry> {
    let mut table: Vec<_> = host.supported_cpuid().iter().map(CpuidEntry::of).collect();
    for entry in &mut table {
        if entry.function == 1 {
            // Older kernels do not list the deadline timer, although their local APIC has it.
            entry.ecx |= u32::from(host.tsc_deadline) << 24;
        }
    }
    hide_without_msr(&mut table, |index| host.feature_msr(index).is_some());
    table
}

/// Hides what announces an MSR that a vCPU does not have here. KVM says so of IA32_ARCH_CAPABILITIES on AMD processors.
fn hide_without_msr(table: &mut [CpuidEntry], has: impl Fn(u32) -> bool) {
    for (msr, function, register, bit) in ANNOUNCED_MSRS {
        if has(msr) {
            continue;
        }
        for entry in table.iter_mut().filter(|e| e.function == function && e.index == 0) {
            *entry.register(register) &= !(1 << bit);
        }
    }
}

/// Makes the table of a new machine with this many vCPUs. `tsc_khz` is the guest's TSC frequency.
pub(crate) fn table(host: &Host, model: CpuModel, tsc_khz: u32) -> Result<Vec<CpuidEntry>, VmError> {
    let mut table = host_table(host);
    let lacking = levels::apply(&mut table, model);
    if !lacking.is_empty() {
        return Err(VmError::CpuModel { model: model.to_string(), lacking });
    }
    let timing_is_there = table.iter().any(|e| e.function == HYPERVISOR_TIMING);
    for entry in &mut table {
        match entry.function {
            // We are a hypervisor; what follows CR4 starts as 0.
            1 => {
                entry.ecx = entry.ecx & !(1 << 27) | 1 << 31;
                entry.ebx &= 0x0000_ffff;
            }
            7 if entry.index == 0 => entry.ecx &= !(1 << 4),
            HYPERVISOR => entry.eax = entry.eax.max(HYPERVISOR_TIMING),
            HYPERVISOR_TIMING => (entry.eax, entry.ebx) = (tsc_khz, APIC_TIMER_KHZ),
            _ => {}
        }
    }
    if !timing_is_there && table.iter().any(|e| e.function == HYPERVISOR) {
        table.push(CpuidEntry { function: HYPERVISOR_TIMING, eax: tsc_khz, ebx: APIC_TIMER_KHZ, ..Default::default() });
    }
    // These are made for each vCPU.
    table.retain(|e| !matches!(e.function, 0xb | 0x1f));
    table.sort_by_key(|e| (e.function, e.index));
    Ok(table)
}

/// The table of one vCPU: one socket, a core for each vCPU, one thread a core, the vCPU's number as its APIC id.
pub(crate) fn for_vcpu(table: &[CpuidEntry], vcpu: u32, vcpus: u32) -> Result<CpuId, VmError> {
    // Bits of an APIC id within the socket.
    let bits = vcpus.next_power_of_two().trailing_zeros();
    let mut list: Vec<kvm_cpuid_entry2> = Vec::with_capacity(table.len() + 6);
    for entry in table {
        let mut e = entry.to_kvm();
        match e.function {
            1 => {
                e.ebx = e.ebx & 0x0000_ffff | vcpu << 24 | (1 << bits).min(255) << 16;
                e.edx = e.edx & !(1 << 28) | u32::from(vcpus > 1) << 28;
            }
            // Caches: threads that share one, and cores of the socket. All but the last level belong to a core.
            4 if e.eax & 0x1f != 0 => {
                let sharing = if e.eax >> 5 & 7 >= 3 { (1 << bits) - 1 } else { 0 };
                e.eax = e.eax & 0x3fff | sharing << 14 | ((1u32 << bits) - 1).min(63) << 26;
            }
            0x8000_0001 => e.ecx = e.ecx & !(1 << 1 | 1 << 22) | u32::from(vcpus > 1) << 1,
            0x8000_0008 => e.ecx = (vcpus - 1) & 0xff | bits << 12,
            0x8000_001e => (e.eax, e.ebx, e.ecx) = (vcpu, vcpu & 0xff, 0),
            _ => {}
        }
        list.push(e);
    }
    let highest = value(table, 0, 0, Register::Eax);
    for function in [0xb, 0x1f] {
        if highest < function {
            continue;
        }
        // Level 0 tells of threads (type 1), level 1 of cores (type 2), level 2 ends the list.
        for (index, shift, count, kind) in [(0, 0, 1, 1), (1, bits, vcpus, 2), (2, 0, 0, 0)] {
            list.push(kvm_cpuid_entry2 {
                function,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: count,
                ecx: kind << 8 | index,
                edx: vcpu,
                padding: [0; 3],
            });
        }
    }
    CpuId::from_entries(&list).map_err(|_| VmError::Lacks(vec![format!("room for {} CPUID entries", list.len())]))
}

/// What a guest with this table may use and this host does not have, by name. Empty if it can run here.
pub(crate) fn lacking(table: &[CpuidEntry], host: &Host) -> Vec<String> {
    lacking_in(table, &host_table(host))
}

fn lacking_in(table: &[CpuidEntry], here: &[CpuidEntry]) -> Vec<String> {
    let mut lacking = Vec::new();
    let vendor = |t: &[CpuidEntry]| {
        let leaf = find(t, 0, 0).unwrap_or_default();
        let bytes = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let (wanted, had) = (vendor(table), vendor(here));
    if wanted != had {
        lacking.push(format!("a CPU by {} (this host's is by {})", wanted.escape_debug(), had.escape_debug()));
    }
    for word in WORDS {
        let wanted = value(table, word.function, word.index, word.register) & word.features;
        let missing = wanted & !value(here, word.function, word.index, word.register);
        lacking
            .extend((0..32).filter(|bit| missing >> bit & 1 != 0).map(|bit| format!("CPU feature {}", word.name(bit))));
    }
    let (wanted, had) = (address_bits(table), address_bits(here));
    if wanted > had {
        lacking.push(format!("{wanted} physical address bits (this host has {had})"));
    }
    let (wanted, had) = (xsave_bytes(table), xsave_bytes(here));
    if wanted > had {
        lacking.push(format!("an XSAVE area of {wanted} bytes (this host's has {had})"));
    }
    lacking
}

/// Bytes of the largest XSAVE area in the standard format that a guest with this table can use.
pub(crate) fn xsave_bytes(table: &[CpuidEntry]) -> u32 {
    value(table, 0xd, 0, Register::Ecx)
}

/// Physical address bits of the guest's CPUs.
pub(crate) fn address_bits(table: &[CpuidEntry]) -> u32 {
    value(table, 0x8000_0008, 0, Register::Eax) & 0xff
}

/// Whether the table offers VMX or SVM.
pub(crate) fn offers_nesting(table: &[CpuidEntry]) -> bool {
    value(table, 1, 0, Register::Ecx) & 1 << 5 != 0 || value(table, 0x8000_0001, 0, Register::Ecx) & 1 << 2 != 0
}

/// MSRs that tell features, and the bit of CPUID that announces each: leaf, register, bit.
const ANNOUNCED_MSRS: [(u32, u32, Register, u32); 3] =
    [(0x10a, 7, Register::Edx, 29), (0xcf, 7, Register::Edx, 30), (0x345, 1, Register::Ecx, 15)];

/// Which of the MSRs that tell features a guest with this table looks at.
pub(crate) fn shown_feature_msrs(table: &[CpuidEntry]) -> impl Iterator<Item = u32> {
    ANNOUNCED_MSRS
        .into_iter()
        .filter(|(_, function, register, bit)| value(table, *function, 0, *register) >> bit & 1 != 0)
        .map(|(msr, ..)| msr)
}

#[cfg(test)]
mod tests;
