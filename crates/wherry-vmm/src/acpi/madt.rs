//! MADT (section 5.2.12): interrupt controllers.
//!
//! `acpi_tables` builds MADTs too, but has neither interrupt source overrides nor the flag for the PC's pair of 8259s.

use acpi_tables::sdt::Sdt;

use super::{SCI, table};
use crate::layout;

/// The machine also has 8259 interrupt controllers.
const PCAT_COMPAT: u32 = 1;
const IO_APIC_ID: u8 = 0;
/// Flags of an override or an NMI: as the bus says; or active high and level-triggered.
const CONFORMS: u16 = 0;
const HIGH_LEVEL: u16 = 1 | 3 << 2;

pub(super) fn madt(cpus: u32) -> Sdt {
    let mut body = Vec::new();
    body.extend_from_slice(&(layout::LOCAL_APIC as u32).to_le_bytes());
    body.extend_from_slice(&PCAT_COMPAT.to_le_bytes());
    for id in 0..cpus {
        match u8::try_from(id) {
            // Processor local APIC: UID, APIC id, enabled.
            Ok(id) if id < 255 => body.extend_from_slice(&[0, 8, id, id, 1, 0, 0, 0]),
            // Processor local x2APIC: APIC id, enabled, UID.
            _ => {
                body.extend_from_slice(&[9, 16, 0, 0]);
                for value in [id, 1, id] {
                    body.extend_from_slice(&value.to_le_bytes());
                }
            }
        }
    }
    body.extend_from_slice(&[1, 12, IO_APIC_ID, 0]);
    body.extend_from_slice(&(layout::IOAPIC as u32).to_le_bytes());
    body.extend_from_slice(&0u32.to_le_bytes());
    // The interval timer, ISA interrupt 0, needs no override: KVM connects it to input 0, where other PCs have input 2.
    body.extend_from_slice(&[2, 10, 0, SCI as u8]);
    body.extend_from_slice(&SCI.to_le_bytes());
    body.extend_from_slice(&HIGH_LEVEL.to_le_bytes());
    // NMI at LINT1 of all processors.
    body.extend_from_slice(&[4, 6, 0xff]);
    body.extend_from_slice(&CONFORMS.to_le_bytes());
    body.push(1);
    table(*b"APIC", 5, &body)
}
