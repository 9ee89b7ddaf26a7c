//! What a process says to its successor beside the machine: docs/live-update.md has the table.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use prost::Message;
use wherry_virtio::blk::ImageFormat;

use super::HostState;
use crate::config::{
    ConsoleTarget, DiskConfig, FunctionSource, Kernel, MachineConfig, NetConfig, PciConfig, SerialTarget, VhostSpec,
};
use crate::vm::DeviceConfig;

/// The process.
#[derive(Clone, PartialEq, Message)]
pub(super) struct SavedHost {
    /// Path of the API socket.
    #[prost(bytes = "vec", tag = "1")]
    api: Vec<u8>,
    /// It stays when its VM has left.
    #[prost(bool, tag = "2")]
    linger: bool,
    /// What the devices are connected to.
    #[prost(message, optional, tag = "3")]
    devices: Option<SavedDevices>,
    /// What is booted after a reset; absent for a VM that came from elsewhere.
    #[prost(message, optional, tag = "4")]
    reboot: Option<SavedBoot>,
}

/// What is booted.
#[derive(Clone, PartialEq, Message)]
struct SavedBoot {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(bytes = "vec", tag = "2")]
    vm: Vec<u8>,
    #[prost(uint64, tag = "3")]
    memory: u64,
    #[prost(bool, tag = "4")]
    hugepages: bool,
    #[prost(uint32, tag = "5")]
    cpus: u32,
    /// Name of the CPU model.
    #[prost(string, tag = "6")]
    cpu: String,
    /// Absent: the built-in probe guest.
    #[prost(bytes = "vec", optional, tag = "7")]
    kernel: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "8")]
    initrd: Option<Vec<u8>>,
    #[prost(string, tag = "9")]
    cmdline: String,
    #[prost(message, optional, tag = "10")]
    devices: Option<SavedDevices>,
}

/// What devices are connected to.
#[derive(Clone, PartialEq, Message)]
struct SavedDevices {
    #[prost(message, optional, tag = "1")]
    serial: Option<SavedTarget>,
    #[prost(message, repeated, tag = "2")]
    disks: Vec<SavedDisk>,
    #[prost(message, repeated, tag = "3")]
    nets: Vec<SavedNet>,
    #[prost(message, optional, tag = "4")]
    console: Option<SavedTarget>,
    #[prost(message, repeated, tag = "5")]
    vhost_user: Vec<SavedVhost>,
    #[prost(bytes = "vec", repeated, tag = "6")]
    vfio_user: Vec<Vec<u8>>,
    /// Functions of this host, by their addresses there.
    #[prost(string, repeated, tag = "9")]
    vfio: Vec<String>,
    #[prost(bool, tag = "7")]
    rng: bool,
    #[prost(bool, tag = "8")]
    balloon: bool,
}

/// A place of this host: `stdio`, `null`, `file`, `socket` or `pty`, and its path if it has one.
#[derive(Clone, PartialEq, Eq, Message)]
struct SavedTarget {
    #[prost(string, tag = "1")]
    kind: String,
    #[prost(bytes = "vec", tag = "2")]
    path: Vec<u8>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct SavedDisk {
    #[prost(bytes = "vec", tag = "1")]
    path: Vec<u8>,
    #[prost(bool, tag = "2")]
    read_only: bool,
    /// `raw` or `qcow2`.
    #[prost(string, tag = "3")]
    format: String,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct SavedNet {
    #[prost(string, tag = "1")]
    tap: String,
    #[prost(bytes = "vec", tag = "2")]
    mac: Vec<u8>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct SavedVhost {
    #[prost(bytes = "vec", tag = "1")]
    socket: Vec<u8>,
    #[prost(uint32, tag = "2")]
    id: u32,
    #[prost(uint32, tag = "3")]
    queues: u32,
}

fn bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

fn path(bytes: Vec<u8>) -> PathBuf {
    OsString::from_vec(bytes).into()
}

fn target(kind: &str, path: Option<&Path>) -> SavedTarget {
    SavedTarget { kind: kind.into(), path: path.map(bytes).unwrap_or_default() }
}

impl From<&DeviceConfig> for SavedDevices {
    fn from(config: &DeviceConfig) -> Self {
        let serial = match &config.serial {
            SerialTarget::Stdio => target("stdio", None),
            SerialTarget::Null => target("null", None),
            SerialTarget::File(path) => target("file", Some(path)),
            SerialTarget::Socket(path) => target("socket", Some(path)),
        };
        let pci = &config.pci;
        let console = pci.console.as_ref().map(|console| match console {
            ConsoleTarget::Socket(path) => target("socket", Some(path)),
            ConsoleTarget::Pty(path) => target("pty", Some(path)),
            ConsoleTarget::File(path) => target("file", Some(path)),
        });
        let disk = |disk: &DiskConfig| SavedDisk {
            path: bytes(&disk.path),
            read_only: disk.read_only,
            format: match disk.format {
                ImageFormat::Raw => "raw".into(),
                ImageFormat::Qcow2 => "qcow2".into(),
            },
        };
        let net = |net: &NetConfig| SavedNet {
            tap: net.tap.clone(),
            mac: net.mac.map(|mac| mac.to_vec()).unwrap_or_default(),
        };
        let vhost = |spec: &VhostSpec| SavedVhost {
            socket: bytes(&spec.socket),
            id: spec.id.into(),
            queues: spec.queues.into(),
        };
        let (mut vfio_user, mut vfio) = (Vec::new(), Vec::new());
        for source in &pci.functions {
            match source {
                FunctionSource::VfioUser(socket) => vfio_user.push(bytes(socket)),
                FunctionSource::Vfio(address) => vfio.push(address.to_string()),
            }
        }
        Self {
            serial: Some(serial),
            disks: pci.disks.iter().map(disk).collect(),
            nets: pci.nets.iter().map(net).collect(),
            console,
            vhost_user: pci.vhost_user.iter().map(vhost).collect(),
            vfio_user,
            vfio,
            rng: pci.rng,
            balloon: pci.balloon,
        }
    }
}

impl TryFrom<SavedDevices> for DeviceConfig {
    type Error = String;

    fn try_from(saved: SavedDevices) -> Result<Self, String> {
        let serial = saved.serial.ok_or("no serial port")?;
        let serial = match serial.kind.as_str() {
            "stdio" => SerialTarget::Stdio,
            "null" => SerialTarget::Null,
            "file" => SerialTarget::File(path(serial.path)),
            "socket" => SerialTarget::Socket(path(serial.path)),
            other => return Err(format!("a serial port that leads to {other:?}")),
        };
        let console = saved.console.map(|console| match console.kind.as_str() {
            "socket" => Ok(ConsoleTarget::Socket(path(console.path))),
            "pty" => Ok(ConsoleTarget::Pty(path(console.path))),
            "file" => Ok(ConsoleTarget::File(path(console.path))),
            other => Err(format!("a console that leads to {other:?}")),
        });
        let disk = |disk: SavedDisk| {
            let format = match disk.format.as_str() {
                "raw" => ImageFormat::Raw,
                "qcow2" => ImageFormat::Qcow2,
                other => return Err(format!("a disk image of format {other:?}")),
            };
            Ok(DiskConfig { path: path(disk.path), read_only: disk.read_only, format })
        };
        let net = |net: SavedNet| {
            let mac = match net.mac.len() {
                0 => None,
                _ => Some(net.mac.try_into().map_err(|mac| format!("a network address {mac:?}"))?),
            };
            Ok::<_, String>(NetConfig { tap: net.tap, mac })
        };
        let vhost = |spec: SavedVhost| {
            let number = |what: &str, value: u32| {
                value.try_into().map_err(|_| format!("a vhost-user device with {what} {value}"))
            };
            let (id, queues) = (number("id", spec.id)?, number("rings", spec.queues)?);
            Ok::<_, String>(VhostSpec { socket: path(spec.socket), id, queues })
        };
        let address = |text: String| text.parse().map(FunctionSource::Vfio).map_err(|error| format!("{error}"));
        let sockets = saved.vfio_user.into_iter().map(path).map(FunctionSource::VfioUser).map(Ok);
        let functions = sockets.chain(saved.vfio.into_iter().map(address)).collect::<Result<_, String>>()?;
        let pci = PciConfig {
            disks: saved.disks.into_iter().map(disk).collect::<Result<_, _>>()?,
            nets: saved.nets.into_iter().map(net).collect::<Result<_, _>>()?,
            console: console.transpose()?,
            vhost_user: saved.vhost_user.into_iter().map(vhost).collect::<Result<_, _>>()?,
            functions,
            rng: saved.rng,
            balloon: saved.balloon,
        };
        Ok(Self { serial, pci })
    }
}

impl From<&MachineConfig> for SavedBoot {
    fn from(config: &MachineConfig) -> Self {
        let devices = DeviceConfig { serial: config.serial.clone(), pci: config.pci.clone() };
        Self {
            name: config.name.clone(),
            vm: config.vm.to_vec(),
            memory: config.memory,
            hugepages: config.hugepages,
            cpus: config.cpus,
            cpu: config.cpu.name().into(),
            kernel: match &config.kernel {
                Kernel::Path(path) => Some(bytes(path)),
                Kernel::Probe => None,
            },
            initrd: config.initrd.as_deref().map(bytes),
            cmdline: config.cmdline.clone(),
            devices: Some((&devices).into()),
        }
    }
}

impl TryFrom<SavedBoot> for MachineConfig {
    type Error = String;

    fn try_from(saved: SavedBoot) -> Result<Self, String> {
        let devices = DeviceConfig::try_from(saved.devices.ok_or("no devices")?)?;
        let config = Self {
            name: saved.name,
            vm: saved.vm.try_into().map_err(|_| "an identity that has not 16 bytes")?,
            memory: saved.memory,
            hugepages: saved.hugepages,
            cpus: saved.cpus,
            cpu: saved.cpu.parse().map_err(|error: crate::config::ConfigError| error.to_string())?,
            kernel: saved.kernel.map_or(Kernel::Probe, |kernel| Kernel::Path(path(kernel))),
            initrd: saved.initrd.map(path),
            cmdline: saved.cmdline,
            serial: devices.serial,
            pci: devices.pci,
        };
        config.check().map_err(|error| error.to_string())?;
        Ok(config)
    }
}

impl SavedHost {
    pub(super) fn of(host: &HostState, devices: &DeviceConfig) -> Self {
        Self {
            api: bytes(&host.api),
            linger: host.linger,
            devices: Some(devices.into()),
            reboot: host.reboot.as_ref().map(SavedBoot::from),
        }
    }

    /// The process, and what the devices are connected to. An error names what this program does not know.
    pub(super) fn read(encoded: &[u8]) -> Result<(HostState, DeviceConfig), String> {
        let saved = Self::decode(encoded).map_err(|error| format!("what the old process says of itself: {error}"))?;
        let devices = saved.devices.ok_or("what the old process says of its devices")?;
        let host = HostState {
            api: path(saved.api),
            linger: saved.linger,
            reboot: saved.reboot.map(MachineConfig::try_from).transpose()?,
        };
        Ok((host, devices.try_into()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::CpuModel;

    fn everything() -> (HostState, DeviceConfig) {
        let pci = PciConfig {
            disks: vec![
                DiskConfig { path: "/a".into(), read_only: true, format: ImageFormat::Raw },
                DiskConfig {
                    path: OsString::from_vec(vec![b'/', 0xff]).into(),
                    read_only: false,
                    format: ImageFormat::Qcow2,
                },
            ],
            nets: vec![
                NetConfig { tap: "t0".into(), mac: None },
                NetConfig { tap: "t1".into(), mac: Some([2, 0, 0, 0, 0, 9]) },
            ],
            console: Some(ConsoleTarget::Pty("/p".into())),
            vhost_user: vec![VhostSpec { socket: "/v".into(), id: 2, queues: 3 }],
            functions: vec![FunctionSource::VfioUser("/f".into()), "vfio=3b:00.1".parse().unwrap()],
            rng: true,
            balloon: true,
        };
        let devices = DeviceConfig { serial: SerialTarget::Socket("/s".into()), pci };
        let reboot = MachineConfig {
            name: "n".into(),
            vm: [7; 16],
            memory: 64 << 20,
            hugepages: true,
            cpus: 3,
            cpu: CpuModel::X86_64V3,
            kernel: Kernel::Path("/k".into()),
            initrd: Some("/i".into()),
            cmdline: "c".into(),
            serial: SerialTarget::Stdio,
            pci: devices.pci.clone(),
        };
        let host = HostState { api: "/api".into(), linger: true, reboot: Some(reboot) };
        (host, devices)
    }

    #[test]
    fn all_that_a_process_is_comes_back() {
        let (host, devices) = everything();
        let read = SavedHost::read(&SavedHost::of(&host, &devices).encode_to_vec()).unwrap();
        assert_eq!(read, (host, devices));
        let plain = HostState { api: "/api".into(), ..HostState::default() };
        for serial in [SerialTarget::Null, SerialTarget::File("/f".into())] {
            let devices = DeviceConfig { serial, pci: PciConfig::default() };
            let read = SavedHost::read(&SavedHost::of(&plain, &devices).encode_to_vec()).unwrap();
            assert_eq!(read, (plain.clone(), devices));
        }
    }

    #[test]
    fn what_this_program_does_not_know_is_named() {
        let refused = |change: &dyn Fn(&mut SavedHost)| {
            let (host, devices) = everything();
            let mut saved = SavedHost::of(&host, &devices);
            change(&mut saved);
            SavedHost::read(&saved.encode_to_vec()).unwrap_err()
        };
        let devices = |saved: &mut SavedHost| saved.devices.clone().unwrap();
        let error = refused(&|saved| {
            let serial = Some(SavedTarget { kind: "telepathy".into(), path: vec![] });
            saved.devices = Some(SavedDevices { serial, ..devices(saved) });
        });
        assert!(error.contains("telepathy"), "{error}");
        let error = refused(&|saved| saved.devices.as_mut().unwrap().disks[0].format = "vhd".into());
        assert!(error.contains("vhd"), "{error}");
        let error = refused(&|saved| saved.devices.as_mut().unwrap().nets[0].mac = vec![1]);
        assert!(error.contains("network address"), "{error}");
        let error = refused(&|saved| saved.reboot.as_mut().unwrap().cpu = "pentium".into());
        assert!(error.contains("pentium"), "{error}");
        let error = refused(&|saved| saved.reboot.as_mut().unwrap().cpus = 0);
        assert!(error.contains("vCPUs"), "{error}");
        assert!(refused(&|saved| saved.devices = None).contains("devices"));
        assert!(SavedHost::read(&[0xff; 9]).is_err());
    }
}
