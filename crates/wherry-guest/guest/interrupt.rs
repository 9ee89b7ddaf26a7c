//! IDT, local APIC and interrupts.
//!
//! An interrupt costs its vCPU a dozen instructions in ring 0: count it, signal its end. Drivers watch the count. Those of
//! [`LEVEL_VECTORS`] have not ended until the driver says so: a pin that is still up would interrupt again at once, without end.

use core::sync::atomic::Ordering;

use crate::gate::GATE_VECTOR;
use crate::{gate, mmio, percpu};

/// Vectors for drivers. Those below belong to the processor, the legacy PIC's range and the timer.
pub const DEVICE_VECTORS: core::ops::Range<u8> = 0x90..0xf0;
/// Vectors for pins, whose driver calls [`end`]. What has a lower vector waits for that.
pub const LEVEL_VECTORS: core::ops::Range<u8> = 0xf0..0xff;
/// Vector of the local APIC's timer.
pub const TIMER_VECTOR: u8 = 0x40;

const SPURIOUS_VECTOR: u8 = 0xff;
const IO_APIC: u64 = 0xfec0_0000;
const LAPIC: u64 = 0xfee0_0000;
const LAPIC_ID: u64 = LAPIC + 0x20;
const LAPIC_EOI: u64 = LAPIC + 0xb0;
const LAPIC_SVR: u64 = LAPIC + 0xf0;
const LAPIC_ICR_LOW: u64 = LAPIC + 0x300;
const LAPIC_ICR_HIGH: u64 = LAPIC + 0x310;
const LAPIC_LVT_TIMER: u64 = LAPIC + 0x320;
const LAPIC_LVT_LINT0: u64 = LAPIC + 0x350;
const LAPIC_TIMER_INITIAL: u64 = LAPIC + 0x380;
const LAPIC_TIMER_COUNT: u64 = LAPIC + 0x390;
const LAPIC_TIMER_DIVIDE: u64 = LAPIC + 0x3e0;
const MASKED: u32 = 1 << 16;
const ICR_PENDING: u32 = 1 << 12;

unsafe extern "C" {
    #[link_name = "idt"]
    static mut IDT: [[u64; 2]; 256];
    #[link_name = "vector_stubs"]
    static VECTOR_STUBS: u8;
    #[link_name = "gate_entry"]
    static GATE_ENTRY: u8;
}

/// Fills the IDT, which all vCPUs share. Called once, by the first vCPU, before anything can fault or interrupt.
pub fn init_idt() {
    for vector in 0..=255u8 {
        let handler = if vector == GATE_VECTOR {
            &raw const GATE_ENTRY as u64
        } else {
            &raw const VECTOR_STUBS as u64 + 16 * u64::from(vector)
        };
        let low = handler & 0xffff | 0x08 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
        // SAFETY: the table is only read by the processor; this is its only writer.
        unsafe { (&raw mut IDT[vector as usize]).write_volatile([low, handler >> 32]) };
    }
}

/// Enables the local APIC of this vCPU, with the PIC's input and the timer masked.
pub fn init_local_apic() {
    // SAFETY: the local APIC's registers do not touch memory.
    unsafe {
        mmio::write32(LAPIC_LVT_LINT0, MASKED);
        mmio::write32(LAPIC_LVT_TIMER, MASKED | u32::from(TIMER_VECTOR));
        mmio::write32(LAPIC_TIMER_DIVIDE, 0b1011);
        mmio::write32(LAPIC_SVR, 0x100 | u32::from(SPURIOUS_VECTOR));
    }
}

/// Id of this vCPU's local APIC.
pub fn local_apic_id() -> u32 {
    // SAFETY: reads a register of the local APIC.
    unsafe { mmio::read32(LAPIC_ID) >> 24 }
}

/// Sends an interprocessor interrupt: `command` is the low half of the ICR.
pub fn send_ipi(apic_id: u32, command: u32) {
    // SAFETY: registers of the local APIC; INIT and SIPI go to vCPUs whose start is prepared.
    unsafe {
        mmio::write32(LAPIC_ICR_HIGH, apic_id << 24);
        mmio::write32(LAPIC_ICR_LOW, command);
        for _ in 0..10_000 {
            if mmio::read32(LAPIC_ICR_LOW) & ICR_PENDING == 0 {
                break;
            }
        }
    }
}

/// How often vCPU `cpu` has taken `vector`. Wraps.
pub fn count(cpu: usize, vector: u8) -> u32 {
    percpu::interrupt_counts(cpu)[usize::from(vector)].load(Ordering::Acquire)
}

/// How many interrupts vCPU `cpu` has taken, of all vectors. Wraps.
pub fn total(cpu: usize) -> u32 {
    count(cpu, 0)
}

/// Has an input of the I/O APIC raise `vector` of a vCPU, as PCI's pins do: by level, active low.
pub fn route_pin(input: u8, vector: u8, apic_id: u32) {
    let register = 0x10 + 2 * u32::from(input);
    // SAFETY: registers of the I/O APIC; the vector has a stub.
    unsafe {
        mmio::write32(IO_APIC, register + 1);
        mmio::write32(IO_APIC + 0x10, apic_id << 24);
        mmio::write32(IO_APIC, register);
        mmio::write32(IO_APIC + 0x10, 1 << 15 | 1 << 13 | u32::from(vector));
    }
}

/// Ends the interrupt of this vCPU that is being served, which is one of [`LEVEL_VECTORS`].
pub fn end() {
    // SAFETY: a register of the local APIC.
    unsafe { mmio::write32(LAPIC_EOI, 0) };
}

/// Frequency of the local APIC's timer in Hz, measured against the TSC for about 2 ms.
pub fn measure_timer(tsc_hz: u64) -> u64 {
    // SAFETY: registers of the local APIC; its timer stays masked.
    unsafe {
        mmio::write32(LAPIC_TIMER_INITIAL, u32::MAX);
        let start_count = mmio::read32(LAPIC_TIMER_COUNT);
        let start = crate::time::tsc();
        while crate::time::tsc().wrapping_sub(start) < tsc_hz / 500 {
            core::hint::spin_loop();
        }
        let ticks = start_count.wrapping_sub(mmio::read32(LAPIC_TIMER_COUNT));
        let elapsed = crate::time::tsc().wrapping_sub(start).max(1);
        mmio::write32(LAPIC_TIMER_INITIAL, 0);
        (u128::from(ticks) * u128::from(tsc_hz) / u128::from(elapsed)) as u64
    }
}

/// Lets the timer of this vCPU interrupt, for [`sleep`].
pub fn enable_timer() {
    // SAFETY: a register of the local APIC; the vector has a stub.
    unsafe { mmio::write32(LAPIC_LVT_TIMER, u32::from(TIMER_VECTOR)) };
}

/// Sleeps for `ticks` of the local APIC's timer, or until an interrupt; not if more than `interrupts` have come to this vCPU.
pub fn rest(ticks: u32, interrupts: u32) {
    gate::rest(ticks.max(1), interrupts);
}

/// Sleeps for `ticks` of the local APIC's timer, or until another interrupt.
pub fn sleep(ticks: u32) {
    gate::wait(ticks.max(1));
}
