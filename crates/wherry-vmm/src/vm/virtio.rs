//! The virtio devices of a machine: made from its description and from what this host has for them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use wherry_interrupt::Input;
use wherry_state::StateUnit;
use wherry_virtio::blk::{Blk, Image, ImageError};
use wherry_virtio::rng::Rng;
use wherry_virtio::{Device, PciParts, TransportError, VirtioPci};

use super::VmError;
use crate::config::{DiskConfig, SerialTarget, VirtioConfig};
use crate::description::DeviceDescription;
use crate::pci::{PciError, PciRoot};

/// Names of devices in a description.
const DISK: &str = "disk";
const RNG: &str = "rng";

/// What this host has for the devices of one machine. Nothing is locked.
#[derive(Debug)]
pub(crate) struct Backing {
    pub(super) serial: SerialTarget,
    disks: Vec<Arc<Image>>,
}

impl Backing {
    /// Opens what the configuration names.
    pub(crate) fn open(serial: &SerialTarget, config: &VirtioConfig) -> Result<Self, ImageError> {
        let serial = serial.clone();
        let open = |disk: &DiskConfig| Image::open(&disk.path, disk.read_only).map(Arc::new);
        Ok(Self { serial, disks: config.disks.iter().map(open).collect::<Result<_, _>>()? })
    }

    /// Without any virtio device.
    pub(crate) fn bare(serial: &SerialTarget) -> Self {
        Self { serial: serial.clone(), disks: Vec::new() }
    }

    /// Describes the devices of a machine that is made of this.
    pub(crate) fn describe(&self, config: &VirtioConfig) -> Vec<DeviceDescription> {
        let disks = self.disks.iter().map(|image| DeviceDescription {
            kind: DISK.into(),
            label: image.path().display().to_string(),
            sectors: image.sectors(),
            read_only: image.is_read_only(),
        });
        let rng = config.rng.then(|| DeviceDescription { kind: RNG.into(), ..Default::default() });
        disks.chain(rng).collect()
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
        for device in described.iter().filter(|device| ![DISK, RNG].contains(&device.kind.as_str())) {
            reasons.push(format!("a device {:?}", device.kind.chars().take(40).collect::<String>()));
        }
        reasons
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

    /// Unlocks all images.
    pub(crate) fn unlock(&self) -> Result<(), ImageError> {
        self.disks.iter().try_for_each(|image| image.unlock())
    }
}

/// The virtio devices of a machine.
#[derive(Default)]
pub(super) struct VirtioDevices {
    functions: Vec<Arc<VirtioPci>>,
}

impl VirtioDevices {
    /// Makes the devices of a description, each at the next free place of the bus. `parts` is for the pin of a device
    /// number.
    pub(super) fn make(
        described: &[DeviceDescription],
        backing: &Backing,
        pci: &PciRoot,
        parts: impl Fn(Input) -> PciParts,
    ) -> Result<Self, VmError> {
        let failed = |e: std::io::Error| VmError::Device(e.into());
        let mut functions = Vec::new();
        let mut images = backing.disks.iter();
        let (mut disks, mut rngs) = (0, 0);
        for described in described {
            let (device, instance): (Arc<dyn Device>, u32) = match described.kind.as_str() {
                DISK => {
                    let image = images.next().ok_or_else(|| VmError::Lacks(vec![format!("disk {disks}")]))?;
                    disks += 1;
                    (Arc::new(Blk::new(image.clone(), disks - 1).map_err(failed)?), disks - 1)
                }
                RNG => {
                    rngs += 1;
                    (Arc::new(Rng::new(rngs - 1).map_err(failed)?), rngs - 1)
                }
                other => return Err(VmError::Lacks(vec![format!("a device {other:?}")])),
            };
            let address = pci.free_device().map_err(|e| VmError::Device(e.into()))?;
            let input = Input(PciRoot::interrupt_input(address.device(), 1));
            let made = VirtioPci::new(device, instance, &parts(input), |config| {
                pci.assign_bars(config).map_err(MakeError::Pci)
            });
            let function = made.map_err(|e| VmError::Device(e.into()))?;
            pci.add(address, function.clone()).map_err(|e| VmError::Device(e.into()))?;
            functions.push(function);
        }
        Ok(Self { functions })
    }

    pub(super) fn units(&self) -> impl Iterator<Item = Arc<dyn StateUnit>> + '_ {
        self.functions.iter().map(|function| function.clone() as Arc<dyn StateUnit>)
    }

    /// Brings the devices to rest for good; false if one does not come to rest in time.
    pub(super) fn end(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        self.functions.iter().for_each(|function| function.device().quiesce());
        self.functions.iter().all(|function| function.device().stop(deadline).is_ok())
    }
}

#[derive(Debug, thiserror::Error)]
enum MakeError {
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error(transparent)]
    Pci(PciError),
}
