//! The registers themselves, without bus, interrupt or lock.

use std::time::{Duration, Instant};

use super::saved::SavedAcpi;

/// Ticks of the PM timer in a second (ACPI 6.5, section 4.8.2.1).
const TIMER_HZ: u128 = 3_579_545;

const STATUS_POWER_BUTTON: u16 = 1 << 8;
/// Bits of status that exist, all cleared by writing 1.
const STATUS_BITS: u16 = STATUS_POWER_BUTTON | 1 | 1 << 4 | 1 << 5 | 1 << 9 | 1 << 10 | 1 << 15;
/// Bits of enable that exist: timer, global, power button, sleep button, RTC.
const ENABLE_BITS: u16 = 1 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10;
/// ACPI mode; always on.
const CONTROL_SCI_EN: u16 = 1;
/// Bits of control that keep what is written: bus master reload and the sleep type.
const CONTROL_KEPT: u16 = 1 << 1 | 7 << 10;
/// The sleep enable bit, in the upper byte of control; always reads 0.
const SLEEP_ENABLE: u8 = 1 << 5;

pub(super) struct Registers {
    status: u16,
    enable: u16,
    control: u16,
    timer: Timer,
}

/// Counts from a moment on.
struct Timer {
    since: Instant,
    from: u64,
}

impl Timer {
    fn now(&self, now: Instant) -> u64 {
        self.from.wrapping_add(ticks(now.saturating_duration_since(self.since)))
    }
}

fn ticks(time: Duration) -> u64 {
    (time.as_nanos() * TIMER_HZ / 1_000_000_000) as u64
}

impl Registers {
    pub fn new(now: Instant) -> Self {
        Self { status: 0, enable: 0, control: CONTROL_SCI_EN, timer: Timer { since: now, from: 0 } }
    }

    /// `passed` is the time since `timer` was saved.
    pub fn restore(status: u16, enable: u16, control: u16, timer: u64, passed: Duration, now: Instant) -> Self {
        Self {
            status: status & STATUS_BITS,
            enable: enable & ENABLE_BITS,
            control: control & CONTROL_KEPT | CONTROL_SCI_EN,
            timer: Timer { since: now, from: timer.wrapping_add(ticks(passed)) },
        }
    }

    pub fn save(&self, now: Instant) -> SavedAcpi {
        SavedAcpi {
            pm1_status: self.status.into(),
            pm1_enable: self.enable.into(),
            pm1_control: self.control.into(),
            timer: self.timer.now(now),
            reset_control: 0,
            realtime_ns: 0,
        }
    }

    /// Level of the system control interrupt.
    pub fn sci(&self) -> bool {
        self.status & self.enable != 0
    }

    /// Sets the button's status. True if its event is enabled.
    pub fn press_power_button(&mut self) -> bool {
        self.status |= STATUS_POWER_BUTTON;
        self.enable & STATUS_POWER_BUTTON != 0
    }

    pub fn read(&self, offset: u64, data: &mut [u8], now: Instant) {
        let timer = (self.timer.now(now) as u32).to_le_bytes();
        for (at, byte) in (offset..).zip(data) {
            *byte = match at {
                0 | 1 => self.status.to_le_bytes()[at as usize],
                2 | 3 => self.enable.to_le_bytes()[at as usize - 2],
                4 | 5 => self.control.to_le_bytes()[at as usize - 4],
                8..12 => timer[at as usize - 8],
                _ => 0,
            };
        }
    }

    /// Returns the sleep type if the write asks to sleep.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Option<u8> {
        let mut sleep = None;
        for (at, byte) in (offset..).zip(data) {
            // A byte of a 16-bit register, and the mask of that byte.
            let wide = |shift: u64| (u16::from(*byte) << (shift * 8), 0xff << (shift * 8));
            match at {
                0 | 1 => self.status &= !wide(at).0,
                2 | 3 => {
                    let (value, mask) = wide(at - 2);
                    self.enable = (self.enable & !mask | value) & ENABLE_BITS;
                }
                4 | 5 => {
                    let (value, mask): (u16, u16) = wide(at - 4);
                    self.control = self.control & !(mask & CONTROL_KEPT) | value & CONTROL_KEPT;
                    if at == 5 && byte & SLEEP_ENABLE != 0 {
                        sleep = Some(byte >> 2 & 7);
                    }
                }
                _ => {}
            }
        }
        sleep
    }
}
