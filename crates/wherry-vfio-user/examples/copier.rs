//! A device in less than 150 lines: it copies memory of its client and interrupts when that is done, and it can be migrated.
//!
//!     copier --socket-path=/run/copier.sock
//!
//! BAR 0: source, destination, length and copies done, 8 bytes each; writing 1 to 0x20 starts one. The MSI-X table is at 0x800,
//! its pending bits at 0xc00. BAR 1 is memory; its second page can be mapped.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use wherry_vfio_user::payload::{Area, pci_irq, pci_region};
use wherry_vfio_user::server::{Host, Irq, Kept, Region, Shared, config, config::Config};
use wherry_vfio_user::{Bus, Description, Device, Image, Migration, Server, State};

const BAR: u64 = 4096;
/// Bytes of one copy, at most.
const MOST: u64 = 1 << 20;

/// The device.
pub struct Copier {
    config: Config,
    /// BAR 0 as a driver reads it.
    page: [u8; BAR as usize],
    /// BAR 1.
    memory: Arc<OwnedFd>,
    /// A state that is being saved or loaded: configuration space and BAR 0.
    image: Image,
}

impl Copier {
    /// As it is after a reset.
    pub fn new() -> std::io::Result<Self> {
        let memory = memfd_create("copier", MemfdFlags::CLOEXEC)?;
        ftruncate(&memory, 2 * BAR)?;
        let config = Config::new(0x1de5, 0x0c09, 0x08_80_00).with_bar(0, BAR as u32).with_bar(1, 2 * BAR as u32);
        let config = config.with_msix(4, 0, 0x800, 0xc00);
        Ok(Self { config, page: [0; BAR as usize], memory: memory.into(), image: Image::default() })
    }

    fn word(&mut self, at: usize) -> &mut [u8; 8] {
        &mut self.page.as_chunks_mut().0[at]
    }

    fn copy(&mut self, bus: &Bus) -> Result<(), Errno> {
        let [source, destination, length, done] = [0, 1, 2, 3].map(|at| u64::from_le_bytes(*self.word(at)));
        if length > MOST || !self.config.is_bus_master() {
            return Err(Errno::INVAL);
        }
        let mut data = vec![0; length as usize];
        bus.read(source, &mut data).map_err(|_| Errno::FAULT)?;
        bus.write(destination, &data).map_err(|_| Errno::FAULT)?;
        *self.word(3) = (done + 1).to_le_bytes();
        bus.trigger(if bus.enabled(pci_irq::MSIX) { pci_irq::MSIX } else { pci_irq::INTX }, 0);
        Ok(())
    }
}

impl Device for Copier {
    fn description(&self) -> Description {
        let mut regions = vec![Region::default(); pci_region::COUNT as usize];
        regions[0] = Region::trapped(BAR);
        let areas = vec![Area { offset: BAR, size: BAR }];
        let shared = Some(Shared { file: self.memory.clone(), offset: 0, areas });
        regions[1] = Region { shared, ..Region::trapped(2 * BAR) };
        regions[pci_region::CONFIG as usize] = Region::trapped(config::SIZE as u64);
        let mut irqs = vec![Irq::default(); pci_irq::COUNT as usize];
        irqs[pci_irq::INTX as usize] = Irq::pin();
        irqs[pci_irq::MSIX as usize] = Irq::vectors(4);
        Description { resettable: true, regions, irqs, migration: true, pre_copy: true, p2p: true, logging: true }
    }

    fn read(&mut self, _: &Bus, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        match region {
            pci_region::CONFIG => return self.config.read(offset, data),
            1 => return rustix::io::pread(&*self.memory, data, offset).map(|_| ()),
            _ => data.copy_from_slice(&self.page[offset as usize..][..data.len()]),
        }
        Ok(())
    }

    fn write(&mut self, bus: &Bus, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let end = offset as usize + data.len();
        match (region, offset) {
            (pci_region::CONFIG, _) => return self.config.write(offset, data),
            (1, _) => return rustix::io::pwrite(&*self.memory, data, offset).map(|_| ()),
            (_, 0x20) if data[0] == 1 => return self.copy(bus),
            (_, 0..0x18) if end <= 0x18 => self.page[offset as usize..end].copy_from_slice(data),
            (_, 0x800..0xc00) if end <= 0xc00 => self.page[offset as usize..end].copy_from_slice(data),
            _ => {}
        }
        Ok(())
    }

    fn reset(&mut self, _: &Bus) -> Result<(), Errno> {
        self.config.reset();
        (self.page, self.image) = ([0; BAR as usize], Image::default());
        Ok(())
    }

    fn migration(&mut self) -> Option<&mut dyn Migration> {
        Some(self)
    }

    fn kept(&mut self) -> Option<&mut dyn Kept> {
        None
    }
}

/// A copy is over when its message is answered: there is nothing to wait for. All of its state is read when it has stopped; what
/// was written to BAR 1 stays behind.
impl Migration for Copier {
    fn arc(&mut self, _: &Bus, from: State, to: State) -> Result<(), Errno> {
        match (from, to) {
            (_, State::StopCopy) => self.image = Image::of(&[&self.config.bytes()[..], &self.page].concat()),
            (State::Resuming, _) => {
                let state = self.image.finish()?;
                let (config, page) = state.split_first_chunk().ok_or(Errno::INVAL)?;
                self.page = page.try_into().map_err(|_| Errno::INVAL)?;
                self.config.load(config)?;
            }
            _ => self.image = Image::default(),
        }
        Ok(())
    }

    fn save(&mut self, _: &Bus, into: &mut [u8]) -> Result<usize, Errno> {
        Ok(self.image.read(into))
    }

    fn load(&mut self, _: &Bus, data: &[u8]) -> Result<(), Errno> {
        self.image.write(data, config::SIZE + self.page.len())
    }

    fn estimate(&mut self, _: &Bus) -> u64 {
        (16 + config::SIZE + self.page.len()) as u64
    }
}

#[allow(dead_code, reason = "tests have this file as a module")]
fn main() -> std::io::Result<()> {
    let path = std::env::args().find_map(|a| a.strip_prefix("--socket-path=").map(std::path::PathBuf::from));
    let path = path.ok_or_else(|| std::io::Error::other("--socket-path=PATH is missing"))?;
    let mut device = Copier::new()?;
    Server::bind(&path)?.serve(&mut Host::new(&device)?, &mut device)
}
