//! The saved state of one unit, from any bytes: the first chooses the unit, the others are its section. A device refuses
//! it, or takes it and then saves what another one of its kind takes, too, and saves alike. State that only the kernel can
//! take is decoded, and must mean the same when it is written again.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use vmm_sys_util::eventfd::EventFd;
use wherry_handover::Registry;
use wherry_state::{Saved, SavedState, Section, StateUnit};
use wherry_vmm::config::SerialTarget;
use wherry_vmm::line::InterruptLine;
use wherry_vmm::pci::{PciRoot, PciWindows};
use wherry_vmm::power::{AcpiPm, ResetControl};
use wherry_vmm::rtc::Rtc;
use wherry_vmm::serial::Serial;
use wherry_vmm::units::clock::saved::ClockState;
use wherry_vmm::units::irqchip::saved::IrqchipState;
use wherry_vmm::units::pit::saved::PitState;
use wherry_vmm::units::vcpu::saved::VcpuState;

struct Line;

impl InterruptLine for Line {
    fn set_level(&self, _asserted: bool) {}
}

fn unit(choice: u8) -> Arc<dyn StateUnit> {
    match choice {
        0 => Arc::new(Rtc::new(1 << 30, 1 << 30)),
        1 => AcpiPm::new(Arc::new(Line), ResetControl::new(Arc::new(|_| {})), Arc::new(|_| {})),
        2 => Serial::new(EventFd::new(0).expect("an eventfd"), &SerialTarget::Null, None, &Registry::new())
            .expect("a serial port"),
        _ => {
            let windows =
                PciWindows { io: 0xc000..0xd000, memory32: 0xc000_0000..0xe000_0000, memory64: 1 << 40..1 << 41 };
            PciRoot::new(windows).expect("a PCI root")
        }
    }
}

fn decode<T: SavedState>(section: &Section) {
    if let Ok(state) = T::from_section(section) {
        let again = Section { bytes: state.encode_to_vec(), ..section.clone() };
        let again = T::from_section(&again).expect("what we wrote is readable");
        assert_eq!(state.encode_to_vec(), again.encode_to_vec());
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((choice, bytes)) = bytes.split_first() else {
        return;
    };
    let section = |unit: &str| Section { unit: unit.into(), instance: 0, schema: 1, bytes: bytes.to_vec() };
    match choice % 8 {
        4 => decode::<VcpuState>(&section("vcpu")),
        5 => decode::<IrqchipState>(&section("irqchip")),
        6 => decode::<PitState>(&section("pit")),
        7 => decode::<ClockState>(&section("clock")),
        device => {
            let first = unit(device);
            if first.restore(&section(&first.id().name)).is_err() {
                return;
            }
            let Ok(Saved::Section(saved)) = first.save() else {
                panic!("{} took its state and does not save it", first.id());
            };
            unit(device).restore(&saved).expect("what a unit saves is what it takes");
        }
    }
});
