use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;

use super::*;

#[derive(Default)]
struct Line(AtomicBool);

impl InterruptLine for Line {
    fn set_level(&self, asserted: bool) {
        self.0.store(asserted, Ordering::SeqCst);
    }
}

struct Rig {
    hotplug: Arc<PciHotplug>,
    sci: Arc<Line>,
    ejected: Arc<Mutex<Vec<u32>>>,
}

impl Rig {
    fn new() -> Self {
        let (sci, ejected) = (Arc::new(Line::default()), Arc::new(Mutex::new(Vec::new())));
        let sink = ejected.clone();
        let hotplug = PciHotplug::new(sci.clone(), Arc::new(move |slots| sink.lock().unwrap().push(slots)));
        Self { hotplug, sci, ejected }
    }

    fn out(&self, port: u16, data: &[u8]) {
        self.hotplug.write(HOTPLUG_BASE.into(), (port - HOTPLUG_BASE).into(), data);
    }

    fn dword(&self, port: u16) -> u32 {
        let mut data = [0; 4];
        self.hotplug.read(HOTPLUG_BASE.into(), (port - HOTPLUG_BASE).into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn level(&self) -> bool {
        self.sci.0.load(Ordering::SeqCst)
    }

    /// What the handler of the event does, without acting on it.
    fn scan(&self) -> (u32, u32) {
        self.out(GPE0, &[1 << GPE]);
        let (up, down) = (self.dword(UP), self.dword(DOWN));
        self.out(UP, &up.to_le_bytes());
        self.out(DOWN, &down.to_le_bytes());
        (up, down)
    }
}

#[test]
fn the_guest_is_told_once_of_each_device_that_comes_or_is_to_go() {
    let rig = Rig::new();
    rig.hotplug.plugged(3);
    assert!(!rig.level(), "the event is not enabled");
    rig.out(GPE0 + 1, &[0xff]);
    assert!(rig.level());
    rig.hotplug.plugged(31);
    rig.hotplug.ask(3);
    assert_eq!(rig.scan(), (1 << 3 | 1 << 31, 1 << 3));
    assert!(!rig.level());
    assert_eq!(rig.scan(), (0, 0));
    rig.hotplug.plugged(4);
    assert!(rig.level());
}

#[test]
fn what_comes_between_reading_and_clearing_is_not_lost() {
    let rig = Rig::new();
    rig.hotplug.plugged(1);
    rig.out(GPE0 + 1, &[1 << GPE]);
    rig.out(GPE0, &[1 << GPE]);
    let up = rig.dword(UP);
    rig.hotplug.plugged(2);
    rig.out(UP, &up.to_le_bytes());
    assert!(rig.level());
    assert_eq!(rig.scan(), (1 << 2, 0));
}

#[test]
fn a_device_is_ejected_once_and_only_if_it_may_be() {
    let rig = Rig::new();
    rig.hotplug.allow(5);
    rig.hotplug.ask(5);
    rig.out(EJECT, &0xffff_ffff_u32.to_le_bytes());
    rig.out(EJECT, &(1u32 << 5).to_le_bytes());
    assert_eq!(*rig.ejected.lock().unwrap(), [1 << 5]);
    assert_eq!((rig.scan(), rig.dword(EJECT)), ((0, 0), 0), "there is nothing more to ask");
    rig.hotplug.freed(5);
    rig.out(EJECT, &(1u32 << 5).to_le_bytes());
    assert_eq!(rig.ejected.lock().unwrap().len(), 1, "the slot is empty");
    rig.hotplug.plugged(5);
    rig.out(EJECT, &(1u32 << 5).to_le_bytes());
    assert_eq!(rig.ejected.lock().unwrap().len(), 2);
}

#[test]
fn a_request_that_is_withdrawn_says_whether_the_guest_has_heard_it() {
    let rig = Rig::new();
    rig.hotplug.allow(5);
    rig.hotplug.ask(5);
    assert!(rig.hotplug.withdraw(5));
    assert_eq!(rig.scan(), (0, 0));
    rig.hotplug.ask(5);
    assert_eq!(rig.scan(), (0, 1 << 5));
    assert!(!rig.hotplug.withdraw(5));
    rig.out(EJECT, &(1u32 << 5).to_le_bytes());
    assert_eq!(*rig.ejected.lock().unwrap(), [1 << 5], "it is taken at its word all the same");
}

#[test]
fn the_state_comes_back_and_what_was_ejected_is_hidden_again() {
    let (here, there) = (Rig::new(), Rig::new());
    here.out(GPE0 + 1, &[1 << GPE]);
    for rig in [&here, &there] {
        rig.hotplug.allow(2);
        rig.hotplug.allow(3);
    }
    here.hotplug.plugged(9);
    here.hotplug.ask(3);
    here.out(EJECT, &(1u32 << 2).to_le_bytes());
    let Saved::Section(section) = here.hotplug.save().unwrap() else { panic!("it has state") };
    there.hotplug.restore(&section).unwrap();
    there.hotplug.start().unwrap();
    assert!(there.level());
    assert_eq!(*there.ejected.lock().unwrap(), [1 << 2]);
    assert_eq!(there.scan(), (1 << 9, 1 << 3));
    assert!(there.hotplug.restore(&section).unwrap_err().to_string().contains("runs already"));
    let without = Rig::new().hotplug.restore(&section).unwrap_err().to_string();
    assert!(without.contains("were ejected"), "{without}");
}

proptest! {
    #[test]
    fn any_access_is_survived_and_ejects_nothing_but_what_may_go(
        accesses in proptest::collection::vec((0u64..16, 1usize..9, any::<u64>(), any::<bool>()), 0..40),
    ) {
        let rig = Rig::new();
        rig.hotplug.allow(7);
        for (at, len, value, writes) in accesses {
            let len = len.min(16 - at as usize);
            let mut data = value.to_le_bytes()[..len].to_vec();
            if writes {
                rig.hotplug.write(HOTPLUG_BASE.into(), at, &data);
            } else {
                rig.hotplug.read(HOTPLUG_BASE.into(), at, &mut data);
            }
        }
        let ejected = rig.ejected.lock().unwrap();
        prop_assert!(ejected.iter().all(|slots| *slots == 1 << 7) && ejected.len() <= 1);
    }
}

#[test]
fn schema_1_reads_as_it_was_written() {
    let saved = SavedHotplug { gpe_status: 2, gpe_enable: 3, up: 0x10, down: 0x20, ejected: 0x8000_0000 };
    crate::golden::check("pci-hotplug", 1, &saved);
}
