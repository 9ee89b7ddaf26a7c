//! The common configuration (section 4.1.4.3): what the driver sets before it uses the device. Registers only; what
//! follows from them is for the transport.

use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};

use crate::device::{Position, RingSetup};
use crate::saved::{SavedRing, SavedTransport};

pub(super) const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
pub(super) const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
pub(super) const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;
/// Status: only a reset helps.
pub(super) const NEEDS_RESET: u8 = 0x40;
/// No vector.
pub(super) const NO_VECTOR: u16 = 0xffff;
/// Bytes of the registers.
pub(super) const LEN: u64 = 0x38;
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

#[derive(Clone, Copy)]
pub(super) struct RingRegisters {
    pub(super) most: u16,
    pub(super) setup: RingSetup,
    pub(super) enabled: bool,
}

impl RingRegisters {
    fn reset(most: u16) -> Self {
        Self { most, setup: RingSetup { size: most, ..Default::default() }, enabled: false }
    }
}

/// The registers. Status, vectors and the number of the configuration are elsewhere: others use them without this lock.
pub(super) struct Common {
    pub(super) offered: u64,
    pub(super) accepted: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
    pub(super) rings: Vec<RingRegisters>,
}

/// The registers that live elsewhere, as a read shows them.
pub(super) struct Shown {
    pub(super) status: u8,
    pub(super) generation: u8,
    pub(super) config_vector: u16,
    pub(super) ring_vector: u16,
}

/// What a write asks for beyond the registers here.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Nothing,
    Status(u8),
    ConfigVector(u16),
    RingVector(u16, u16),
}

impl Common {
    pub(super) fn new(features: u64, sizes: &[u16]) -> Self {
        Self {
            offered: features | VERSION_1,
            accepted: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            rings: sizes.iter().map(|most| RingRegisters::reset(*most)).collect(),
        }
    }

    pub(super) fn reset(&mut self) {
        let sizes: Vec<_> = self.rings.iter().map(|ring| ring.most).collect();
        *self = Self::new(self.offered, &sizes);
    }

    /// Whether the features that the driver has taken are ones that were offered, with the one that all need.
    pub(super) fn features_are_good(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & VERSION_1 != 0
    }

    pub(super) fn selected(&self) -> u16 {
        self.queue_select
    }

    pub(super) fn read(&self, shown: &Shown, offset: u64, data: &mut [u8]) {
        let mut image = [0; LEN as usize];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        put(0x00, &self.device_feature_select.to_le_bytes());
        put(0x04, &half(self.offered, self.device_feature_select).to_le_bytes());
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(0x0c, &half(self.accepted, self.driver_feature_select).to_le_bytes());
        put(0x10, &shown.config_vector.to_le_bytes());
        put(0x12, &(self.rings.len() as u16).to_le_bytes());
        put(0x14, &[shown.status, shown.generation]);
        put(0x16, &self.queue_select.to_le_bytes());
        // A ring that does not exist has size 0.
        if let Some(ring) = self.rings.get(usize::from(self.queue_select)) {
            put(0x18, &ring.setup.size.to_le_bytes());
            put(0x1a, &shown.ring_vector.to_le_bytes());
            put(0x1c, &u16::from(ring.enabled).to_le_bytes());
            put(0x1e, &self.queue_select.to_le_bytes());
            put(0x20, &ring.setup.descriptors.to_le_bytes());
            put(0x28, &ring.setup.available.to_le_bytes());
            put(0x30, &ring.setup.used.to_le_bytes());
        }
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes one register: of its own width, or half of an address. Anything else is ignored, and so is what may not be
    /// changed in this status.
    pub(super) fn write(&mut self, status: u8, offset: u64, data: &[u8]) -> Asked {
        let mut bytes = [0; 8];
        let Some(low) = bytes.get_mut(..data.len()) else { return Asked::Nothing };
        low.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let select = self.queue_select;
        let configuring = status & DRIVER_OK == 0;
        let ring = self.rings.get_mut(usize::from(select));
        match (offset, data.len()) {
            (0x00, 4) => self.device_feature_select = value as u32,
            (0x08, 4) => self.driver_feature_select = value as u32,
            (0x0c, 4) if status & FEATURES_OK == 0 => match self.driver_feature_select {
                0 => self.accepted = self.accepted & !0xffff_ffff | value,
                1 => self.accepted = self.accepted & 0xffff_ffff | value << 32,
                // Bits that were never offered spoil the agreement.
                _ if value != 0 => self.accepted |= !self.offered,
                _ => {}
            },
            (0x10, 2) => return Asked::ConfigVector(value as u16),
            (0x14, 1) => return Asked::Status(value as u8),
            (0x16, 2) => self.queue_select = value as u16,
            (0x1a, 2) if ring.is_some() => return Asked::RingVector(select, value as u16),
            (at, len) => {
                let Some(ring) = ring.filter(|ring| configuring && !ring.enabled) else { return Asked::Nothing };
                match (at, len) {
                    (0x18, 2) if (value as u16).is_power_of_two() && value <= u64::from(ring.most) => {
                        ring.setup.size = value as u16;
                    }
                    (0x1c, 2) if value == 1 => ring.enabled = true,
                    (0x20..0x38, 4 | 8) => {
                        let field = match at & !7 {
                            0x20 => &mut ring.setup.descriptors,
                            0x28 => &mut ring.setup.available,
                            _ => &mut ring.setup.used,
                        };
                        *field = match (at & 7, len) {
                            (0, 8) => value,
                            (0, 4) => *field & !0xffff_ffff | value,
                            (4, 4) => *field & 0xffff_ffff | value << 32,
                            _ => *field,
                        };
                    }
                    _ => {}
                }
            }
        }
        Asked::Nothing
    }

    /// Fills in what is here.
    pub(super) fn save(&self, saved: &mut SavedTransport, vector: impl Fn(u16) -> u16, positions: &[(u16, Position)]) {
        saved.offered = self.offered;
        saved.accepted = self.accepted;
        saved.device_feature_select = self.device_feature_select;
        saved.driver_feature_select = self.driver_feature_select;
        saved.queue_select = self.queue_select.into();
        let rings = (0u16..).zip(&self.rings).map(|(index, ring)| {
            let position = positions.iter().find(|(i, _)| *i == index).map_or(ring.setup.position, |(_, p)| *p);
            SavedRing {
                size: ring.setup.size.into(),
                vector: vector(index).into(),
                enabled: ring.enabled,
                descriptors: ring.setup.descriptors,
                available: ring.setup.available,
                used: ring.setup.used,
                next_available: position.available.into(),
                next_used: position.used.into(),
            }
        });
        saved.rings = rings.collect();
    }

    /// Takes what is here, or says what is impossible.
    pub(super) fn restore(&mut self, saved: &SavedTransport) -> Result<(), String> {
        let missing = saved.accepted & !self.offered;
        if missing != 0 {
            return Err(format!("the driver uses features {missing:#x}, which this device does not have"));
        }
        if saved.rings.len() != self.rings.len() {
            return Err(format!("{} rings were saved, this device has {}", saved.rings.len(), self.rings.len()));
        }
        let number = |what: &str, value: u32| {
            u16::try_from(value).map_err(|_| format!("{what} {value:#x} has more than 16 bits"))
        };
        let mut rings = self.rings.clone();
        for (ring, saved) in rings.iter_mut().zip(&saved.rings) {
            let size = number("ring size", saved.size)?;
            if !size.is_power_of_two() || size > ring.most {
                return Err(format!("a ring of {size} entries, where this device has at most {}", ring.most));
            }
            ring.enabled = saved.enabled;
            ring.setup = RingSetup {
                size,
                descriptors: saved.descriptors,
                available: saved.available,
                used: saved.used,
                position: Position {
                    available: number("ring index", saved.next_available)?,
                    used: number("ring index", saved.next_used)?,
                },
            };
        }
        self.queue_select = number("ring number", saved.queue_select)?;
        // The driver goes on to see what was offered there; should it begin anew, then without what is lacking here.
        self.offered &= saved.offered;
        self.accepted = saved.accepted;
        self.device_feature_select = saved.device_feature_select;
        self.driver_feature_select = saved.driver_feature_select;
        self.rings = rings;
        Ok(())
    }
}
