//! DSDT: what cannot be found by probing, as AML.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Package,
    PackageBuilder, ResourceTemplate, Return, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;

use super::{AcpiConfig, LAST_BUS, RTC_PORT, SERIAL_INTERRUPT, SERIAL_PORT, table};
use crate::pci::{PciPorts, PciRoot, PciWindows};
use crate::{layout, power};

pub(super) fn dsdt(config: &AcpiConfig<'_>) -> Sdt {
    let mut body = Vec::new();
    // Section 7.4.2: what to write to PM1 control to switch off.
    Name::new("\\_S5_".into(), &Package::new(vec![&power::SLEEP_TYPE_S5, &power::SLEEP_TYPE_S5, &ZERO, &ZERO]))
        .to_aml_bytes(&mut body);
    let mut devices = Encoded(Vec::new());
    pci(&mut devices.0, config.windows);
    board(&mut devices.0);
    serial(&mut devices.0);
    clock(&mut devices.0);
    for device in &config.devices {
        device.to_aml_bytes(&mut devices.0);
    }
    Scope::new("\\_SB_".into(), vec![&devices]).to_aml_bytes(&mut body);
    table(*b"DSDT", 2, &body)
}

/// AML that is encoded already.
struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn hid(id: &str) -> Name {
    Name::new("_HID".into(), &EISAName::new(id))
}

/// The PCI host bridge, with its windows and the routing of interrupt pins.
fn pci(sink: &mut Vec<u8>, windows: &PciWindows) {
    let mut routes = PackageBuilder::new();
    for device in 0..32u8 {
        for pin in 0..4u8 {
            let input = PciRoot::interrupt_input(device, pin + 1);
            routes.add_element(&Package::new(vec![&(u32::from(device) << 16 | 0xffff), &pin, &ZERO, &input]));
        }
    }
    let last = |end: u64| end - 1;
    let configuration = PciPorts::BASE as u16;
    let behind = configuration + PciPorts::LEN as u16;
    let (mmio32, mmio64) = (&windows.memory32, &windows.memory64);
    let not_cacheable = AddressSpaceCacheable::NotCacheable;
    let resources = ResourceTemplate::new(vec![
        &AddressSpace::new_bus_number(0u16, LAST_BUS.into()),
        &IO::new(configuration, configuration, 1, PciPorts::LEN as u8),
        &AddressSpace::new_io(0u16, configuration - 1, None),
        &AddressSpace::new_io(behind, 0xffff, None),
        &AddressSpace::new_memory(not_cacheable, true, mmio32.start as u32, last(mmio32.end) as u32, None),
        &AddressSpace::new_memory(not_cacheable, true, mmio64.start, last(mmio64.end), None),
    ])
    .encoded();
    Device::new(
        "PCI0".into(),
        vec![
            &hid("PNP0A08"),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_UID".into(), &ZERO),
            // Whatever the system asks to control, it may: it is given back unchanged.
            &Method::new("_OSC".into(), 4, false, vec![&Return::new(&Arg(3))]),
            &Name::new("_CRS".into(), &resources),
            &Name::new("_PRT".into(), &routes),
        ],
    )
    .to_aml_bytes(sink);
}

/// What belongs to the board and to no device: the ECAM window, which Linux uses only if it is listed here, and the
/// ports of power management and reset.
fn board(sink: &mut Vec<u8>) {
    let ecam = &layout::ECAM;
    let resources = ResourceTemplate::new(vec![
        &Memory32Fixed::new(true, ecam.start as u32, (ecam.end - ecam.start) as u32),
        &IO::new(power::PM_BASE, power::PM_BASE, 1, power::PM_LEN as u8),
    ])
    .encoded();
    Device::new(
        "MBRD".into(),
        vec![&hid("PNP0C02"), &Name::new("_UID".into(), &ZERO), &Name::new("_CRS".into(), &resources)],
    )
    .to_aml_bytes(sink);
}

/// The first serial port.
fn serial(sink: &mut Vec<u8>) {
    let resources = ResourceTemplate::new(vec![
        &IO::new(SERIAL_PORT, SERIAL_PORT, 1, 8),
        &Interrupt::new(true, true, false, false, SERIAL_INTERRUPT),
    ])
    .encoded();
    Device::new(
        "COM1".into(),
        vec![&hid("PNP0501"), &Name::new("_UID".into(), &ZERO), &Name::new("_CRS".into(), &resources)],
    )
    .to_aml_bytes(sink);
}

/// The real-time clock. It has no interrupt: it never sounds an alarm.
fn clock(sink: &mut Vec<u8>) {
    let resources = ResourceTemplate::new(vec![&IO::new(RTC_PORT, RTC_PORT, 1, 2)]).encoded();
    Device::new("RTC_".into(), vec![&hid("PNP0B00"), &Name::new("_CRS".into(), &resources)]).to_aml_bytes(sink);
}

/// Encodes an object on the spot, so that what it borrows need not outlive the statement.
trait Encode {
    fn encoded(&self) -> Encoded;
}

impl<T: Aml> Encode for T {
    fn encoded(&self) -> Encoded {
        let mut bytes = Vec::new();
        self.to_aml_bytes(&mut bytes);
        Encoded(bytes)
    }
}
