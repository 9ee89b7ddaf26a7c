//! Guest memory as a front end shows it: regions, each a part of a file.
#![expect(unsafe_code, reason = "maps what a front end shows, advises the kernel about it, and unlocks it")]

use std::ffi::c_void;
use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryRegion};
use wherry_memory::{GRANULE, GuestMemory, GuestRegion, WriteLog, Written};

use crate::log::DirtyLog;

/// Regions of one table, whose descriptors come with one message.
pub(crate) const MOST_IN_TABLE: usize = 8;
/// Regions that come one by one.
pub(crate) const MOST_SLOTS: usize = 509;

/// A region as it is described.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Described {
    /// Guest address.
    pub(crate) guest: u64,
    /// Bytes.
    pub(crate) size: u64,
    /// Where the front end has mapped it: rings are named by these addresses.
    pub(crate) user: u64,
    /// Where it begins in its file.
    pub(crate) offset: u64,
}

impl Described {
    pub(crate) fn of(words: [u64; 4]) -> Self {
        let [guest, size, user, offset] = words;
        Self { guest, size, user, offset }
    }

    fn check(&self) -> Result<(), String> {
        let Self { guest, size, user, offset } = *self;
        let whole = [guest, size, offset].iter().all(|number| number.is_multiple_of(GRANULE)) && size > 0;
        let ends = [guest, user, offset].iter().all(|start| start.checked_add(size).is_some());
        match whole && ends && usize::try_from(size).is_ok() {
            true => Ok(()),
            false => {
                Err(format!("a region of {size:#x} bytes at {guest:#x}, {user:#x} there, {offset:#x} in its file"))
            }
        }
    }
}

/// Where a region is to be mapped, and whether it may be touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Anywhere.
    Anywhere,
    /// Anywhere, locked: who touches it dies, until [`Region::unlock`].
    Locked,
    /// Locked, and at the front end's own address, if that is free here.
    ///
    /// QEMU (10.0.2, and what is known of later ones) notes a page that a back end misses by the back end's address, and strikes
    /// it off by its own. With a connection of its own for such pages (`postcopy-preempt`) it waits at the end until all are
    /// struck off, for ever: unless the addresses are the same.
    LockedAsTheirs,
}

/// A mapping. It goes with the last who may touch it: the log of what is written through it, which the region's map has.
#[derive(Debug)]
struct Mapping {
    base: *mut c_void,
    bytes: usize,
    log: Arc<DirtyLog>,
}

// SAFETY: the address is not used but to unmap it, once, when nobody has the value any more.
unsafe impl Send for Mapping {}
// SAFETY: as above; what is shared is the log.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps part of a file: all of it has to be there.
    fn new(
        file: &File,
        bytes: usize,
        described: &Described,
        place: Place,
        log: Arc<DirtyLog>,
    ) -> rustix::io::Result<Self> {
        let protection = match place {
            Place::Anywhere => ProtFlags::READ | ProtFlags::WRITE,
            Place::Locked | Place::LockedAsTheirs => ProtFlags::empty(),
        };
        let hint = if place == Place::LockedAsTheirs { described.user } else { 0 };
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        let hint = std::ptr::without_provenance_mut(hint as usize);
        // SAFETY: not MAP_FIXED: the kernel takes the address for a wish, and replaces no mapping that is there.
        let base = unsafe { rustix::mm::mmap(hint, bytes, protection, flags, file, described.offset)? };
        Ok(Self { base, bytes, log })
    }
}

impl WriteLog for Mapping {
    fn wrote(&self, granules: Range<u64>) {
        self.log.wrote(granules);
    }

    fn is_marked(&self, granule: u64) -> bool {
        self.log.is_marked(granule)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping made above, whole. The map that is used of it has this value and is gone.
        let _ = unsafe { rustix::mm::munmap(self.base, self.bytes) };
    }
}

/// A region that is mapped.
pub(crate) struct Region {
    pub(crate) described: Described,
    map: Arc<GuestRegion>,
}

impl Region {
    fn map(described: Described, fd: OwnedFd, log: &Arc<DirtyLog>, place: Place) -> Result<Self, String> {
        described.check()?;
        let Described { guest, size, offset, .. } = described;
        if !log.covers(guest + size) {
            return Err(format!("the dirty log ends before the region of {size:#x} bytes at {guest:#x}"));
        }
        let file = File::from(fd);
        let bytes = whole("a region", &file, size, offset)?;
        let cannot = |e: String| format!("mapping the region of {size:#x} bytes at {guest:#x}: {e}");
        let mapping = Mapping::new(&file, bytes, &described, place, log.clone()).map_err(|e| cannot(e.to_string()))?;
        let base = mapping.base;
        let written = Written::There { first: guest / GRANULE, log: Arc::new(mapping) };
        let map = MmapRegionBuilder::new_with_bitmap(bytes, written).with_file_offset(FileOffset::new(file, offset));
        // SAFETY: the mapping made above, whole; it is not unmapped before the log that the map has is dropped with it.
        let map = unsafe { map.with_raw_mmap_pointer(base.cast()) }.build().map_err(|e| cannot(e.to_string()))?;
        for advice in [Advice::LinuxNoHugepage, Advice::LinuxDontFork] {
            // SAFETY: these kinds of advice change no content and unmap nothing; the range is the mapping made above.
            // They are refused for what they do not concern, such as hugetlb.
            let _ = unsafe { rustix::mm::madvise(base, bytes, advice) };
        }
        let map = GuestRegion::new(map, GuestAddress(guest));
        let map = map.ok_or_else(|| format!("the region of {size:#x} bytes at {guest:#x} wraps around"))?;
        Ok(Self { described, map: Arc::new(map) })
    }

    /// Where it is mapped here.
    pub(crate) fn base(&self) -> u64 {
        self.map.as_ptr() as u64
    }

    /// The file that it is a part of.
    pub(crate) fn file(&self) -> Option<&File> {
        self.map.file_offset().map(FileOffset::file)
    }

    /// From now on it may be touched.
    pub(crate) fn unlock(&self) -> Result<(), String> {
        let flags = MprotectFlags::READ | MprotectFlags::WRITE;
        // SAFETY: the whole of our own mapping, which is used through `vm-memory` only.
        let unlocked = unsafe { rustix::mm::mprotect(self.map.as_ptr().cast(), self.described.size as usize, flags) };
        unlocked.map_err(|e| format!("unlocking the region at {:#x}: {e}", self.described.guest))
    }
}

/// All regions of a front end.
#[derive(Default)]
pub(crate) struct Regions {
    regions: Vec<Region>,
}

impl Regions {
    /// Maps a whole table: its descriptors are those that came with it.
    pub(crate) fn table(
        described: Vec<Described>,
        fds: Vec<OwnedFd>,
        log: &Arc<DirtyLog>,
        place: Place,
    ) -> Result<Self, String> {
        if described.len() != fds.len() {
            return Err(format!("{} regions with {} descriptors", described.len(), fds.len()));
        }
        let mut all = Self::default();
        for (described, fd) in described.into_iter().zip(fds) {
            all.add(described, fd, log, place)?;
        }
        Ok(all)
    }

    /// Maps one more.
    pub(crate) fn add(
        &mut self,
        described: Described,
        fd: OwnedFd,
        log: &Arc<DirtyLog>,
        place: Place,
    ) -> Result<&Region, String> {
        if self.regions.len() >= MOST_SLOTS {
            return Err(format!("more than {MOST_SLOTS} regions"));
        }
        described.check()?;
        let overlaps = |a: u64, b: u64, len: u64| a < b + len && b < a + described.size;
        if let Some(other) = self.regions.iter().map(|region| region.described).find(|other| {
            overlaps(described.guest, other.guest, other.size) || overlaps(described.user, other.user, other.size)
        }) {
            return Err(format!("a region at {:#x} that overlaps that at {:#x}", described.guest, other.guest));
        }
        let region = Region::map(described, fd, log, place)?;
        let at = self.regions.partition_point(|other| other.described.guest < described.guest);
        self.regions.insert(at, region);
        Ok(&self.regions[at])
    }

    /// Unmaps one, when nobody uses it any more. Where it begins in its file need not be told.
    pub(crate) fn remove(&mut self, described: Described) -> Result<Region, String> {
        let same = |region: &Region| {
            let Described { guest, size, user, .. } = region.described;
            (guest, size, user) == (described.guest, described.size, described.user)
        };
        match self.regions.iter().position(same) {
            Some(at) => Ok(self.regions.remove(at)),
            None => Err(format!("there is no region of {:#x} bytes at {:#x}", described.size, described.guest)),
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Region> {
        self.regions.iter()
    }

    /// Guest address of what the front end has at an address of its own.
    pub(crate) fn guest(&self, user: u64) -> Option<u64> {
        self.regions.iter().map(|region| region.described).find_map(|region| {
            let offset = user.checked_sub(region.user)?;
            (offset < region.size).then(|| region.guest + offset)
        })
    }

    /// All of it.
    pub(crate) fn memory(&self) -> Result<GuestMemory, String> {
        let maps = self.regions.iter().map(|region| region.map.clone()).collect();
        GuestMemory::from_arc_regions(maps).map_err(|e| format!("its regions are no guest memory: {e}"))
    }
}

/// The size of a part of a file, if it is all there: what lies behind the end of a file kills who touches it.
pub(crate) fn whole(what: &str, file: &File, bytes: u64, offset: u64) -> Result<usize, String> {
    let len = file.metadata().map_err(|e| format!("looking at the file of {what}: {e}"))?.len();
    match (offset.checked_add(bytes).is_some_and(|end| end <= len), usize::try_from(bytes)) {
        (true, Ok(size)) if size > 0 && offset.is_multiple_of(GRANULE) => Ok(size),
        _ => Err(format!("{what} of {bytes:#x} bytes at {offset:#x} of a file of {len:#x}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_the_front_end_become_those_of_the_guest_or_nothing() {
        let fd = rustix::fs::memfd_create("front", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 8192).unwrap();
        let described = Described { guest: 1 << 40, size: 8192, user: 4096, offset: 0 };
        let regions = Regions::table(vec![described], vec![fd], &Arc::default(), Place::Anywhere).unwrap();
        assert_eq!(regions.guest(4096 + 8191), Some((1 << 40) + 8191));
        for user in [0, 4095, 4096 + 8192, u64::MAX] {
            assert_eq!(regions.guest(user), None, "{user:#x}");
        }
    }
    #[test]
    fn a_region_is_mapped_where_the_front_end_has_it_if_that_is_free_and_unmapped_when_nobody_has_it() {
        let fd = || {
            let fd = rustix::fs::memfd_create("wherry-place", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            rustix::fs::ftruncate(&fd, 8192).unwrap();
            fd
        };
        let mapped = || std::fs::read_to_string("/proc/self/maps").unwrap().matches("wherry-place").count();
        // What was mapped and is free again.
        let user = {
            let described = Described { guest: 0, size: 8192, user: 0, offset: 0 };
            Region::map(described, fd(), &Arc::default(), Place::Anywhere).unwrap().base()
        };
        assert_eq!(mapped(), 0);
        let user = user - (1 << 40);
        let described = Described { guest: 0, size: 8192, user, offset: 0 };
        let first = Region::map(described, fd(), &Arc::default(), Place::LockedAsTheirs).unwrap();
        assert_eq!(first.base(), user);
        // Never over what is there.
        let second = Region::map(described, fd(), &Arc::default(), Place::LockedAsTheirs).unwrap();
        assert_ne!(second.base(), user);
        first.unlock().unwrap();
        let memory = GuestMemory::from_arc_regions(vec![first.map.clone()]).unwrap();
        drop((first, second));
        assert_eq!(mapped(), 1, "somebody still has it");
        vm_memory::Bytes::write_obj(&memory, 7u64, GuestAddress(8)).unwrap();
        drop(memory);
        assert_eq!(mapped(), 0);
    }
}
