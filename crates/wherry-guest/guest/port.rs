//! The probe port: a VMM that has it is told of events at once. See `report::PORT_GPA`.

use core::sync::atomic::{AtomicBool, Ordering};

use crate::mmio;
use crate::report::{PORT_GPA, PORT_ID, PORT_REG_EVENT, PORT_REG_ID, PORT_REG_POWEROFF, PortEvent};

static PRESENT: AtomicBool = AtomicBool::new(false);

/// Looks for the port; until then nothing is written to it.
pub fn probe() -> bool {
    // SAFETY: the address is device memory or nothing; the register has no read effect.
    let present = unsafe { mmio::read32(PORT_GPA + PORT_REG_ID) } == PORT_ID;
    PRESENT.store(present, Ordering::Relaxed);
    present
}

/// Tells the VMM of an event.
pub fn event(event: PortEvent, cpu: usize, argument: u32) {
    write(PORT_REG_EVENT, event.encode(cpu as u8, argument as u16));
}

/// Asks the VMM to power off; 0 is a good end. Comes back where the VMM has no port.
pub fn power_off(code: u32) {
    write(PORT_REG_POWEROFF, code);
}

fn write(register: u64, value: u32) {
    if PRESENT.load(Ordering::Relaxed) {
        // SAFETY: the port is there; its registers do not touch memory.
        unsafe { mmio::write32(PORT_GPA + register, value) };
    }
}
