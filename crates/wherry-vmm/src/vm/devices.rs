//! The devices every machine has, their buses and interrupt lines.
//!
//! Most are the same in every machine, so the description does not list them; their state units' names and schemas are
//! compared in the handshake. Those on the PCI bus are as the description says.

use std::sync::Arc;
use std::time::Duration;

use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use wherry_guest::report;
use wherry_interrupt::{Events, Input};
use wherry_memory::{DirtySource, GuestMemory};
use wherry_passthrough::{Crew, PassthroughParts};
use wherry_state::StateUnit;
use wherry_virtio::PciParts;
use wherry_virtio::balloon::Balloon;

use super::files::DeviceFiles;
use super::hotplug::{Signal, Slots, Wanted};
use super::router::KvmRouter;
use super::slot::DeviceSlots;
use super::virtio::{Backing, PciDevices, Shown};
use super::{ExitNotice, ExitReason, VmError};
use crate::acpi::{self, AcpiConfig};
use crate::config::{PciConfig, SerialTarget};
use crate::description::VmDescription;
use crate::hotplug::{self, PciHotplug};
use crate::layout;
use crate::line::{InterruptLine, SharedLine};
use crate::pci::{Ecam, HostBridge, PciPorts, PciRoot, PciWindows};
use crate::power::{self, AcpiPm, KeyboardController, PowerHandler, PowerRequest, ResetControl};
use crate::rtc::{RTC_LEN, Rtc};
use crate::serial::{EscapeHandler, SERIAL_LEN, Serial};
use crate::vcpu::Buses;
use wherry_pci::FunctionAddress;
use wherry_pci::bus::{Bus, BusDevice};

/// Ports that PCI devices may have.
const PCI_PORTS: std::ops::Range<u64> = 0x1000..0x1_0000;

/// What the devices of a machine are connected to on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Where the first serial port leads.
    pub serial: SerialTarget,
    /// What its devices on the PCI bus are connected to.
    pub pci: PciConfig,
}

/// The devices of a machine.
pub struct Devices {
    buses: Buses,
    units: Vec<Arc<dyn StateUnit>>,
    serial: Arc<Serial>,
    pci: Arc<PciRoot>,
    acpi: Arc<AcpiPm>,
    pci_devices: PciDevices,
    backing: Backing,
}

fn failed(e: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> VmError {
    VmError::Device(e.into())
}

impl Devices {
    /// The devices, and what [`Board`](super::hotplug::Board) is made of.
    pub(super) fn make(
        description: &VmDescription,
        mut backing: Backing,
        vm: &Arc<VmFd>,
        shown: &Shown<'_>,
        notice: &ExitNotice,
    ) -> Result<(Self, Slots), VmError> {
        let ram = shown.ram;
        let (pio, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let on_pio = |base: u64, len: u64, device: Arc<dyn BusDevice>| pio.insert(base, len, device).map_err(failed);
        let on_mmio = |base: u64, len: u64, device: Arc<dyn BusDevice>| mmio.insert(base, len, device).map_err(failed);

        let power = power_handler(notice);
        let reset = ResetControl::new(power.clone());
        let sci = SharedLine::new(Arc::new(GsiLine { vm: vm.clone(), gsi: acpi::SCI }));
        let acpi = AcpiPm::new(sci.tap(0), reset.clone(), power.clone());
        on_pio(power::PM_BASE.into(), power::PM_LEN.into(), acpi.clone())?;
        on_pio(power::KEYBOARD_PORT.into(), 1, Arc::new(KeyboardController::new(power)))?;

        let memory64 = layout::mmio64(ram.size());
        let windows = PciWindows { io: PCI_PORTS, memory32: layout::MMIO32, memory64 };
        let pci = PciRoot::new(windows).map_err(failed)?;
        let bridge = FunctionAddress::from_devfn(0);
        pci.add(bridge, Arc::new(HostBridge::new())).map_err(failed)?;
        on_pio(PciPorts::BASE, PciPorts::LEN, Arc::new(PciPorts::new(pci.clone(), reset)))?;
        on_mmio(layout::ECAM.start, layout::ECAM.end - layout::ECAM.start, Arc::new(Ecam::new(pci.clone())))?;

        let interrupt = EventFd::new(EFD_NONBLOCK).map_err(failed)?;
        vm.register_irqfd(&interrupt, acpi::SERIAL_INTERRUPT)
            .map_err(VmError::kvm("attaching the serial port's interrupt"))?;
        let user = notice.clone();
        let escape: EscapeHandler = Arc::new(move || {
            user.tell(ExitReason::ApiStop);
        });
        let serial =
            Serial::new(interrupt, &backing.connections().serial, Some(escape), backing.registry()).map_err(failed)?;
        on_pio(acpi::SERIAL_PORT.into(), SERIAL_LEN, serial.clone())?;

        let rtc = Arc::new(Rtc::new(ram.size(), layout::LOW_RAM_END));
        on_pio(acpi::RTC_PORT.into(), RTC_LEN, rtc.clone())?;

        on_mmio(layout::PROBE_PORT, report::PAGE_SIZE, Arc::new(ProbePort(notice.clone())))?;

        let router = KvmRouter::new(vm.clone());
        let parts = |pin_input| PciParts {
            memory_bus: mmio.clone(),
            doorbells: router.clone(),
            router: router.clone(),
            pin_input,
            memory: ram.memory().clone(),
            events: Events::own(),
            registry: backing.registry().clone(),
        };
        let wanted = Arc::new(Wanted::default());
        let passed = PassthroughParts {
            memory_bus: mmio.clone(),
            io_bus: pio.clone(),
            doorbells: router.clone(),
            maps: DeviceSlots::new(vm.clone()),
            files: DeviceFiles::new(vm.clone()),
            router: router.clone(),
            // Of a place that no device has.
            pin_input: Input(PciRoot::interrupt_input(0, 1)),
            ram: ram.clone(),
            faults: shown.faults.clone(),
            crew: Crew::new(),
            registry: backing.registry().clone(),
            give_back: wanted.handler(),
        };
        let made = PciDevices::make(&description.devices, &backing, &pci, shown, parts, &passed);
        let (pci_devices, occupants) = made?;
        backing.forget_owners();

        let mut units: Vec<Arc<dyn StateUnit>> = vec![serial.clone(), pci.clone(), acpi.clone(), rtc];
        let signal = Signal::new(occupants);
        let controller = description.hotplug.then(|| PciHotplug::new(sci.tap(1), signal.eject_handler(&pci)));
        if let Some(controller) = &controller {
            on_pio(hotplug::HOTPLUG_BASE.into(), hotplug::HOTPLUG_LEN.into(), controller.clone())?;
            units.push(controller.clone());
        }
        units.extend(pci_devices.units());
        let balloon = pci_devices.balloon().is_some();
        let host = backing.host().clone();
        let slots = Slots { signal, controller, pci: pci.clone(), parts: passed, balloon, host, wanted };
        Ok((Self { buses: Buses { pio, mmio }, units, serial, pci, acpi, pci_devices, backing }, slots))
    }

    pub(super) fn buses(&self) -> &Buses {
        &self.buses
    }

    pub(super) fn units(&self) -> &[Arc<dyn StateUnit>] {
        &self.units
    }

    /// What virtio devices in other processes write.
    pub(super) fn logs(&self) -> &[Arc<dyn DirtySource>] {
        self.pci_devices.logs()
    }

    /// The balloon, if there is one.
    pub(crate) fn balloon(&self) -> Option<&Arc<Balloon>> {
        self.pci_devices.balloon()
    }

    /// Writes the tables that tell the guest of its hardware; where they begin. `slots` are those of which devices come and go.
    pub(super) fn write_tables(&self, memory: &GuestMemory, cpus: u32, slots: u32) -> Result<Option<u64>, VmError> {
        let config = AcpiConfig { cpus, windows: self.pci.windows(), slots, devices: Vec::new(), tables: Vec::new() };
        acpi::write_tables(memory, &config).map(Some).map_err(|e| VmError::Boot(e.into()))
    }

    /// Presses the power button; false if the guest does not listen to it (yet).
    pub fn press_power_button(&self) -> bool {
        self.acpi.press_power_button()
    }

    /// What the devices are connected to on this host, and what only the owner of the VM may have locked.
    pub(super) fn backing(&self) -> &Backing {
        &self.backing
    }

    /// Brings devices that work on their own to rest for good; false if one does not come to rest in time.
    pub(super) fn end(&self, limit: Duration) -> bool {
        self.pci_devices.end(limit)
    }

    /// Bytes of serial output that were dropped because nobody took them.
    pub fn serial_dropped(&self) -> u64 {
        self.serial.dropped()
    }
}

/// Ends the machine when its guest asks for it.
fn power_handler(notice: &ExitNotice) -> PowerHandler {
    let notice = notice.clone();
    Arc::new(move |request| {
        notice.tell(match request {
            PowerRequest::PowerOff => ExitReason::PowerOff,
            PowerRequest::Reset => ExitReason::Reset,
        });
    })
}

/// An input of KVM's interrupt controllers.
struct GsiLine {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl InterruptLine for GsiLine {
    fn set_level(&self, asserted: bool) {
        // It fails only for an input that does not exist.
        if let Err(error) = self.vm.set_irq_line(self.gsi, asserted) {
            tracing::error!(gsi = self.gsi, %error, "setting an interrupt line");
        }
    }
}

/// The port page by which the probe guest tells of events. It has no state.
struct ProbePort(ExitNotice);

impl BusDevice for ProbePort {
    fn read(&self, _base: u64, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == report::PORT_REG_ID && data.len() == 4 {
            data.copy_from_slice(&report::PORT_ID.to_le_bytes());
        }
    }

    fn write(&self, _base: u64, offset: u64, data: &[u8]) {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return };
        match offset {
            report::PORT_REG_EVENT => {
                if let Some((event, vcpu, argument)) = report::PortEvent::decode(value) {
                    tracing::debug!(?event, vcpu, argument, "probe guest");
                }
            }
            report::PORT_REG_POWEROFF => {
                self.0.tell(ExitReason::PowerOff);
            }
            _ => {}
        }
    }
}

const _: () = assert!(report::PORT_GPA == layout::PROBE_PORT, "the probe guest and the memory layout must agree");
