//! Power management: ACPI's fixed registers, and every way in which a guest switches off or resets the machine.
//!
//! - [`AcpiPm`]: the PM1 event and control registers and the PM timer (ACPI 6.5, section 4.8.3) at [`PM_BASE`]. Writing
//!   sleep type [`SLEEP_TYPE_S5`] with the enable bit switches off. [`AcpiPm::press_power_button`] asks the guest to.
//! - [`ResetControl`]: the reset control register at port 0xCF9, which lies inside the PCI configuration ports.
//! - [`KeyboardController`]: port 0x64, of which only the reset command exists.
//!
//! Contract: a [`PowerHandler`] is called on the vCPU's thread in the middle of the access, perhaps more than once,
//! and must not block. The machine decides what follows.
//!
//! The timer counts on while the machine is stopped or on its way to another host, as the guest's other clocks do: Linux
//! compares them. There is no system management mode: ACPI mode is always on. Timer and global events are never raised.

mod registers;
mod saved;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use wherry_state::{Saved, SavedState, Section, StateUnit, UnitError, UnitId};

use crate::line::InterruptLine;
use crate::units::Once;
use registers::Registers;
pub(crate) use saved::SavedAcpi;
use wherry_pci::bus::BusDevice;

/// First port of the fixed ACPI registers.
pub const PM_BASE: u16 = 0x600;
/// Number of ports they take.
pub const PM_LEN: u16 = 12;
/// Port of PM1 events: status and enable, two bytes each.
pub const PM1_EVENT: u16 = PM_BASE;
/// Port of PM1 control, two bytes.
pub const PM1_CONTROL: u16 = PM_BASE + 4;
/// Port of the PM timer, four bytes.
pub const PM_TIMER: u16 = PM_BASE + 8;
/// The sleep type that switches off.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Port of the reset control register.
pub const RESET_PORT: u16 = 0xcf9;
/// What resets the machine when it is written to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 6;
/// Command and status port of the keyboard controller.
pub const KEYBOARD_PORT: u16 = 0x64;

/// What the guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    /// To be switched off.
    PowerOff,
    /// To be reset.
    Reset,
}

/// Whom the devices tell.
pub type PowerHandler = Arc<dyn Fn(PowerRequest) + Send + Sync>;

/// The reset control register. Bit 2 going from 0 to 1 resets.
pub struct ResetControl {
    value: AtomicU8,
    handler: PowerHandler,
}

impl ResetControl {
    /// A register that tells this handler.
    pub fn new(handler: PowerHandler) -> Arc<Self> {
        Arc::new(Self { value: AtomicU8::new(0), handler })
    }

    /// What the guest reads.
    pub fn read(&self) -> u8 {
        self.value.load(Ordering::Relaxed)
    }

    /// What the guest writes.
    pub fn write(&self, value: u8) {
        // Bit 0 does not exist; bits 1 (kind of reset) and 3 (full reset) are kept and mean the same to us.
        let before = self.value.swap(value & 0x0e & !4, Ordering::Relaxed);
        if value & 4 != 0 && before & 4 == 0 {
            (self.handler)(PowerRequest::Reset);
        }
    }
}

/// Port 0x64: the command 0xFE pulses the reset line. It always reads as an idle controller without data, so that
/// nobody waits for it.
pub struct KeyboardController(PowerHandler);

impl KeyboardController {
    /// A controller that tells this handler.
    pub fn new(handler: PowerHandler) -> Self {
        Self(handler)
    }
}

impl BusDevice for KeyboardController {
    fn read(&self, _base: u64, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _base: u64, _offset: u64, data: &[u8]) {
        if data.first() == Some(&0xfe) {
            (self.0)(PowerRequest::Reset);
        }
    }
}

/// The fixed ACPI registers, and the state unit `acpi`.
pub struct AcpiPm {
    /// Taken by vCPUs, by whoever presses the button, and by the steps of the unit; nothing else is locked under it
    /// but the interrupt line.
    registers: Mutex<Registers>,
    sci: Arc<dyn InterruptLine>,
    reset: Arc<ResetControl>,
    handler: PowerHandler,
    once: Once,
}

/// `CLOCK_REALTIME` since 1970.
fn realtime() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

impl AcpiPm {
    /// Registers that raise this interrupt and tell this handler. The reset control register is saved with them.
    pub fn new(sci: Arc<dyn InterruptLine>, reset: Arc<ResetControl>, handler: PowerHandler) -> Arc<Self> {
        Arc::new(Self {
            registers: Mutex::new(Registers::new(Instant::now())),
            sci,
            reset,
            handler,
            once: Once::default(),
        })
    }

    /// Presses the power button. False if the guest does not listen to it (yet); the press is remembered then.
    pub fn press_power_button(&self) -> bool {
        let mut registers = self.lock();
        let heard = registers.press_power_button();
        self.sci.set_level(registers.sci());
        heard
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for AcpiPm {
    fn read(&self, _base: u64, offset: u64, data: &mut [u8]) {
        self.lock().read(offset, data, Instant::now());
    }

    fn write(&self, _base: u64, offset: u64, data: &[u8]) {
        let sleep = {
            let mut registers = self.lock();
            let sleep = registers.write(offset, data);
            self.sci.set_level(registers.sci());
            sleep
        };
        if sleep == Some(SLEEP_TYPE_S5) {
            (self.handler)(PowerRequest::PowerOff);
        }
    }
}

impl StateUnit for AcpiPm {
    fn id(&self) -> UnitId {
        UnitId::new("acpi", 0)
    }

    fn depends_on(&self) -> &[&str] {
        &["irqchip"]
    }

    fn schema(&self) -> u32 {
        SavedAcpi::SCHEMA
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
        let mut saved = self.lock().save(Instant::now());
        saved.reset_control = self.reset.read().into();
        saved.realtime_ns = realtime().as_nanos() as u64;
        Ok(Saved::Section(saved.to_section(&self.id())))
    }

    fn restore(&self, section: &Section) -> Result<(), UnitError> {
        self.once.restoring()?;
        let saved = SavedAcpi::from_section(section)?;
        let narrow = |what, value: u32| {
            u16::try_from(value).map_err(|_| UnitError::failed(format!("{what} {value:#x} has more than 16 bits")))
        };
        let registers = Registers::restore(
            narrow("PM1 status", saved.pm1_status)?,
            narrow("PM1 enable", saved.pm1_enable)?,
            narrow("PM1 control", saved.pm1_control)?,
            saved.timer,
            // A clock that is behind the source's counts as no time at all.
            realtime().saturating_sub(Duration::from_nanos(saved.realtime_ns)),
            Instant::now(),
        );
        *self.lock() = registers;
        self.reset.value.store(saved.reset_control as u8 & 0x0a, Ordering::Relaxed);
        Ok(())
    }

    fn start(&self) -> Result<(), UnitError> {
        self.once.started();
        let registers = self.lock();
        self.sci.set_level(registers.sci());
        Ok(())
    }
}
