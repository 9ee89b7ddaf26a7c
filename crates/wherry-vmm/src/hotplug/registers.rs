//! The registers themselves, without bus, interrupt or lock.

use super::saved::SavedHotplug;
use super::{DOWN, EJECT, GPE, HOTPLUG_BASE, UP};

/// Events that exist: ours.
const EVENTS: u8 = 1 << GPE;

#[derive(Default)]
pub(super) struct Registers {
    status: u8,
    enable: u8,
    up: u32,
    down: u32,
    /// Slots that were ejected, and are not free yet.
    ejected: u32,
    /// Slots whose devices may go.
    removable: u32,
}

fn offset(port: u16) -> u64 {
    u64::from(port - HOTPLUG_BASE)
}

impl Registers {
    pub fn restore(&mut self, saved: &SavedHotplug) -> Result<(), String> {
        let lacking = saved.ejected & !self.removable;
        if lacking != 0 {
            return Err(format!("slots {lacking:#x} were ejected, and there are no devices in them that could be"));
        }
        self.status = saved.gpe_status as u8 & EVENTS;
        self.enable = saved.gpe_enable as u8 & EVENTS;
        (self.up, self.down, self.ejected) = (saved.up, saved.down, saved.ejected);
        Ok(())
    }

    pub fn save(&self) -> SavedHotplug {
        SavedHotplug {
            gpe_status: self.status.into(),
            gpe_enable: self.enable.into(),
            up: self.up,
            down: self.down,
            ejected: self.ejected,
        }
    }

    /// Level of the system control interrupt.
    pub fn sci(&self) -> bool {
        self.status & self.enable != 0
    }

    /// The device in a slot may be ejected. Nothing is told to the guest.
    pub fn allow(&mut self, slot: u8) {
        self.removable |= 1 << slot;
    }

    /// A slot has a new device, which the guest is to be told of.
    pub fn plugged(&mut self, slot: u8) {
        self.allow(slot);
        self.up |= 1 << slot;
        self.status |= EVENTS;
    }

    /// The guest is to let a slot go.
    pub fn ask(&mut self, slot: u8) {
        self.down |= 1 << slot;
        self.status |= EVENTS;
    }

    /// It need not any more. False if it has been told already.
    pub fn withdraw(&mut self, slot: u8) -> bool {
        let untold = self.down & 1 << slot != 0;
        self.down &= !(1 << slot);
        untold
    }

    /// A slot is empty.
    pub fn freed(&mut self, slot: u8) {
        let others = !(1 << slot);
        for bits in [&mut self.up, &mut self.down, &mut self.ejected, &mut self.removable] {
            *bits &= others;
        }
    }

    pub fn ejected(&self) -> u32 {
        self.ejected
    }

    pub fn read(&self, at: u64, data: &mut [u8]) {
        let (up, down) = (offset(UP), offset(DOWN));
        for (at, byte) in (at..).zip(data) {
            *byte = match at {
                0 => self.status,
                1 => self.enable,
                at if (up..up + 4).contains(&at) => self.up.to_le_bytes()[(at - up) as usize],
                at if (down..down + 4).contains(&at) => self.down.to_le_bytes()[(at - down) as usize],
                _ => 0,
            };
        }
    }

    /// Returns the slots that the write has ejected.
    pub fn write(&mut self, at: u64, data: &[u8]) -> u32 {
        let (up, down, eject) = (offset(UP), offset(DOWN), offset(EJECT));
        let mut ejected = 0;
        for (at, byte) in (at..).zip(data) {
            let bits = |first: u64| u32::from(*byte) << (8 * (at - first));
            match at {
                0 => self.status &= !byte,
                1 => self.enable = byte & EVENTS,
                at if (up..up + 4).contains(&at) => self.up &= !bits(up),
                at if (down..down + 4).contains(&at) => self.down &= !bits(down),
                at if (eject..eject + 4).contains(&at) => ejected |= bits(eject) & self.removable & !self.ejected,
                _ => {}
            }
        }
        self.ejected |= ejected;
        self.up &= !ejected;
        self.down &= !ejected;
        ejected
    }
}
