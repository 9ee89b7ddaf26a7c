//! The accelerator as a PCI function, which a VMM in another process reaches by vfio-user (`docs/accel-abi.md`, "As a PCI
//! function").
//!
//! - this file: identity, BARs, interrupts, reset: what is done with a message.
//! - [`space`]: the client's memory, through its maps, as an address space.
//! - [`moves`]: its state, and the ways between the states of a migration.
//!
//! Contract:
//!
//! - Registers are those of the library; what is none reads as ones, and writes to it are lost.
//! - Memory is reached while the function is a bus master, inside of the client's maps, and every write is in the client's log
//!   before the completion that speaks of it is published.
//! - A reset leaves nothing of what clients did: the device behind it is made anew, with the keys that the host gave.
//!
//! Threads: the server's, on which all messages are done, the workers of the device (`wherry-accel-N`), and the one that listens
//! to its bells and polls (`wherry-accel-bells`); they end with it.

mod moves;
mod space;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::io::Errno;
use wherry_vfio_user::payload::{IoFd, pci_irq, pci_region};
use wherry_vfio_user::server::{Irq, Kept, Region, config};
use wherry_vfio_user::{Bus, Description, Image, Migration};

use crate::abi::{BELLS, MAX_CONTEXTS, register};
use crate::catalogue::{Catalogue, CatalogueError, Host};
use crate::device::{Caller, Config, Device, FIRST_SPACE, Notify, bell};
use crate::drive::{Bells, Drive, Driven};
use crate::error::Refused;
use crate::keys::{FleetKey, KeyKind};
use space::BusSpace;

pub use moves::SavedFunction;

/// Vendor and device id.
pub const ID: (u16, u16) = (0x1de5, 0x0acc);
/// Class code: a processing accelerator.
pub const CLASS: u32 = 0x12_00_00;
/// Vectors of MSI-X.
pub const VECTORS: u16 = 64;
/// Bytes of BAR 0, which has the registers.
pub const REGISTERS: u64 =
    (register::CONTEXTS_BASE + MAX_CONTEXTS as u64 * register::CONTEXT_BYTES).next_power_of_two();
/// Bytes of BAR 1, which has the MSI-X table, and its pending bits from [`PENDING`] on.
pub const TABLE: u64 = 4096;
/// Where the pending bits are.
pub const PENDING: u32 = 0x800;

/// A function cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum FunctionError {
    /// No such device.
    #[error("making the device")]
    Catalogue(#[from] CatalogueError),
    /// No thread.
    #[error("starting its threads")]
    Workers(#[from] std::io::Error),
    /// A key is refused.
    #[error("importing a key")]
    Key(#[from] Refused),
}

/// What a function is made of, again after each reset.
pub struct Model {
    /// The engines that clients see. Both ends of a move have the same.
    pub catalogue: Catalogue,
    /// The workers of this host.
    pub host: Host,
    /// What keys are wrapped with, if there are any.
    pub fleet: Option<FleetKey>,
    /// Who works on it.
    pub drive: Box<dyn Drive>,
    /// Whether the client has privilege; who made the model may change its mind.
    pub privileged: Arc<AtomicBool>,
    /// Decides where virtual slots begin among their siblings; any number.
    pub seed: u64,
    /// Keys that the host gives: handle, kind, and the wrapped key.
    pub keys: Vec<(u32, KeyKind, Vec<u8>)>,
}

/// What the device behind the function reaches of the client.
#[derive(Default)]
struct Wires {
    /// Known from the first message on; before that nothing can have been submitted.
    bus: OnceLock<Bus>,
    /// The function may reach memory.
    master: AtomicBool,
}

impl Notify for Wires {
    fn raise(&self, vector: u16) {
        let Some(bus) = self.bus.get() else { return };
        match bus.enabled(pci_irq::MSIX) {
            // A vector that is not there is nobody's.
            true if vector < VECTORS => bus.trigger(pci_irq::MSIX, vector.into()),
            true => {}
            false => bus.trigger(pci_irq::INTX, 0),
        }
    }
}

/// The device behind the function, and who works on it.
struct Live {
    /// Ended first: nobody works on a device that is given up.
    driven: Box<dyn Driven>,
    device: Arc<Device>,
}

/// The function.
pub struct AccelFunction {
    model: Model,
    wires: Arc<Wires>,
    bells: Bells,
    config: config::Config,
    /// The MSI-X table, as a driver writes it. Who traps it (a VMM) uses it; the server has eventfds.
    table: [u8; 16 * VECTORS as usize],
    live: Live,
    /// A state that is being read or written.
    image: Image,
}

impl std::fmt::Debug for AccelFunction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AccelFunction({:?})", self.live.device)
    }
}

impl Model {
    fn live(&self, wires: &Arc<Wires>, bells: &Bells) -> Result<Live, FunctionError> {
        let config = Config {
            catalogue: self.catalogue.clone(),
            host: self.host.clone(),
            clock: self.drive.clock(),
            notify: wires.clone(),
            seed: self.seed,
        };
        let device = Arc::new(Device::new(config)?);
        device.set_space(FIRST_SPACE, Arc::new(BusSpace::new(wires.clone())));
        Ok(Live { driven: self.drive.start(&device, bells)?, device })
    }

    fn import(&self, device: &Device) -> Result<(), Refused> {
        let Some(fleet) = &self.fleet else { return Ok(()) };
        self.keys.iter().try_for_each(|(handle, kind, wrapped)| device.keys().import(fleet, *handle, *kind, wrapped))
    }
}

/// The subsystem of a function with those engines: a VMM that compares what it is refuses another one before anything moves.
pub fn subsystem(catalogue: &Catalogue) -> u16 {
    let bytes = catalogue.engines().iter().flat_map(|engine| {
        let [a, b] = engine.class.to_le_bytes();
        let [c, d] = engine.instance.to_le_bytes();
        [a, b, c, d]
    });
    let crc = crc32c::crc32c(&bytes.collect::<Vec<_>>());
    (crc >> 16) as u16 ^ crc as u16
}

impl Live {
    /// Goes on after a stop.
    fn resume(&self) {
        self.device.resume();
        self.driven.resumed();
    }
}

impl AccelFunction {
    /// As it is after a reset.
    pub fn new(model: Model) -> Result<Self, FunctionError> {
        Self::with_bells(model, Bells::new()?)
    }

    /// As it is after a reset, with bells that a client may have already.
    pub fn with_bells(model: Model, bells: Bells) -> Result<Self, FunctionError> {
        let wires = Arc::new(Wires::default());
        let live = model.live(&wires, &bells)?;
        model.import(&live.device)?;
        let config = config::Config::new(ID.0, ID.1, CLASS).with_bar(0, REGISTERS as u32).with_bar(1, TABLE as u32);
        let config = config.with_subsystem(ID.0, subsystem(&model.catalogue)).with_msix(VECTORS, 1, 0, PENDING);
        Ok(Self { model, wires, bells, config, table: [0; 16 * VECTORS as usize], live, image: Image::default() })
    }

    /// The device behind it, for figures.
    pub fn device(&self) -> &Arc<Device> {
        &self.live.device
    }

    fn attach(&self, bus: &Bus) {
        let _ = self.wires.bus.get_or_init(|| bus.clone());
    }

    fn note_master(&self) {
        self.wires.master.store(self.config.is_bus_master(), Ordering::SeqCst);
    }
}

impl wherry_vfio_user::Device for AccelFunction {
    fn description(&self) -> Description {
        let mut regions = vec![Region::default(); pci_region::COUNT as usize];
        let bell = |bell: u32| IoFd {
            offset: register::BELLS + register::BELL_BYTES * u64::from(bell),
            size: 4,
            fd_index: bell,
            kind: IoFd::IOEVENTFD,
            flags: 0,
            data: 0,
        };
        regions[0] = Region {
            io_fds: (0..BELLS).map(bell).collect(),
            descriptors: self.bells.descriptors().to_vec(),
            ..Region::trapped(REGISTERS)
        };
        regions[1] = Region::trapped(TABLE);
        regions[pci_region::CONFIG as usize] = Region::trapped(config::SIZE as u64);
        let mut irqs = vec![Irq::default(); pci_irq::COUNT as usize];
        irqs[pci_irq::INTX as usize] = Irq::pin();
        irqs[pci_irq::MSIX as usize] = Irq::vectors(VECTORS.into());
        Description { resettable: true, regions, irqs, migration: true, pre_copy: true, p2p: false, logging: true }
    }

    fn read(&mut self, bus: &Bus, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.attach(bus);
        match region {
            pci_region::CONFIG => return self.config.read(offset, data),
            0 => {
                if self.live.device.read_register(offset, data).is_err() {
                    data.fill(0xff);
                }
            }
            _ => {
                let table = self.table.iter().copied().chain(std::iter::repeat(0));
                data.iter_mut().zip(table.skip(offset as usize)).for_each(|(to, from)| *to = from);
            }
        }
        Ok(())
    }

    fn write(&mut self, bus: &Bus, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.attach(bus);
        match region {
            pci_region::CONFIG => {
                self.config.write(offset, data)?;
                self.note_master();
            }
            // Where nobody put the eventfd. Its thread looks: this one answers messages.
            0 if data.len() == 4 && bell(offset).is_some() => {
                bell(offset).into_iter().for_each(|n| self.live.driven.ring(n))
            }
            0 => {
                // A client learns of it by the registers that say so (RESULT, STATUS).
                let caller = Caller { privileged: self.model.privileged.load(Ordering::SeqCst), space: FIRST_SPACE };
                let _ = self.live.device.write_register(caller, offset, data);
            }
            _ => {
                let to = self.table.iter_mut().skip(offset as usize);
                to.zip(data).for_each(|(to, from)| *to = *from);
            }
        }
        Ok(())
    }

    fn reset(&mut self, bus: &Bus) -> Result<(), Errno> {
        self.attach(bus);
        self.renew()?;
        self.model.import(&self.live.device).map_err(|_| Errno::IO)?;
        self.config.reset();
        self.note_master();
        (self.table, self.image) = ([0; 16 * VECTORS as usize], Image::default());
        Ok(())
    }

    fn migration(&mut self) -> Option<&mut dyn Migration> {
        Some(self)
    }

    fn kept(&mut self) -> Option<&mut dyn Kept> {
        Some(self)
    }
}
