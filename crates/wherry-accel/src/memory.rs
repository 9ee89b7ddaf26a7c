//! The address space of a context: bytes by address, checked, and logged when written.
//!
//! [`AddressSpace`] is what a device gives the engines; [`Arena`] is one in the memory of this process. Its bytes are
//! shared with a client that may change them at any moment, so nothing here ever makes a reference to them: they are
//! copied, or reached by atomic operations.
//!
//! Contract: a write is in the dirty log when the call returns. Payload is therefore logged before the status byte of
//! its completion is published, and a page that is read and cleared between a write and its mark is marked again.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vm_memory::{Bytes, MmapRegion, VolatileMemory, VolatileSlice};

/// Bytes of a page of the dirty log.
pub const PAGE: u64 = 4096;

/// Memory that is not there, or may not be used so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot {access} {bytes} bytes at {at:#x}: not mapped so")]
pub struct Fault {
    /// First address of the access.
    pub at: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// What was tried.
    pub access: Access,
}

/// What is done with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read.
    Read,
    /// Write.
    Write,
}

impl std::fmt::Display for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Access::Read => "read",
            Access::Write => "write",
        })
    }
}

/// Width of an atomic access; the address is a multiple of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// Four bytes.
    Four,
    /// Eight bytes.
    Eight,
}

impl Width {
    /// In bytes.
    pub fn bytes(self) -> u64 {
        match self {
            Width::Four => 4,
            Width::Eight => 8,
        }
    }
}

/// An atomic operation (RFC 9669, section 5.3). The old value is the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Atomic {
    /// Nothing but a load.
    Load,
    /// Add.
    Add(u64),
    /// Bitwise or.
    Or(u64),
    /// Bitwise and.
    And(u64),
    /// Bitwise exclusive or.
    Xor(u64),
    /// Exchange.
    Exchange(u64),
    /// Store `new` if the value is `expected`.
    CompareExchange {
        /// The value that must be there.
        expected: u64,
        /// The value to store then.
        new: u64,
    },
}

/// Memory by address. Every access is checked as a whole before a byte moves.
pub trait AddressSpace: Send + Sync {
    /// Copies bytes out.
    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Fault>;

    /// Copies bytes in, and logs it.
    fn write(&self, at: u64, from: &[u8]) -> Result<(), Fault>;

    /// Copies within the space as if through a buffer (the ranges may overlap), and logs it. `bytes` is at most
    /// [`MAX_MOVE`].
    fn copy(&self, from: u64, to: u64, bytes: u64) -> Result<(), Fault>;

    /// One atomic operation, sequentially consistent; logged unless it is a load.
    fn atomic(&self, at: u64, width: Width, operation: Atomic) -> Result<u64, Fault>;

    /// Stores one byte with release order, and logs it: whoever reads it with acquire order sees all writes before.
    fn publish(&self, at: u64, value: u8) -> Result<(), Fault>;

    /// Whether a whole range can be accessed so.
    fn check(&self, at: u64, bytes: u64, access: Access) -> Result<(), Fault>;
}

/// The most that one [`AddressSpace::copy`] moves, in bytes.
pub const MAX_MOVE: u64 = 1 << 20;

/// Reads an integer, little-endian.
pub(crate) fn read_u16(space: &dyn AddressSpace, at: u64) -> Result<u16, Fault> {
    let mut bytes = [0; 2];
    space.read(at, &mut bytes)?;
    Ok(u16::from_le_bytes(bytes))
}

/// Reads an integer, little-endian.
pub(crate) fn read_u32(space: &dyn AddressSpace, at: u64) -> Result<u32, Fault> {
    let mut bytes = [0; 4];
    space.read(at, &mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

/// Reads an integer, little-endian.
pub(crate) fn read_u64(space: &dyn AddressSpace, at: u64) -> Result<u64, Fault> {
    let mut bytes = [0; 8];
    space.read(at, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// The address `offset` bytes after `at`, or a fault where addresses end.
pub(crate) fn offset(at: u64, offset: u64) -> Result<u64, Fault> {
    at.checked_add(offset).ok_or(Fault { at, bytes: offset, access: Access::Read })
}

struct Region {
    base: u64,
    memory: MmapRegion,
    writable: bool,
    /// One bit a page.
    dirty: Vec<AtomicU64>,
}

/// An address space in the memory of this process, with holes where nothing is mapped.
pub struct Arena {
    regions: Vec<Region>,
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.regions.iter().map(|r| (r.base, r.memory.size(), r.writable))).finish()
    }
}

/// An arena cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// A region is empty, not made of pages, at the end of all addresses, or over another one.
    #[error("a region of {bytes} bytes at {base:#x} is empty, not made of pages, too high, or over another one")]
    Region {
        /// Its address.
        base: u64,
        /// Its length.
        bytes: u64,
    },
    /// No memory.
    #[error("mapping {bytes} bytes of memory")]
    Map {
        /// How much was asked for.
        bytes: u64,
        /// Why not.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
}

impl Arena {
    /// An arena of zeroed regions, each (address, bytes), both multiples of [`PAGE`].
    pub fn new(regions: &[(u64, u64)]) -> Result<Self, ArenaError> {
        let mut arena = Self { regions: Vec::new() };
        for &(base, bytes) in regions {
            arena.map(base, bytes, true)?;
        }
        Ok(arena)
    }

    /// Adds a zeroed region.
    pub fn map(&mut self, base: u64, bytes: u64, writable: bool) -> Result<(), ArenaError> {
        let wrong = || ArenaError::Region { base, bytes };
        let end = base.checked_add(bytes).ok_or_else(wrong)?;
        let over = self.regions.iter().any(|r| base < r.base + r.memory.size() as u64 && r.base < end);
        if bytes == 0 || !bytes.is_multiple_of(PAGE) || !base.is_multiple_of(PAGE) || over {
            return Err(wrong());
        }
        let size = usize::try_from(bytes).map_err(|_| wrong())?;
        let memory = MmapRegion::new(size).map_err(|source| ArenaError::Map { bytes, source })?;
        let dirty = (0..(bytes / PAGE).div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        self.regions.push(Region { base, memory, writable, dirty });
        self.regions.sort_by_key(|r| r.base);
        Ok(())
    }

    /// Whether writes to the region at `base` are allowed. False if there is none.
    pub fn set_writable(&mut self, base: u64, writable: bool) -> bool {
        let region = self.regions.iter_mut().find(|r| r.base == base);
        region.map(|r| r.writable = writable).is_some()
    }

    /// Takes the pages written since the last call, by page number.
    pub fn take_dirty(&self) -> BTreeSet<u64> {
        let mut pages = BTreeSet::new();
        for region in &self.regions {
            for (index, word) in region.dirty.iter().enumerate() {
                let bits = word.swap(0, Ordering::AcqRel);
                let first = region.base / PAGE + index as u64 * 64;
                pages.extend((0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| first + bit));
            }
        }
        pages
    }

    fn region(&self, at: u64) -> Option<&Region> {
        self.regions.get(self.regions.partition_point(|r| r.base <= at).checked_sub(1)?)
    }

    fn slice(&self, at: u64, bytes: u64, access: Access) -> Result<VolatileSlice<'_>, Fault> {
        let fault = Fault { at, bytes, access };
        let region = self.region(at).ok_or(fault)?;
        if access == Access::Write && !region.writable {
            return Err(fault);
        }
        let offset = usize::try_from(at - region.base).map_err(|_| fault)?;
        let bytes = usize::try_from(bytes).map_err(|_| fault)?;
        region.memory.get_slice(offset, bytes).map_err(|_| fault)
    }

    /// The pieces of a range, which may span regions that touch. Most lie in one, and are looked for there first.
    fn pieces(&self, at: u64, bytes: u64, access: Access) -> Result<Vec<VolatileSlice<'_>>, Fault> {
        let fault = Fault { at, bytes, access };
        let end = at.checked_add(bytes).ok_or(fault)?;
        let mut pieces = Vec::new();
        let mut here = at;
        while here < end {
            let region = self.region(here).ok_or(fault)?;
            let stop = end.min(region.base + region.memory.size() as u64);
            if stop <= here {
                return Err(fault);
            }
            pieces.push(self.slice(here, stop - here, access).map_err(|_| fault)?);
            here = stop;
        }
        Ok(pieces)
    }

    fn mark(&self, at: u64, bytes: u64) {
        // Nothing was written, and `at` may be anywhere: ranges of no bytes need no memory.
        if bytes == 0 {
            return;
        }
        let (mut page, end) = (at / PAGE, (at + bytes).div_ceil(PAGE));
        while page < end {
            let Some(region) = self.region(page * PAGE) else {
                page += 1;
                continue;
            };
            let (first, pages) = (region.base / PAGE, region.memory.size() as u64 / PAGE);
            // As many as one word of the log has, in one atomic operation.
            let index = page - first;
            let count = (end - page).min(pages - index).min(64 - index % 64);
            let bits = (u64::MAX >> (64 - count)) << (index % 64);
            region.dirty[(index / 64) as usize].fetch_or(bits, Ordering::AcqRel);
            page += count;
        }
    }
}

impl AddressSpace for Arena {
    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Fault> {
        if let Ok(whole) = self.slice(at, to.len() as u64, Access::Read) {
            whole.copy_to(to);
            return Ok(());
        }
        let mut rest = to;
        for piece in self.pieces(at, rest.len() as u64, Access::Read)? {
            let (now, later) = rest.split_at_mut(piece.len());
            piece.copy_to(now);
            rest = later;
        }
        Ok(())
    }

    fn write(&self, at: u64, from: &[u8]) -> Result<(), Fault> {
        if let Ok(whole) = self.slice(at, from.len() as u64, Access::Write) {
            whole.copy_from(from);
            self.mark(at, from.len() as u64);
            return Ok(());
        }
        let mut rest = from;
        for piece in self.pieces(at, from.len() as u64, Access::Write)? {
            let (now, later) = rest.split_at(piece.len());
            piece.copy_from(now);
            rest = later;
        }
        self.mark(at, from.len() as u64);
        Ok(())
    }

    fn copy(&self, from: u64, to: u64, bytes: u64) -> Result<(), Fault> {
        let fault = |access| Fault { at: if access == Access::Read { from } else { to }, bytes, access };
        if bytes > MAX_MOVE {
            return Err(fault(Access::Read));
        }
        if from.abs_diff(to) >= bytes
            && let Ok(source) = self.slice(from, bytes, Access::Read)
            && let Ok(target) = self.slice(to, bytes, Access::Write)
        {
            source.copy_to_volatile_slice(target);
            self.mark(to, bytes);
            return Ok(());
        }
        // All of it is checked before a byte moves.
        self.check(from, bytes, Access::Read)?;
        self.check(to, bytes, Access::Write)?;
        let mut buffer = vec![0; usize::try_from(bytes).map_err(|_| fault(Access::Read))?];
        self.read(from, &mut buffer)?;
        self.write(to, &buffer)
    }

    fn atomic(&self, at: u64, width: Width, operation: Atomic) -> Result<u64, Fault> {
        let access = if operation == Atomic::Load { Access::Read } else { Access::Write };
        let fault = Fault { at, bytes: width.bytes(), access };
        let slice = self.slice(at, width.bytes(), access)?;
        const ORDER: Ordering = Ordering::SeqCst;
        macro_rules! run {
            ($atomic:ty, $int:ty) => {{
                let cell = slice.get_atomic_ref::<$atomic>(0).map_err(|_| fault)?;
                u64::from(match operation {
                    Atomic::Load => cell.load(ORDER),
                    Atomic::Add(v) => cell.fetch_add(v as $int, ORDER),
                    Atomic::Or(v) => cell.fetch_or(v as $int, ORDER),
                    Atomic::And(v) => cell.fetch_and(v as $int, ORDER),
                    Atomic::Xor(v) => cell.fetch_xor(v as $int, ORDER),
                    Atomic::Exchange(v) => cell.swap(v as $int, ORDER),
                    Atomic::CompareExchange { expected, new } => {
                        let (Ok(old) | Err(old)) = cell.compare_exchange(expected as $int, new as $int, ORDER, ORDER);
                        old
                    }
                })
            }};
        }
        let old = match width {
            Width::Four => run!(AtomicU32, u32),
            Width::Eight => run!(AtomicU64, u64),
        };
        if access == Access::Write {
            self.mark(at, width.bytes());
        }
        Ok(old)
    }

    fn publish(&self, at: u64, value: u8) -> Result<(), Fault> {
        let fault = Fault { at, bytes: 1, access: Access::Write };
        self.slice(at, 1, Access::Write)?.store(value, 0, Ordering::Release).map_err(|_| fault)?;
        self.mark(at, 1);
        Ok(())
    }

    fn check(&self, at: u64, bytes: u64, access: Access) -> Result<(), Fault> {
        match self.slice(at, bytes, access) {
            Ok(_) => Ok(()),
            Err(_) => self.pieces(at, bytes, access).map(|_| ()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arena() -> Arena {
        let mut arena = Arena::new(&[(0x1000, 0x1000), (0x2000, 0x1000), (0x8000, 0x1000)]).unwrap();
        arena.map(0xa000, 0x1000, false).unwrap();
        arena
    }

    #[test]
    fn ranges_may_span_regions_that_touch_but_no_hole() {
        let arena = arena();
        arena.write(0x1ffe, &[1, 2, 3, 4]).unwrap();
        let mut back = [0; 4];
        arena.read(0x1ffe, &mut back).unwrap();
        assert_eq!(back, [1, 2, 3, 4]);
        assert_eq!(arena.take_dirty(), BTreeSet::from([1, 2]));
        let fault = arena.write(0x2ffe, &[9; 4]).unwrap_err();
        assert_eq!(fault, Fault { at: 0x2ffe, bytes: 4, access: Access::Write });
        arena.read(0x2ffe, &mut back[..2]).unwrap();
        assert_eq!(back[..2], [0, 0], "nothing moves when a part is missing");
        assert!(arena.take_dirty().is_empty());
        assert!(arena.read(u64::MAX, &mut back).is_err() && arena.read(1, &mut back).is_err());
    }

    #[test]
    fn a_write_of_no_bytes_marks_nothing_wherever_it_is() {
        let arena = arena();
        for at in [0, 1, 0x1001, 0x7001, 0xb001, u64::MAX] {
            arena.write(at, &[]).unwrap();
            arena.copy(0x1000, at, 0).unwrap();
        }
        assert!(arena.take_dirty().is_empty());
    }

    #[test]
    fn every_page_that_is_written_is_in_the_log_and_no_other() {
        // Two regions that touch, over several words of the log, and one behind a hole.
        let arena = Arena::new(&[(0x1000, 70 * PAGE), (0x1000 + 70 * PAGE, 130 * PAGE), (0x100_0000, PAGE)]).unwrap();
        for (first, pages) in
            [(0u64, 1u64), (0, 64), (0, 65), (63, 2), (5, 59), (64, 6), (69, 2), (0, 200), (134, 64), (199, 1)]
        {
            for (before, cut) in [(0, 0), (1, 1), (PAGE - 1, PAGE - 1)] {
                if pages * PAGE <= cut + before {
                    continue;
                }
                let bytes = pages * PAGE - cut - before;
                let at = 0x1000 + first * PAGE + before;
                arena.write(at, &vec![1; bytes as usize]).unwrap();
                let expected: BTreeSet<u64> = (at / PAGE..(at + bytes).div_ceil(PAGE)).collect();
                assert_eq!(arena.take_dirty(), expected, "{bytes} bytes at {at:#x}");
            }
        }
    }

    #[test]
    fn read_only_memory_is_read_and_not_written() {
        let arena = arena();
        arena.read(0xa000, &mut [0; 8]).unwrap();
        assert!(arena.write(0xa000, &[1]).is_err() && arena.publish(0xa000, 1).is_err());
        assert!(arena.atomic(0xa000, Width::Eight, Atomic::Add(1)).is_err());
        assert_eq!(arena.atomic(0xa000, Width::Eight, Atomic::Load), Ok(0));
    }

    #[test]
    fn copies_may_overlap_and_atomics_are_aligned() {
        let arena = arena();
        let bytes: Vec<u8> = (0..100).collect();
        arena.write(0x1000, &bytes).unwrap();
        arena.copy(0x1000, 0x100a, 100).unwrap();
        let mut back = [0; 100];
        arena.read(0x100a, &mut back).unwrap();
        assert_eq!(back[..], bytes[..]);
        assert!(arena.atomic(0x8001, Width::Four, Atomic::Load).is_err(), "an odd address");
        assert_eq!(arena.atomic(0x8008, Width::Four, Atomic::Add(u64::MAX)), Ok(0));
        assert_eq!(arena.atomic(0x8008, Width::Eight, Atomic::Load), Ok(0xffff_ffff));
        let exchange = Atomic::CompareExchange { expected: 0xffff_ffff, new: 7 };
        assert_eq!(arena.atomic(0x8008, Width::Eight, exchange), Ok(0xffff_ffff));
        assert_eq!(arena.atomic(0x8008, Width::Eight, exchange), Ok(7));
    }

    #[test]
    fn regions_that_overlap_or_are_not_pages_are_refused() {
        for (base, bytes) in [(0x1000, 0), (0x1001, 0x1000), (0x2000, 0x2000), (u64::MAX - 0xfff, 0x1000), (0x5000, 3)]
        {
            assert!(arena().map(base, bytes, true).is_err(), "{base:#x} {bytes:#x}");
        }
    }
}
