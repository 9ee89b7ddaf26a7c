//! KVM system calls that `kvm-ioctls` does not have, or not in every form. Everything else goes through that crate.
#![expect(unsafe_code, reason = "ioctls")]

use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1,
    kvm_device_attr, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch,
    kvm_ioeventfd_flag_nr_deassign, kvm_sregs2,
};

use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::errno::{Error, Result};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};
use wherry_pci::Doorbell;

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);
ioctl_iow_nr!(KVM_X86_SETUP_MCE, KVMIO, 0x9c, u64);
ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_iow_nr!(KVM_HAS_DEVICE_ATTR, KVMIO, 0xe3, kvm_device_attr);

/// Reads the dirty bitmap of a slot with `pages` pages into `words`, which must have a word for each 64 of them. With
/// manual protection nothing is cleared; without it, this reads and clears.
pub(crate) fn get_dirty_log(vm: &VmFd, slot: u32, pages: u64, words: &mut [u64]) -> Result<()> {
    if (words.len() as u64) < pages.div_ceil(64) {
        return Err(Error::new(libc::EINVAL));
    }
    let log = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: words.as_mut_ptr().cast() },
    };
    // SAFETY: a VM descriptor, and a bitmap that is large enough for the slot: KVM writes ceil(pages / 64) words.
    check(unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &log) })
}

/// Clears the bits of `words` in the dirty bitmap of a slot and write-protects those pages again. `words` begins at
/// page `first`, a multiple of 64, and covers `pages`, a multiple of 64 unless it ends with the slot.
pub(crate) fn clear_dirty_log(vm: &VmFd, slot: u32, first: u64, pages: u32, words: &[u64]) -> Result<()> {
    if words.len() < pages.div_ceil(64) as usize {
        return Err(Error::new(libc::EINVAL));
    }
    let log = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page: first,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: words.as_ptr().cast_mut().cast() },
    };
    // SAFETY: a VM descriptor, and a bitmap of ceil(pages / 64) words, which KVM only reads.
    check(unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &log) })
}

/// Has writes to a doorbell signal an eventfd, or ends that.
pub(crate) fn ioeventfd(vm: &VmFd, bell: Doorbell, event: &dyn AsRawFd, attach: bool) -> Result<()> {
    let matched = if bell.data.is_some() { 1 << kvm_ioeventfd_flag_nr_datamatch } else { 0 };
    let ending = if attach { 0 } else { 1 << kvm_ioeventfd_flag_nr_deassign };
    let ioeventfd = kvm_ioeventfd {
        datamatch: bell.data.unwrap_or(0),
        addr: bell.address,
        len: bell.len,
        fd: event.as_raw_fd(),
        flags: matched | ending,
        ..Default::default()
    };
    // SAFETY: a VM descriptor and the structure that this call reads; KVM checks the descriptor in it.
    check(unsafe { ioctl_with_ref(vm, KVM_IOEVENTFD(), &ioeventfd) })
}

/// Special registers with the PDPTRs.
pub(crate) fn get_sregs2(vcpu: &VcpuFd) -> Result<kvm_sregs2> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: a vCPU descriptor and the structure that this call fills.
    check(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) })?;
    Ok(sregs)
}

/// Sets special registers and PDPTRs.
pub(crate) fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> Result<()> {
    // SAFETY: a vCPU descriptor and the structure that this call reads.
    check(unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), sregs) })
}

/// What is added to the host's TSC to make the guest's.
pub(crate) fn get_tsc_offset(vcpu: &VcpuFd) -> Result<u64> {
    let mut offset = 0u64;
    let attr = tsc_attr(&raw mut offset);
    // SAFETY: a vCPU descriptor; KVM writes 8 bytes to the address in the attribute, which is `offset`.
    check(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attr) })?;
    Ok(offset)
}

/// Sets what is added to the host's TSC to make the guest's.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<()> {
    let attr = tsc_attr(&raw mut offset);
    // SAFETY: a vCPU descriptor; KVM reads 8 bytes at the address in the attribute, which is `offset`.
    check(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attr) })
}

/// Whether the TSC offset can be read and set.
pub(crate) fn has_tsc_offset(vcpu: &VcpuFd) -> bool {
    let attr = tsc_attr(std::ptr::null_mut());
    // SAFETY: a vCPU descriptor; this call does not look at the address.
    check(unsafe { ioctl_with_ref(vcpu, KVM_HAS_DEVICE_ATTR(), &attr) }).is_ok()
}

fn tsc_attr(offset: *mut u64) -> kvm_device_attr {
    kvm_device_attr { flags: 0, group: KVM_VCPU_TSC_CTRL, attr: KVM_VCPU_TSC_OFFSET.into(), addr: offset as u64 }
}

/// Says how many machine check banks a vCPU has, before it runs: the value of IA32_MCG_CAP.
pub(crate) fn setup_mce(vcpu: &VcpuFd, mcg_cap: u64) -> Result<()> {
    // SAFETY: a vCPU descriptor and the 8 bytes that this call reads.
    check(unsafe { ioctl_with_ref(vcpu, KVM_X86_SETUP_MCE(), &mcg_cap) })
}

/// Reads the host's TSC.
pub(crate) fn host_tsc() -> u64 {
    // SAFETY: every x86-64 CPU has the instruction, and Linux lets user space execute it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Identifies the thread that calls, for [`kick`].
pub(crate) fn thread_id() -> libc::pid_t {
    // SAFETY: no arguments, cannot fail.
    unsafe { libc::gettid() }
}

/// Interrupts a thread of this process that may be in `KVM_RUN`.
pub(crate) fn kick(thread: libc::pid_t, signal: i32) {
    // SAFETY: a signal to a thread of this process; its handler does nothing. The caller knows that the thread lives.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal) };
}

fn check(ret: i32) -> Result<()> {
    if ret < 0 { Err(Error::last()) } else { Ok(()) }
}
