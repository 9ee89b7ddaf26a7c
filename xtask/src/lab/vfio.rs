//! `lab vfio`: devices of the outer machine, behind an IOMMU, that Wherry passes through to its guests.
//!
//! The work is done inside the outer machine by the `lab-agent` (see `xtask/agent/src/vfio`).

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use super::images::Content;
use super::{Outer, home, unique};
use crate::process::output;
use crate::tally::Tally;

/// Everything is emulated twice; this is several times what it takes.
const LIMIT: Duration = Duration::from_secs(12 * 60);
const FULL_LIMIT: Duration = Duration::from_secs(40 * 60);

/// Modules of the outer kernel: VFIO, and drivers of what is passed through. Those of virtual functions are left out, so that nobody takes them.
const MODULES: [&str; 5] = ["vfio-pci", "vfio_iommu_type1", "nvme", "igb", "uio_pci_generic"];

/// What is behind the IOMMU, in the words of QEMU's `-device`. Virtual functions of the NVMe subsystem have nothing until they are given some of the
/// flexible queues (`vq`) and vectors (`vi`).
const DEVICES: [&str; 9] = [
    "edu,addr=4",
    "pcie-root-port,id=port-nvme,chassis=1,slot=1,addr=5",
    "nvme-subsys,id=subsystem",
    "nvme,id=nvme,bus=port-nvme,serial=wherry,subsys=subsystem,sriov_max_vfs=2,max_ioqpairs=9,msix_qsize=9,sriov_vq_flexible=4,\
     sriov_vi_flexible=4",
    "nvme-ns,bus=nvme,drive=namespace,nsid=1",
    "pcie-root-port,id=port-nic,chassis=2,slot=2,addr=6",
    "igb,bus=port-nic,netdev=cable",
    // Two functions that the IOMMU does not tell apart.
    "edu,addr=7.0,multifunction=on",
    "edu,addr=7.1",
];

/// Runs the lab; `full` for more than a change is tested with.
pub fn run(full: bool) -> Result<Tally> {
    let content = Content {
        script: if full { "lab-agent vfio --full" } else { "lab-agent vfio" }.to_owned(),
        binaries: vec!["lab-agent", "wherry"],
        modules: MODULES.map(str::to_owned).to_vec(),
        passthrough: true,
        ..Content::default()
    };
    let mut lab = Outer::prepare("vfio", &content)?;
    let namespace = Namespace::new()?;
    lab.machine.iommu = true;
    lab.machine.devices = DEVICES.map(str::to_owned).to_vec();
    lab.machine.behind = [
        ("-blockdev", format!("driver=file,node-name=namespace,filename={}", namespace.0.display())),
        // A cable that leads nowhere: the functions of a NIC reach each other without one.
        ("-netdev", "hubport,id=cable,hubid=0".to_owned()),
    ]
    .into_iter()
    .flat_map(|(option, value)| [option.to_owned(), value])
    .collect();
    lab.run(if full { FULL_LIMIT } else { LIMIT })
}

/// The file behind the namespace of the NVMe subsystem: an empty ext4 file system. It goes with this.
#[derive(Debug)]
struct Namespace(PathBuf);

impl Namespace {
    fn new() -> Result<Self> {
        let this = Self(home().join(unique("namespace")).with_extension("img"));
        let file = std::fs::File::create(&this.0).with_context(|| format!("cannot create {}", this.0.display()))?;
        file.set_len(128 << 20).with_context(|| format!("cannot set the length of {}", this.0.display()))?;
        let lazy = "lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0";
        output(std::process::Command::new("mke2fs").args(["-q", "-F", "-t", "ext4", "-E", lazy]).arg(&this.0))?;
        Ok(this)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
