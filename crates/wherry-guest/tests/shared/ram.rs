//! Which RAM of a memory map the guest takes.

use proptest::prelude::*;
use wherry_guest::ram::{BOOT_MAPPED, FIRST_FREE, GIB, LAST_MAPPABLE, MemoryMapEntry, Ram, Region};
use wherry_guest::report::PAGE_SIZE;

const RAM: u32 = 1;
const RESERVED: u32 = 2;

fn entry(start: u64, end: u64, kind: u32) -> MemoryMapEntry {
    MemoryMapEntry { start, size: end - start, kind, reserved: 0 }
}

/// Takes everything.
fn drain(mut ram: Ram) -> Vec<Region> {
    std::iter::from_fn(|| ram.take_piece(u64::MAX / 2)).collect()
}

#[test]
fn ram_is_taken_from_16_mib_up_without_what_is_reserved() {
    let map = [
        entry(0, 0x9_fc00, RAM),
        entry(0x10_0000, 0x4000_0000, RAM),
        entry(0x3000_0800, 0x3000_1800, RESERVED),
        entry(0x3fff_0000, 0x4000_0000, 3),
    ];
    let ram = Ram::new(&map);
    assert_eq!(ram.total(), 0x9_fc00 + 0x3ff0_0000);
    let expected = [Region { start: FIRST_FREE, end: 0x3000_0000 }, Region { start: 0x3000_2000, end: 0x3fff_0000 }];
    assert_eq!(drain(ram), expected);
}

#[test]
fn ram_above_4_gib_costs_a_low_page_per_gib_for_its_tables() {
    let map = [entry(0, 3 * GIB, RAM), entry(4 * GIB, 260 * GIB, RAM)];
    let mut ram = Ram::new(&map);
    let low = ram.take_piece(u64::MAX / 2).unwrap();
    assert_eq!(low.start, FIRST_FREE + 256 * PAGE_SIZE);
    assert_eq!((ram.table_page(4), ram.table_page(259)), (FIRST_FREE, FIRST_FREE + 255 * PAGE_SIZE));
    assert_eq!(ram.take_piece(u64::MAX / 2), Some(Region { start: 4 * GIB, end: 260 * GIB }));
}

#[test]
fn ram_above_4_gib_is_left_alone_when_there_is_no_room_for_its_tables() {
    let map = [entry(0, FIRST_FREE + PAGE_SIZE, RAM), entry(4 * GIB, 8 * GIB, RAM)];
    assert_eq!(drain(Ram::new(&map)), [Region { start: FIRST_FREE, end: FIRST_FREE + PAGE_SIZE }]);
}

#[test]
fn a_piece_is_all_or_nothing_and_comes_from_the_first_place_that_has_it() {
    let map = [entry(FIRST_FREE, FIRST_FREE + 0x4000, RAM), entry(0x200_0000, 0x300_0000, RAM)];
    let mut ram = Ram::new(&map);
    assert_eq!(ram.take(0x8001), Some(Region { start: 0x200_0000, end: 0x200_9000 }));
    assert_eq!(ram.take(0x4000).unwrap().start, FIRST_FREE);
    assert_eq!(ram.take(0x100_0000), None);
    assert_eq!(ram.free(), 0xff_7000);
}

#[test]
fn nothing_is_taken_below_an_address_that_was_skipped_to() {
    let map = [entry(0, 0x200_0000, RAM), entry(0x300_0000, 0x400_0000, RAM), entry(0x500_0000, 0x600_0000, RAM)];
    let mut ram = Ram::new(&map);
    ram.skip_to(0x380_0001);
    assert_eq!(ram.free(), 0x17f_f000);
    let expected = [Region { start: 0x380_1000, end: 0x400_0000 }, Region { start: 0x500_0000, end: 0x600_0000 }];
    assert_eq!(drain(ram), expected);
    let mut ram = Ram::new(&map);
    ram.skip_to(u64::MAX);
    assert_eq!((ram.free(), ram.take_piece(1)), (0, None));
}

fn entries() -> impl Strategy<Value = Vec<MemoryMapEntry>> {
    let entry = (any::<u64>(), 0u32..45, 0u64..1 << 40, 0u32..42, 1u32..4).prop_map(|(a, shift, size, cut, kind)| {
        MemoryMapEntry { start: a >> (19 + shift), size: size >> cut, kind, reserved: 0 }
    });
    proptest::collection::vec(entry, 0..12)
}

proptest! {
    #[test]
    fn whatever_the_map_says_only_ram_is_taken_and_none_twice(map in entries()) {
        let ram: Vec<_> = map.iter().filter(|entry| entry.kind == RAM).collect();
        let pieces = drain(Ram::new(&map));
        for (i, piece) in pieces.iter().enumerate() {
            prop_assert!(piece.start < piece.end && piece.start >= FIRST_FREE && piece.end <= LAST_MAPPABLE);
            prop_assert!(piece.start.is_multiple_of(PAGE_SIZE) && piece.end.is_multiple_of(PAGE_SIZE));
            prop_assert!(ram.iter().any(|e| e.start <= piece.start && piece.end <= e.start + e.size), "{piece:x?} is not RAM");
            for reserved in map.iter().filter(|entry| entry.kind != RAM && entry.size != 0) {
                prop_assert!(piece.end <= reserved.start || reserved.start + reserved.size <= piece.start);
            }
            prop_assert!(pieces[..i].iter().all(|other| other.end <= piece.start));
        }
    }

    #[test]
    fn tables_are_set_aside_for_all_that_is_handed_out_above_4_gib(map in entries()) {
        let ram = Ram::new(&map);
        let table = |gib| ram.table_page(gib);
        let (first, last) = (table(BOOT_MAPPED / GIB), table(LAST_MAPPABLE / GIB - 1));
        for piece in drain(Ram::new(&map)) {
            let highest = (piece.end - 1) / GIB;
            if highest >= BOOT_MAPPED / GIB {
                prop_assert!(first >= FIRST_FREE && table(highest) + PAGE_SIZE <= BOOT_MAPPED && first < last);
            }
            prop_assert!(piece.start >= first + PAGE_SIZE || piece.end <= first || highest < BOOT_MAPPED / GIB);
        }
    }
}
