//! What the guest is told about its memory.

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use wherry_memory::GuestMemory;

use crate::layout;

/// End of conventional memory: what lies between it and 1 MiB is not used as RAM on a PC.
const CONVENTIONAL_END: u64 = 0x9_fc00;
const MIB: u64 = 1 << 20;

/// The nature of a range, with the number that E820 and PVH give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MapKind {
    /// RAM for the guest's use.
    Ram = 1,
    /// Not for the guest's use as RAM, and nothing may be placed over it.
    Reserved = 2,
}

/// One range of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// Guest physical address.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
    /// What it is.
    pub kind: MapKind,
}

/// The memory map of a machine with this RAM, in ascending order: RAM, without the PC's hole below 1 MiB, in which the
/// ACPI tables lie; and the ECAM window, which Linux uses only where it is reserved.
pub fn memory_map(memory: &GuestMemory) -> Vec<MapEntry> {
    let entry = |start: u64, end: u64, kind| MapEntry { start, size: end.saturating_sub(start), kind };
    let mut map = vec![
        entry(CONVENTIONAL_END, MIB, MapKind::Reserved),
        entry(layout::ECAM.start, layout::ECAM.end, MapKind::Reserved),
    ];
    for region in memory.iter() {
        let start = region.start_addr().raw_value();
        let end = start + region.len();
        map.push(entry(start, end.min(CONVENTIONAL_END), MapKind::Ram));
        map.push(entry(start.max(MIB), end, MapKind::Ram));
    }
    map.retain(|e| e.size > 0);
    map.sort_by_key(|e| e.start);
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use MapKind::{Ram, Reserved};

    #[test]
    fn the_map_names_all_ram_but_the_hole_below_1_mib_and_reserves_the_ecam_window() {
        let ranges = [(0, 3 << 30), (1 << 32, 1 << 30)].map(|(a, s)| (vm_memory::GuestAddress(a), s));
        let memory = GuestMemory::from_ranges(&ranges).unwrap();
        let map: Vec<_> = memory_map(&memory).iter().map(|e| (e.start, e.start + e.size, e.kind)).collect();
        assert_eq!(
            map,
            [
                (0, 0x9_fc00, Ram),
                (0x9_fc00, 0x10_0000, Reserved),
                (0x10_0000, 0xc000_0000, Ram),
                (0xe000_0000, 0xf000_0000, Reserved),
                (0x1_0000_0000, 0x1_4000_0000, Ram),
            ]
        );
        assert!(map[1].0 <= layout::ACPI_TABLES.start && layout::ACPI_TABLES.end <= map[1].1);
    }
}
