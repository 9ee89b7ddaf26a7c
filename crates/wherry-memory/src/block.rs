//! One block of guest RAM: a sealed memfd and its two maps.
#![expect(unsafe_code, reason = "maps memory, and hands out slices of guest RAM that others write concurrently")]

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress};

use crate::{GRANULE, GuestRegion, MemoryError, Written};

/// Number of a block, unique in its machine, the same on source and destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u16);

impl fmt::Display for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The page size a block is backed by: its *unit*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// 4 KiB pages of shared memory; transparent huge pages are off.
    Base,
    /// 2 MiB hugetlb pages.
    Huge2M,
}

impl PageSize {
    /// The size in bytes.
    pub fn bytes(self) -> u64 {
        match self {
            PageSize::Base => GRANULE,
            PageSize::Huge2M => 2 << 20,
        }
    }
}

/// The shape of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSpec {
    /// Its number.
    pub id: BlockId,
    /// Guest physical base address, a multiple of the page size.
    pub guest_base: u64,
    /// Size in bytes, a multiple of the page size.
    pub size: u64,
    /// What it is backed by.
    pub page_size: PageSize,
}

/// A contiguous piece of guest RAM: one memfd named `wherry-ram`, sealed against changes of size and mapped twice.
pub struct Block {
    spec: BlockSpec,
    file: Arc<File>,
    region: Arc<GuestRegion>,
    engine: EngineMap,
}

/// The engine's own mapping of a block.
struct EngineMap {
    base: *mut u8,
    len: usize,
}

// SAFETY: the pointer is to a shared mapping that lives as long as the value; all access through it is by raw pointer.
unsafe impl Send for EngineMap {}
// SAFETY: as above; there is no thread affinity and no interior Rust state.
unsafe impl Sync for EngineMap {}

impl Drop for EngineMap {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `Block::adopt`, unmapped once; no reference into it outlives the block.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.len) };
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Block").field("spec", &self.spec).field("fd", &self.file.as_raw_fd()).finish_non_exhaustive()
    }
}

impl Block {
    /// Makes the memfd, seals it and maps it. No page is allocated.
    pub fn create(spec: BlockSpec) -> Result<Self, MemoryError> {
        Self::check(&spec)?;
        let os = |what| move |e: rustix::io::Errno| MemoryError::Os { what, id: spec.id, source: e.into() };
        let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        if spec.page_size == PageSize::Huge2M {
            flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        }
        let fd = rustix::fs::memfd_create("wherry-ram", flags).map_err(os("creating the memfd"))?;
        rustix::fs::ftruncate(&fd, spec.size).map_err(os("setting the size of the memfd"))?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(os("sealing the memfd"))?;
        Self::adopt(spec, fd)
    }

    /// Maps a memfd that was made elsewhere by [`create`](Self::create): by an earlier VMM, or by the VMM this device
    /// process works for. It must have the right size and be sealed against changes of it.
    pub fn adopt(spec: BlockSpec, fd: OwnedFd) -> Result<Self, MemoryError> {
        Self::check(&spec)?;
        let os = |what| move |source: io::Error| MemoryError::Os { what, id: spec.id, source };
        let seals = rustix::fs::fcntl_get_seals(&fd).map_err(|e| os("reading the seals")(e.into()))?;
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err(MemoryError::Adopt {
                id: spec.id,
                reason: "it is not sealed against shrinking and growing".into(),
            });
        }
        let file = File::from(fd);
        let len = file.metadata().map_err(os("reading the size"))?.len();
        if len != spec.size {
            return Err(MemoryError::Adopt { id: spec.id, reason: format!("it has {len} bytes, not {}", spec.size) });
        }
        let file = Arc::new(file);
        let size = spec.size as usize;
        let mapping = MmapRegionBuilder::new_with_bitmap(size, Written::here(size))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::from_arc(file.clone(), 0))
            .with_hugetlbfs(spec.page_size == PageSize::Huge2M)
            .build()
            .map_err(|e| MemoryError::Regions(e.to_string()))?;
        let guest = mapping.as_ptr();
        let region = GuestRegion::new(mapping, GuestAddress(spec.guest_base))
            .ok_or_else(|| MemoryError::Regions(format!("block {} wraps around the address space", spec.id)))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice; nothing else is mapped over.
        let engine = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                size,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &file,
                0,
            )
        }
        .map_err(|e| os("mapping the engine map")(e.into()))?;
        let engine = EngineMap { base: engine.cast(), len: size };
        for map in [guest, engine.base] {
            for advice in [Advice::LinuxNoHugepage, Advice::LinuxDontFork] {
                // hugetlb answers EINVAL to the huge page advice, which does not concern it.
                if spec.page_size == PageSize::Huge2M && advice as i32 == Advice::LinuxNoHugepage as i32 {
                    continue;
                }
                // SAFETY: these two kinds of advice change no content and unmap nothing; the range is our own mapping.
                unsafe { rustix::mm::madvise(map.cast(), size, advice) }
                    .map_err(|e| os("advising the kernel")(e.into()))?;
            }
        }
        Ok(Self { spec, file, region: Arc::new(region), engine })
    }

    fn check(spec: &BlockSpec) -> Result<(), MemoryError> {
        let unit = spec.page_size.bytes();
        let whole = spec.size > 0 && spec.size.is_multiple_of(unit) && spec.guest_base.is_multiple_of(unit);
        if !whole || spec.guest_base.checked_add(spec.size).is_none() || usize::try_from(spec.size).is_err() {
            return Err(MemoryError::Misaligned { id: spec.id, base: spec.guest_base, size: spec.size, unit });
        }
        Ok(())
    }

    /// Its shape.
    pub fn spec(&self) -> &BlockSpec {
        &self.spec
    }

    /// How many granules it has.
    pub fn pages(&self) -> u64 {
        self.spec.size / GRANULE
    }

    /// The memfd.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The guest map as a `vm-memory` region.
    pub fn region(&self) -> &Arc<GuestRegion> {
        &self.region
    }

    /// Base of the guest map in this process: what a KVM memory slot and userfaultfd are given.
    pub fn guest_map(&self) -> *mut u8 {
        self.region.as_ptr()
    }

    /// Base of the engine map in this process. Only the engine uses it. Other threads, the guest and other processes
    /// may write the same bytes at any time, so references into it must not be made; use raw pointers and system calls.
    pub fn engine_map(&self) -> *mut u8 {
        self.engine.base
    }

    /// Address of `len` bytes at `offset` in the engine map, or an error if they are not inside the block.
    pub fn engine_range(&self, offset: u64, len: u64) -> Result<*mut u8, MemoryError> {
        let end = offset.checked_add(len).filter(|end| *end <= self.spec.size);
        match end {
            // SAFETY: offset is at most the size of the mapping.
            Some(_) => Ok(unsafe { self.engine.base.add(offset as usize) }),
            None => Err(MemoryError::OutOfBlock {
                id: self.spec.id,
                start: offset,
                end: offset.saturating_add(len),
                size: self.spec.size,
            }),
        }
    }

    /// What the VMM wrote through the guest map by way of `vm-memory`.
    pub(crate) fn written(&self) -> &Written {
        (**self.region).bitmap()
    }

    /// Reads bytes without allocating holes.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, offset)
    }

    /// Gives the pages of a byte range back: afterwards they are holes and read as zeros. The range is cut inwards to
    /// whole units.
    pub fn punch(&self, range: Range<u64>) -> Result<(), MemoryError> {
        let unit = self.spec.page_size.bytes();
        self.engine_range(range.start, range.end.saturating_sub(range.start))?;
        let start = range.start.next_multiple_of(unit);
        let end = range.end / unit * unit;
        if start >= end {
            return Ok(());
        }
        rustix::fs::fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, start, end - start)
            .map_err(|e| MemoryError::Os { what: "punching a hole", id: self.spec.id, source: e.into() })
    }

    /// The runs of allocated pages inside a byte range, in ascending order; what lies between is holes, which read as
    /// zeros. A page that is written while the iterator runs may or may not be listed: have a dirty source running.
    pub fn data_runs(&self, range: Range<u64>) -> DataRuns<'_> {
        DataRuns { block: self, next: range.start, end: range.end.min(self.spec.size) }
    }

    /// The next allocated run at or after `from`, for shared memory.
    fn next_data(&self, from: u64, end: u64) -> io::Result<Option<Range<u64>>> {
        use rustix::fs::SeekFrom;
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(from)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        if start >= end {
            return Ok(None);
        }
        let stop = rustix::fs::seek(&self.file, SeekFrom::Hole(start))?;
        Ok(Some(start..stop.min(end)))
    }

    /// The next allocated run at or after `from`, for hugetlb, where `SEEK_DATA` reports holes as data: what either of
    /// our two maps has present. Pages are present in the map through which they were first touched.
    fn next_huge_data(&self, from: u64, end: u64) -> io::Result<Option<Range<u64>>> {
        let pagemap = File::open("/proc/self/pagemap")?;
        let unit = self.spec.page_size.bytes();
        let present = |offset: u64| -> io::Result<bool> {
            for map in [self.guest_map(), self.engine.base] {
                let mut entry = [0; 8];
                pagemap.read_exact_at(&mut entry, (map as u64 + offset) / GRANULE * 8)?;
                if u64::from_le_bytes(entry) >> 63 == 1 {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        let mut start = from / unit * unit;
        while start < end && !present(start)? {
            start += unit;
        }
        if start >= end {
            return Ok(None);
        }
        let mut stop = start + unit;
        while stop < end && present(stop)? {
            stop += unit;
        }
        Ok(Some(start.max(from)..stop.min(end)))
    }
}

/// Iterator over allocated byte ranges; see [`Block::data_runs`].
#[derive(Debug)]
pub struct DataRuns<'a> {
    block: &'a Block,
    next: u64,
    end: u64,
}

impl Iterator for DataRuns<'_> {
    type Item = io::Result<Range<u64>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.end {
            return None;
        }
        let run = match self.block.spec.page_size {
            PageSize::Base => self.block.next_data(self.next, self.end),
            PageSize::Huge2M => self.block.next_huge_data(self.next, self.end),
        };
        match run {
            Ok(Some(run)) => {
                self.next = run.end;
                Some(Ok(run))
            }
            Ok(None) => {
                self.next = self.end;
                None
            }
            Err(e) => {
                self.next = self.end;
                Some(Err(e))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: BlockSpec = BlockSpec { id: BlockId(3), guest_base: 0, size: 1 << 20, page_size: PageSize::Base };

    fn runs(block: &Block) -> Vec<Range<u64>> {
        block.data_runs(0..u64::MAX).collect::<Result<_, _>>().unwrap()
    }

    #[test]
    fn both_maps_show_the_same_bytes_and_holes_stay_holes() {
        let block = Block::create(SPEC).unwrap();
        assert!(runs(&block).is_empty());
        // SAFETY: inside the mapping, and nobody else knows of it.
        unsafe {
            block.guest_map().add(8192).write_volatile(7);
            assert_eq!(block.engine_map().add(8192).read_volatile(), 7);
            block.engine_map().add(5 * 4096).write_volatile(1);
        }
        assert_eq!(runs(&block), [8192..12288, 20480..24576]);
        let mut buffer = [1; 4096];
        block.read_at(0, &mut buffer).unwrap();
        assert_eq!(buffer, [0; 4096]);
        assert_eq!(runs(&block).len(), 2, "reading a hole allocated it");
    }

    #[test]
    fn punching_leaves_a_hole_in_both_maps() {
        let block = Block::create(SPEC).unwrap();
        // SAFETY: inside the mapping, and nobody else knows of it.
        unsafe { block.guest_map().write_bytes(0xaa, 1 << 20) };
        block.punch(4095..12288).unwrap();
        assert_eq!(runs(&block), [0..4096, 12288..1 << 20]);
        // SAFETY: as above.
        assert_eq!(unsafe { block.engine_map().add(4096).read_volatile() }, 0);
        assert!(block.punch(0..(1 << 20) + 1).is_err());
    }

    #[test]
    fn the_memfd_can_be_neither_shrunk_nor_grown_nor_unsealed() {
        let block = Block::create(SPEC).unwrap();
        assert!(block.file.set_len(4096).is_err());
        assert!(block.file.set_len(2 << 20).is_err());
        assert!(rustix::fs::fcntl_add_seals(block.fd(), SealFlags::WRITE).is_err());
        let name = std::fs::read_link(format!("/proc/self/fd/{}", block.fd().as_raw_fd())).unwrap();
        assert!(name.to_string_lossy().contains("wherry-ram"), "{name:?}");
    }

    #[test]
    fn a_descriptor_of_the_wrong_size_or_without_seals_is_not_adopted() {
        let fd = rustix::fs::memfd_create("x", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&fd, SPEC.size).unwrap();
        assert!(matches!(Block::adopt(SPEC, fd.try_clone().unwrap()), Err(MemoryError::Adopt { .. })));
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW).unwrap();
        let larger = BlockSpec { size: 2 << 20, ..SPEC };
        assert!(matches!(Block::adopt(larger, fd.try_clone().unwrap()), Err(MemoryError::Adopt { .. })));
        Block::adopt(SPEC, fd).unwrap();
    }

    #[test]
    fn misaligned_and_empty_blocks_are_refused() {
        for (guest_base, size) in [(0, 0), (0, 4095), (1, 4096), (u64::MAX - 4095, 4096)] {
            let spec = BlockSpec { guest_base, size, ..SPEC };
            assert!(matches!(Block::create(spec), Err(MemoryError::Misaligned { .. })), "{spec:?}");
        }
    }

    #[test]
    fn a_forked_child_does_not_inherit_the_maps() {
        let block = Block::create(SPEC).unwrap();
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        for map in [block.guest_map(), block.engine_map()] {
            let at = maps.find(&format!("{:08x}-", map as usize)).unwrap();
            let flags = maps[at..].lines().find(|l| l.starts_with("VmFlags:")).unwrap();
            assert!(flags.contains(" dc") && flags.contains(" nh"), "{flags}");
        }
    }

    /// Lets the kernel hand out hugetlb pages on demand for the length of a test.
    struct HugePages(String);

    impl HugePages {
        const FILE: &str = "/proc/sys/vm/nr_overcommit_hugepages";

        fn permit() -> Option<Self> {
            let before = std::fs::read_to_string(Self::FILE).ok()?;
            std::fs::write(Self::FILE, "64").ok()?;
            Some(Self(before))
        }
    }

    impl Drop for HugePages {
        fn drop(&mut self) {
            let _ = std::fs::write(Self::FILE, &self.0);
        }
    }

    #[test]
    fn holes_of_hugetlb_blocks_are_known_although_the_kernel_calls_them_data() {
        const UNIT: u64 = 2 << 20;
        let Some(_permit) = HugePages::permit() else {
            println!("SKIPPED: {} cannot be written, so there are no huge pages to test with", HugePages::FILE);
            return;
        };
        let spec = BlockSpec { size: 8 * UNIT, page_size: PageSize::Huge2M, ..SPEC };
        let block = match Block::create(spec) {
            Ok(block) => block,
            Err(error) => {
                println!("SKIPPED: no huge pages on this machine: {error}");
                return;
            }
        };
        assert!(runs(&block).is_empty());
        // SAFETY: inside the mapping, and nobody else knows of it.
        unsafe {
            block.guest_map().add(UNIT as usize).write_volatile(1);
            block.engine_map().add(2 * UNIT as usize + 5).write_volatile(1);
            block.guest_map().add(5 * UNIT as usize).write_volatile(1);
        }
        assert_eq!(runs(&block), [UNIT..3 * UNIT, 5 * UNIT..6 * UNIT]);
        block.punch(2 * UNIT - 4096..4 * UNIT).unwrap();
        assert_eq!(runs(&block), [UNIT..2 * UNIT, 5 * UNIT..6 * UNIT]);
    }
}
