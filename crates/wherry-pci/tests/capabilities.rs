//! MSI-X and MSI as a guest sets them, against a router that remembers.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;

use wherry_interrupt::fake::FakeRouter;
use wherry_interrupt::{Events, Message};
use wherry_pci::{ConfigSpace, Identity, Msi, MsiForm, Msix, MsixPlace};

struct Rig {
    router: Arc<FakeRouter>,
    config: ConfigSpace,
    msix: Msix,
    control: u16,
}

impl Rig {
    fn new(count: u16) -> Self {
        let router = Arc::new(FakeRouter::default());
        let mut config = ConfigSpace::new(&Identity::default());
        let place = MsixPlace { bar: 2, table: 0x1000, pending_bar: 2, pending: 0x1800 };
        let msix = Msix::new(router.clone(), &Events::own(), count, place, &mut config).unwrap();
        Self { router, config, msix, control: 0x42 }
    }

    fn set_control(&mut self, value: u16) {
        self.config.write(self.control, &value.to_le_bytes());
        self.msix.follow(&self.config);
    }

    fn set_entry(&self, index: u64, data: u32, mask: u32) {
        self.msix.write_table(index * 16, &0xfee0_1000u64.to_le_bytes());
        self.msix.write_table(index * 16 + 8, &data.to_le_bytes());
        self.msix.write_table(index * 16 + 12, &mask.to_le_bytes());
    }

    fn delivered(&self, index: u16) -> Option<u64> {
        self.router.delivered(self.msix.vector(index).unwrap().input())
    }

    fn pending(&self) -> u64 {
        let mut bits = [0; 8];
        self.msix.read_pending(0, &mut bits);
        u64::from_le_bytes(bits)
    }
}

#[test]
fn the_capability_tells_size_and_place_of_its_table() {
    let rig = Rig::new(3);
    assert_eq!(rig.config.dword(0x40), 0x0002_0011);
    assert_eq!((rig.config.dword(0x44), rig.config.dword(0x48)), (0x1002, 0x1802));
    assert_eq!((rig.msix.table_range(), rig.msix.pending_range()), (0x1000..0x1030, 0x1800..0x1808));
}

#[test]
fn a_vector_is_delivered_only_when_neither_it_nor_its_function_is_masked() {
    let mut rig = Rig::new(2);
    rig.set_entry(0, 0x51, 0);
    rig.set_entry(1, 0x52, 1);
    let raise = |rig: &Rig| (0..2).for_each(|i| rig.msix.vector(i).unwrap().raise());
    raise(&rig);
    assert_eq!((rig.delivered(0), rig.pending()), (None, 3), "it is switched off");
    rig.set_control(0xc000);
    assert_eq!((rig.delivered(0), rig.pending()), (None, 3), "the function is masked");
    rig.set_control(0x8000);
    assert_eq!((rig.delivered(0), rig.delivered(1), rig.pending()), (Some(1), None, 2));
    rig.set_entry(1, 0x52, 0);
    assert_eq!((rig.delivered(1), rig.pending()), (Some(1), 0));
    let input = rig.msix.vector(1).unwrap().input();
    assert_eq!(rig.router.told().routes[&input], Message { address: 0xfee0_1000, data: 0x52 });
    rig.msix.reset(&mut rig.config);
    assert_eq!(rig.delivered(0), None);
}

#[test]
fn reserved_bits_of_the_table_do_not_stick_and_what_lies_behind_it_reads_as_zero() {
    let rig = Rig::new(1);
    rig.msix.write_table(0, &[0xff; 40]);
    let mut data = [0xaa; 20];
    rig.msix.read_table(0, &mut data);
    assert_eq!(data[..16], [0xfc, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1, 0, 0, 0]);
    assert_eq!(data[16..], [0; 4]);
}

#[test]
fn a_restored_function_delivers_what_was_pending_when_it_resumes() {
    let mut source = Rig::new(2);
    source.set_entry(0, 0x61, 0);
    source.set_entry(1, 0x62, 1);
    source.set_control(0x8000);
    source.msix.vectors().rest().unwrap();
    (0..2).for_each(|i| source.msix.vector(i).unwrap().raise());
    let (config, saved) = (source.config.save(), source.msix.save());

    let mut rig = Rig::new(2);
    rig.config.restore(&config).unwrap();
    rig.msix.restore(&saved, &rig.config).unwrap();
    assert_eq!(rig.delivered(0), None);
    rig.msix.vectors().resume().unwrap();
    assert_eq!((rig.delivered(0), rig.pending()), (Some(1), 2));
    let mut entry = [0; 16];
    rig.msix.read_table(16, &mut entry);
    assert_eq!((entry[8], entry[12]), (0x62, 1));
}

#[test]
fn state_of_another_function_or_that_contradicts_itself_is_refused() {
    let source = Rig::new(2);
    let rig = Rig::new(3);
    let error = rig.msix.restore(&source.msix.save(), &rig.config).unwrap_err().to_string();
    assert!(error.contains("2 vectors") && error.contains("has 3"), "{error}");
    let mut saved = rig.msix.save();
    saved.vectors[1].open = true;
    let error = rig.msix.restore(&saved, &rig.config).unwrap_err().to_string();
    assert!(error.contains("vector 1"), "{error}");
}

#[test]
fn impossible_tables_are_refused() {
    for (count, bar, table) in [(0, 0, 0), (2049, 0, 0), (1, 6, 0), (1, 0, 4)] {
        let mut config = ConfigSpace::new(&Identity::default());
        let place = MsixPlace { bar, table, pending_bar: bar, pending: 0x800 };
        assert!(Msix::new(Arc::new(FakeRouter::default()), &Events::own(), count, place, &mut config).is_err());
    }
}

#[test]
fn msi_vectors_share_a_message_and_have_their_own_masks_and_pending_bits() {
    let router = Arc::new(FakeRouter::default());
    let mut config = ConfigSpace::new(&Identity::default());
    let msi = Msi::new(router.clone(), &Events::own(), 4, MsiForm::WHOLE, &mut config).unwrap();
    let delivered = |index| router.delivered(msi.vectors().get(index).unwrap().input());
    config.write(0x44, &0xfee0_2000u32.to_le_bytes());
    config.write(0x4c, &0x71u16.to_le_bytes());
    config.write(0x50, &0b10u32.to_le_bytes());
    // Enabled, and all four vectors used.
    config.write(0x42, &0x21u16.to_le_bytes());
    msi.follow(&config);
    assert!(msi.enabled(&config));
    (0..4).for_each(|i| msi.vector(i, &config).unwrap().raise());
    assert_eq!([0, 1, 2, 3].map(delivered), [Some(1), None, Some(1), Some(1)]);
    let input = msi.vectors().get(3).unwrap().input();
    assert_eq!(router.told().routes[&input], Message { address: 0xfee0_2000, data: 0x73 });
    msi.show_pending(&mut config);
    assert_eq!(config.dword(0x54), 0b10);
    config.write(0x50, &[0; 4]);
    msi.follow(&config);
    assert_eq!(delivered(1), Some(1));
    // One vector: all interrupts of the function share it.
    config.write(0x42, &1u16.to_le_bytes());
    msi.follow(&config);
    msi.vector(3, &config).unwrap().raise();
    assert_eq!([0, 3].map(delivered), [Some(1), None]);
    assert!(Msi::new(router.clone(), &Events::own(), 3, MsiForm::WHOLE, &mut config).is_err());
}

#[test]
fn msi_of_every_form_takes_the_place_of_the_device_s_own() {
    for (control, len) in [(0x0002u16, 10u16), (0x0082, 14), (0x0102, 20), (0x0182, 24)] {
        let mut device = [0u8; 256];
        (device[6], device[0x34]) = (0x10, 0x50);
        device[0x50..0x54].copy_from_slice(&[5, 0x70, control as u8, (control >> 8) as u8]);
        device[0x70..0x72].copy_from_slice(&[9, 0]);
        device[usize::from(0x50 + len)] = 0xee;
        let mut config = ConfigSpace::like(&device);
        let (count, form) = MsiForm::of_control(control);
        assert_eq!((count, form.bytes()), (2, len));
        let router = Arc::new(FakeRouter::default());
        let msi = Msi::new(router.clone(), &Events::own(), count, form, &mut config).unwrap();
        assert_eq!(msi.place(), (0x50, len));
        assert_eq!(config.capabilities(), [(5, 0x50), (9, 0x70)]);
        assert_eq!(config.dword(0x50 + len) as u8, 0xee, "what follows is not the capability's");
        config.write(0x54, &0xfee0_1000u32.to_le_bytes());
        config.write(0x50 + if form.wide { 12 } else { 8 }, &0x41u16.to_le_bytes());
        config.write(0x52, &(1u16 | 1 << 4).to_le_bytes());
        msi.follow(&config);
        assert_eq!(msi.used(&config), 2);
        let vector = msi.vector(1, &config).unwrap();
        vector.raise();
        assert_eq!(router.told().routes[&vector.input()], Message { address: 0xfee0_1000, data: 0x41 });
        assert_eq!(router.delivered(vector.input()), Some(1), "control {control:#x}");
    }
}

#[test]
fn a_list_of_capabilities_that_goes_in_a_circle_ends() {
    let mut device = [0u8; 256];
    (device[6], device[0x34]) = (0x10, 0x40);
    device[0x40..0x42].copy_from_slice(&[1, 0x50]);
    device[0x50..0x52].copy_from_slice(&[9, 0x40]);
    let mut config = ConfigSpace::like(&device);
    assert!(config.capabilities().len() <= 48);
    config.retain_capabilities(|id| id == 7);
    assert_eq!(config.capabilities(), []);
    assert_eq!(config.word(6) & 0x10, 0);
}
