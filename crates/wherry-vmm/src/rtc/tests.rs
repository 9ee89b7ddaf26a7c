use proptest::prelude::*;

use super::*;

/// 2026-11-21 13:45:06 UTC, a Saturday.
const NOW: i64 = 1_795_268_706;

fn rtc() -> Rtc {
    Rtc::with_time(8 << 30, 3 << 30, || NOW)
}

fn get(rtc: &Rtc, index: u8) -> u8 {
    rtc.write(0x70, 0, &[index]);
    let mut data = [0];
    rtc.read(0x70, 1, &mut data);
    data[0]
}

fn set(rtc: &Rtc, index: u8, value: u8) {
    rtc.write(0x70, 0, &[index]);
    rtc.write(0x70, 1, &[value]);
}

/// Century, year, month, day, hour, minute, second.
fn all(rtc: &Rtc) -> [u8; 7] {
    [RTC_CENTURY, 9, 8, 7, 4, 2, 0].map(|i| get(rtc, i))
}

fn section(rtc: &Rtc) -> Section {
    match rtc.save().unwrap() {
        Saved::Section(section) => section,
        Saved::Nothing => panic!("the unit has state"),
    }
}

#[test]
fn it_tells_utc_in_decimal_digits_and_in_binary_in_24_and_12_hours() {
    let rtc = rtc();
    assert_eq!(all(&rtc), [0x20, 0x26, 0x11, 0x21, 0x13, 0x45, 0x06]);
    assert_eq!(get(&rtc, 6), 7, "Saturday");
    set(&rtc, 11, 2 | 4);
    assert_eq!(all(&rtc), [20, 26, 11, 21, 13, 45, 6]);
    set(&rtc, 11, 4);
    assert_eq!(get(&rtc, 4), 0x80 | 1);
    set(&rtc, 11, 0);
    assert_eq!(get(&rtc, 4), 0x80 | 1);
    assert_eq!((get(&rtc, 10) & 0x80, get(&rtc, 12), get(&rtc, 13)), (0, 0, 0x80));
}

#[test]
fn the_guest_can_set_it() {
    let rtc = rtc();
    set(&rtc, 11, 0x82);
    for (index, value) in [(RTC_CENTURY, 0x19), (9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x58)] {
        set(&rtc, index, value);
    }
    set(&rtc, 11, 2);
    assert_eq!(all(&rtc), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58]);
    set(&rtc, 8, 2);
    assert_eq!(get(&rtc, 7), 0x28, "February 1999 had 28 days");
    set(&rtc, 11, 0);
    set(&rtc, 4, 0x92);
    set(&rtc, 11, 2);
    assert_eq!(get(&rtc, 4), 0x12, "12 in the afternoon is noon");
}

#[test]
fn the_memory_sizes_are_those_of_the_machine() {
    let rtc = rtc();
    let word = |at| u16::from(get(&rtc, at)) | u16::from(get(&rtc, at + 1)) << 8;
    assert_eq!((word(0x15), word(0x17), word(0x30)), (640, 0xffff, 0xffff));
    assert_eq!(word(0x34), (((3u64 << 30) - (16 << 20)) >> 16) as u16);
    assert_eq!((word(0x5b), get(&rtc, 0x5d)), ((5u64 << 30 >> 16) as u16, (5u64 << 30 >> 32) as u8));
}

#[test]
fn its_offset_and_memory_move_with_the_state() {
    let rtc = rtc();
    set(&rtc, 0x0f, 0xaa);
    set(&rtc, 9, 0x30);
    let other = super::Rtc::with_time(1 << 20, 3 << 30, || NOW + 5);
    other.restore(&section(&rtc)).unwrap();
    assert_eq!(all(&other), [0x20, 0x30, 0x11, 0x21, 0x13, 0x45, 0x11]);
    assert_eq!((get(&other, 0x0f), get(&other, 0x30)), (0xaa, 0xff));
    assert!(other.restore(&section(&rtc)).is_err(), "restored twice");
}

#[test]
fn impossible_state_is_refused() {
    let rtc = rtc();
    let saved = SavedRtc { cmos: vec![0; 127], ..Default::default() };
    assert!(rtc.restore(&saved.to_section(&rtc.id())).unwrap_err().to_string().contains("127"));
}

proptest! {
    #[test]
    fn no_access_panics_and_the_clock_shows_a_date(
        accesses in proptest::collection::vec((0u64..2, proptest::collection::vec(any::<u8>(), 1..9)), 1..80),
        offset: i64,
    ) {
        let rtc = rtc();
        rtc.lock().offset = offset;
        for (port, mut data) in accesses {
            rtc.write(0x70, port, &data);
            rtc.read(0x70, port, &mut data);
        }
        set(&rtc, 11, 6);
        prop_assert!((1..=12).contains(&get(&rtc, 8)) && (1..=31).contains(&get(&rtc, 7)));
        let fresh = super::tests::rtc();
        fresh.restore(&section(&rtc)).unwrap();
        prop_assert_eq!(section(&fresh), section(&rtc));
    }
}
