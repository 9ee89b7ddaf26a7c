//! Usable RAM, pieces of it handed out once and for all, and mapping of what lies above 4 GiB.
//!
//! RAM below [`FIRST_FREE`] is never handed out: firmware tables, the report pages and the kernel image are there.

use crate::boot::MemoryMapEntry;
use crate::report::PAGE_SIZE;

/// Start of the RAM that is handed out: 16 MiB.
pub const FIRST_FREE: u64 = 16 << 20;
/// End of what can be mapped: the first entry of the top-level page table.
pub const LAST_MAPPABLE: u64 = 512 << 30;
/// Most separate pieces of RAM that are used.
pub const MAX_REGIONS: usize = 16;

const GIB: u64 = 1 << 30;
/// Always mapped by the boot tables.
const BOOT_MAPPED: u64 = 4 * GIB;

unsafe extern "C" {
    #[link_name = "boot_pdpt"]
    static mut BOOT_PDPT: [u64; 512];
}

/// A piece of RAM: addresses from `start` up to, not including, `end`; multiples of 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
}

/// Hands out RAM from the bottom up. Nothing is ever given back.
pub struct Allocator {
    regions: [Region; MAX_REGIONS],
    len: usize,
    total: u64,
    /// First page of the pool of page tables.
    tables: u64,
}

impl Allocator {
    /// Takes the RAM of a memory map: type 1, above [`FIRST_FREE`], without what other entries claim.
    pub fn new(map: &[MemoryMapEntry]) -> Self {
        let mut allocator = Self { regions: [Region { start: 0, end: 0 }; MAX_REGIONS], len: 0, total: 0, tables: 0 };
        for entry in map.iter().filter(|entry| entry.kind == 1) {
            allocator.total = allocator.total.saturating_add(entry.size);
            let start = entry.start.max(FIRST_FREE).next_multiple_of(PAGE_SIZE);
            let end = entry.start.saturating_add(entry.size).min(LAST_MAPPABLE) / PAGE_SIZE * PAGE_SIZE;
            if start < end && allocator.len < MAX_REGIONS {
                allocator.regions[allocator.len] = Region { start, end };
                allocator.len += 1;
            }
        }
        for entry in map.iter().filter(|entry| entry.kind != 1 && entry.size != 0) {
            let start = entry.start / PAGE_SIZE * PAGE_SIZE;
            let end = entry.start.saturating_add(entry.size).min(LAST_MAPPABLE).next_multiple_of(PAGE_SIZE);
            allocator.exclude(start, end);
        }
        allocator.regions[..allocator.len].sort_unstable_by_key(|region| region.start);
        allocator.reserve_tables();
        allocator
    }

    fn exclude(&mut self, start: u64, end: u64) {
        for i in 0..self.len {
            let region = self.regions[i];
            if start >= region.end || end <= region.start {
                continue;
            }
            self.regions[i].end = start.max(region.start);
            if end < region.end && self.len < MAX_REGIONS {
                self.regions[self.len] = Region { start: end.max(region.start), end: region.end };
                self.len += 1;
            }
        }
    }

    /// Sets pages below 4 GiB aside for the tables that [`Self::map`] will write: one per GiB that is not mapped yet.
    /// Without room for them, RAM above 4 GiB is left alone.
    fn reserve_tables(&mut self) {
        let highest = self.regions[..self.len].iter().map(|region| region.end).max().unwrap_or(0);
        let bytes = highest.saturating_sub(BOOT_MAPPED).div_ceil(GIB) * PAGE_SIZE;
        let low = |region: &Region| region.start.saturating_add(bytes) <= region.end.min(BOOT_MAPPED);
        match self.regions[..self.len].iter().position(low) {
            Some(i) => {
                self.tables = self.regions[i].start;
                self.regions[i].start += bytes;
            }
            None => self.exclude(BOOT_MAPPED, LAST_MAPPABLE),
        }
    }

    /// All RAM in the map, in bytes, whether it can be handed out or not.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Bytes that can still be handed out.
    pub fn free(&self) -> u64 {
        self.regions[..self.len].iter().map(|region| region.end - region.start).sum()
    }

    /// Up to `bytes` of RAM in one piece, mapped. `None` when nothing is left. Contents are whatever was there.
    pub fn take_piece(&mut self, bytes: u64) -> Option<Region> {
        let wanted = bytes.next_multiple_of(PAGE_SIZE);
        let region = self.regions[..self.len].iter_mut().find(|region| region.start < region.end)?;
        let piece = Region { start: region.start, end: region.end.min(region.start + wanted) };
        region.start = piece.end;
        self.map(piece);
        Some(piece)
    }

    /// Exactly `bytes` of RAM in one piece, mapped. `None` when there is no such piece.
    pub fn take(&mut self, bytes: u64) -> Option<Region> {
        let wanted = bytes.next_multiple_of(PAGE_SIZE);
        let region = self.regions[..self.len].iter_mut().find(|region| region.end - region.start >= wanted)?;
        let piece = Region { start: region.start, end: region.start + wanted };
        region.start = piece.end;
        self.map(piece);
        Some(piece)
    }

    /// Maps what the boot tables do not, by 2 MiB pages, a table per GiB.
    fn map(&mut self, piece: Region) {
        let mut gib = piece.start.max(BOOT_MAPPED) / GIB;
        while gib * GIB < piece.end {
            let slot = &raw mut BOOT_PDPT;
            // SAFETY: gib < 512, because no region ends above LAST_MAPPABLE; only this vCPU changes the table.
            if unsafe { (*slot)[gib as usize] } & 1 == 0 {
                let table = self.tables + (gib - BOOT_MAPPED / GIB) * PAGE_SIZE;
                for n in 0..512 {
                    // SAFETY: a page of the pool, below 4 GiB, used for nothing else.
                    unsafe { ((table + n * 8) as *mut u64).write_volatile((gib * GIB + (n << 21)) | 0xe7) };
                }
                // SAFETY: as above. From not present to present needs no TLB flush.
                unsafe { (&raw mut (*slot)[gib as usize]).write_volatile(table | 0x27) };
            }
            gib += 1;
        }
    }
}
