//! The guest physical address space. Fixed: it is part of what a destination must agree on.
//!
//! | from | to | what |
//! |---|---|---|
//! | 0 | 0xE_0000 | RAM |
//! | 0xE_0000 | 0x10_0000 | RAM, reserved in the memory map: RSDP and ACPI tables |
//! | 0x10_0000 | 0xC000_0000 | RAM, up to 3 GiB in block 0 |
//! | 0xC000_0000 | 0xE000_0000 | PCI MMIO, 32 bits |
//! | 0xE000_0000 | 0xF000_0000 | PCI ECAM: bus 0 to 255 |
//! | 0xFEC0_0000 | +4 KiB | IOAPIC |
//! | 0xFED5_0000 | +4 KiB | port of the probe guest |
//! | 0xFEE0_0000 | +4 KiB | local APICs |
//! | 0xFFFB_C000 | +4 KiB | identity map page that KVM wants on some CPUs |
//! | 0xFFFB_D000 | +12 KiB | TSS pages that KVM wants on some CPUs |
//! | 0x1_0000_0000 | | the rest of RAM, in block 1 |
//! | [`mmio64`] | | PCI MMIO, 64 bits, above RAM |

use std::ops::Range;

use wherry_memory::{BlockId, BlockSpec, PageSize};

/// End of RAM below 4 GiB, and so the largest size of block 0.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Start of RAM above 4 GiB: block 1.
pub const HIGH_RAM_START: u64 = 1 << 32;
/// RSDP and ACPI tables; reserved in the memory map.
pub const ACPI_TABLES: Range<u64> = 0xe_0000..0x10_0000;
/// 32-bit PCI MMIO window.
pub const MMIO32: Range<u64> = 0xc000_0000..0xe000_0000;
/// PCI ECAM window: 1 MiB a bus.
pub const ECAM: Range<u64> = 0xe000_0000..0xf000_0000;
/// The IOAPIC's page.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Port page of the probe guest.
pub const PROBE_PORT: u64 = 0xfed5_0000;
/// The local APICs' page.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Identity map page for KVM.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// TSS pages for KVM, three of them.
pub const KVM_TSS: u64 = KVM_IDENTITY_MAP + 0x1000;
/// Size of the 64-bit PCI MMIO window.
pub const MMIO64_SIZE: u64 = 64 << 30;

/// The RAM blocks of a machine with `memory` bytes: block 0 from 0, and what does not fit below 3 GiB in block 1 from
/// 4 GiB.
pub fn ram_blocks(memory: u64, page_size: PageSize) -> Vec<BlockSpec> {
    let low = memory.min(LOW_RAM_END);
    let mut blocks = vec![BlockSpec { id: BlockId(0), guest_base: 0, size: low, page_size }];
    if memory > low {
        blocks.push(BlockSpec { id: BlockId(1), guest_base: HIGH_RAM_START, size: memory - low, page_size });
    }
    blocks
}

/// The 64-bit PCI MMIO window of a machine with `memory` bytes of RAM: [`MMIO64_SIZE`] bytes above the end of RAM, at
/// a multiple of that size so that BARs of that size would fit.
pub fn mmio64(memory: u64) -> Range<u64> {
    let end_of_ram = HIGH_RAM_START + memory.saturating_sub(LOW_RAM_END);
    let start = end_of_ram.next_multiple_of(MMIO64_SIZE);
    start..start + MMIO64_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_hole_below_4_gib_free() {
        let small = ram_blocks(1 << 30, PageSize::Base);
        assert_eq!(small.len(), 1);
        assert_eq!((small[0].guest_base, small[0].size), (0, 1 << 30));
        let large = ram_blocks(8 << 30, PageSize::Base);
        assert_eq!((large[0].size, large[1].guest_base, large[1].size), (3 << 30, 4 << 30, 5 << 30));
    }

    #[test]
    fn the_64_bit_window_lies_above_ram() {
        assert_eq!(mmio64(1 << 30).start, MMIO64_SIZE);
        let window = mmio64(256 << 30);
        assert!(window.start >= HIGH_RAM_START + (253 << 30) && window.start.is_multiple_of(MMIO64_SIZE));
    }
}
