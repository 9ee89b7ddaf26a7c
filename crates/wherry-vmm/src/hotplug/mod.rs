//! Hot plug of PCI functions, as the guest sees it: a few registers that ACPI's methods in the DSDT use
//! (docs/decisions/hot-plug-by-acpi.md).
//!
//! | port | bytes | register |
//! |---|---|---|
//! | 0x610 | 1 | status of general-purpose events 0 to 7; a 1 clears. Only event [`GPE`] exists |
//! | 0x611 | 1 | which of them raise the SCI |
//! | 0x614 | 4 | slots with a new device; a 1 clears |
//! | 0x618 | 4 | slots that are to be let go; a 1 clears |
//! | 0x61c | 4 | writing a 1 ejects the device in that slot; reads as 0 |
//!
//! Bit n of a register is slot n, the device number of bus 0. The event comes with every new bit. The guest reads, clears exactly
//! what it read, and does what it says; so nothing that comes meanwhile is lost.
//!
//! Contract: an [`EjectHandler`] is called on the vCPU's thread in the middle of the access, without a lock held. When it returns,
//! the guest must no longer find the device; taking it away may take longer. A guest may eject at any time, asked or not.
//!
//! References are to ACPI 6.5.

mod registers;
mod saved;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use wherry_guest::hotplug as guest;
use wherry_pci::bus::BusDevice;
use wherry_state::{Saved, SavedState, Section, StateUnit, UnitError, UnitId};

use crate::line::InterruptLine;
use crate::units::Once;
use registers::Registers;
pub(crate) use saved::SavedHotplug;

/// First port of the registers.
pub const HOTPLUG_BASE: u16 = 0x610;
/// Number of ports they take.
pub const HOTPLUG_LEN: u16 = 16;
/// Port of the general-purpose events (section 4.8.4.1): status and enable, one byte each.
pub const GPE0: u16 = HOTPLUG_BASE;
/// Port of the slots with a new device.
pub const UP: u16 = HOTPLUG_BASE + 4;
/// Port of the slots that are to be let go.
pub const DOWN: u16 = HOTPLUG_BASE + 8;
/// Port that ejects.
pub const EJECT: u16 = HOTPLUG_BASE + 12;
/// The general-purpose event of all this.
pub const GPE: u8 = 1;

const _: () = assert!(
    guest::UP == UP && guest::DOWN == DOWN && guest::EJECT == EJECT,
    "the probe guest and the machine must agree"
);

/// Who hears of slots that the guest has ejected, a bit for each.
pub type EjectHandler = Arc<dyn Fn(u32) + Send + Sync>;

/// The registers, and the state unit `pci-hotplug`.
pub struct PciHotplug {
    /// Taken by vCPUs, by whoever plugs, and by the steps of the unit; nothing else is locked under it but the interrupt line.
    registers: Mutex<Registers>,
    sci: Arc<dyn InterruptLine>,
    handler: EjectHandler,
    once: Once,
}

impl PciHotplug {
    /// Registers that raise this interrupt and tell this handler.
    pub fn new(sci: Arc<dyn InterruptLine>, handler: EjectHandler) -> Arc<Self> {
        Arc::new(Self { registers: Mutex::default(), sci, handler, once: Once::default() })
    }

    /// The device in a slot may be ejected. It was there before the guest was, so the guest is not told.
    pub fn allow(&self, slot: u8) {
        self.lock().allow(slot);
    }

    /// Tells the guest of a new device, which answers already.
    pub fn plugged(&self, slot: u8) {
        let mut registers = self.lock();
        registers.plugged(slot);
        self.sci.set_level(registers.sci());
    }

    /// Asks the guest to let a slot go.
    pub fn ask(&self, slot: u8) {
        let mut registers = self.lock();
        registers.ask(slot);
        self.sci.set_level(registers.sci());
    }

    /// Asks no longer. False if the guest has heard it already: it may still let the slot go.
    pub fn withdraw(&self, slot: u8) -> bool {
        self.lock().withdraw(slot)
    }

    /// The device in a slot has been taken away.
    pub fn freed(&self, slot: u8) {
        self.lock().freed(slot);
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for PciHotplug {
    fn read(&self, _base: u64, offset: u64, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn write(&self, _base: u64, offset: u64, data: &[u8]) {
        let ejected = {
            let mut registers = self.lock();
            let ejected = registers.write(offset, data);
            self.sci.set_level(registers.sci());
            ejected
        };
        if ejected != 0 {
            (self.handler)(ejected);
        }
    }
}

impl StateUnit for PciHotplug {
    fn id(&self) -> UnitId {
        UnitId::new("pci-hotplug", 0)
    }

    fn depends_on(&self) -> &[&str] {
        &["irqchip", "pci-host"]
    }

    fn schema(&self) -> u32 {
        SavedHotplug::SCHEMA
    }

    fn drain(&self, _deadline: Instant) -> Result<(), UnitError> {
        Ok(())
    }

    fn undrain(&self) -> Result<(), UnitError> {
        Ok(())
    }

    fn begin_stop(&self) -> Result<(), UnitError> {
        Ok(())
    }

    fn finish_stop(&self, _deadline: Instant) -> Result<(), UnitError> {
        Ok(())
    }

    fn save(&self) -> Result<Saved, UnitError> {
        Ok(Saved::Section(self.lock().save().to_section(&self.id())))
    }

    fn restore(&self, section: &Section) -> Result<(), UnitError> {
        self.once.restoring()?;
        let saved = SavedHotplug::from_section(section)?;
        let ejected = {
            let mut registers = self.lock();
            registers.restore(&saved).map_err(UnitError::failed)?;
            registers.ejected()
        };
        if ejected != 0 {
            (self.handler)(ejected);
        }
        Ok(())
    }

    fn start(&self) -> Result<(), UnitError> {
        self.once.started();
        let registers = self.lock();
        self.sci.set_level(registers.sci());
        Ok(())
    }
}
