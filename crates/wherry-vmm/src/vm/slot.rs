//! Memory slots: which RAM KVM maps into the guest.
#![expect(unsafe_code, reason = "gives KVM addresses of our mappings")]

use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vmm_sys_util::errno::Error;
use wherry_memory::Block;

/// The slot of a RAM block. It keeps the block, and so its mapping, alive.
#[derive(Clone, Debug)]
pub(crate) struct MemorySlot {
    pub(crate) number: u32,
    pub(crate) block: Arc<Block>,
}

impl MemorySlot {
    /// Makes the slot, or changes its flags (`KVM_MEM_LOG_DIRTY_PAGES`) if it is there.
    pub(crate) fn register(&self, vm: &VmFd, flags: u32) -> Result<(), Error> {
        let spec = self.block.spec();
        let region = kvm_userspace_memory_region {
            slot: self.number,
            flags,
            guest_phys_addr: spec.guest_base,
            memory_size: spec.size,
            userspace_addr: self.block.guest_map() as u64,
        };
        // SAFETY: the range is the block's guest map, which is mapped as long as the block lives. Whoever registers a
        // slot keeps it until the VM's vCPUs have ended (`Vm` does, by keeping its RAM).
        unsafe { vm.set_user_memory_region(region) }
    }
}
