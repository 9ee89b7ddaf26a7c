//! DSDT: what cannot be found by probing, as AML.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule,
    FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, MethodCall, Name, Notify, OpRegion,
    OpRegionSpace, Package, PackageBuilder, Path, ResourceTemplate, Return, Scope, Store, ZERO,
};
use acpi_tables::sdt::Sdt;

use super::{AcpiConfig, LAST_BUS, RTC_PORT, SERIAL_INTERRUPT, SERIAL_PORT, table};
use crate::pci::{PciPorts, PciRoot, PciWindows};
use crate::{hotplug, layout, power};

/// What is told of a slot (section 5.6.6): look whether a device is there; let it go.
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;

pub(super) fn dsdt(config: &AcpiConfig<'_>) -> Sdt {
    let mut body = Vec::new();
    // Section 7.4.2: what to write to PM1 control to switch off.
    Name::new("\\_S5_".into(), &Package::new(vec![&power::SLEEP_TYPE_S5, &power::SLEEP_TYPE_S5, &ZERO, &ZERO]))
        .to_aml_bytes(&mut body);
    let mut devices = Encoded(Vec::new());
    pci(&mut devices.0, config.windows, &slots(config.slots));
    board(&mut devices.0);
    serial(&mut devices.0);
    clock(&mut devices.0);
    for device in &config.devices {
        device.to_aml_bytes(&mut devices.0);
    }
    Scope::new("\\_SB_".into(), vec![&devices]).to_aml_bytes(&mut body);
    event(&mut body);
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

/// Name of a slot below the host bridge.
fn slot_name(slot: u8) -> Path {
    format!("S{slot:02X}_").as_str().into()
}

/// Slots of which devices come and go, and what the general-purpose event does: all in the scope of the host bridge.
fn slots(slots: u32) -> Encoded {
    let slots: Vec<u8> = (1..32).filter(|slot| slots & 1 << slot != 0).collect();
    let mut sink = Vec::new();
    let (base, len) = (hotplug::UP, hotplug::HOTPLUG_BASE + hotplug::HOTPLUG_LEN - hotplug::UP);
    OpRegion::new("HPRG".into(), OpRegionSpace::SystemIO, &base, &len).to_aml_bytes(&mut sink);
    let fields = [*b"HPUP", *b"HPDN", *b"HPEJ"].map(|name| FieldEntry::Named(name, 32)).to_vec();
    let (access, rule) = (FieldAccessType::DWord, FieldUpdateRule::Preserve);
    Field::new("HPRG".into(), access, FieldLockRule::NoLock, rule, fields).to_aml_bytes(&mut sink);
    let (up, down, eject): (Path, Path, Path) = ("HPUP".into(), "HPDN".into(), "HPEJ".into());
    for slot in &slots {
        let (address, bit) = (u32::from(*slot) << 16, 1u32 << slot);
        Device::new(
            slot_name(*slot),
            vec![
                &Name::new("_ADR".into(), &address),
                &Name::new("_SUN".into(), slot),
                &Method::new("_EJ0".into(), 1, true, vec![&Store::new(&eject, &bit)]),
            ],
        )
        .to_aml_bytes(&mut sink);
    }
    // HPNT(slots, what): tells what of each slot.
    let mut tell = Encoded(Vec::new());
    for slot in &slots {
        let bit = 1u32 << slot;
        If::new(&And::new(&ZERO, &Arg(0), &bit), vec![&Notify::new(&slot_name(*slot), &Arg(1))])
            .to_aml_bytes(&mut tell.0);
    }
    Method::new("HPNT".into(), 2, true, vec![&tell]).to_aml_bytes(&mut sink);
    // HPSC(): reads what there is, clears exactly that, and tells it.
    Method::new(
        "HPSC".into(),
        0,
        true,
        vec![
            &Store::new(&Local(0), &up),
            &Store::new(&up, &Local(0)),
            &MethodCall::new("HPNT".into(), vec![&Local(0), &DEVICE_CHECK]),
            &Store::new(&Local(1), &down),
            &Store::new(&down, &Local(1)),
            &MethodCall::new("HPNT".into(), vec![&Local(1), &EJECT_REQUEST]),
        ],
    )
    .to_aml_bytes(&mut sink);
    Encoded(sink)
}

/// The handler of the general-purpose event.
fn event(sink: &mut Vec<u8>) {
    let scan = MethodCall::new("\\_SB_.PCI0.HPSC".into(), vec![]);
    let name = format!("_E{:02X}", hotplug::GPE);
    let handler = Method::new(name.as_str().into(), 0, false, vec![&scan]);
    Scope::new("\\_GPE".into(), vec![&handler]).to_aml_bytes(sink);
}

/// The PCI host bridge, with its windows, the routing of interrupt pins, and its slots.
fn pci(sink: &mut Vec<u8>, windows: &PciWindows, slots: &Encoded) {
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
            slots,
        ],
    )
    .to_aml_bytes(sink);
}

/// What belongs to the board and to no device: the ECAM window, which Linux uses only if it is listed here, and the
/// ports of power management, reset and hot plug.
fn board(sink: &mut Vec<u8>) {
    let ecam = &layout::ECAM;
    let resources = ResourceTemplate::new(vec![
        &Memory32Fixed::new(true, ecam.start as u32, (ecam.end - ecam.start) as u32),
        &IO::new(power::PM_BASE, power::PM_BASE, 1, power::PM_LEN as u8),
        &IO::new(hotplug::HOTPLUG_BASE, hotplug::HOTPLUG_BASE, 1, hotplug::HOTPLUG_LEN as u8),
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
