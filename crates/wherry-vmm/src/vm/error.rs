//! What can go wrong while a machine is made or driven.

use crate::config::ConfigError;
use wherry_memory::MemoryError;
use wherry_state::UnitsError;

/// An operation on a machine failed.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The configuration is impossible.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// `/dev/kvm` cannot be used.
    #[error("cannot use /dev/kvm: {0}; is KVM enabled, and may this user open it?")]
    NoKvm(#[source] std::io::Error),
    /// KVM is too old or the host lacks something this machine needs.
    #[error("this host lacks {}", .0.join(", "))]
    Lacks(Vec<String>),
    /// KVM refused a call.
    #[error("KVM, {what}: {source}")]
    Kvm {
        /// What was being done.
        what: String,
        /// Why KVM refused.
        source: std::io::Error,
    },
    /// Guest RAM could not be made.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The CPU model asks for what this host does not have.
    #[error("CPU model {model} needs what this host lacks: {}", .lacking.join(", "))]
    CpuModel {
        /// The model.
        model: String,
        /// What is lacking.
        lacking: Vec<String>,
    },
    /// The kernel, initrd or boot structures could not be loaded.
    #[error("loading the guest: {0}")]
    Boot(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A device could not be made.
    #[error("making the devices: {0}")]
    Device(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The state units do not fit together, or a step of them failed.
    #[error(transparent)]
    Units(#[from] UnitsError),
    /// A vCPU thread could not be started.
    #[error("starting the thread of vCPU {vcpu}: {source}")]
    Thread {
        /// The vCPU.
        vcpu: u32,
        /// Why not.
        source: std::io::Error,
    },
    /// vCPUs did not come to rest in time. The machine runs on.
    #[error("vCPU {} did not come to rest within {limit_ms} ms; it may wait for memory that is not there yet", list(.vcpus))]
    NotAtRest {
        /// Which.
        vcpus: Vec<u32>,
        /// How long they were given.
        limit_ms: u64,
    },
    /// The machine has ended.
    #[error("the machine has ended: {0}")]
    Ended(super::ExitReason),
}

fn list(vcpus: &[u32]) -> String {
    vcpus.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
}

impl VmError {
    /// Makes the error of a KVM call.
    pub(crate) fn kvm(what: impl Into<String>) -> impl FnOnce(vmm_sys_util::errno::Error) -> Self {
        let what = what.into();
        move |e| VmError::Kvm { what, source: e.into() }
    }
}
