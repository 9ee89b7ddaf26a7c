//! What KVM is told of functions that the kernel has (`KVM_DEV_TYPE_VFIO`): drivers of some want to know which VM they are in, and KVM
//! whether their DMA is coherent.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};
use wherry_passthrough::HypervisorFiles;

/// The files of a VM.
pub(super) struct DeviceFiles {
    vm: Arc<VmFd>,
    /// Held while KVM is asked.
    told: Mutex<Told>,
}

#[derive(Default)]
struct Told {
    /// Made for the first.
    device: Option<DeviceFd>,
    /// How often each was told.
    files: BTreeMap<RawFd, u32>,
}

impl DeviceFiles {
    pub(super) fn new(vm: Arc<VmFd>) -> Arc<Self> {
        Arc::new(Self { vm, told: Mutex::default() })
    }
}

fn set(device: &DeviceFd, attr: u32, file: RawFd) -> io::Result<()> {
    let addr = std::ptr::from_ref(&file) as u64;
    let attr = kvm_device_attr { group: KVM_DEV_VFIO_FILE, attr: attr.into(), addr, flags: 0 };
    Ok(device.set_device_attr(&attr)?)
}

impl HypervisorFiles for DeviceFiles {
    fn add(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let Told { device, files } = &mut *told;
        let count = files.entry(file.as_raw_fd()).or_default();
        if *count == 0 {
            let device = match device {
                Some(device) => device,
                None => {
                    let mut create = kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, fd: 0, flags: 0 };
                    device.insert(self.vm.create_device(&mut create)?)
                }
            };
            set(device, KVM_DEV_VFIO_FILE_ADD, file.as_raw_fd())?;
        }
        *count += 1;
        Ok(())
    }

    fn remove(&self, file: BorrowedFd<'_>) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let number = file.as_raw_fd();
        let Some(count) = told.files.get_mut(&number) else { return };
        *count = count.saturating_sub(1);
        if *count == 0 {
            told.files.remove(&number);
            if let Some(Err(error)) = told.device.as_ref().map(|device| set(device, KVM_DEV_VFIO_FILE_DEL, number)) {
                tracing::error!(%error, "having KVM forget a function of this host");
            }
        }
    }
}
