//! What goes wrong with a function of this host, and what can be done about it.

use std::io;
use std::sync::Arc;

use super::address::HostAddress;

/// A function of this host cannot be used, or did not do what it was asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum VfioError {
    /// There is none.
    #[error("vfio:{0}: there is no such PCI function here (`ls /sys/bus/pci/devices` shows those there are)")]
    Absent(HostAddress),
    /// It belongs to another driver, or to none.
    #[error("vfio:{address} is not bound to vfio-pci ({}); {}", of(driver), binding(*address, driver.is_some()))]
    NotBound {
        /// Which.
        address: HostAddress,
        /// Whose it is.
        driver: Option<String>,
    },
    /// Nothing would keep it from the host's memory.
    #[error(
        "vfio:{0} has no IOMMU group: switch the IOMMU on, in the firmware and on the host's kernel command line \
         (intel_iommu=on; AMD's is on by itself)"
    )]
    NoIommu(HostAddress),
    /// Devices that are not told apart by the IOMMU are in different hands.
    #[error(
        "vfio:{address}: its IOMMU group {group} is not viable, since others of it are in use by the host: {}; bind all of \
         the group to vfio-pci, or to no driver", others.join(", ")
    )]
    NotViable {
        /// Which.
        address: HostAddress,
        /// The group.
        group: u32,
        /// Who else is in it.
        others: Vec<String>,
    },
    /// Somebody has it open.
    #[error("vfio:{address}: {what} is in use by another process, which has to end first")]
    InUse {
        /// Which.
        address: HostAddress,
        /// The device node.
        what: String,
    },
    /// Interrupts could be forged.
    #[error(
        "vfio:{address}: the host has no interrupt remapping, so a device could raise any interrupt of the host: switch it on in \
         the firmware, or, where all guests are trusted, load vfio_iommu_type1 with allow_unsafe_interrupts=1"
    )]
    UnsafeInterrupts {
        /// Which.
        address: HostAddress,
    },
    /// Memory cannot be pinned.
    #[error("vfio:{device}: pinning {size} bytes of guest memory at {address:#x}: {source}{}", limit(source))]
    Pin {
        /// Which.
        device: HostAddress,
        /// In the guest.
        address: u64,
        /// Bytes.
        size: u64,
        /// Why not.
        source: Arc<io::Error>,
    },
    /// The kernel did not do something else.
    #[error("vfio:{device}: {what}: {source}")]
    Call {
        /// Which.
        device: HostAddress,
        /// What was being done.
        what: &'static str,
        /// Why not.
        source: Arc<io::Error>,
    },
    /// It cannot be used so.
    #[error("vfio:{device}: {reason}")]
    Lacks {
        /// Which.
        device: HostAddress,
        /// What is missing.
        reason: String,
    },
}

fn of(driver: &Option<String>) -> String {
    driver.as_ref().map_or_else(|| "it has no driver".into(), |driver| format!("its driver is {driver}"))
}

fn binding(address: HostAddress, driven: bool) -> String {
    let path = format!("/sys/bus/pci/devices/{address}");
    let unbind = if driven { format!("echo {address} > {path}/driver/unbind; ") } else { String::new() };
    format!(
        "to bind it, as root: modprobe vfio-pci; echo vfio-pci > {path}/driver_override; {unbind}echo {address} > \
         /sys/bus/pci/drivers_probe"
    )
}

fn limit(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOMEM | libc::EPERM) => " (is RLIMIT_MEMLOCK, `ulimit -l`, at least the memory of the VM?)",
        Some(libc::EINVAL) => " (does the IOMMU reach such addresses?)",
        _ => "",
    }
}

impl VfioError {
    /// The device has gone.
    pub(crate) fn is_lost(&self) -> bool {
        matches!(self, Self::Call { source, .. } if source.raw_os_error() == Some(libc::ENODEV))
    }

    pub(super) fn call(device: HostAddress, what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Call { device, what, source: Arc::new(source) }
    }

    /// The answer to the opening of a device node.
    pub(super) fn opening(address: HostAddress, node: &std::path::Path) -> impl FnOnce(io::Error) -> Self {
        let what = node.display().to_string();
        move |source| match source.raw_os_error() {
            Some(libc::EBUSY) => Self::InUse { address, what },
            _ => Self::Lacks { device: address, reason: format!("opening {what}: {source}") },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_that_is_not_bound_is_told_with_what_binds_it() {
        let address: HostAddress = "0000:00:04.0".parse().unwrap();
        let text = VfioError::NotBound { address, driver: Some("e1000e".into()) }.to_string();
        for part in ["its driver is e1000e", "modprobe vfio-pci", "driver_override", "0000:00:04.0/driver/unbind"] {
            assert!(text.contains(part), "{text}");
        }
        let text = VfioError::NotBound { address, driver: None }.to_string();
        assert!(text.contains("no driver") && !text.contains("unbind"), "{text}");
    }
}
