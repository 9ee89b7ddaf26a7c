//! What a machine is made from: the configuration a user gives at its first start.
//!
//! A destination does not read this; it builds from the source's description (see [`crate::description`]) and its own
//! [`LocalConfig`](crate::builder::LocalConfig).

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use wherry_memory::PageSize;
use wherry_passthrough::vfio::BadAddress;
pub use wherry_passthrough::vfio::HostAddress;
use wherry_passthrough::{VFIO, VFIO_USER};
pub use wherry_virtio::blk::ImageFormat;
pub use wherry_virtio::console::ConsoleTarget;
pub use wherry_virtio::vhost::{MOST_QUEUES, VhostSpec};

/// Most vCPUs of a machine: xAPIC ids are 8 bits, and 255 is the broadcast.
pub const MAX_CPUS: u32 = 254;
/// Least RAM of a machine, in bytes.
pub const MIN_MEMORY: u64 = 4 << 20;
/// Most RAM of a machine, in bytes: what fits below the 64-bit PCI window of the smallest address width we meet.
pub const MAX_MEMORY: u64 = 1 << 43;

/// Everything that defines a new machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineConfig {
    /// Name given by the user.
    pub name: String,
    /// Identity of the VM: random, chosen once in its life. Ownership is per identity.
    pub vm: [u8; 16],
    /// RAM in bytes, a positive multiple of the page size.
    pub memory: u64,
    /// Backs RAM with 2 MiB hugetlb pages.
    pub hugepages: bool,
    /// Number of vCPUs, 1 to [`MAX_CPUS`].
    pub cpus: u32,
    /// What the guest's CPUs are.
    pub cpu: CpuModel,
    /// What is booted.
    pub kernel: Kernel,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Where the first serial port leads.
    pub serial: SerialTarget,
    /// Its devices on the PCI bus.
    pub pci: PciConfig,
}

/// The devices of a machine on the PCI bus, and what they are connected to on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PciConfig {
    /// Disks, in the order in which the guest sees them.
    pub disks: Vec<DiskConfig>,
    /// Network devices, in the order in which the guest sees them.
    pub nets: Vec<NetConfig>,
    /// What its console is connected to, if it has one.
    pub console: Option<ConsoleTarget>,
    /// Virtio devices whose rings other processes serve.
    pub vhost_user: Vec<VhostSpec>,
    /// Functions that somebody else owns, in the order in which the guest sees them.
    pub functions: Vec<FunctionSource>,
    /// A source of random numbers. A destination has one if the machine does, whatever this says.
    pub rng: bool,
    /// A balloon. A destination has one if the machine does, whatever this says.
    pub balloon: bool,
}

/// Where a PCI function is that somebody else owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FunctionSource {
    /// Another process serves it at this socket.
    VfioUser(PathBuf),
    /// The kernel has it: one of this host, which is bound to VFIO.
    Vfio(HostAddress),
}

impl FunctionSource {
    /// What such a function is in a description.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::VfioUser(_) => VFIO_USER,
            Self::Vfio(_) => VFIO,
        }
    }
}

impl fmt::Display for FunctionSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::VfioUser(socket) => write!(f, "{VFIO_USER}={}", socket.display()),
            Self::Vfio(address) => write!(f, "{VFIO}={address}"),
        }
    }
}

impl FromStr for FunctionSource {
    type Err = String;

    /// As on the command line: `vfio-user=SOCKET`, `vfio=ADDRESS`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((VFIO_USER, "")) => Err("give the socket of a device process".into()),
            Some((VFIO_USER, socket)) => Ok(Self::VfioUser(socket.into())),
            Some((VFIO, address)) => address.parse().map(Self::Vfio).map_err(|error: BadAddress| error.to_string()),
            _ => Err(format!("{text:?} is neither vfio-user=SOCKET nor vfio=ADDRESS")),
        }
    }
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// Its image: a file or block device.
    pub path: PathBuf,
    /// It is only read.
    pub read_only: bool,
    /// What the image looks like.
    pub format: ImageFormat,
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// The tap device of this host that it is connected to.
    pub tap: String,
    /// Its address; without, one that follows from the VM's identity. A destination's is always that of the machine.
    pub mac: Option<[u8; 6]>,
}

impl NetConfig {
    /// The address of the `n`-th device of a VM: made from the VM's identity, unicast, and not one of a manufacturer.
    pub fn mac(&self, vm: &[u8; 16], n: usize) -> [u8; 6] {
        self.mac.unwrap_or([2, vm[0], vm[1], vm[2], vm[3], vm[4].wrapping_add(n as u8)])
    }
}

/// What the guest's CPUs are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CpuModel {
    /// All that KVM can give on this host.
    #[default]
    Host,
    /// The x86-64-v2 level: SSE4.2, POPCNT, CMPXCHG16B.
    X86_64V2,
    /// The x86-64-v3 level: v2 and AVX2, BMI, FMA, MOVBE.
    X86_64V3,
    /// The x86-64-v4 level: v3 and AVX-512 F, BW, CD, DQ, VL.
    X86_64V4,
}

/// What is booted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// A Linux bzImage or an ELF with a PVH entry.
    Path(PathBuf),
    /// The built-in probe guest.
    Probe,
}

/// Where the first serial port leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialTarget {
    /// Standard input and output of the VMM.
    Stdio,
    /// Output goes to a file.
    File(PathBuf),
    /// A UNIX socket that the VMM listens on.
    Socket(PathBuf),
    /// Output is dropped.
    Null,
}

/// A configuration that no machine can have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Too few or too many vCPUs.
    #[error("{0} vCPUs: a machine has 1 to {MAX_CPUS}")]
    Cpus(u32),
    /// Too little or too much RAM.
    #[error("{0} bytes of RAM: a machine has {MIN_MEMORY} to {MAX_MEMORY}")]
    Memory(u64),
    /// RAM does not consist of whole pages.
    #[error("{memory} bytes of RAM are not a multiple of the page size {page}")]
    MemoryPages {
        /// RAM in bytes.
        memory: u64,
        /// Page size in bytes.
        page: u64,
    },
    /// No such CPU model.
    #[error("unknown CPU model {0:?}: use host, x86-64-v2, x86-64-v3 or x86-64-v4")]
    CpuModel(String),
}

impl MachineConfig {
    /// Checks counts and sizes. Files are looked at when they are opened.
    pub fn check(&self) -> Result<(), ConfigError> {
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(ConfigError::Cpus(self.cpus));
        }
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&self.memory) {
            return Err(ConfigError::Memory(self.memory));
        }
        let page = self.page_size().bytes();
        if !self.memory.is_multiple_of(page) {
            return Err(ConfigError::MemoryPages { memory: self.memory, page });
        }
        Ok(())
    }

    /// The page size that RAM is backed by.
    pub fn page_size(&self) -> PageSize {
        if self.hugepages { PageSize::Huge2M } else { PageSize::Base }
    }
}

impl CpuModel {
    /// The name users and descriptions know it by.
    pub fn name(self) -> &'static str {
        match self {
            CpuModel::Host => "host",
            CpuModel::X86_64V2 => "x86-64-v2",
            CpuModel::X86_64V3 => "x86-64-v3",
            CpuModel::X86_64V4 => "x86-64-v4",
        }
    }
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for CpuModel {
    type Err = ConfigError;

    fn from_str(s: &str) -> Result<Self, ConfigError> {
        [CpuModel::Host, CpuModel::X86_64V2, CpuModel::X86_64V3, CpuModel::X86_64V4]
            .into_iter()
            .find(|model| model.name() == s)
            .ok_or_else(|| ConfigError::CpuModel(s.chars().take(80).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> MachineConfig {
        MachineConfig {
            name: "t".into(),
            vm: [1; 16],
            memory: 64 << 20,
            hugepages: false,
            cpus: 1,
            cpu: CpuModel::Host,
            kernel: Kernel::Probe,
            initrd: None,
            cmdline: String::new(),
            serial: SerialTarget::Null,
            pci: PciConfig::default(),
        }
    }

    #[test]
    fn impossible_counts_and_sizes_are_refused() {
        assert_eq!(config().check(), Ok(()));
        assert_eq!(MachineConfig { cpus: 0, ..config() }.check(), Err(ConfigError::Cpus(0)));
        assert_eq!(MachineConfig { cpus: 255, ..config() }.check(), Err(ConfigError::Cpus(255)));
        assert_eq!(MachineConfig { memory: 4096, ..config() }.check(), Err(ConfigError::Memory(4096)));
        let odd = (64 << 20) + 4096;
        assert_eq!(MachineConfig { memory: odd, ..config() }.check(), Ok(()));
        assert_eq!(
            MachineConfig { memory: odd, hugepages: true, ..config() }.check(),
            Err(ConfigError::MemoryPages { memory: odd, page: 2 << 20 })
        );
    }

    #[test]
    fn cpu_models_are_known_by_their_names_and_others_are_refused() {
        for model in [CpuModel::Host, CpuModel::X86_64V2, CpuModel::X86_64V3, CpuModel::X86_64V4] {
            assert_eq!(model.to_string().parse(), Ok(model));
        }
        assert_eq!("pentium".parse::<CpuModel>(), Err(ConfigError::CpuModel("pentium".into())));
    }
}
