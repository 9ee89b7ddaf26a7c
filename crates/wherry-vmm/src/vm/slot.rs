//! Memory slots: which RAM, and which memory of devices, KVM maps into the guest.
#![expect(unsafe_code, reason = "gives KVM addresses of our mappings")]

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vmm_sys_util::errno::Error;
use wherry_memory::Block;
use wherry_passthrough::{DeviceMemory, GuestMaps};

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

/// First number of a slot for memory of a device: RAM has those before.
const FIRST: u32 = 16;

/// Memory of devices that the guest reaches directly.
pub(super) struct DeviceSlots {
    vm: Arc<VmFd>,
    /// What is shown in each slot, and where. Held while KVM is asked.
    shown: Mutex<BTreeMap<u32, (u64, Arc<DeviceMemory>)>>,
}

impl DeviceSlots {
    pub(super) fn new(vm: Arc<VmFd>) -> Arc<Self> {
        Arc::new(Self { vm, shown: Mutex::default() })
    }

    fn set(&self, slot: u32, address: u64, memory: &DeviceMemory, size: u64) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: address,
            memory_size: size,
            userspace_addr: memory.start() as u64,
        };
        // SAFETY: the range is that mapping, which is kept in `shown` for as long as the slot is there; or the slot is deleted.
        Ok(unsafe { self.vm.set_user_memory_region(region) }?)
    }
}

impl GuestMaps for DeviceSlots {
    fn map(&self, address: u64, memory: &Arc<DeviceMemory>) -> io::Result<u32> {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = (FIRST..).find(|slot| !shown.contains_key(slot)).unwrap_or(u32::MAX);
        self.set(slot, address, memory, memory.size() as u64)?;
        shown.insert(slot, (address, memory.clone()));
        Ok(slot)
    }

    fn unmap(&self, map: u32) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((address, memory)) = shown.get(&map) else { return };
        match self.set(map, *address, memory, 0) {
            Ok(()) => {
                shown.remove(&map);
            }
            // The mapping stays, as KVM may still use it.
            Err(error) => tracing::error!(%error, slot = map, "taking memory of a device away from the guest"),
        }
    }
}
