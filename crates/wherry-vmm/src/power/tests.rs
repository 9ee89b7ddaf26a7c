use std::sync::atomic::AtomicBool;
use std::time::Duration;

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
    pm: Arc<AcpiPm>,
    sci: Arc<Line>,
    reset: Arc<ResetControl>,
    asked: Arc<Mutex<Vec<PowerRequest>>>,
    keyboard: KeyboardController,
}

impl Rig {
    fn new() -> Self {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let sink = asked.clone();
        let handler: PowerHandler = Arc::new(move |request| sink.lock().unwrap().push(request));
        let (sci, reset) = (Arc::new(Line::default()), ResetControl::new(handler.clone()));
        let pm = AcpiPm::new(sci.clone(), reset.clone(), handler.clone());
        Self { pm, sci, reset, asked, keyboard: KeyboardController::new(handler) }
    }

    fn out(&self, port: u16, data: &[u8]) {
        self.pm.write(PM_BASE.into(), (port - PM_BASE).into(), data);
    }

    fn word(&self, port: u16) -> u16 {
        let mut data = [0; 2];
        self.pm.read(PM_BASE.into(), (port - PM_BASE).into(), &mut data);
        u16::from_le_bytes(data)
    }

    fn timer(&self) -> u32 {
        let mut data = [0; 4];
        self.pm.read(PM_BASE.into(), 8, &mut data);
        u32::from_le_bytes(data)
    }

    fn asked(&self) -> Vec<PowerRequest> {
        self.asked.lock().unwrap().clone()
    }

    fn level(&self) -> bool {
        self.sci.0.load(Ordering::SeqCst)
    }
}

#[test]
fn sleep_type_5_with_the_enable_bit_switches_off_in_words_and_in_bytes() {
    let rig = Rig::new();
    rig.out(PM1_CONTROL, &(5u16 << 10).to_le_bytes());
    assert_eq!(rig.asked(), []);
    assert_eq!(rig.word(PM1_CONTROL), 5 << 10 | 1, "ACPI mode is always on");
    rig.out(PM1_CONTROL, &(1u16 << 10 | 1 << 13).to_le_bytes());
    assert_eq!(rig.asked(), [], "another sleep type is no power-off");
    rig.out(PM1_CONTROL, &(5u16 << 10 | 1 << 13).to_le_bytes());
    assert_eq!(rig.asked(), [PowerRequest::PowerOff]);
    assert_eq!(rig.word(PM1_CONTROL) & 1 << 13, 0, "the enable bit reads as 0");
    rig.out(PM1_CONTROL + 1, &[5 << 2 | 1 << 5]);
    assert_eq!(rig.asked().len(), 2);
}

#[test]
fn the_power_button_raises_the_sci_until_its_status_is_cleared() {
    let rig = Rig::new();
    assert!(!rig.pm.press_power_button(), "nobody listens yet");
    assert!(!rig.level());
    rig.out(PM1_EVENT + 2, &(1u16 << 8).to_le_bytes());
    assert!(rig.level(), "a press from before is seen when it is enabled");
    rig.out(PM1_EVENT, &(1u16 << 8).to_le_bytes());
    assert!(!rig.level());
    assert!(rig.pm.press_power_button());
    assert_eq!((rig.level(), rig.word(PM1_EVENT)), (true, 1 << 8));
    rig.out(PM1_EVENT + 2, &[0, 0]);
    assert!(!rig.level());
}

#[test]
fn the_reset_control_register_resets_on_the_rising_bit_only() {
    let rig = Rig::new();
    rig.reset.write(2);
    assert_eq!((rig.asked(), rig.reset.read()), (vec![], 2));
    rig.reset.write(RESET_VALUE);
    assert_eq!(rig.asked(), [PowerRequest::Reset]);
}

#[test]
fn the_keyboard_controller_resets_and_is_never_busy() {
    let rig = Rig::new();
    rig.keyboard.write(0x64, 0, &[0xd1]);
    assert_eq!(rig.asked(), []);
    rig.keyboard.write(0x64, 0, &[0xfe]);
    assert_eq!(rig.asked(), [PowerRequest::Reset]);
    let mut status = [0xff];
    rig.keyboard.read(0x64, 0, &mut status);
    assert_eq!(status[0] & 3, 0);
}

#[test]
fn the_timer_counts_3579545_ticks_a_second() {
    let start = Instant::now();
    let registers = Registers::new(start);
    let at = |after| {
        let mut data = [0; 4];
        registers.read(8, &mut data, start + after);
        u32::from_le_bytes(data)
    };
    assert_eq!((at(Duration::ZERO), at(Duration::from_secs(1))), (0, 3_579_545));
    assert_eq!(at(Duration::from_secs(1200)), (1200 * 3_579_545u64) as u32, "it wraps");
}

#[test]
fn state_survives_save_and_restore_and_the_timer_counts_on_meanwhile() {
    let rig = Rig::new();
    rig.out(PM1_EVENT + 2, &(1u16 << 8).to_le_bytes());
    rig.pm.press_power_button();
    rig.out(PM1_CONTROL, &(3u16 << 10).to_le_bytes());
    rig.reset.write(2);
    let Saved::Section(section) = rig.pm.save().unwrap() else { panic!("the unit has state") };
    // As if it had been saved a minute ago.
    let mut saved = SavedAcpi::from_section(&section).unwrap();
    saved.realtime_ns -= 60_000_000_000;

    let other = Rig::new();
    other.pm.restore(&saved.to_section(&rig.pm.id())).unwrap();
    assert!(!other.level(), "interrupts wait for the start");
    other.pm.start().unwrap();
    assert!(other.level());
    assert_eq!((other.word(PM1_EVENT), other.word(PM1_EVENT + 2)), (1 << 8, 1 << 8));
    assert_eq!((other.word(PM1_CONTROL), other.reset.read()), (3 << 10 | 1, 2));
    assert!(u64::from(other.timer()) >= saved.timer + 60 * 3_579_545);
    assert!(other.pm.restore(&section).is_err(), "restored while it runs");

    // A host whose clock is behind: the timer does not go back.
    let third = Rig::new();
    saved.realtime_ns += 3_600_000_000_000;
    third.pm.restore(&saved.to_section(&rig.pm.id())).unwrap();
    let timer = u64::from(third.timer());
    assert!(timer >= saved.timer && timer < saved.timer + 1800 * 3_579_545);
}

#[test]
fn impossible_state_is_refused() {
    let saved = SavedAcpi { pm1_status: 0x1_0000, ..Default::default() };
    let rig = Rig::new();
    assert!(rig.pm.restore(&saved.to_section(&rig.pm.id())).is_err());
}

proptest! {
    #[test]
    fn no_access_panics_and_reserved_bits_stay_clear(
        accesses in proptest::collection::vec((0u64..12, proptest::collection::vec(any::<u8>(), 1..9)), 1..40)
    ) {
        let rig = Rig::new();
        for (offset, data) in accesses {
            rig.pm.write(PM_BASE.into(), offset, &data);
            rig.pm.read(PM_BASE.into(), offset, &mut vec![0; data.len()]);
            rig.reset.write(data[0]);
        }
        prop_assert_eq!(rig.word(PM1_EVENT), 0);
        prop_assert_eq!(rig.word(PM1_EVENT + 2) & !0x721, 0);
        prop_assert_eq!(rig.word(PM1_CONTROL) & 1, 1);
    }
}
