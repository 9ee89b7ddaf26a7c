//! Memory for the kernel: RAM that is handed out once and for all, and mapped.
//!
//! The boot tables map the first 4 GiB one to one. What is handed out above is mapped here, one to one too, by 2 MiB
//! pages, a table per GiB. Everything is accessible from ring 3.

use crate::ram::{BOOT_MAPPED, GIB, MemoryMapEntry, Ram, Region};

unsafe extern "C" {
    #[link_name = "boot_pdpt"]
    static mut BOOT_PDPT: [u64; 512];
}

/// Hands out RAM from the bottom up. Nothing is ever given back.
pub struct Allocator(Ram);

impl Allocator {
    /// Takes the RAM of a memory map. There may be only one allocator, and the first vCPU uses it.
    pub fn new(map: &[MemoryMapEntry]) -> Self {
        Self(Ram::new(map))
    }

    /// All RAM in the map, in bytes, whether it can be handed out or not.
    pub fn total(&self) -> u64 {
        self.0.total()
    }

    /// Bytes that can still be handed out.
    pub fn free(&self) -> u64 {
        self.0.free()
    }

    /// Hands out nothing below `address` any more.
    pub fn skip_to(&mut self, address: u64) {
        self.0.skip_to(address);
    }

    /// Up to `bytes` of RAM in one piece. `None` when nothing is left. Contents are whatever was there.
    pub fn take_piece(&mut self, bytes: u64) -> Option<Region> {
        self.0.take_piece(bytes).inspect(|piece| self.map(piece))
    }

    /// Exactly `bytes` of RAM in one piece. `None` when there is no such piece.
    pub fn take(&mut self, bytes: u64) -> Option<Region> {
        self.0.take(bytes).inspect(|piece| self.map(piece))
    }

    /// Maps what the boot tables do not.
    fn map(&self, piece: &Region) {
        let mut gib = piece.start.max(BOOT_MAPPED) / GIB;
        while gib * GIB < piece.end {
            let slot = &raw mut BOOT_PDPT;
            // SAFETY: gib < 512, because no region ends above LAST_MAPPABLE; only this vCPU changes the table.
            if unsafe { (*slot)[gib as usize] } & 1 == 0 {
                let table = self.0.table_page(gib);
                for n in 0..512 {
                    // SAFETY: a page set aside for this, below 4 GiB.
                    unsafe { ((table + n * 8) as *mut u64).write_volatile((gib * GIB + (n << 21)) | 0xe7) };
                }
                // SAFETY: as above. From not present to present needs no TLB flush.
                unsafe { (&raw mut (*slot)[gib as usize]).write_volatile(table | 0x27) };
            }
            gib += 1;
        }
    }
}
