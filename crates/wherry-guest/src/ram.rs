//! The RAM that the guest uses: what a memory map leaves, handed out piece by piece.
//!
//! This file is compiled into the guest and into the host side, where it is tested. It needs only `core`.
//!
//! RAM below [`FIRST_FREE`] is never handed out: firmware tables, the report pages and the kernel image are there.

use crate::report::PAGE_SIZE;

/// Start of the RAM that is handed out: 16 MiB.
pub const FIRST_FREE: u64 = 16 << 20;
/// End of what can be mapped: the first entry of the top-level page table.
pub const LAST_MAPPABLE: u64 = 512 << 30;
/// Most separate pieces of RAM that are used.
pub const MAX_REGIONS: usize = 16;

/// What one page table of 2 MiB pages maps.
pub const GIB: u64 = 1 << 30;
/// The boot tables map everything below.
pub const BOOT_MAPPED: u64 = 4 * GIB;

/// One entry of the memory map.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryMapEntry {
    /// First address.
    pub start: u64,
    /// Size in bytes.
    pub size: u64,
    /// E820 type; 1 is RAM.
    pub kind: u32,
    /// 0.
    pub reserved: u32,
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
pub struct Ram {
    regions: [Region; MAX_REGIONS],
    len: usize,
    total: u64,
    /// First page of the pool of page tables.
    tables: u64,
}

impl Ram {
    /// Takes the RAM of a memory map: type 1, above [`FIRST_FREE`], without what other entries claim.
    pub fn new(map: &[MemoryMapEntry]) -> Self {
        let mut ram = Self { regions: [Region { start: 0, end: 0 }; MAX_REGIONS], len: 0, total: 0, tables: 0 };
        for entry in map.iter().filter(|entry| entry.kind == 1) {
            ram.total = ram.total.saturating_add(entry.size);
            let start = entry.start.max(FIRST_FREE).next_multiple_of(PAGE_SIZE);
            let end = entry.start.saturating_add(entry.size).min(LAST_MAPPABLE) / PAGE_SIZE * PAGE_SIZE;
            if start < end && ram.len < MAX_REGIONS {
                ram.regions[ram.len] = Region { start, end };
                ram.len += 1;
            }
        }
        for entry in map.iter().filter(|entry| entry.kind != 1 && entry.size != 0) {
            let start = entry.start / PAGE_SIZE * PAGE_SIZE;
            let end = entry.start.saturating_add(entry.size).min(LAST_MAPPABLE).next_multiple_of(PAGE_SIZE);
            ram.exclude(start, end);
        }
        ram.regions[..ram.len].sort_unstable_by_key(|region| region.start);
        ram.part_overlaps();
        ram.reserve_tables();
        ram
    }

    /// Hands out nothing below `address` any more.
    pub fn skip_to(&mut self, address: u64) {
        let address = address.min(LAST_MAPPABLE).next_multiple_of(PAGE_SIZE);
        for region in &mut self.regions[..self.len] {
            region.start = region.start.max(address.min(region.end));
        }
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

    /// Entries of a map may overlap: each byte belongs to the first region that has it.
    fn part_overlaps(&mut self) {
        let mut taken = 0;
        for region in &mut self.regions[..self.len] {
            region.start = region.start.max(taken).min(region.end);
            taken = taken.max(region.end);
        }
    }

    /// Sets pages below 4 GiB aside for page tables: one per GiB that is not mapped by the boot tables.
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

    /// Address of the page table for GiB number `gib`, which must be at least 4 and hold RAM that was handed out.
    pub fn table_page(&self, gib: u64) -> u64 {
        self.tables + (gib - BOOT_MAPPED / GIB) * PAGE_SIZE
    }

    /// All RAM in the map, in bytes, whether it can be handed out or not.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Bytes that can still be handed out.
    pub fn free(&self) -> u64 {
        self.regions[..self.len].iter().map(|region| region.end - region.start).sum()
    }

    /// Up to `bytes` of RAM in one piece. `None` when nothing is left. Contents are whatever was there.
    pub fn take_piece(&mut self, bytes: u64) -> Option<Region> {
        let wanted = bytes.next_multiple_of(PAGE_SIZE);
        let region = self.regions[..self.len].iter_mut().find(|region| region.start < region.end)?;
        let piece = Region { start: region.start, end: region.end.min(region.start + wanted) };
        region.start = piece.end;
        Some(piece)
    }

    /// Exactly `bytes` of RAM in one piece. `None` when there is no such piece.
    pub fn take(&mut self, bytes: u64) -> Option<Region> {
        let wanted = bytes.next_multiple_of(PAGE_SIZE);
        let region = self.regions[..self.len].iter_mut().find(|region| region.end - region.start >= wanted)?;
        let piece = Region { start: region.start, end: region.start + wanted };
        region.start = piece.end;
        Some(piece)
    }
}
