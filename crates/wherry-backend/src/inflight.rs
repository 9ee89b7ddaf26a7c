//! Requests under way, noted in memory that the front end keeps while back ends come and go.
//!
//! The layout is that of the document ("Inflight I/O tracking", split rings): for each ring a header of 16 bytes and an entry
//! of 16 bytes for each descriptor. An entry says whether a request that begins there was taken and not given back, when, and
//! which was given back before it. So is found out which of a batch were given back, if the process ended in between.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{AtomicInteger, FileOffset, MmapRegion, VolatileMemory};

use crate::memory::whole;

const HEADER: usize = 16;
const ENTRY: usize = 16;
/// Offsets in a header, behind features of 8 bytes.
const VERSION: usize = 8;
const ENTRIES: usize = 10;
const LAST: usize = 12;
const USED: usize = 14;
/// Offsets in an entry.
const TAKEN: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;
/// The only version there is. 0: nobody has used it yet.
const NOW: u16 = 1;

/// Bytes of the part of one ring.
fn part(entries: u16) -> usize {
    (HEADER + ENTRY * usize::from(entries)).next_multiple_of(64)
}

/// The parts of all rings.
pub(crate) struct Parts {
    map: Arc<MmapRegion>,
    rings: u16,
    entries: u16,
}

impl Parts {
    /// Makes them, in a file to be kept by the front end: how many bytes.
    pub(crate) fn create(rings: u16, entries: u16) -> Result<(Self, u64), String> {
        let failed = |e: rustix::io::Errno| format!("making memory for requests under way: {e}");
        let bytes = (usize::from(rings) * part(entries)).next_multiple_of(4096) as u64;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("wherry-in-flight", flags).map_err(failed)?;
        rustix::fs::ftruncate(&fd, bytes).map_err(failed)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(failed)?;
        Ok((Self::adopt(fd, bytes, 0, rings, entries)?, bytes))
    }

    /// Takes those that the front end has kept.
    pub(crate) fn adopt(fd: OwnedFd, bytes: u64, offset: u64, rings: u16, entries: u16) -> Result<Self, String> {
        let file = File::from(fd);
        let size = whole("memory for requests under way", &file, bytes, offset)?;
        if size < usize::from(rings) * part(entries) {
            return Err(format!("{size} bytes for requests under way of {rings} rings with {entries} entries"));
        }
        let map = MmapRegion::from_file(FileOffset::new(file, offset), size);
        Ok(Self { map: Arc::new(map.map_err(|e| e.to_string())?), rings, entries })
    }

    /// Bytes, offset, rings, entries.
    pub(crate) fn described(&self) -> (u64, u64, u16, u16) {
        let offset = self.map.file_offset().map_or(0, |offset| offset.start());
        (self.map.size() as u64, offset, self.rings, self.entries)
    }

    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.map.file_offset().map(|offset| offset.file().as_fd())
    }

    /// The part of a ring with so many entries.
    pub(crate) fn ring(&self, index: u16, size: u16) -> Result<Arc<InFlight>, String> {
        if index >= self.rings || size > self.entries {
            let (rings, entries) = (self.rings, self.entries);
            return Err(format!(
                "ring {index} with {size} entries; requests under way are kept for {rings} with {entries}"
            ));
        }
        let at = usize::from(index) * part(self.entries);
        Ok(Arc::new(InFlight { map: self.map.clone(), at, entries: size, counter: AtomicU64::new(1) }))
    }
}

/// The requests of one ring that are under way.
pub struct InFlight {
    map: Arc<MmapRegion>,
    at: usize,
    entries: u16,
    /// Number of the next request.
    counter: AtomicU64,
}

impl std::fmt::Debug for InFlight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InFlight").field("entries", &self.entries).finish_non_exhaustive()
    }
}

impl InFlight {
    fn load<T: AtomicInteger>(&self, at: usize) -> T::V
    where
        T::V: Default,
    {
        // All that is used lies inside: that was seen to when the part was made.
        self.map.get_atomic_ref::<T>(self.at + at).map(|cell| cell.load(Ordering::Acquire)).unwrap_or_default()
    }

    fn store<T: AtomicInteger>(&self, at: usize, value: T::V) {
        if let Ok(cell) = self.map.get_atomic_ref::<T>(self.at + at) {
            cell.store(value, Ordering::Release);
        }
    }

    /// Where the entry of a head lies; none for what is no head.
    fn entry(&self, head: u16) -> Option<usize> {
        (head < self.entries).then(|| HEADER + ENTRY * usize::from(head))
    }

    /// The heads that were taken and not given back, in the order in which they were taken, where the used ring is at `used`.
    pub fn left(&self, used: u16) -> Vec<u16> {
        if self.load::<AtomicU16>(VERSION) != NOW || self.load::<AtomicU16>(ENTRIES) != self.entries {
            for at in (0..self.entries).filter_map(|head| self.entry(head)) {
                self.store::<AtomicU8>(at + TAKEN, 0);
            }
            self.store::<AtomicU16>(ENTRIES, self.entries);
            self.store::<AtomicU16>(USED, used);
            self.store::<AtomicU16>(VERSION, NOW);
            return Vec::new();
        }
        // Given back, and not noted.
        let mut last = self.load::<AtomicU16>(LAST);
        for _ in 0..used.wrapping_sub(self.load::<AtomicU16>(USED)).min(self.entries) {
            let Some(at) = self.entry(last) else { break };
            self.store::<AtomicU8>(at + TAKEN, 0);
            last = self.load::<AtomicU16>(at + NEXT);
        }
        self.store::<AtomicU16>(USED, used);
        let heads = (0..self.entries).filter_map(|head| Some((head, self.entry(head)?)));
        let left = heads.filter(|(_, at)| self.load::<AtomicU8>(at + TAKEN) == 1);
        let mut left: Vec<_> = left.map(|(head, at)| (self.load::<AtomicU64>(at + COUNTER), head)).collect();
        left.sort_unstable();
        self.counter.store(left.last().map_or(1, |(number, _)| number.wrapping_add(1)), Ordering::Relaxed);
        left.into_iter().map(|(_, head)| head).collect()
    }

    /// A request was taken.
    pub fn taken(&self, head: u16) {
        let Some(at) = self.entry(head) else { return };
        self.store::<AtomicU64>(at + COUNTER, self.counter.fetch_add(1, Ordering::Relaxed));
        self.store::<AtomicU8>(at + TAKEN, 1);
    }

    /// A request is about to be given back.
    pub fn giving(&self, head: u16) {
        let Some(at) = self.entry(head) else { return };
        self.store::<AtomicU16>(at + NEXT, self.load::<AtomicU16>(LAST));
        self.store::<AtomicU16>(LAST, head);
    }

    /// The used ring shows that these were given back; its index is `used` now.
    pub fn given(&self, heads: &[u16], used: u16) {
        for at in heads.iter().filter_map(|head| self.entry(*head)) {
            self.store::<AtomicU8>(at + TAKEN, 0);
        }
        self.store::<AtomicU16>(USED, used);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts() -> Parts {
        Parts::create(2, 8).unwrap().0
    }

    #[test]
    fn requests_that_a_process_has_left_are_found_in_the_order_in_which_they_were_taken() {
        let parts = parts();
        let ring = parts.ring(1, 8).unwrap();
        assert!(ring.left(100).is_empty());
        [3, 7, 0, 5].iter().for_each(|head| ring.taken(*head));
        ring.giving(7);
        ring.given(&[7], 101);
        assert_eq!(parts.ring(1, 8).unwrap().left(101), [3, 0, 5]);
        // Taken again, they are the newest; others that were left keep their order.
        let next = parts.ring(1, 8).unwrap();
        assert_eq!(next.left(101), [3, 0, 5]);
        next.taken(3);
        next.taken(1);
        assert_eq!(parts.ring(1, 8).unwrap().left(101), [0, 5, 3, 1]);
        assert!(parts.ring(0, 8).unwrap().left(0).is_empty(), "another ring");
    }

    #[test]
    fn a_process_may_end_at_any_step_of_giving_requests_back() {
        for (shown, noted, left) in [(0, false, vec![2, 4, 6]), (2, false, vec![6]), (2, true, vec![6])] {
            let parts = parts();
            let ring = parts.ring(0, 8).unwrap();
            ring.left(0);
            [2, 4, 6].iter().for_each(|head| ring.taken(*head));
            ring.giving(2);
            ring.giving(4);
            if noted {
                ring.given(&[2, 4], shown);
            }
            let next = parts.ring(0, 8).unwrap();
            assert_eq!(next.left(shown), left);
            // The next one gives them back, and may end, too.
            left.iter().for_each(|head| next.giving(*head));
            let all = shown + left.len() as u16;
            assert!(parts.ring(0, 8).unwrap().left(all).is_empty());
        }
    }

    #[test]
    fn what_the_memory_claims_is_not_believed() {
        let parts = parts();
        let ring = parts.ring(0, 8).unwrap();
        ring.left(0);
        ring.taken(9);
        ring.giving(u16::MAX);
        ring.given(&[8], 1);
        ring.store::<AtomicU16>(LAST, 4000);
        assert!(ring.left(7).is_empty());
        ring.store::<AtomicU16>(ENTRIES, 4);
        assert!(ring.left(9).is_empty(), "of a ring with other entries");
        assert!(parts.ring(2, 8).is_err() && parts.ring(0, 16).is_err());
        let small = rustix::fs::memfd_create("small", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&small, 4096).unwrap();
        assert!(Parts::adopt(small.try_clone().unwrap(), 8192, 0, 1, 8).is_err());
        assert!(Parts::adopt(small.try_clone().unwrap(), 4096, 0, 8, 64).is_err());
        assert!(Parts::adopt(small, 4096, 0, 1, 64).is_ok());
    }
}
