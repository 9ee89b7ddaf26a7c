//! What this host's KVM can do: asked once, before any machine is made.

use std::collections::BTreeMap;

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_NESTED_STATE, KVM_CAP_SREGS2, KVM_CAP_TSC_CONTROL,
    KVM_CAP_XSAVE2, KVM_CLOCK_REALTIME, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MAX_CPUID_ENTRIES, Msrs,
    kvm_cpuid_entry2, kvm_msr_entry, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use super::{VmError, ioctl};
use crate::units::vcpu::msrs;

/// MSRs that KVM reports as features and that a guest can read: `IA32_ARCH_CAPABILITIES`, `IA32_CORE_CAPABILITIES` and
/// `IA32_PERF_CAPABILITIES`. A destination must have at least their bits.
pub(crate) const FEATURE_MSRS: [(u32, &str); 3] =
    [(0x10a, "IA32_ARCH_CAPABILITIES"), (0xcf, "IA32_CORE_CAPABILITIES"), (0x345, "IA32_PERF_CAPABILITIES")];

/// KVM, and what it can do here.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
    /// All that a guest's CPUID may show.
    supported: Vec<kvm_cpuid_entry2>,
    /// The MSRs that KVM says have to be saved.
    msrs: Vec<u32>,
    /// The values of [`FEATURE_MSRS`] that a guest may have at most.
    features: BTreeMap<u32, u64>,
    /// Special registers can be had with PDPTRs.
    pub(crate) sregs2: bool,
    /// Extended state beyond 4 KiB can be had.
    pub(crate) xsave2: bool,
    /// Dirty bitmaps are cleared by us, not by reading them.
    pub(crate) manual_dirty_log: bool,
    /// The guest's TSC can be scaled.
    pub(crate) tsc_scaling: bool,
    /// The local APIC's TSC deadline timer can be shown.
    pub(crate) tsc_deadline: bool,
    /// KVM can advance the clock by the time that has passed since it was read.
    pub(crate) clock_realtime: bool,
    /// There may be nested state.
    pub(crate) nested: bool,
    /// Most vCPUs of a VM.
    pub(crate) max_vcpus: u32,
    /// Frequency of a guest's TSC that is not scaled, in kHz.
    pub(crate) tsc_khz: u32,
    /// The guest's TSC can be moved against the host's. Back ends that let the guest read the host's cannot.
    pub(crate) tsc_movable: bool,
    /// Bytes of a vCPU's XSAVE area, at least 4096.
    pub(crate) xsave_bytes: usize,
    /// The host's boot id; empty if it cannot be read, and then every host counts as another one.
    pub(crate) boot_id: String,
}

impl Host {
    /// Opens `/dev/kvm` and asks what it can do.
    pub fn open() -> Result<Self, VmError> {
        let kvm = Kvm::new().map_err(|e| VmError::NoKvm(e.into()))?;
        let mut lacks = Vec::new();
        if kvm.get_api_version() != KVM_API_VERSION as i32 {
            lacks.push(format!("API version {KVM_API_VERSION} (it has {})", kvm.get_api_version()));
        }
        for (cap, name) in [
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
            (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
            (Cap::Pit2, "KVM_CAP_PIT2"),
            (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
            (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
            (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
            (Cap::MpState, "KVM_CAP_MP_STATE"),
            (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
            (Cap::Xcrs, "KVM_CAP_XCRS"),
            (Cap::Xsave, "KVM_CAP_XSAVE"),
            (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
            (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
            (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
            (Cap::Irqfd, "KVM_CAP_IRQFD"),
        ] {
            if !kvm.check_extension(cap) {
                lacks.push(name.to_string());
            }
        }
        if !lacks.is_empty() {
            return Err(VmError::Lacks(lacks));
        }
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(VmError::kvm("listing CPUID"))?;
        let msrs = kvm.get_msr_index_list().map_err(VmError::kvm("listing MSRs"))?;
        let mut features = BTreeMap::new();
        for (index, _) in FEATURE_MSRS {
            let entry = kvm_msr_entry { index, ..Default::default() };
            if let Ok(mut one) = Msrs::from_entries(&[entry])
                && kvm.get_msrs(&mut one).is_ok_and(|n| n == 1)
            {
                features.insert(index, one.as_slice()[0].data);
            }
        }
        // Some things only a vCPU knows.
        let vm = kvm.create_vm().map_err(VmError::kvm("making a VM to ask"))?;
        let vcpu = vm.create_vcpu(0).map_err(VmError::kvm("making a vCPU to ask"))?;
        let tsc_khz = vcpu.get_tsc_khz().map_err(VmError::kvm("reading the TSC frequency"))?;
        let xsave_bytes = vm.check_extension_int(Cap::Xsave2).max(0) as usize;
        let tsc_movable = tsc_movable(&vcpu);
        vcpu.set_cpuid2(&supported).map_err(VmError::kvm("setting all of CPUID to ask"))?;
        // KVM may say of one that it supports it, and then have no vCPU take it.
        features.retain(|index, value| msrs::set(&vcpu, &[*index], &[*value]).is_ok());
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let has = |cap: u32| kvm.check_extension_raw(cap.into());
        Ok(Self {
            supported: supported.as_slice().to_vec(),
            msrs: msrs.as_slice().to_vec(),
            features,
            sregs2: has(KVM_CAP_SREGS2) > 0,
            xsave2: has(KVM_CAP_XSAVE2) > 0,
            manual_dirty_log: has(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) as u32 & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0,
            tsc_scaling: has(KVM_CAP_TSC_CONTROL) > 0,
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            clock_realtime: kvm.check_extension_int(Cap::AdjustClock) as u32 & KVM_CLOCK_REALTIME != 0,
            nested: has(KVM_CAP_NESTED_STATE) > 0,
            max_vcpus: kvm.get_max_vcpus().try_into().unwrap_or(u32::MAX),
            tsc_khz,
            tsc_movable,
            boot_id: boot_id.trim().into(),
            xsave_bytes: xsave_bytes.max(size_of::<kvm_xsave>()),
            kvm,
        })
    }

    /// The system descriptor.
    pub(crate) fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// All that a guest's CPUID may show on this host.
    pub(crate) fn supported_cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.supported
    }

    /// The MSRs that KVM says have to be saved.
    pub(crate) fn msrs(&self) -> &[u32] {
        &self.msrs
    }

    /// The most that a feature MSR may show; `None` where this host does not have it.
    pub(crate) fn feature_msr(&self, index: u32) -> Option<u64> {
        self.features.get(&index).copied()
    }
}

/// Whether a TSC offset that is set takes effect. Without the attribute, whether the TSC itself can be written.
fn tsc_movable(vcpu: &VcpuFd) -> bool {
    const FAR: u64 = 1 << 50;
    if ioctl::has_tsc_offset(vcpu) {
        // Not exactly: on a host whose TSC KVM calls unstable it corrects what it is given.
        let near = |now: u64| now.abs_diff(FAR) < FAR / 2;
        return ioctl::set_tsc_offset(vcpu, FAR).is_ok() && ioctl::get_tsc_offset(vcpu).is_ok_and(near);
    }
    let far = msrs::get(vcpu, msrs::TSC).map(|now| now.wrapping_add(FAR));
    far.is_some_and(|far| {
        msrs::set(vcpu, &[msrs::TSC], &[far]).is_ok() && msrs::get(vcpu, msrs::TSC).is_some_and(|now| now >= far)
    })
}

/// The name of one of [`FEATURE_MSRS`], or its number.
pub(crate) fn feature_msr_name(index: u32) -> String {
    FEATURE_MSRS.iter().find(|(i, _)| *i == index).map_or_else(|| format!("{index:#x}"), |(_, name)| (*name).into())
}

/// Huge pages of 2 MiB that nobody uses or has reserved.
pub(crate) fn free_huge_pages() -> u64 {
    let read = |name: &str| {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}");
        std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    read("free_hugepages").saturating_sub(read("resv_hugepages"))
}
