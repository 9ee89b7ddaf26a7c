//! The function's state, and the ways between the states of a migration.
//!
//! It stands still when it is stopped, and all of its state is read then. What a client reads of it before (`PRE_COPY`) is
//! nothing. A state is taken by a device that is made anew, so that nothing of the old one is left when it is refused. To another
//! process of the same host ([`Kept`]) it goes likewise, but for its interrupts and its bells, which stay.

use std::time::{Duration, Instant};

use prost::Message;
use rustix::io::Errno;
use wherry_state::{SavedState, Section, UnitId};
use wherry_vfio_user::payload::pci_irq;
use wherry_vfio_user::server::{Kept, config};
use wherry_vfio_user::{Bus, Image, Migration, State};

use super::AccelFunction;
use crate::state::saved::SavedDevice;

/// How long workers may take to come to rest: one step of whatever they are doing.
const REST: Duration = Duration::from_secs(2);

/// Most bytes of a state: more than a device can have.
const MOST: usize = 64 << 20;

/// What there is beside contexts and requests, in bytes, at most: configuration space, the MSI-X table, engines, places.
const FIXED: usize = 16 << 10;

/// Name of the section.
const UNIT: &str = "accel-function";

/// What the function saves: schema 2 of `accel-function`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedFunction {
    /// Configuration space: 256 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub config: Vec<u8>,
    /// The MSI-X table: 16 bytes for each vector.
    #[prost(bytes = "vec", tag = "2")]
    pub table: Vec<u8>,
    /// Vectors of MSI-X that wait since they are masked.
    #[prost(uint32, repeated, tag = "3")]
    pub pending: Vec<u32>,
    /// The pin waits.
    #[prost(bool, tag = "4")]
    pub pin_pending: bool,
    /// The device behind it: schema 2 of `accel`.
    #[prost(message, optional, tag = "5")]
    pub device: Option<SavedDevice>,
}

impl SavedState for SavedFunction {
    /// 2: the device's is 2.
    const SCHEMA: u32 = 2;
}

/// A state that cannot be taken.
struct Unfit {
    errno: Errno,
    why: String,
}

impl Unfit {
    fn new(why: impl Into<String>) -> Self {
        Self { errno: Errno::INVAL, why: why.into() }
    }
}

impl AccelFunction {
    /// A device made anew, with no key.
    pub(super) fn renew(&mut self) -> Result<(), Errno> {
        // Comes to rest first: a worker that is in the middle of a step ends it.
        self.live.device.stop(Instant::now() + REST);
        self.live = self.model.live(&self.wires, &self.bells).map_err(|_| Errno::NOMEM)?;
        Ok(())
    }

    /// `waiting` are the interrupts that go along.
    fn saved(&self, waiting: &[(u32, u32)]) -> Section {
        let saved = SavedFunction {
            config: self.config.bytes().to_vec(),
            table: self.table.to_vec(),
            pending: waiting.iter().filter(|(index, _)| *index == pci_irq::MSIX).map(|(_, vector)| *vector).collect(),
            pin_pending: waiting.iter().any(|(index, _)| *index == pci_irq::INTX),
            device: Some(self.live.device.save()),
        };
        saved.to_section(&UnitId::new(UNIT, 0))
    }

    /// Takes a state; it stands still afterwards. The client gets a number; why it is refused is in the log.
    fn load_state(&mut self, bus: &Bus, bytes: &[u8]) -> Result<(), Errno> {
        self.take_state(bus, bytes).map_err(|Unfit { errno, why }| {
            tracing::warn!("a state of {} bytes is refused: {why}", bytes.len());
            errno
        })
    }

    fn take_state(&mut self, bus: &Bus, bytes: &[u8]) -> Result<(), Unfit> {
        let section = Section::decode(bytes).map_err(|error| Unfit::new(format!("it is no section: {error}")))?;
        if section.unit != UNIT {
            return Err(Unfit::new(format!("it is that of a {:.80}", section.unit)));
        }
        let saved = SavedFunction::from_section(&section).map_err(|error| Unfit::new(error.to_string()))?;
        let wrong = |what: &str, bytes: usize| Unfit::new(format!("its {what} has {bytes} bytes"));
        let config: &[u8; config::SIZE] =
            saved.config.as_slice().try_into().map_err(|_| wrong("configuration space", saved.config.len()))?;
        let table = saved.table.as_slice().try_into().map_err(|_| wrong("MSI-X table", saved.table.len()))?;
        let device = saved.device.as_ref().ok_or_else(|| Unfit::new("there is no device in it"))?;
        if let Some(vector) = saved.pending.iter().find(|vector| **vector >= super::VECTORS.into()) {
            return Err(Unfit::new(format!("vector {vector} waits, and there is none")));
        }
        self.renew().map_err(|errno| Unfit { errno, why: "there is no room for another device".into() })?;
        let restored = self.live.device.restore(device, self.model.fleet.as_ref());
        restored.map_err(|error| Unfit::new(error.to_string()))?;
        // They are its host's now: a reset has them again.
        self.model.keys = self.live.device.keys().wrapped();
        let loaded = self.config.load(config);
        loaded.map_err(|errno| Unfit { errno, why: "its configuration space is that of another function".into() })?;
        self.table = table;
        self.note_master();
        saved.pending.iter().for_each(|vector| bus.set_pending(pci_irq::MSIX, *vector));
        if saved.pin_pending {
            bus.set_pending(pci_irq::INTX, 0);
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), Errno> {
        match self.live.device.stop(Instant::now() + REST) {
            true => Ok(()),
            false => {
                self.live.resume();
                Err(Errno::BUSY)
            }
        }
    }
}

impl Migration for AccelFunction {
    fn arc(&mut self, bus: &Bus, from: State, to: State) -> Result<(), Errno> {
        self.attach(bus);
        match (from, to) {
            (State::Running, State::Stop) => self.stop(),
            (State::PreCopy, State::StopCopy) => {
                self.stop()?;
                self.image = Image::of(&self.saved(&bus.pending()).encode_to_vec());
                Ok(())
            }
            (State::Stop, State::StopCopy) => {
                self.image = Image::of(&self.saved(&bus.pending()).encode_to_vec());
                Ok(())
            }
            (State::Resuming, State::Stop) => {
                let state = self.image.finish()?;
                self.load_state(bus, &state)
            }
            (State::Stop, State::Running) => {
                self.live.resume();
                Ok(())
            }
            _ => {
                self.image = Image::default();
                Ok(())
            }
        }
    }

    fn save(&mut self, _: &Bus, into: &mut [u8]) -> Result<usize, Errno> {
        Ok(self.image.read(into))
    }

    fn load(&mut self, _: &Bus, data: &[u8]) -> Result<(), Errno> {
        self.image.write(data, MOST)
    }

    fn estimate(&mut self, _: &Bus) -> u64 {
        match self.image.left() {
            // The most that it can be, without a look at all of it.
            0 => (self.live.device.locked().weight() + FIXED) as u64,
            left => left as u64,
        }
    }
}

impl Kept for AccelFunction {
    fn rest(&mut self, bus: &Bus) -> Result<Vec<u8>, String> {
        self.attach(bus);
        self.stop().map_err(|_| format!("its workers did not come to rest within {REST:?}"))?;
        Ok(self.saved(&[]).encode_to_vec())
    }

    fn take(&mut self, bus: &Bus, state: &[u8]) -> Result<(), String> {
        self.attach(bus);
        self.take_state(bus, state).map_err(|unfit| unfit.why)
    }

    fn go_on(&mut self, _: &Bus) {
        self.live.resume();
    }
}
