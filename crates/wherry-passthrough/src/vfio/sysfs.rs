//! What sysfs says of a function: its group, its driver, and those with whom it shares the group.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::address::HostAddress;
use super::error::VfioError;

/// Where the kernel shows its devices: `/sys` and `/dev`, or what a test has made like them.
#[derive(Clone, Debug)]
pub struct Places {
    /// `/sys`.
    pub sys: PathBuf,
    /// `/dev`.
    pub dev: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self { sys: "/sys".into(), dev: "/dev".into() }
    }
}

/// Drivers that do no DMA of their own, so that a group is viable with them.
const HARMLESS: [&str; 2] = ["pcieport", "pci-stub"];

/// Opens a device node, for a function.
pub(super) fn open(node: &Path, address: HostAddress) -> Result<OwnedFd, VfioError> {
    let file = File::options().read(true).write(true).open(node);
    file.map(OwnedFd::from).map_err(VfioError::opening(address, node))
}

fn last(path: &Path) -> Option<String> {
    let target = std::fs::read_link(path).ok()?;
    Some(target.file_name()?.to_string_lossy().into_owned())
}

impl Places {
    fn function(&self, address: HostAddress) -> PathBuf {
        self.sys.join("bus/pci/devices").join(address.to_string())
    }

    /// The driver of a function.
    fn driver(&self, function: &Path) -> Option<String> {
        last(&function.join("driver"))
    }

    /// The group of a function that is bound to a driver of VFIO.
    pub(super) fn group(&self, address: HostAddress) -> Result<u32, VfioError> {
        let function = self.function(address);
        if !function.exists() {
            return Err(VfioError::Absent(address));
        }
        let driver = self.driver(&function);
        let bound = function.join("vfio-dev").exists()
            || driver.as_deref().is_some_and(|driver| driver.replace('_', "-").contains("vfio-pci"));
        if !bound {
            return Err(VfioError::NotBound { address, driver });
        }
        let group = last(&function.join("iommu_group")).and_then(|group| group.parse().ok());
        group.ok_or(VfioError::NoIommu(address))
    }

    /// Who else is in a group, and keeps it from being used: each with its driver.
    pub(super) fn in_the_way(&self, group: u32) -> Vec<String> {
        let members = self.sys.join("kernel/iommu_groups").join(group.to_string()).join("devices");
        let mut others: Vec<_> = std::fs::read_dir(members)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let driver = self.driver(&entry.path())?;
                let vfio = driver.contains("vfio") || HARMLESS.contains(&driver.as_str());
                (!vfio).then(|| format!("{} ({driver})", entry.file_name().to_string_lossy()))
            })
            .collect();
        others.sort();
        others
    }

    /// The device node of a group.
    pub(super) fn group_node(&self, group: u32) -> PathBuf {
        self.dev.join("vfio").join(group.to_string())
    }

    /// The node by which containers are made.
    pub(super) fn container_node(&self) -> PathBuf {
        self.dev.join("vfio/vfio")
    }

    /// The node of iommufd.
    pub(super) fn iommufd_node(&self) -> PathBuf {
        self.dev.join("iommu")
    }

    /// The node of a function itself, where the kernel has such (`CONFIG_VFIO_DEVICE_CDEV`) and iommufd with it.
    pub(super) fn device_node(&self, address: HostAddress) -> Option<PathBuf> {
        let entries = std::fs::read_dir(self.function(address).join("vfio-dev")).ok()?;
        let name = entries.flatten().map(|entry| entry.file_name()).next()?;
        let node = self.dev.join("vfio/devices").join(name);
        (node.exists() && self.iommufd_node().exists()).then_some(node)
    }
}
