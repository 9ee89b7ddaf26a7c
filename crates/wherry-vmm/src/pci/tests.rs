use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use wherry_pci::bus::{Bus, BusDevice};
use wherry_pci::*;
use wherry_state::{Saved, SavedState, StateUnit};

use super::*;
use crate::power::ResetControl;

const ECAM: u64 = 0xe000_0000;

/// A register file behind a BAR: reads give its tag.
struct Tagged(u8);

impl BusDevice for Tagged {
    fn read(&self, _: u64, _: u64, data: &mut [u8]) {
        data.fill(self.0);
    }
    fn write(&self, _: u64, _: u64, _: &[u8]) {}
}

/// A function with a BAR of each kind.
struct Test(Mutex<(ConfigSpace, BarMap)>);

impl Test {
    fn new(root: &PciRoot, ports: &Arc<Bus>, memory: &Arc<Bus>) -> Arc<Self> {
        let identity = Identity { vendor: 0x1af4, device: 0x1041, class: [2, 0, 0], ..Default::default() };
        let mut config = ConfigSpace::new(&identity);
        config.add_bar(0, BarKind::Memory32, 0x1000).unwrap();
        config.add_bar(1, BarKind::Io, 0x20).unwrap();
        config.add_bar(2, BarKind::Memory64 { prefetchable: true }, 0x4000).unwrap();
        config.add_capability(9, &[0x11; 14], &[0; 14]).unwrap();
        config.add_express_endpoint().unwrap();
        config.set_interrupt(1, 11);
        root.assign_bars(&mut config).unwrap();
        let mut map = BarMap::default();
        for (index, bus) in [(0, memory), (1, ports), (2, memory)] {
            let device = Arc::new(Tagged(0x70 + index as u8));
            map.set_target(index, Arc::new(BusBar { bus: bus.clone(), device }));
        }
        Arc::new(Self(Mutex::new((config, map))))
    }
}

impl PciFunction for Test {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        assert!((1..=4).contains(&data.len()) && usize::from(offset) % 4 + data.len() <= 4);
        self.0.lock().unwrap().0.read(offset, data);
    }
    fn write_config(&self, offset: u16, data: &[u8]) {
        assert!((1..=4).contains(&data.len()) && usize::from(offset) % 4 + data.len() <= 4);
        let (config, map) = &mut *self.0.lock().unwrap();
        if config.write(offset, data).mapping {
            map.follow(config);
        }
    }
    fn save_config(&self) -> Option<Vec<u8>> {
        Some(self.0.lock().unwrap().0.save())
    }
    fn restore_config(&self, saved: &[u8]) -> Result<(), String> {
        let (config, map) = &mut *self.0.lock().unwrap();
        config.restore(saved).map_err(|e| e.to_string())?;
        map.follow(config);
        Ok(())
    }
}

struct Rig {
    ports: Arc<Bus>,
    memory: Arc<Bus>,
    root: Arc<PciRoot>,
    resets: Arc<Mutex<u32>>,
}

impl Rig {
    fn new() -> Self {
        let (ports, memory) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let windows = PciWindows {
            io: 0x1000..0x2000,
            memory32: 0xc000_0000..0xe000_0000,
            memory64: 0x10_0000_0000..0x20_0000_0000,
        };
        let root = PciRoot::new(windows).unwrap();
        let resets = Arc::new(Mutex::new(0));
        let count = resets.clone();
        let reset = ResetControl::new(Arc::new(move |_| *count.lock().unwrap() += 1));
        ports.insert(PciPorts::BASE, PciPorts::LEN, Arc::new(PciPorts::new(root.clone(), reset))).unwrap();
        memory.insert(ECAM, 1 << 28, Arc::new(Ecam::new(root.clone()))).unwrap();
        root.add(FunctionAddress::from_devfn(0), Arc::new(HostBridge::new())).unwrap();
        let address = root.free_device().unwrap();
        assert_eq!(address.to_string(), "00:01.0");
        root.add(address, Test::new(&root, &ports, &memory)).unwrap();
        Self { ports, memory, root, resets }
    }

    fn read(&self, devfn: u64, offset: u64) -> u32 {
        let mut data = [0; 4];
        assert!(self.memory.read(ECAM + (devfn << 12) + offset, &mut data));
        u32::from_le_bytes(data)
    }

    fn write(&self, devfn: u64, offset: u64, value: u32) {
        assert!(self.memory.write(ECAM + (devfn << 12) + offset, &value.to_le_bytes()));
    }

    fn tag(&self, bus: &Bus, address: u64) -> Option<u8> {
        let mut data = [0];
        bus.read(address, &mut data).then_some(data[0])
    }
}

#[test]
fn both_ways_lead_to_the_same_configuration_space() {
    let rig = Rig::new();
    assert_eq!(rig.read(0, 0), 0x0008_1b36);
    assert_eq!(rig.read(0, 8) >> 8, 0x06_0000, "class: host bridge");
    let mut data = [0; 4];
    rig.ports.write(0xcf8, &0x8000_0800u32.to_le_bytes());
    rig.ports.read(0xcfc, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x1041_1af4);
    let mut half = [0; 2];
    rig.ports.read(0xcfe, &mut half);
    assert_eq!(u16::from_le_bytes(half), 0x1041);
    rig.ports.read(0xcf8, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x8000_0800);
    rig.ports.write(0xcf8, &0x0000_0800u32.to_le_bytes());
    rig.ports.read(0xcfc, &mut data);
    assert_eq!(data, [0xff; 4], "without the enable bit nothing is selected");
}

#[test]
fn absent_functions_read_as_ones() {
    let rig = Rig::new();
    assert_eq!(rig.read(2 << 3, 0), !0);
    assert_eq!(rig.read(1, 0), !0);
    assert_eq!(rig.read(1 << 8, 0), !0, "other buses are empty");
}

#[test]
fn a_byte_at_0xcf9_is_the_reset_register_and_not_the_address() {
    let rig = Rig::new();
    rig.ports.write(0xcf8, &0x8000_0800u32.to_le_bytes());
    rig.ports.write(0xcf9, &[6]);
    assert_eq!(*rig.resets.lock().unwrap(), 1);
    let mut data = [0; 4];
    rig.ports.read(0xcf8, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x8000_0800);
}

#[test]
fn bars_are_sized_by_writing_ones() {
    let rig = Rig::new();
    for (offset, expected) in [(0x10, 0xffff_f000u32), (0x14, 0xffff_ffe1), (0x18, 0xffff_c00c), (0x1c, !0), (0x20, 0)]
    {
        let before = rig.read(8, offset);
        rig.write(8, offset, !0);
        assert_eq!(rig.read(8, offset), expected, "BAR register {offset:#x}");
        rig.write(8, offset, before);
        assert_eq!(rig.read(8, offset), before);
    }
}

#[test]
fn bars_answer_when_decoding_is_on_and_follow_when_they_are_moved() {
    let rig = Rig::new();
    let bar0 = u64::from(rig.read(8, 0x10));
    let bar1 = u64::from(rig.read(8, 0x14) & !3);
    assert!((0xc000_0000..0xe000_0000).contains(&bar0) && (0x1000..0x2000).contains(&bar1));
    assert_eq!(rig.tag(&rig.memory, bar0), None, "decoding is off at first");
    rig.write(8, 4, 2);
    assert_eq!((rig.tag(&rig.memory, bar0), rig.tag(&rig.ports, bar1)), (Some(0x70), None));
    rig.write(8, 4, 3);
    assert_eq!(rig.tag(&rig.ports, bar1), Some(0x71));
    assert_eq!(rig.tag(&rig.memory, 0x10_0000_3fff), Some(0x72));

    rig.write(8, 0x10, 0xd000_0000);
    assert_eq!((rig.tag(&rig.memory, bar0), rig.tag(&rig.memory, 0xd000_0fff)), (None, Some(0x70)));
    rig.write(8, 0x1c, 0x11);
    assert_eq!(rig.tag(&rig.memory, 0x11_0000_0000), Some(0x72));
    rig.write(8, 4, 0);
    assert_eq!(rig.memory.ranges(), std::slice::from_ref(&(ECAM..ECAM + (1 << 28))));
}

#[test]
fn a_bar_moved_over_another_device_answers_nowhere_until_it_is_moved_away() {
    let rig = Rig::new();
    rig.write(8, 4, 2);
    rig.write(8, 0x10, ECAM as u32);
    assert_eq!(rig.read(0, 0), 0x0008_1b36, "the ECAM window still answers");
    rig.write(8, 0x10, 0);
    assert_eq!(rig.tag(&rig.memory, 0), None);
    rig.write(8, 0x10, 0xc100_0000);
    assert_eq!(rig.tag(&rig.memory, 0xc100_0000), Some(0x70));
}

#[test]
fn capabilities_are_linked_and_their_read_only_bits_stay() {
    let rig = Rig::new();
    assert_eq!(rig.read(8, 4) >> 16 & 0x10, 0x10);
    let first = u64::from(rig.read(8, 0x34) & 0xff);
    assert_eq!(rig.read(8, first) & 0xff, 9);
    let second = u64::from(rig.read(8, first) >> 8 & 0xff);
    assert_eq!((rig.read(8, second) & 0xffff, rig.read(8, second) >> 20 & 0xf), (0x10, 9));
    rig.write(8, first, 0);
    assert_eq!(rig.read(8, first) & 0xff, 9);
    let mut config = ConfigSpace::new(&Identity::default());
    assert_eq!(config.add_capability(5, &[0; 191], &[0; 191]), Err(ConfigError::NoRoom(5)));
    assert_eq!(config.add_capability(5, &[0; 2], &[0; 1]), Err(ConfigError::BadMask(5)));
    assert_eq!(config.add_capability(5, &[0; 190], &[0; 190]), Ok(0x40));
}

#[test]
fn impossible_bars_are_refused() {
    let mut config = ConfigSpace::new(&Identity::default());
    let wide = BarKind::Memory64 { prefetchable: false };
    assert_eq!(config.add_bar(5, wide, 0x1000), Err(ConfigError::BadBar(5)));
    assert_eq!(config.add_bar(6, BarKind::Io, 4), Err(ConfigError::BadBar(6)));
    config.add_bar(2, wide, 0x1000).unwrap();
    assert_eq!(config.add_bar(3, BarKind::Memory32, 0x1000), Err(ConfigError::BadBar(3)));
    assert_eq!(config.add_bar(1, wide, 0x1000), Err(ConfigError::BadBar(1)));
    for size in [0, 8, 0x1001, 1 << 32] {
        assert_eq!(config.add_bar(0, BarKind::Memory32, size), Err(ConfigError::BadBarSize { index: 0, size }));
    }
}

#[test]
fn full_windows_and_taken_addresses_are_refused() {
    let rig = Rig::new();
    let mut config = ConfigSpace::new(&Identity::default());
    config.add_bar(0, BarKind::Memory32, 1 << 30).unwrap();
    assert!(matches!(rig.root.assign_bars(&mut config), Err(PciError::NoRoom { size: 0x4000_0000, .. })));
    let address = FunctionAddress::from_devfn(8);
    assert_eq!(rig.root.add(address, Arc::new(HostBridge::new())), Err(PciError::Taken(address)));
    for _ in 2..32 {
        rig.root.add(rig.root.free_device().unwrap(), Arc::new(HostBridge::new())).unwrap();
    }
    assert_eq!(rig.root.free_device(), Err(PciError::Full));
}

#[test]
fn restored_functions_answer_where_the_guest_had_put_them() {
    let rig = Rig::new();
    rig.ports.write(0xcf8, &0x8000_0810u32.to_le_bytes());
    rig.write(8, 4, 6);
    rig.write(8, 0x10, 0xd234_5000);
    rig.write(8, 0x3c, 0x2a);
    let Saved::Section(section) = rig.root.save().unwrap() else { panic!("the unit has state") };
    assert!(section.bytes.len() < 1024, "{} bytes", section.bytes.len());

    let other = Rig::new();
    other.root.restore(&section).unwrap();
    assert_eq!(other.tag(&other.memory, 0xd234_5000), Some(0x70));
    assert_eq!((other.read(8, 4) & 0xffff, other.read(8, 0x3c)), (6, 0x012a));
    let mut data = [0; 4];
    other.ports.read(0xcf8, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x8000_0810);
    let Saved::Section(again) = other.root.save().unwrap() else { panic!("the unit has state") };
    assert_eq!(again, section);
}

#[test]
fn state_of_other_functions_is_refused_by_name() {
    let rig = Rig::new();
    let Saved::Section(section) = rig.root.save().unwrap() else { panic!("the unit has state") };
    let good = SavedPciHost::from_section(&section).unwrap();
    let refuse = |change: fn(&mut SavedPciHost)| {
        let mut saved = good.clone();
        change(&mut saved);
        Rig::new().root.restore(&saved.to_section(&rig.root.id())).unwrap_err().to_string()
    };
    assert!(refuse(|s| s.functions[1].devfn = 0x10).contains("0x10"));
    assert!(refuse(|s| s.functions.truncate(1)).contains("no state for PCI function 00:01.0"));
    assert!(refuse(|s| s.functions[1].config[0] = 0).contains("offset 0x0"));
    assert!(refuse(|s| s.functions[1].length = 1 << 30).contains("impossible length"));
    assert!(refuse(|s| s.functions[1].length = 256).contains("256 bytes"));
    let second = good.functions[1].clone();
    let mut twice = good.clone();
    twice.functions.push(second);
    assert!(Rig::new().root.restore(&twice.to_section(&rig.root.id())).is_err());
}

#[test]
fn pins_of_neighbours_lead_to_different_inputs() {
    assert_eq!(PciRoot::interrupt_input(0, 1), 16);
    assert_eq!(PciRoot::interrupt_input(1, 1), 17);
    assert_eq!(PciRoot::interrupt_input(1, 4), 20);
    assert_eq!(PciRoot::interrupt_input(31, 4), 18);
}

proptest! {
    #[test]
    fn no_access_panics_and_mappings_always_follow_the_registers(
        accesses in proptest::collection::vec(
            (any::<bool>(), prop_oneof![0u64..0x100, 0u64..0x1000, 0xff0u64..0x1010], proptest::collection::vec(
                prop_oneof![Just(0u8), Just(0xff), any::<u8>()], 1..9)), 1..60)
    ) {
        let rig = Rig::new();
        for (port, at, data) in accesses {
            let mut out = vec![0; data.len()];
            if port {
                rig.ports.write(0xcf8 + at % 8, &data);
                rig.ports.read(0xcf8 + at % 8, &mut out);
            } else {
                let address = ECAM + (8 << 12) + at;
                rig.memory.write(address, &data);
                rig.memory.read(address, &mut out);
            }
        }
        let decoding = rig.read(8, 4);
        let bar0 = u64::from(rig.read(8, 0x10) & !0xf);
        let elsewhere = !(0xdfff_f001..0xf000_0000).contains(&bar0);
        let expected = decoding & 2 != 0 && bar0 != 0 && elsewhere;
        let bar2 = u64::from(rig.read(8, 0x18) & !0xf) | u64::from(rig.read(8, 0x1c)) << 32;
        if bar0.abs_diff(bar2) >= 0x4000 {
            prop_assert_eq!(rig.memory.ranges().contains(&(bar0..bar0 + 0x1000)), expected);
        }
    }
}

#[test]
fn an_ejected_device_is_not_found_and_its_place_and_addresses_are_free_when_it_is_gone() {
    let rig = Rig::new();
    let address = FunctionAddress::from_devfn(8);
    let vendor = || {
        let mut data = [0; 2];
        rig.root.read_config(0, address.devfn(), 0, &mut data);
        u16::from_le_bytes(data)
    };
    assert_eq!(vendor(), 0x1af4);
    assert!(rig.root.hide(1).is_some() && rig.root.hide(9).is_none() && rig.root.hide(32).is_none());
    assert_eq!(vendor(), 0xffff);
    assert_ne!(rig.root.free_device().unwrap(), address, "it is still there");
    assert!(rig.root.remove(address).is_some());
    assert_eq!(rig.root.free_device().unwrap(), address);
    rig.root.add(address, Arc::new(HostBridge::new())).unwrap();
    assert_ne!(vendor(), 0xffff, "the next one is found");

    let mut config = ConfigSpace::new(&Identity::default());
    config.add_bar(0, BarKind::Memory32, 0x1000).unwrap();
    config.add_bar(1, BarKind::Memory32, 1 << 28).unwrap();
    let first = rig.root.assign_bars(&mut config).unwrap();
    let places = (config.dword(0x10), config.dword(0x14));
    assert!(matches!(rig.root.assign_bars(&mut config), Err(PciError::NoRoom { size: 0x1000_0000, .. })));
    rig.root.release_bars(first);
    rig.root.assign_bars(&mut config).unwrap();
    assert_eq!((config.dword(0x10), config.dword(0x14)), places, "what was refused has left nothing taken");
}
