//! The transport as a driver sees it, with the entropy device behind it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::sync::Arc;

use support::*;
use vm_memory::{Bytes, GuestAddress};
use wherry_pci::PciFunction;
use wherry_state::{Saved, SavedState, StateUnit};
use wherry_virtio::rng::Rng;
use wherry_virtio::saved::SavedRng;

const VERSION_1: u64 = 1 << 32;
const EVENT_INDEX: u64 = 1 << 29;
const INDIRECT_FEATURE: u64 = 1 << 28;
const BUFFER: u64 = 0x2_0000;

fn driver() -> Driver {
    let driver = Driver::new(Arc::new(Rng::new(0).unwrap()), ram());
    driver.switch_on(true);
    driver
}

/// Asks for random bytes and gets them.
fn ask(driver: &mut Driver) {
    driver.memory().write_slice(&[0; 64], GuestAddress(BUFFER)).unwrap();
    driver.descriptor(3, BUFFER, 64, WRITE, 0);
    driver.offer(3);
    assert_eq!(driver.used(), (3, 64));
    let mut bytes = [0; 64];
    driver.memory().read_slice(&mut bytes, GuestAddress(BUFFER)).unwrap();
    assert_ne!(bytes, [0; 64]);
}

#[test]
fn a_driver_that_follows_the_rules_is_served_and_interrupted() {
    let mut driver = driver();
    let mut id = [0; 4];
    driver.function.read_config(0, &mut id);
    assert_eq!(u32::from_le_bytes(id), 0x1044_1af4);
    driver.set_up(VERSION_1);
    ask(&mut driver);
    until("its interrupt", || driver.interrupts(0) == Some(1));
    ask(&mut driver);
    assert_eq!(driver.status(), 15);
}

#[test]
fn without_msix_the_pin_is_asserted_until_the_interrupt_status_is_read() {
    let mut driver = Driver::new(Arc::new(Rng::new(0).unwrap()), ram());
    driver.switch_on(false);
    driver.set_up(VERSION_1);
    ask(&mut driver);
    until("its interrupt", || driver.router.delivered(PIN) == Some(1));
    // The guest ends the interrupt without having served the device: it fires again, by the device's thread.
    driver.router.end_of_interrupt(PIN);
    until("the next interrupt", || driver.router.delivered(PIN) == Some(1));
    assert_eq!(driver.read::<1>(0x1000), [1]);
    assert_eq!(driver.read::<1>(0x1000), [0]);
    let mut status = [0; 2];
    driver.function.read_config(6, &mut status);
    assert_eq!(status[0] & 8, 0, "the pin is released");
}

#[test]
fn features_that_were_not_offered_or_lack_version_1_are_not_accepted() {
    let driver = driver();
    for features in [0, VERSION_1 | 1 << 40, VERSION_1 | 1] {
        driver.write(0x14, &[0]);
        driver.write(0x14, &[3]);
        for half in 0..2u32 {
            driver.write(0x08, &half.to_le_bytes());
            driver.write(0x0c, &((features >> (32 * half)) as u32).to_le_bytes());
        }
        driver.write(0x14, &[11]);
        assert_eq!(driver.status(), 3, "{features:#x}");
        driver.write(0x14, &[15]);
        assert_eq!(driver.status() & 4, 0, "it runs without an agreement");
    }
}

#[test]
fn an_event_index_keeps_interrupts_back_until_the_driver_wants_one() {
    let mut driver = driver();
    driver.set_up(VERSION_1 | EVENT_INDEX);
    // Behind the available ring: interrupt when the entry with index 1 is used.
    driver.memory().write_obj(1u16, GuestAddress(AVAILABLE + 4 + 2 * u64::from(SIZE))).unwrap();
    ask(&mut driver);
    ask(&mut driver);
    until("the interrupt of the second", || driver.interrupts(0) == Some(1));
}

/// Whether the device needs a reset after the driver has done this; and that it works again after one.
fn breaks(features: u64, offend: impl FnOnce(&mut Driver)) {
    let mut driver = driver();
    driver.set_up(VERSION_1 | features);
    offend(&mut driver);
    until("the device to need a reset", || driver.status() & 0x40 != 0);
    until("the interrupt of the configuration", || driver.interrupts(1).is_some_and(|n| n > 0));
    driver.set_up(VERSION_1 | features);
    ask(&mut driver);
}

#[test]
fn a_chain_without_an_end_breaks_the_device_and_not_the_vmm() {
    breaks(0, |driver| {
        driver.descriptor(0, BUFFER, 4, WRITE | NEXT, 1);
        driver.descriptor(1, BUFFER, 4, WRITE | NEXT, 0);
        driver.offer(0);
    });
}

#[test]
fn descriptors_and_buffers_that_lie_nowhere_break_the_device() {
    breaks(0, |driver| driver.offer(SIZE));
    breaks(0, |driver| {
        driver.descriptor(0, BUFFER, 4, WRITE | NEXT, SIZE);
        driver.offer(0);
    });
    for (address, len) in [(4 << 20, 1), ((4 << 20) - 1, 2), (u64::MAX, 4), (0, u32::MAX)] {
        breaks(0, |driver| {
            driver.descriptor(0, address, len, WRITE, 0);
            driver.offer(0);
        });
    }
}

#[test]
fn more_than_4_gib_in_a_chain_break_the_device() {
    breaks(0, |driver| {
        (0..SIZE - 1).for_each(|i| driver.descriptor(i, 0, 4 << 20, WRITE | NEXT, i + 1));
        driver.descriptor(SIZE - 1, 0, u32::MAX, WRITE, 0);
        driver.offer(0);
    });
}

#[test]
fn indirect_tables_are_followed_where_they_are_legal_and_break_the_device_where_not() {
    const TABLE: u64 = 0x3_0000;
    let mut driver = driver();
    driver.set_up(VERSION_1 | INDIRECT_FEATURE);
    driver.descriptor_at(TABLE, BUFFER, 8, WRITE | NEXT, 1);
    driver.descriptor_at(TABLE + 16, BUFFER + 8, 8, WRITE, 0);
    driver.descriptor(2, TABLE, 32, INDIRECT, 0);
    driver.offer(2);
    assert_eq!(driver.used(), (2, 16));
    let indirect = |len: u32, flags: u16, inner: u16| {
        move |driver: &mut Driver| {
            driver.descriptor_at(TABLE, BUFFER, 8, WRITE | inner, 0);
            driver.descriptor(2, TABLE, len, flags, 0);
            driver.offer(2);
        }
    };
    breaks(0, indirect(16, INDIRECT, 0));
    breaks(INDIRECT_FEATURE, indirect(17, INDIRECT, 0));
    breaks(INDIRECT_FEATURE, indirect(0, INDIRECT, 0));
    breaks(INDIRECT_FEATURE, indirect(16, INDIRECT | NEXT, 0));
    breaks(INDIRECT_FEATURE, indirect(16, INDIRECT, INDIRECT));
}

#[test]
fn an_available_index_that_runs_away_and_rings_outside_memory_break_the_device() {
    breaks(0, |driver| {
        driver.memory().write_obj(SIZE + 1, GuestAddress(AVAILABLE + 2)).unwrap();
        driver.ring();
    });
    let driver = driver();
    driver.write(0x14, &[3]);
    driver.write(0x08, &1u32.to_le_bytes());
    driver.write(0x0c, &1u32.to_le_bytes());
    driver.write(0x14, &[11]);
    driver.write(0x20, &0xffff_ffff_f000u64.to_le_bytes());
    driver.write(0x1c, &1u16.to_le_bytes());
    driver.write(0x14, &[15]);
    until("the device to need a reset", || driver.status() & 0x40 != 0);
}

#[test]
fn registers_are_reached_through_configuration_space_too() {
    let driver = driver();
    let window = {
        let mut at = 0x40;
        loop {
            let mut word = [0; 4];
            driver.function.read_config(at, &mut word);
            if word[0] == 9 && word[3] == 5 {
                break at;
            }
            at = u16::from(word[1]);
        }
    };
    driver.function.write_config(window + 8, &0x14u32.to_le_bytes());
    driver.function.write_config(window + 12, &1u32.to_le_bytes());
    driver.function.write_config(window + 16, &[3]);
    assert_eq!(driver.status(), 3);
    let mut byte = [0];
    driver.function.read_config(window + 16, &mut byte);
    assert_eq!(byte, [3]);
    driver.function.write_config(window + 8, &0xffff_fff0u32.to_le_bytes());
    driver.function.read_config(window + 16, &mut byte);
}

#[test]
fn a_restored_device_serves_on_where_it_stood_and_finds_what_came_meanwhile() {
    let mut source = driver();
    source.set_up(VERSION_1 | EVENT_INDEX);
    for _ in 0..SIZE + 3 {
        ask(&mut source);
    }
    source.function.begin_stop().unwrap();
    source.function.finish_stop(soon()).unwrap();
    source.descriptor(5, BUFFER, 32, WRITE, 0);
    source.offer(5);
    let Saved::Section(section) = source.function.save().unwrap() else { panic!("it has state") };

    let mut destination = Driver::new(Arc::new(Rng::new(0).unwrap()), source.ram.clone());
    destination.function.restore(&section).unwrap();
    assert!(destination.function.restore(&section).is_err(), "it was restored before");
    (destination.available, destination.seen) = (source.available, source.seen);
    assert_eq!(destination.interrupts(0), None, "vectors are attached when it starts");
    destination.function.start().unwrap();
    assert_eq!(destination.used(), (5, 32));
    ask(&mut destination);
    assert_eq!(destination.status(), 15);
    destination.function.begin_stop().unwrap();
    destination.function.finish_stop(soon()).unwrap();
    assert_eq!(source.seen.wrapping_add(2), destination.used_index());
    assert_eq!(source.used_index(), destination.used_index(), "they share memory");
}

#[test]
fn a_stop_that_is_undone_loses_neither_requests_nor_interrupts() {
    let mut driver = driver();
    driver.set_up(VERSION_1);
    ask(&mut driver);
    until("the first interrupt", || driver.interrupts(0) == Some(1));
    driver.function.drain(soon()).unwrap();
    driver.function.begin_stop().unwrap();
    driver.function.finish_stop(soon()).unwrap();
    assert_eq!(driver.interrupts(0), None);
    driver.descriptor(3, BUFFER, 64, WRITE, 0);
    driver.offer(3);
    driver.function.start().unwrap();
    assert_eq!(driver.used(), (3, 64));
    until("its interrupt", || driver.interrupts(0) == Some(1));
    driver.function.drain(soon()).unwrap();
    driver.function.undrain().unwrap();
    ask(&mut driver);
}

#[test]
fn impossible_state_is_refused_by_name() {
    let mut driver = driver();
    driver.set_up(VERSION_1);
    driver.function.finish_stop(soon()).unwrap();
    let Saved::Section(section) = driver.function.save().unwrap() else { panic!("it has state") };
    let refuse = |change: fn(&mut SavedRng)| {
        let mut saved = SavedRng::from_section(&section).unwrap();
        change(&mut saved);
        let fresh = Driver::new(Arc::new(Rng::new(0).unwrap()), ram());
        let section = saved.to_section(&driver.function.id());
        fresh.function.restore(&section).unwrap_err().to_string()
    };
    assert!(refuse(|s| s.transport = None).contains("transport"));
    assert!(refuse(|s| s.transport.as_mut().unwrap().accepted |= 1 << 50).contains("features"));
    assert!(refuse(|s| s.transport.as_mut().unwrap().rings.clear()).contains("rings"));
    assert!(refuse(|s| s.transport.as_mut().unwrap().rings[0].size = 3).contains("ring"));
    assert!(refuse(|s| s.transport.as_mut().unwrap().rings[0].vector = 2).contains("vector"));
    assert!(refuse(|s| s.transport.as_mut().unwrap().msix = None).contains("MSI-X"));
    assert!(refuse(|s| s.transport.as_mut().unwrap().config[0] ^= 1).contains("offset 0x0"));
    assert!(refuse(|s| s.transport.as_mut().unwrap().status = 256).contains("status"));
}
