//! Makes the KVM side of a machine from its description: the same for a machine that boots and one that arrives.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap,
    kvm_pit_config,
};
use kvm_ioctls::VmFd;
use wherry_memory::Ram;

use super::{ExitNotice, Host, MemorySlot, VmError, ioctl};
use crate::cpu_model;
use crate::description::VmDescription;
use crate::layout;
use crate::units::clock::TimeBase;
use crate::units::vcpu::{VcpuTraits, msrs};
use crate::vcpu::{Vcpu, VcpuSet};

/// IA32_MCG_CAP: one bank of machine check registers, which a guest sets up and which we never raise. The fewer, the
/// less to save.
const MCG_CAP: u64 = 1;

/// The KVM side of a machine. Its vCPUs have no threads yet.
pub(crate) struct Assembly {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) slots: Vec<MemorySlot>,
    pub(crate) vcpus: Arc<VcpuSet>,
    pub(crate) traits: Arc<VcpuTraits>,
    /// The dirty log is cleared by us, not by reading it.
    pub(crate) manual_log: bool,
}

pub(crate) fn assemble(
    host: &Arc<Host>,
    ram: &Ram,
    description: &VmDescription,
    notice: &ExitNotice,
) -> Result<Assembly, VmError> {
    if description.cpus > host.max_vcpus {
        return Err(VmError::Lacks(vec![format!("room for {} vCPUs (it has {})", description.cpus, host.max_vcpus)]));
    }
    let vm = create_vm(host)?;
    if host.manual_dirty_log {
        let cap = kvm_enable_cap {
            cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            args: [KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.into(), 0, 0, 0],
            ..Default::default()
        };
        vm.enable_cap(&cap).map_err(VmError::kvm("enabling manual dirty log protection"))?;
    }
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(VmError::kvm("placing the identity map"))?;
    vm.set_tss_address(layout::KVM_TSS as usize).map_err(VmError::kvm("placing the TSS"))?;
    vm.create_irq_chip().map_err(VmError::kvm("making the interrupt controllers"))?;
    // The speaker port 0x61 belongs to the PIT, by which some guests measure time.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(VmError::kvm("making the PIT"))?;

    let slots: Vec<_> =
        ram.blocks().iter().zip(0..).map(|(block, number)| MemorySlot { number, block: block.clone() }).collect();
    for slot in &slots {
        let what = format!("mapping RAM block {} of {} bytes", slot.block.spec().id, slot.block.spec().size);
        slot.register(&vm, 0).map_err(VmError::kvm(what))?;
    }

    let mut vcpus = Vec::with_capacity(description.cpus as usize);
    let mut saved_msrs = Vec::new();
    let mut tsc_offset = false;
    for index in 0..description.cpus {
        let step = |what: &str| VmError::kvm(format!("vCPU {index}: {what}"));
        let fd = vm.create_vcpu(index.into()).map_err(step("making it"))?;
        let cpuid = cpu_model::for_vcpu(&description.cpuid, index, description.cpus)?;
        fd.set_cpuid2(&cpuid).map_err(step("setting CPUID"))?;
        if needs_scaling(host, description.tsc_khz) {
            fd.set_tsc_khz(description.tsc_khz).map_err(step("scaling the TSC"))?;
        }
        if let Err(error) = ioctl::setup_mce(&fd, MCG_CAP) {
            // Then there are more banks, and what the guest sets in them is lost when it moves. We never raise them.
            tracing::debug!(%error, "setting up machine checks");
        }
        let features = description.feature_msrs.iter().map(|m| (m.index, m.value));
        let (numbers, values): (Vec<_>, Vec<_>) = msrs::AT_BOOT.into_iter().chain(features).unzip();
        msrs::set(&fd, &numbers, &values)
            .map_err(|e| VmError::Lacks(vec![format!("a vCPU {index} as described: {e}")]))?;
        if index == 0 {
            saved_msrs = msrs::readable(&fd, host.msrs())?;
            tsc_offset = ioctl::has_tsc_offset(&fd) && !needs_scaling(host, description.tsc_khz);
        }
        vcpus.push(Arc::new(Vcpu::new(index, fd)));
    }
    let traits = VcpuTraits {
        host: host.clone(),
        time: Arc::new(TimeBase::default()),
        notice: notice.clone(),
        msrs: saved_msrs,
        xsave_bytes: host.xsave_bytes,
        tsc_khz: description.tsc_khz,
        tsc_offset,
        nested: host.nested && cpu_model::offers_nesting(&description.cpuid),
    };
    let vcpus = Arc::new(VcpuSet::new(vcpus));
    Ok(Assembly { vm: Arc::new(vm), slots, vcpus, traits: Arc::new(traits), manual_log: host.manual_dirty_log })
}

/// Makes a VM. A signal that interrupts this is no failure.
fn create_vm(host: &Host) -> Result<VmFd, VmError> {
    loop {
        match host.kvm().create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            made => return made.map_err(VmError::kvm("making a VM")),
        }
    }
}

/// Frequencies that differ by no more than this many parts in a million count as the same, as they do for KVM.
const TSC_TOLERANCE_PPM: u64 = 250;

/// Whether the guest's TSC runs so differently from the host's that it has to be scaled.
pub(crate) fn needs_scaling(host: &Host, guest_khz: u32) -> bool {
    tsc_differs(host.tsc_khz, guest_khz)
}

fn tsc_differs(host_khz: u32, guest_khz: u32) -> bool {
    u64::from(host_khz.abs_diff(guest_khz)) * 1_000_000 > u64::from(host_khz) * TSC_TOLERANCE_PPM
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_within_250_ppm_count_as_the_same() {
        assert!(!tsc_differs(2_000_000, 2_000_500));
        assert!(!tsc_differs(2_000_000, 1_999_500));
        assert!(tsc_differs(2_000_000, 2_000_501));
        assert!(tsc_differs(2_000_000, 3_000_000));
    }
}
