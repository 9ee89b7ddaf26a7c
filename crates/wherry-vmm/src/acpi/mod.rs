//! ACPI tables: how an operating system learns what this machine has.
//!
//! [`write_tables`] puts RSDP, XSDT, FADT, FACS, DSDT, MADT and MCFG into the area that [`layout::ACPI_TABLES`] names.
//! Each table is built by its own module and knows nothing of addresses but what it is given; a device that a later
//! version adds appends its AML to [`AcpiConfig::devices`] or a whole table to [`AcpiConfig::tables`].
//!
//! The machine is not "hardware-reduced": it has the fixed registers of [`crate::power`], because power-off, reset and
//! the power button through them need no AML and work in every operating system. PCI devices come and go by a general-purpose event
//! and methods in the DSDT, on the registers of [`crate::hotplug`].
//!
//! References are to ACPI 6.5. The tables belong to the guest once it runs: they are RAM, and migrate as such.

mod dsdt;
mod fadt;
mod madt;
#[cfg(test)]
mod tests;

use acpi_tables::facs::FACS;
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, sdt::Sdt};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use wherry_memory::GuestMemory;

use crate::layout;
use crate::pci::PciWindows;

const OEM: [u8; 6] = *b"WHERRY";
const OEM_TABLE: [u8; 8] = *b"WHERRYVM";
const OEM_REVISION: u32 = 1;

/// Last bus number. There are no bridges, and Linux asks every bus up to here for every device, which takes a moment.
const LAST_BUS: u8 = 0;

/// The system control interrupt: level-triggered, active high, at this input of the I/O APIC.
pub const SCI: u32 = 9;
/// ISA interrupt and I/O APIC input of the first serial port.
pub const SERIAL_INTERRUPT: u32 = 4;
/// First port of the first serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// First port of the real-time clock.
pub const RTC_PORT: u16 = 0x70;
/// Index of the century in the real-time clock's memory.
pub const RTC_CENTURY: u8 = 0x32;

/// What the tables tell.
pub struct AcpiConfig<'a> {
    /// Number of vCPUs; their local APIC ids are 0, 1, ...
    pub cpus: u32,
    /// What the PCI host bridge passes on.
    pub windows: &'a PciWindows,
    /// Slots (device numbers of bus 0) of which devices may come and go, a bit for each.
    pub slots: u32,
    /// Further objects for the scope `\_SB` of the DSDT.
    pub devices: Vec<Box<dyn Aml>>,
    /// Further tables, complete with header and checksum.
    pub tables: Vec<Box<dyn Aml>>,
}

/// The tables cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// They are larger than the area for them.
    #[error("ACPI tables need {needed} bytes, and there is room for {room}")]
    TooLarge {
        /// What they need.
        needed: u64,
        /// What there is.
        room: u64,
    },
    /// RAM could not be written.
    #[error("writing ACPI tables into guest RAM: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// Places tables one behind the other.
struct Placer {
    bytes: Vec<u8>,
}

impl Placer {
    /// FACS must be aligned to 64 bytes, the others to 8 or 16.
    const ALIGN: usize = 64;

    fn place(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(Self::ALIGN), 0);
        let address = layout::ACPI_TABLES.start + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

/// Writes all tables. Returns the address of the RSDP, for the boot protocols; it also lies where PCs have it.
pub fn write_tables(memory: &GuestMemory, config: &AcpiConfig<'_>) -> Result<u64, AcpiError> {
    // The RSDP comes first, and is known last.
    let mut placer = Placer { bytes: vec![0; Rsdp::len()] };
    let facs = placer.place(&FACS::new());
    let dsdt = placer.place(&dsdt::dsdt(config));
    let mut addresses = vec![placer.place(&fadt::fadt(facs, dsdt)), placer.place(&madt::madt(config.cpus))];
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM.start, 0, 0, LAST_BUS);
    addresses.push(placer.place(&mcfg));
    addresses.extend(config.tables.iter().map(|table| placer.place(&**table)));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    addresses.into_iter().for_each(|address| xsdt.add_entry(address));
    let xsdt = placer.place(&xsdt);

    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    let mut bytes = placer.bytes;
    bytes[..rsdp.len()].copy_from_slice(&rsdp);
    let (needed, room) = (bytes.len() as u64, layout::ACPI_TABLES.end - layout::ACPI_TABLES.start);
    if needed > room {
        return Err(AcpiError::TooLarge { needed, room });
    }
    memory.write_slice(&bytes, GuestAddress(layout::ACPI_TABLES.start))?;
    Ok(layout::ACPI_TABLES.start)
}

/// A table with our header around a body.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let mut table = Sdt::new(signature, 36, revision, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(body);
    table
}
