//! Blocks of 2 MiB pages: units are placed whole.

#![allow(clippy::unwrap_used, reason = "a failure is a panic here")]

mod support;

use support::{BLOCK, HugePages, Lab, PAGE, Sharer};
use wherry_fault::{FaultError, Mode, Outcome, SourceId, Trouble, Userfault, Way};
use wherry_memory::{Block, BlockSpec, PageSize};

const UNIT: u64 = 512;

/// Runs a test with a block of so many units, if the machine has huge pages.
fn with_block(units: u64, test: impl FnOnce(&Lab)) {
    let Some(_permit) = HugePages::permit() else {
        println!("SKIPPED: huge pages cannot be had: not permitted to change the kernel's settings");
        return;
    };
    let spec = BlockSpec { id: BLOCK, guest_base: 0, size: units * UNIT * PAGE, page_size: PageSize::Huge2M };
    if let Err(error) = Block::create(spec) {
        println!("SKIPPED: no huge pages on this machine: {error}");
        return;
    }
    if let Some(lab) = Lab::with(spec) {
        test(&lab);
    }
}

/// One test, because the setting that lets huge pages be had is the whole machine's.
#[test]
fn units_of_large_pages_are_placed_whole() {
    with_block(2, a_unit_is_requested_as_a_whole_and_appears_when_its_last_granule_is_received);
    with_block(2, the_kernel_refuses_to_place_part_of_a_unit);
    with_block(4, zero_granules_need_no_memory_until_they_are_touched);
    with_block(2, zeros_go_over_stale_bytes);
    with_block(4, by_copy_a_unit_is_staged_until_it_is_whole);
    with_block(2, the_way_can_be_changed_with_units_half_received);
    with_block(2, a_punched_unit_is_found_out);
    with_block(4, whole_units_are_placed_when_their_last_granule_arrives_and_in_the_background);
}

fn a_unit_is_requested_as_a_whole_and_appears_when_its_last_granule_is_received(lab: &Lab) {
    let touch = lab.touch(700);
    let wanted: Vec<_> = (0..UNIT).map(|_| lab.wanted().page).collect();
    assert_eq!(wanted[0], 700, "the touched page goes first");
    let mut sorted = wanted;
    sorted.sort();
    assert_eq!(sorted, (512..1024).collect::<Vec<_>>());
    lab.receive(512..1000, 1);
    lab.receive(1001..1024, 1);
    assert!(lab.service.states(BLOCK).unwrap().is_waited(700) && touch.waits());
    lab.receive(1000..1001, 2);
    assert_eq!(touch.bytes(), (1, 1));
    assert_eq!(lab.guest_read(1000), (2, 2));
    lab.served(SourceId::GUEST, 1);
    // A fault on a unit that is received and not placed.
    lab.receive(0..512, 3);
    assert_eq!(lab.touch(5).bytes(), (3, 3));
    assert!(lab.requests.try_recv().is_err());
}

fn the_kernel_refuses_to_place_part_of_a_unit(lab: &Lab) {
    let sharer = Sharer::new(&lab.block, None);
    let uffd = Userfault::open().unwrap();
    let calls = uffd.register(sharer.base, 2 * UNIT * PAGE, Mode::MISSING_MINOR).unwrap();
    assert!(!calls.zeropage());
    lab.write_engine(0, 1);
    assert!(uffd.continue_range(sharer.base, PAGE, true).is_err());
    assert!(uffd.zeropage(sharer.base, UNIT * PAGE, true).is_err());
    assert_eq!(uffd.continue_range(sharer.base, UNIT * PAGE, true).unwrap(), Outcome::Done);
    assert_eq!(uffd.continue_range(sharer.base, UNIT * PAGE, true).unwrap(), Outcome::Exists);
    assert_eq!(uffd.continue_range(sharer.base + UNIT * PAGE, UNIT * PAGE, true).unwrap(), Outcome::Fault);
}

fn zero_granules_need_no_memory_until_they_are_touched(lab: &Lab) {
    let states = lab.service.states(BLOCK).unwrap();
    let touch = lab.touch(3);
    lab.wanted();
    states.claim_range(0..4 * UNIT);
    lab.service.received_zero(BLOCK, 0..4 * UNIT).unwrap();
    assert_eq!(touch.bytes(), (0, 0));
    assert_eq!(lab.touch(2 * UNIT).bytes(), (0, 0));
    assert_eq!(lab.data(), [0..UNIT, 2 * UNIT..3 * UNIT]);
    assert!(lab.service.take_troubles().is_empty());
}

fn zeros_go_over_stale_bytes(lab: &Lab) {
    (0..UNIT).for_each(|page| lab.write_engine(page, 77));
    let states = lab.service.states(BLOCK).unwrap();
    lab.receive(0..100, 5);
    states.claim_range(100..UNIT);
    lab.service.received_zero(BLOCK, 100..UNIT).unwrap();
    assert_eq!(lab.touch(99).bytes(), (5, 5));
    assert_eq!((lab.guest_read(100), lab.guest_read(511)), ((0, 0), (0, 0)));
}

fn by_copy_a_unit_is_staged_until_it_is_whole(lab: &Lab) {
    lab.service.set_way(BLOCK, Way::Copy).unwrap();
    let sharer = Sharer::new(&lab.block, Some(Mode::MISSING));
    let id = lab.service.add_source("disk", sharer.handed_over(), sharer.table()).unwrap();
    let touch = sharer.touch(513);
    assert_eq!(lab.wanted().page, 513);
    lab.receive_copy(512..900, 1);
    lab.service.states(BLOCK).unwrap().claim_range(900..1000);
    lab.service.received_zero(BLOCK, 900..1000).unwrap();
    assert!(touch.waits() && lab.data().is_empty(), "part of a unit is in memory");
    // The rest of this unit, and the beginning of the next.
    lab.receive_copy(1000..1030, 2);
    assert_eq!(touch.bytes(), (1, 1));
    assert_eq!((sharer.read(950), sharer.read(1023), lab.guest_read(1001)), ((0, 0), (2, 2), (2, 2)));
    lab.served(id, 1);
    // A unit that ends with zeros, and one of zeros alone.
    let states = lab.service.states(BLOCK).unwrap();
    states.claim_range(1030..2048);
    lab.service.received_zero(BLOCK, 1030..2048).unwrap();
    assert_eq!((sharer.read(1029), sharer.read(1030)), ((2, 2), (0, 0)));
    assert_eq!(sharer.touch(1600).bytes(), (0, 0));
    assert!(lab.service.take_troubles().is_empty());
}

fn the_way_can_be_changed_with_units_half_received(lab: &Lab) {
    let touch = lab.touch(0);
    (0..UNIT).for_each(|page| lab.write_engine(page, 77));
    lab.receive(0..10, 1);
    lab.service.set_way(BLOCK, Way::Copy).unwrap();
    assert!(lab.data().is_empty());
    lab.receive_copy(10..20, 2);
    lab.service.set_way(BLOCK, Way::InPlace).unwrap();
    lab.receive(20..30, 3);
    lab.service.set_way(BLOCK, Way::Copy).unwrap();
    assert!(touch.waits());
    lab.receive_copy(30..UNIT, 4);
    assert_eq!(touch.bytes(), (1, 1));
    let read = [9, 10, 19, 20, 29, 30, 511].map(|page| lab.guest_read(page).0);
    assert_eq!(read, [1, 2, 2, 3, 3, 4, 4]);
}

fn a_punched_unit_is_found_out(lab: &Lab) {
    lab.receive(0..2 * UNIT, 1);
    assert_eq!(lab.touch(600).bytes(), (1, 1));
    lab.block.punch(UNIT * PAGE..2 * UNIT * PAGE).unwrap();
    assert_eq!(lab.touch(601).bytes(), (0, 0));
    assert_eq!(lab.trouble(), Trouble::Punched { block: BLOCK, page: UNIT, suspects: vec![] });
}

fn whole_units_are_placed_when_their_last_granule_arrives_and_in_the_background(lab: &Lab) {
    (0..UNIT).for_each(|page| lab.write_engine(page, 1));
    lab.service.mark_received(BLOCK, 0..UNIT).unwrap();
    lab.receive(2 * UNIT..3 * UNIT, 2);
    lab.receive(3 * UNIT..4 * UNIT - 1, 3);
    assert_eq!(lab.guest_read(2 * UNIT), (2, 2));
    assert_eq!(lab.service.map_background(u64::MAX).unwrap().pages, UNIT, "the unit that was whole before");
    assert_eq!(lab.guest_read(5), (1, 1));
    assert!(matches!(lab.service.unregister_guest_maps(), Err(FaultError::Incomplete { missing: 513, .. })));
    lab.receive(0..4 * UNIT, 4);
    assert_eq!((lab.guest_read(UNIT), lab.guest_read(4 * UNIT - 1)), ((4, 4), (4, 4)));
    assert_eq!(lab.service.statistics().sources[0].faults, 0);
}
