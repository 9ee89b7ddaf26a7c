//! The few fields of a vCPU's run page that are used beside `kvm-ioctls`.
#![expect(unsafe_code, reason = "shares the run page with the kernel")]

use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;

/// A vCPU's run page, which the descriptor has mapped.
pub(super) struct RunPage(*mut kvm_run);

// SAFETY: points to a mapping that lives as long as the `Vcpu` it is part of. Any thread may access `immediate_exit`,
// atomically; the other fields are read only by the thread that has just left `KVM_RUN`.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// The run page of this vCPU. The caller keeps the descriptor for as long as the value.
    pub(super) fn of(fd: &mut VcpuFd) -> Self {
        Self(fd.get_kvm_run())
    }

    /// With `true`, `KVM_RUN` returns `EINTR` before it enters the guest.
    pub(super) fn set_immediate_exit(&self, value: bool) {
        // SAFETY: the byte is valid, aligned and mapped while `self` lives (see `of`). Nothing accesses it other than
        // through here: `kvm-ioctls` does so only in `set_kvm_immediate_exit`, which is not used.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.0).immediate_exit) }.store(value.into(), Ordering::SeqCst);
    }

    /// Bytes of one element of the port access that KVM has just reported: `rep outs` moves several in one exit.
    /// Called by the vCPU's thread after `KVM_EXIT_IO`.
    pub(super) fn pio_element(&self) -> usize {
        // SAFETY: mapped while `self` lives; the exit was KVM_EXIT_IO, so this is the valid member, and the kernel does
        // not write it outside KVM_RUN.
        usize::from(unsafe { (*self.0).__bindgen_anon_1.io.size }).max(1)
    }

    /// The sub-error of the internal error that KVM has just reported. Called by the vCPU's thread after
    /// `KVM_EXIT_INTERNAL_ERROR`.
    pub(super) fn internal_suberror(&self) -> u32 {
        // SAFETY: as above, for KVM_EXIT_INTERNAL_ERROR.
        unsafe { (*self.0).__bindgen_anon_1.internal.suberror }
    }
}
