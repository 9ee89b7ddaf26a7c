//! What a device is to its server.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::bus::Bus;
use super::kept::Kept;
use crate::payload::{Area, IoFd, irq_flags, region_flags};
use crate::states::State;

/// A region of a device.
#[derive(Clone, Debug, Default)]
pub struct Region {
    /// See [`region_flags`]; those of mapping and capabilities are set by the server.
    pub flags: u32,
    /// Bytes; 0 if there is none.
    pub size: u64,
    /// What a client can map.
    pub shared: Option<Shared>,
    /// Parts that tell of accesses by a descriptor; `fd_index` is an index in `descriptors`.
    pub io_fds: Vec<IoFd>,
    /// Descriptors of those.
    pub descriptors: Vec<Arc<OwnedFd>>,
}

impl Region {
    /// A region that is read and written by message.
    pub fn trapped(size: u64) -> Self {
        Self { flags: region_flags::READ | region_flags::WRITE, size, ..Self::default() }
    }
}

/// Memory of a region that a client can map.
#[derive(Clone, Debug)]
pub struct Shared {
    /// The file.
    pub file: Arc<OwnedFd>,
    /// Where the region starts in it.
    pub offset: u64,
    /// The parts that can be mapped; without any, all of it.
    pub areas: Vec<Area>,
}

/// A type of interrupts of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Irq {
    /// See [`irq_flags`].
    pub flags: u32,
    /// Vectors; 0 if it has none.
    pub count: u32,
}

impl Irq {
    /// A pin: masks itself when it is triggered.
    pub fn pin() -> Self {
        Self { flags: irq_flags::EVENTFD | irq_flags::MASKABLE | irq_flags::AUTOMASKED, count: 1 }
    }

    /// Vectors of MSI or MSI-X.
    pub fn vectors(count: u32) -> Self {
        Self { flags: irq_flags::EVENTFD | irq_flags::MASKABLE, count }
    }
}

/// What a device is; it does not change while a server drives it.
#[derive(Clone, Debug, Default)]
pub struct Description {
    /// It can be reset.
    pub resettable: bool,
    /// Its regions, by index (`payload::pci_region`).
    pub regions: Vec<Region>,
    /// Its interrupts, by index (`payload::pci_irq`).
    pub irqs: Vec<Irq>,
    /// It can be migrated: [`Device::migration`] is there.
    pub migration: bool,
    /// Some of its state can be read while it runs.
    pub pre_copy: bool,
    /// It has the P2P states, for clients that know them.
    pub p2p: bool,
    /// What it writes by [`Bus::write`] is logged when a client asks for it.
    pub logging: bool,
}

/// A device, driven by a server with one message after the other. What it refuses with an error number the client gets as that.
/// Bounds, flags and the order of states are checked before it is asked.
pub trait Device: Send {
    /// What it is.
    fn description(&self) -> Description;

    /// Reads from a region; all of it lies inside.
    fn read(&mut self, bus: &Bus, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno>;

    /// Writes to a region; all of it lies inside.
    fn write(&mut self, bus: &Bus, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno>;

    /// Resets it: whatever it was doing, it does no longer when this returns, and its migration is `RUNNING`.
    fn reset(&mut self, bus: &Bus) -> Result<(), Errno>;

    /// Its migration; `None` without one.
    fn migration(&mut self) -> Option<&mut dyn Migration>;

    /// Its way to another process that goes on with its client; `None` without one.
    fn kept(&mut self) -> Option<&mut dyn Kept>;
}

/// How a device is migrated.
pub trait Migration {
    /// Goes along one arc between two states ([`crate::states`]), completely. When it cannot it stays where it is; but if
    /// the way out of `RESUMING` fails, since the data is not good, the device is in `ERROR` then.
    fn arc(&mut self, bus: &Bus, from: State, to: State) -> Result<(), Errno>;

    /// The next bytes of its state; fewer than there is room for, if there are no more for now.
    fn save(&mut self, bus: &Bus, into: &mut [u8]) -> Result<usize, Errno>;

    /// Takes the next bytes of a state.
    fn load(&mut self, bus: &Bus, data: &[u8]) -> Result<(), Errno>;

    /// Bytes that [`Self::save`] would give from now on if it stopped now; an estimate.
    fn estimate(&mut self, bus: &Bus) -> u64;
}
