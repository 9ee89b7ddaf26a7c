//! The devices of a machine on the PCI bus: made from its description and from what this host has for them. Virtio devices
//! here, those that other processes own in `passthrough`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use wherry_fault::FaultService;
use wherry_handover::{KeptId, Registry, RegistryError, Shelf};
use wherry_interrupt::{Events, Input};
use wherry_memory::{DirtySource, PageSize, Ram};
use wherry_passthrough::vfio::VfioHost;
use wherry_passthrough::{OwnerError, PassthroughParts, VFIO, VFIO_USER};
use wherry_pci::FunctionAddress;
use wherry_state::StateUnit;
use wherry_virtio::balloon::Balloon;
use wherry_virtio::blk::{Blk, Image, ImageError};
use wherry_virtio::console::{Console, Outside, OutsideError};
use wherry_virtio::net::{Net, Tap, TapError};
use wherry_virtio::rng::Rng;
use wherry_virtio::vhost::{self, Backend, VhostError, VhostSpec, VhostUser};
use wherry_virtio::{Device, PciParts, TransportError, VirtioPci};

use super::VmError;
use super::devices::DeviceConfig;
use super::passthrough::{InheritError, Owners, Plugged, is_function};
use crate::config::{DiskConfig, NetConfig, PciConfig, SerialTarget};
use crate::description::{DeviceDescription, Place};
use crate::pci::{PciError, PciRoot};

/// Names of devices in a description.
const DISK: &str = "disk";
const NET: &str = "net";
const CONSOLE: &str = "console";
const RNG: &str = "rng";
const BALLOON: &str = "balloon";
const VHOST_USER: &str = "vhost-user";
/// Name of the descriptor of a tap, with the number of its network device.
const TAP: &str = "tap";

/// What a device needs on this host cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BackingError {
    /// An image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The other end of a console.
    #[error(transparent)]
    Console(#[from] OutsideError),
    /// A back end.
    #[error(transparent)]
    Vhost(#[from] VhostError),
    /// The owner of a function.
    #[error(transparent)]
    Owner(#[from] OwnerError),
    /// The owner of a function that the process before this one has.
    #[error(transparent)]
    Inherit(#[from] InheritError),
    /// A descriptor that was to be kept over an update.
    #[error(transparent)]
    Kept(#[from] RegistryError),
}

/// What this host has for the devices of one machine. Nothing is locked.
#[derive(Debug)]
pub(crate) struct Backing {
    connections: DeviceConfig,
    disks: Vec<Arc<Image>>,
    taps: Vec<Arc<Tap>>,
    console: Option<Arc<Outside>>,
    backends: Vec<Backend>,
    owners: Owners,
    /// The functions of this host that it uses.
    host: Arc<VfioHost>,
    /// What of it is kept over an update.
    registry: Arc<Registry>,
}

impl Backing {
    /// Opens what the configuration names, or takes what the predecessor of this process has opened; but for functions of other
    /// processes.
    pub(crate) fn open(connections: DeviceConfig, registry: Arc<Registry>) -> Result<Self, BackingError> {
        let config = &connections.pci;
        let disk = |(n, disk): (usize, &DiskConfig)| {
            let DiskConfig { path, read_only, format } = disk;
            let adopt = |fd| Ok(Image::adopt(fd, path, *read_only, *format)?);
            let open = || Ok(Image::open_as(path, *read_only, *format)?);
            registry.obtain::<_, BackingError>(KeptId::new(DISK, n as u32), adopt, open)
        };
        let disks = config.disks.iter().enumerate().map(disk).collect::<Result<_, _>>()?;
        let tap = |(n, NetConfig { tap, .. }): (usize, &NetConfig)| {
            let open = || Ok(Tap::open(tap)?);
            registry.obtain::<_, BackingError>(KeptId::new(TAP, n as u32), |fd| Ok(Tap::adopt(fd, tap)), open)
        };
        let taps = config.nets.iter().enumerate().map(tap).collect::<Result<_, _>>()?;
        let console =
            config.console.as_ref().map(|target| Outside::open(target, &registry).map(Arc::new)).transpose()?;
        let (backends, owners) = Default::default();
        let host = Arc::new(VfioHost::new(registry.clone()));
        Ok(Self { connections, disks, taps, console, backends, owners, host, registry })
    }

    /// Connects to the device processes that the configuration names.
    pub(crate) fn connect(mut self) -> Result<Self, BackingError> {
        let connect = |(n, spec): (usize, &VhostSpec)| Ok(Backend::connect(spec)?.kept_on(shelf(&self.registry, n)));
        let backends = self.connections.pci.vhost_user.iter().enumerate().map(connect);
        self.backends = backends.collect::<Result<_, BackingError>>()?;
        self.owners = Owners::connect(&self.connections.pci.functions, &self.host)?;
        Ok(self)
    }

    /// Takes the connections that the predecessor of this process has to the device processes of that machine: those that were plugged
    /// since it was started are among them, and those that were unplugged are not.
    pub(crate) fn inherit(mut self, described: &[DeviceDescription]) -> Result<Self, BackingError> {
        let ours = described.iter().filter(|device| device.kind == VHOST_USER);
        let inherit = |(n, (spec, device)): (usize, (&VhostSpec, &DeviceDescription))| {
            Backend::inherit(spec, device.features, &device.config, shelf(&self.registry, n))
        };
        self.backends = self.connections.pci.vhost_user.iter().zip(ours).enumerate().map(inherit).collect();
        self.owners = Owners::inherit(described, &self.registry, &self.host)?;
        Ok(self)
    }

    /// Without any device on the PCI bus.
    pub(crate) fn bare(serial: &SerialTarget) -> Self {
        let connections = DeviceConfig { serial: serial.clone(), pci: PciConfig::default() };
        let (disks, taps, backends) = (Vec::new(), Vec::new(), Vec::new());
        let (registry, owners) = (Registry::new(), Owners::default());
        let host = Arc::new(VfioHost::new(registry.clone()));
        Self { connections, disks, taps, console: None, backends, owners, host, registry }
    }

    /// Describes the devices of a machine that is made of this.
    pub(crate) fn describe(&self, config: &PciConfig, vm: &[u8; 16]) -> Vec<DeviceDescription> {
        let disks = self.disks.iter().map(|image| DeviceDescription {
            kind: DISK.into(),
            label: image.path().display().to_string(),
            sectors: image.sectors(),
            read_only: image.is_read_only(),
            ..Default::default()
        });
        let nets = config.nets.iter().enumerate().map(|(n, net)| DeviceDescription {
            kind: NET.into(),
            label: net.tap.clone(),
            mac: net.mac(vm, n).to_vec(),
            ..Default::default()
        });
        let backends = self.backends.iter().map(|backend| DeviceDescription {
            kind: VHOST_USER.into(),
            label: backend.spec().socket.display().to_string(),
            virtio_id: backend.spec().id.into(),
            queues: backend.spec().queues.into(),
            features: backend.features(),
            config: backend.config(),
            ..Default::default()
        });
        let console = self.console.iter().map(|outside| DeviceDescription {
            kind: CONSOLE.into(),
            label: outside.path().display().to_string(),
            ..Default::default()
        });
        let rng = config.rng.then(|| DeviceDescription { kind: RNG.into(), ..Default::default() });
        let balloon = config.balloon.then(|| DeviceDescription { kind: BALLOON.into(), ..Default::default() });
        disks
            .chain(nets)
            .chain(console)
            .chain(backends)
            .chain(rng)
            .chain(balloon)
            .chain(self.owners.describe())
            .collect()
    }

    /// Has a description say what may have changed since it was made: the configuration of what other processes serve.
    pub(super) fn refresh(&self, described: &mut [DeviceDescription]) {
        let others = described.iter_mut().filter(|device| device.kind == VHOST_USER);
        others.zip(&self.backends).for_each(|(device, backend)| device.config = backend.config());
    }

    /// What a described machine needs and this is not.
    pub(crate) fn lacking(&self, described: &[DeviceDescription]) -> Vec<String> {
        let mut reasons = Vec::new();
        let disks: Vec<_> = described.iter().filter(|device| device.kind == DISK).collect();
        for (n, disk) in disks.iter().enumerate() {
            let label: String = disk.label.chars().take(200).collect();
            let Some(image) = self.disks.get(n) else {
                reasons.push(format!(
                    "disk {n} ({label:?} at the source, {} sectors): give `receive` a --disk for it",
                    disk.sectors
                ));
                continue;
            };
            let path = image.path().display();
            if image.sectors() != disk.sectors {
                reasons.push(format!("disk {n} with {} sectors ({path} has {})", disk.sectors, image.sectors()));
            }
            if image.is_read_only() != disk.read_only {
                let word = |read_only| if read_only { "read-only" } else { "writable" };
                let (wanted, given) = (word(disk.read_only), word(image.is_read_only()));
                reasons.push(format!("disk {n} that is {wanted} ({path} was given {given})"));
            }
        }
        for image in self.disks.iter().skip(disks.len()) {
            reasons.push(format!(
                "a VM with a disk more (it has {}, and {} was given)",
                disks.len(),
                image.path().display()
            ));
        }
        let nets: Vec<_> = described.iter().filter(|device| device.kind == NET).collect();
        for (n, net) in nets.iter().enumerate() {
            let label: String = net.label.chars().take(40).collect();
            if self.taps.get(n).is_none() {
                reasons
                    .push(format!("network device {n} (tap {label:?} at the source): give `receive` a --net for it"));
            }
            if net.mac.len() != 6 || net.mac[0] & 1 != 0 {
                reasons.push(format!("network device {n} with an address that one device can have"));
            }
        }
        for tap in self.taps.iter().skip(nets.len()) {
            reasons.push(format!(
                "a VM with a network device more (it has {}, and tap {} was given)",
                nets.len(),
                tap.name()
            ));
        }
        let console = described.iter().find(|device| device.kind == CONSOLE);
        match (console, &self.console) {
            (Some(console), None) => {
                let label: String = console.label.chars().take(200).collect();
                reasons.push(format!("a console ({label:?} at the source): give `receive` a --console for it"));
            }
            (None, Some(outside)) => {
                let path = outside.path().display();
                reasons.push(format!("a VM with a console (it has none, and {path} was given)"));
            }
            _ => {}
        }
        let wanted: Vec<_> = described.iter().filter(|device| device.kind == VHOST_USER).collect();
        for (n, device) in wanted.iter().enumerate() {
            match self.backends.get(n) {
                Some(backend) => reasons.extend(lacking_backend(n, backend, device)),
                None => {
                    let label: String = device.label.chars().take(200).collect();
                    let id = device.virtio_id;
                    reasons.push(format!(
                        "vhost-user device {n} (virtio device {id}, {label:?} at the source): give `receive` a --device for it"
                    ));
                }
            }
        }
        for backend in self.backends.iter().skip(wanted.len()) {
            reasons.push(format!(
                "a VM with a vhost-user device more (it has {}, and {} was given)",
                wanted.len(),
                backend.spec().socket.display()
            ));
        }
        reasons.extend(self.owners.lacking(described));
        let known = [DISK, NET, CONSOLE, RNG, BALLOON, VHOST_USER, VFIO_USER, VFIO];
        for device in described.iter().filter(|device| !known.contains(&device.kind.as_str())) {
            reasons.push(format!("a device {:?}", device.kind.chars().take(40).collect::<String>()));
        }
        reasons
    }

    /// Why no memory of such a machine can be given back to the host, if so.
    fn pinned(&self, ram: &Ram) -> Option<String> {
        if let Some(backend) = self.backends.first() {
            let socket = backend.spec().socket.display();
            return Some(format!("the process behind {socket} maps it, and may have pinned what it maps"));
        }
        if let Some(reason) = self.owners.pinned() {
            return Some(reason);
        }
        let huge = ram.blocks().iter().any(|block| block.spec().page_size != PageSize::Base);
        huge.then(|| "it consists of huge pages, and a balloon takes pages of 4 KiB".into())
    }

    /// What it was opened from.
    pub(super) fn connections(&self) -> &DeviceConfig {
        &self.connections
    }

    /// What of it goes over to a new process.
    pub(crate) fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// Why memory cannot follow a machine with these devices, if so.
    pub(crate) fn cannot_follow(&self) -> Option<String> {
        let backend = self.backends.iter().find(|backend| !backend.can_fault()).map(|backend| {
            let socket = backend.spec().socket.display();
            format!("the vhost-user back end at {socket} does not take part in postcopy (no PAGEFAULT)")
        });
        backend.or_else(|| self.owners.cannot_follow())
    }

    /// The functions of this host that the machine uses.
    pub(super) fn host(&self) -> &Arc<VfioHost> {
        &self.host
    }

    /// Its functions are on the bus: whoever owns them is held by them alone, so that they can go.
    pub(super) fn forget_owners(&mut self) {
        self.owners = Owners::default();
    }

    /// Locks all images for the owner of the VM, or none.
    pub(crate) fn lock(&self) -> Result<(), ImageError> {
        let locked = self.disks.iter().try_for_each(|image| image.lock());
        if locked.is_err() {
            // The first error tells; those that were never locked do not mind.
            let _ = self.unlock();
        }
        locked
    }

    /// Takes away what was made here for others to find: the VM is elsewhere.
    pub(crate) fn leave(&self) {
        if let Some(outside) = &self.console {
            outside.remove();
        }
    }

    /// Unlocks all images.
    pub(crate) fn unlock(&self) -> Result<(), ImageError> {
        self.disks.iter().try_for_each(|image| image.unlock())
    }
}

/// Where what is kept of a vhost-user device is.
fn shelf(registry: &Arc<Registry>, number: usize) -> Shelf {
    Shelf::new(registry.clone(), format!("{VHOST_USER}{number}"))
}

/// What of a described device a back end here is not.
fn lacking_backend(n: usize, backend: &Backend, described: &DeviceDescription) -> Vec<String> {
    let VhostSpec { socket, id, queues } = backend.spec();
    let at = |what: String| format!("vhost-user device {n} {what} (the back end at {} is another)", socket.display());
    let mut reasons = Vec::new();
    if described.virtio_id != u32::from(*id) {
        reasons.push(at(format!("that is a virtio device {}", described.virtio_id)));
    }
    if described.queues != u32::from(*queues) {
        reasons.push(at(format!("with {} rings", described.queues)));
    }
    let missing = described.features & !backend.features();
    if missing != 0 {
        reasons.push(at(format!("with features {missing:#x}")));
    }
    // Its size in sectors, at the beginning of its configuration.
    if *id == vhost::BLK && described.config.get(..8) != backend.config().get(..8) {
        let sectors = |config: &[u8]| config.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let (wanted, here) = (sectors(&described.config), sectors(&backend.config()));
        reasons.push(at(format!("with {wanted} sectors, not {here}")));
    }
    reasons
}

/// The virtio devices of a machine on the PCI bus: they come with it, and stay.
pub(super) struct PciDevices {
    virtio: Vec<Arc<VirtioPci>>,
    balloon: Option<Arc<Balloon>>,
    logs: Vec<Arc<dyn DirtySource>>,
}

/// A device of a machine and its place on the bus.
pub(super) struct Occupant {
    /// With its place.
    pub(super) description: DeviceDescription,
    pub(super) address: FunctionAddress,
    /// The function, if another process owns it.
    pub(super) plugged: Option<Plugged>,
}

/// What a device of another process is given of a machine.
pub(super) struct Shown<'a> {
    pub(super) ram: &'a Arc<Ram>,
    /// Serves faults, if memory may follow.
    pub(super) faults: Option<Arc<FaultService>>,
}

impl PciDevices {
    /// Makes the devices of a description, each at its place, or else at the next free one of the bus. `parts` is for the pin of
    /// a device number.
    pub(super) fn make(
        described: &[DeviceDescription],
        backing: &Backing,
        pci: &PciRoot,
        shown: &Shown<'_>,
        parts: impl Fn(Input) -> PciParts,
        passed: &PassthroughParts,
    ) -> Result<(Self, Vec<Occupant>), VmError> {
        let failed = |e: std::io::Error| VmError::Device(e.into());
        let (mut virtio, mut occupants) = (Vec::new(), Vec::<Occupant>::new());
        let (mut images, mut backends) = (backing.disks.iter(), backing.backends.iter());
        let (mut taps, mut consoles) = (backing.taps.iter(), backing.console.iter());
        let (mut disks, mut nets, mut rngs) = (0, 0, 0);
        let mut balloon = None;
        let (mut logs, mut others) = (Vec::<Arc<dyn DirtySource>>::new(), BTreeMap::<&str, u32>::new());
        for described in described {
            let address = match described.place {
                Some(place) => u8::try_from(place.slot).ok().and_then(|slot| FunctionAddress::new(slot, 0)),
                None => Some(pci.free_device().map_err(|e| VmError::Device(e.into()))?),
            };
            let lacks = |what: String| VmError::Lacks(vec![what]);
            let address = address.ok_or_else(|| lacks(format!("a slot for its {}", described.kind)))?;
            let earlier = occupants.iter().filter(|other| other.description.kind == described.kind).count();
            let instance = described.place.map_or(earlier as u32, |place| place.instance);
            let place = Some(Place { slot: address.device().into(), instance });
            let occupant = DeviceDescription { place, ..described.clone() };
            if is_function(&described.kind) {
                let owner = backing.owners.get(&described.kind, earlier);
                let owner = owner.ok_or_else(|| lacks(format!("a {} device", described.kind)))?;
                let pin_input = Input(PciRoot::interrupt_input(address.device(), 1));
                let parts = PassthroughParts { pin_input, ..passed.clone() };
                let plugged = Plugged::make(owner.clone(), instance, pci, &parts);
                let plugged = plugged.map_err(|e| VmError::Device(e.into()))?;
                pci.add(address, plugged.function.clone()).map_err(|e| VmError::Device(e.into()))?;
                occupants.push(Occupant { description: occupant, address, plugged: Some(plugged) });
                continue;
            }
            let mut events = Events::own();
            let (device, instance): (Arc<dyn Device>, u32) = match described.kind.as_str() {
                DISK => {
                    let image = images.next().ok_or_else(|| VmError::Lacks(vec![format!("disk {disks}")]))?;
                    disks += 1;
                    (Arc::new(Blk::new(image.clone(), disks - 1).map_err(failed)?), disks - 1)
                }
                NET => {
                    let lacks = || VmError::Lacks(vec![format!("network device {nets}")]);
                    let tap = taps.next().ok_or_else(lacks)?;
                    let mac = described.mac.as_slice().try_into().map_err(|_| lacks())?;
                    nets += 1;
                    (Arc::new(Net::new(tap.clone(), mac, nets - 1).map_err(failed)?), nets - 1)
                }
                CONSOLE => {
                    let outside = consoles.next().ok_or_else(|| VmError::Lacks(vec!["a second console".into()]))?;
                    (Arc::new(Console::new(outside.clone(), 0).map_err(failed)?), 0)
                }
                RNG => {
                    rngs += 1;
                    (Arc::new(Rng::new(rngs - 1).map_err(failed)?), rngs - 1)
                }
                BALLOON if balloon.is_none() => {
                    let (ram, faults) = (shown.ram.clone(), shown.faults.clone());
                    let made = Balloon::new(ram, faults, backing.pinned(shown.ram), 0).map_err(failed)?;
                    (balloon.insert(Arc::new(made)).clone(), 0)
                }
                VHOST_USER => {
                    let backend = backends.next().ok_or_else(|| VmError::Lacks(vec!["a vhost-user device".into()]))?;
                    let number = others.entry(vhost::unit_name(backend.spec().id)).or_default();
                    let device = VhostUser::new(backend, *number, shown.ram, shown.faults.clone());
                    let device = device.map_err(|e| VmError::Device(e.into()))?;
                    *number += 1;
                    logs.push(device.log());
                    events = backend.events();
                    (Arc::new(device), *number - 1)
                }
                other => return Err(VmError::Lacks(vec![format!("a device {other:?}")])),
            };
            let input = Input(PciRoot::interrupt_input(address.device(), 1));
            let parts = PciParts { events, ..parts(input) };
            let made = VirtioPci::new(device, instance, &parts, |config| {
                pci.assign_bars(config).map(drop).map_err(MakeError::Pci)
            });
            let function = made.map_err(|e| VmError::Device(e.into()))?;
            pci.add(address, function.clone()).map_err(|e| VmError::Device(e.into()))?;
            virtio.push(function);
            occupants.push(Occupant { description: occupant, address, plugged: None });
        }
        Ok((Self { virtio, balloon, logs }, occupants))
    }

    /// The balloon, if there is one.
    pub(super) fn balloon(&self) -> Option<&Arc<Balloon>> {
        self.balloon.as_ref()
    }

    /// What virtio devices in other processes write.
    pub(super) fn logs(&self) -> &[Arc<dyn DirtySource>] {
        &self.logs
    }

    pub(super) fn units(&self) -> impl Iterator<Item = Arc<dyn StateUnit>> + '_ {
        self.virtio.iter().map(|function| function.clone() as Arc<dyn StateUnit>)
    }

    /// Brings the devices to rest for good; false if one does not come to rest in time.
    pub(super) fn end(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        self.virtio.iter().for_each(|function| function.device().serving().quiesce());
        self.virtio.iter().all(|function| function.device().serving().stop(deadline).is_ok())
    }
}

#[derive(Debug, thiserror::Error)]
enum MakeError {
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error(transparent)]
    Pci(PciError),
}
