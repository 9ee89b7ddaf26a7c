//! The real-time clock and its CMOS memory at ports 0x70 and 0x71: an MC146818 as PCs have it.
//!
//! It tells the host's UTC plus the offset that the guest has set. There are no alarms and no periodic interrupts:
//! ACPI gives it no interrupt. An update is never in progress, so a guest may read at any time.
//!
//! The clock is made of the guest's own offset and the host's UTC, so after a move it is as right as the new host's.

mod saved;
#[cfg(test)]
mod tests;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use time::{Date, Month, OffsetDateTime, PrimitiveDateTime, Time};
use wherry_state::{Saved, SavedState, Section, StateUnit, UnitError, UnitId};

use crate::acpi::RTC_CENTURY;
use crate::units::Once;
pub(crate) use saved::SavedRtc;
use wherry_pci::bus::BusDevice;

/// Number of ports.
pub const RTC_LEN: u64 = 2;
/// Bytes of CMOS memory, of which the first 14 are the clock.
const CMOS: usize = 128;

/// Registers and CMOS bytes by index.
mod index {
    pub const SECONDS: u8 = 0;
    pub const SECONDS_ALARM: u8 = 1;
    pub const MINUTES: u8 = 2;
    pub const MINUTES_ALARM: u8 = 3;
    pub const HOURS: u8 = 4;
    pub const HOURS_ALARM: u8 = 5;
    pub const WEEKDAY: u8 = 6;
    pub const DAY: u8 = 7;
    pub const MONTH: u8 = 8;
    pub const YEAR: u8 = 9;
    pub const A: u8 = 10;
    pub const B: u8 = 11;
    pub const C: u8 = 12;
    pub const D: u8 = 13;
    /// Memory below 1 MiB in KiB.
    pub const BASE_MEMORY: usize = 0x15;
    /// Memory from 1 MiB in KiB, twice.
    pub const EXTENDED_MEMORY: [usize; 2] = [0x17, 0x30];
    /// Memory from 16 MiB to 4 GiB in 64 KiB.
    pub const MEMORY_ABOVE_16M: usize = 0x34;
    /// Memory above 4 GiB in 64 KiB; three bytes.
    pub const MEMORY_ABOVE_4G: usize = 0x5b;
}

/// Register A: 32768 Hz crystal, 1024 Hz rate. Bit 7, update in progress, always reads 0.
const A_DEFAULT: u8 = 0x26;
/// Register B: 24 hours.
const B_24_HOURS: u8 = 2;
/// Register B: binary instead of decimal digits.
const B_BINARY: u8 = 4;
/// Register B: the guest sets the clock, which stands still.
const B_SET: u8 = 0x80;
/// Register D: the battery is good.
const D_VALID: u8 = 0x80;
/// Bit of the hour that means afternoon, in 12-hour mode.
const AFTERNOON: u8 = 0x80;

/// Gives the seconds since 1970.
type Now = fn() -> i64;

fn host_now() -> i64 {
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => since.as_secs() as i64,
        Err(before) => -(before.duration().as_secs() as i64),
    }
}

struct Clock {
    index: u8,
    cmos: [u8; CMOS],
    /// The guest's time minus the host's, in seconds.
    offset: i64,
    /// The guest's time while it sets the clock.
    stopped: Option<i64>,
}

/// The real-time clock, and the state unit `rtc`.
pub struct Rtc {
    clock: Mutex<Clock>,
    now: Now,
    once: Once,
}

impl Rtc {
    /// A clock that tells UTC, in a machine with `memory` bytes of RAM of which at most `low` lie below 4 GiB.
    pub fn new(memory: u64, low: u64) -> Self {
        Self::with_time(memory, low, host_now)
    }

    fn with_time(memory: u64, low: u64, now: Now) -> Self {
        let mut cmos = [0; CMOS];
        cmos[usize::from(index::A)] = A_DEFAULT;
        cmos[usize::from(index::B)] = B_24_HOURS;
        let mut put = |at: usize, value: u64, bytes: usize| {
            cmos[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
        };
        let below_4g = memory.min(low);
        put(index::BASE_MEMORY, 640, 2);
        for at in index::EXTENDED_MEMORY {
            put(at, (below_4g.saturating_sub(1 << 20) >> 10).min(0xffff), 2);
        }
        put(index::MEMORY_ABOVE_16M, (below_4g.saturating_sub(16 << 20) >> 16).min(0xffff), 2);
        put(index::MEMORY_ABOVE_4G, (memory.saturating_sub(low) >> 16).min(0xff_ffff), 3);
        Self { clock: Mutex::new(Clock { index: 0, cmos, offset: 0, stopped: None }), now, once: Once::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Clock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Time as the chip shows it. What a guest sets can be no date at all; then it is shown as 1970.
fn date(seconds: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

impl Clock {
    fn seconds(&self, now: i64) -> i64 {
        self.stopped.unwrap_or(now.saturating_add(self.offset))
    }

    fn b(&self) -> u8 {
        self.cmos[usize::from(index::B)]
    }

    /// A number as register B wants it.
    fn encode(&self, value: u8) -> u8 {
        if self.b() & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.b() & B_BINARY != 0 { value } else { (value >> 4).saturating_mul(10).saturating_add(value & 15) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.b() & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        self.encode((hour + 11) % 12 + 1) | if hour >= 12 { AFTERNOON } else { 0 }
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.b() & B_24_HOURS != 0 {
            return self.decode(value);
        }
        self.decode(value & !AFTERNOON) % 12 + if value & AFTERNOON != 0 { 12 } else { 0 }
    }

    fn read(&self, now: i64) -> u8 {
        let date = date(self.seconds(now));
        let year = date.year().clamp(0, 9999);
        match self.index {
            index::SECONDS => self.encode(date.second()),
            index::MINUTES => self.encode(date.minute()),
            index::HOURS => self.encode_hour(date.hour()),
            index::WEEKDAY => self.encode(date.weekday().number_from_sunday()),
            index::DAY => self.encode(date.day()),
            index::MONTH => self.encode(date.month().into()),
            index::YEAR => self.encode((year % 100) as u8),
            RTC_CENTURY => self.encode((year / 100) as u8),
            index::A => self.cmos[usize::from(index::A)] & 0x7f,
            // No interrupt is ever pending.
            index::C => 0,
            index::D => D_VALID,
            other => self.cmos[usize::from(other) % CMOS],
        }
    }

    fn write(&mut self, value: u8, now: i64) {
        match self.index {
            index::SECONDS | index::MINUTES | index::HOURS | index::DAY | index::MONTH | index::YEAR | RTC_CENTURY => {
                self.set(value, now);
            }
            // The day of the week follows from the date.
            index::WEEKDAY | index::C | index::D => {}
            index::B => {
                match (value & B_SET != 0, self.stopped) {
                    (true, None) => self.stopped = Some(self.seconds(now)),
                    (false, Some(at)) => {
                        self.offset = at.saturating_sub(now);
                        self.stopped = None;
                    }
                    _ => {}
                }
                self.cmos[usize::from(index::B)] = value;
            }
            index::SECONDS_ALARM | index::MINUTES_ALARM | index::HOURS_ALARM | index::A => {
                self.cmos[usize::from(self.index)] = value;
            }
            other => self.cmos[usize::from(other) % CMOS] = value,
        }
    }

    /// Sets one field. A day that the month does not have becomes its last: the other fields follow.
    fn set(&mut self, value: u8, now: i64) {
        let seconds = self.seconds(now);
        let date = date(seconds);
        let (mut year, mut month, mut day) = (date.year().clamp(0, 9999), date.month(), date.day());
        let (mut hour, mut minute, mut second) = (date.hour(), date.minute(), date.second());
        let number = self.decode(value);
        match self.index {
            index::SECONDS => second = number.min(59),
            index::MINUTES => minute = number.min(59),
            index::HOURS => hour = self.decode_hour(value).min(23),
            index::DAY => day = number.clamp(1, 31),
            index::MONTH => month = Month::try_from(number).unwrap_or(month),
            index::YEAR => year = year / 100 * 100 + i32::from(number.min(99)),
            _ => year = i32::from(number.min(99)) * 100 + year % 100,
        }
        let day = day.min(month.length(year));
        let (Ok(date), Ok(time)) = (Date::from_calendar_date(year, month, day), Time::from_hms(hour, minute, second))
        else {
            return;
        };
        let set = PrimitiveDateTime::new(date, time).assume_utc().unix_timestamp();
        match &mut self.stopped {
            Some(stopped) => *stopped = set,
            None => self.offset = set.saturating_sub(now),
        }
    }
}

impl BusDevice for Rtc {
    fn read(&self, _base: u64, offset: u64, data: &mut [u8]) {
        let now = (self.now)();
        let clock = self.lock();
        for (port, byte) in (offset..).zip(data) {
            // The index port cannot be read.
            *byte = if port == 1 { clock.read(now) } else { 0xff };
        }
    }

    fn write(&self, _base: u64, offset: u64, data: &[u8]) {
        let now = (self.now)();
        let mut clock = self.lock();
        for (port, byte) in (offset..).zip(data) {
            if port == 1 {
                clock.write(*byte, now);
            } else {
                // Bit 7 switches NMIs off, which nobody sends.
                clock.index = byte & 0x7f;
            }
        }
    }
}

impl StateUnit for Rtc {
    fn id(&self) -> UnitId {
        UnitId::new("rtc", 0)
    }

    fn depends_on(&self) -> &[&str] {
        &[]
    }

    fn schema(&self) -> u32 {
        SavedRtc::SCHEMA
    }

    fn drain(&self, _deadline: Instant) -> Result<(), UnitError> {
        Ok(())
    }

    fn undrain(&self) -> Result<(), UnitError> {
        Ok(())
    }

    fn begin_stop(&self) -> Result<(), UnitError> {
        Ok(())
    }

    fn finish_stop(&self, _deadline: Instant) -> Result<(), UnitError> {
        Ok(())
    }

    fn save(&self) -> Result<Saved, UnitError> {
        let clock = self.lock();
        let saved = SavedRtc {
            index: clock.index.into(),
            cmos: clock.cmos.to_vec(),
            offset: clock.offset,
            stopped: clock.stopped,
        };
        Ok(Saved::Section(saved.to_section(&self.id())))
    }

    fn restore(&self, section: &Section) -> Result<(), UnitError> {
        self.once.restoring()?;
        let saved = SavedRtc::from_section(section)?;
        let cmos = <[u8; CMOS]>::try_from(saved.cmos.as_slice())
            .map_err(|_| UnitError::failed(format!("{} bytes of CMOS memory, not {CMOS}", saved.cmos.len())))?;
        let index = (saved.index & 0x7f) as u8;
        *self.lock() = Clock { index, cmos, offset: saved.offset, stopped: saved.stopped };
        Ok(())
    }

    fn start(&self) -> Result<(), UnitError> {
        self.once.started();
        Ok(())
    }
}
