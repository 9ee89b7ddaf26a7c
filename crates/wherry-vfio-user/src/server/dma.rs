//! The client's memory: its maps, and the log of what was written to them.
//!
//! A map with a descriptor is mapped here. If its file is sealed against shrinking, memory is copied from and to the map; if not, the
//! client could cut the file, and an access would be a SIGBUS: then the file is read and written instead. A map without
//! a descriptor is reached by messages.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{SealFlags, fcntl_get_seals};
use rustix::io::Errno;
use rustix::mm::ProtFlags;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use super::saved::{SavedLog, SavedMap};
use crate::payload::{DmaMap, DmaUnmap, LoggingReport, LoggingStart, Malformed};
use wherry_handover::Copies;

/// Pages of maps and of logs are at least this long.
pub(super) const PAGE: u64 = 4096;
/// Pages of a log are at most this long.
const MOST_PAGE: u64 = 1 << 30;

/// How a map is reached.
enum Way {
    Mapped(MmapRegion),
    File(File, u64),
    Messages,
}

/// A map of the client.
pub(super) struct Map {
    size: u64,
    readable: bool,
    writable: bool,
    way: Way,
}

impl Map {
    fn here(&self) -> Option<(u64, u64)> {
        match &self.way {
            Way::Mapped(region) => Some((region.as_ptr() as u64, self.size)),
            Way::File(..) | Way::Messages => None,
        }
    }
}

/// A part of an access that lies in one map.
pub(super) enum Piece {
    /// It is done.
    Done,
    /// It has to go by message.
    ByMessage,
}

/// All maps of a client, by address.
#[derive(Default)]
pub(super) struct Maps(BTreeMap<u64, Map>);

impl Maps {
    pub(super) fn add(&mut self, map: &DmaMap, descriptors: Vec<OwnedFd>, most: usize) -> Result<(), Errno> {
        let end = map.address.checked_add(map.size).ok_or(Errno::INVAL)?;
        let aligned = [map.address, map.size].iter().all(|value| value.is_multiple_of(PAGE));
        if map.size == 0 || !aligned || descriptors.len() > 1 {
            return Err(Errno::INVAL);
        }
        // The last map that starts before this one's end is the only one that can overlap.
        if self.0.range(..end).next_back().is_some_and(|(at, other)| at + other.size > map.address) {
            return Err(Errno::EXIST);
        }
        if self.0.len() >= most {
            return Err(Errno::NOSPC);
        }
        let way = match descriptors.into_iter().next() {
            None => Way::Messages,
            Some(fd) => Self::way(map, fd)?,
        };
        let (size, readable, writable) = (map.size, map.readable, map.writable);
        self.0.insert(map.address, Map { size, readable, writable, way });
        Ok(())
    }

    fn way(map: &DmaMap, fd: OwnedFd) -> Result<Way, Errno> {
        let file = File::from(fd);
        let stable = fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        let mut access = ProtFlags::empty();
        access.set(ProtFlags::READ, map.readable);
        access.set(ProtFlags::WRITE, map.writable);
        let size = usize::try_from(map.size).map_err(|_| Errno::NOMEM)?;
        let there = file.metadata().map_err(|error| errno(&error))?;
        if there.is_file() && map.offset.checked_add(map.size).is_none_or(|end| end > there.len()) {
            return Err(Errno::INVAL);
        }
        let both = file.try_clone().map_err(|_| Errno::MFILE)?;
        // What is not mapped in the end is mapped all the same: so its access is checked.
        let region = MmapRegion::build(
            Some(FileOffset::new(both, map.offset)),
            size,
            access.bits() as i32,
            rustix::mm::MapFlags::SHARED.bits() as i32,
        );
        match region {
            Ok(region) if stable => Ok(Way::Mapped(region)),
            Ok(_) => Ok(Way::File(file, map.offset)),
            Err(vm_memory::mmap::MmapRegionError::Mmap(error)) => {
                Err(error.raw_os_error().map_or(Errno::INVAL, Errno::from_raw_os_error))
            }
            Err(_) => Err(Errno::INVAL),
        }
    }

    /// Where maps of files are in this process: address and bytes of each.
    pub(super) fn mapped(&self) -> Vec<(u64, u64)> {
        self.0.values().filter_map(Map::here).collect()
    }

    /// Where the map at this address is in this process, if its file is mapped.
    pub(super) fn here(&self, address: u64) -> Option<(u64, u64)> {
        self.0.get(&address)?.here()
    }

    /// Takes away a map; it must be exactly one.
    pub(super) fn remove(&mut self, unmap: &DmaUnmap) -> Result<(), Errno> {
        match self.0.get(&unmap.address) {
            Some(map) if map.size == unmap.size => {
                self.0.remove(&unmap.address);
                Ok(())
            }
            Some(_) => Err(Errno::INVAL),
            None => Err(Errno::NOENT),
        }
    }

    /// Notes all of them; copies of their files are `dma`, by place in the list.
    pub(super) fn save(&self, copies: &mut Copies) -> std::io::Result<Vec<SavedMap>> {
        let save = |(index, (address, map)): (u32, (&u64, &Map))| {
            let Map { size, readable, writable, way } = map;
            let file = match way {
                Way::Mapped(region) => region.file_offset().map(|at| (at.file(), at.start())),
                Way::File(file, offset) => Some((file, *offset)),
                Way::Messages => None,
            };
            if let Some((file, _)) = file {
                copies.add("dma", index, file)?;
            }
            let (address, size, readable, writable) = (*address, *size, *readable, *writable);
            Ok(SavedMap { address, size, readable, writable, offset: file.map(|(_, offset)| offset) })
        };
        (0..).zip(&self.0).map(save).collect()
    }

    /// Makes all of them again.
    pub(super) fn load(
        &mut self,
        saved: &[SavedMap],
        need: &mut dyn FnMut(&str, u32) -> Result<OwnedFd, String>,
    ) -> Result<(), String> {
        for (index, saved) in (0..).zip(saved) {
            let SavedMap { address, size, readable, writable, offset } = *saved;
            let file = offset.map(|_| need("dma", index)).transpose()?;
            let map = DmaMap { address, size, readable, writable, offset: offset.unwrap_or(0) };
            let added = self.add(&map, file.into_iter().collect(), usize::MAX);
            added.map_err(|error| format!("mapping {size:#x} bytes of its client at {address:#x}: {error}"))?;
        }
        Ok(())
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// How many bytes from there on lie in one map that allows it, and where in it they start.
    fn find(&self, address: u64, write: bool) -> Result<(&Map, u64), Errno> {
        match self.0.range(..=address).next_back() {
            Some((at, map)) if address - at < map.size => match if write { map.writable } else { map.readable } {
                true => Ok((map, address - at)),
                false => Err(Errno::ACCESS),
            },
            _ => Err(Errno::FAULT),
        }
    }

    /// Bytes from there on in one map; at most so many.
    pub(super) fn run(&self, address: u64, most: usize, write: bool) -> Result<usize, Errno> {
        let (map, within) = self.find(address, write)?;
        Ok(usize::try_from(map.size - within).unwrap_or(usize::MAX).min(most))
    }

    /// Reads from one map; the bytes are known to lie in it.
    pub(super) fn read(&self, address: u64, data: &mut [u8]) -> Result<Piece, Errno> {
        let (map, within) = self.find(address, false)?;
        match &map.way {
            Way::Messages => return Ok(Piece::ByMessage),
            Way::Mapped(region) => region
                .get_slice(within as usize, data.len())
                .and_then(|slice| slice.read_slice(data, 0))
                .map_err(|_| Errno::FAULT)?,
            Way::File(file, offset) => file.read_exact_at(data, offset + within).map_err(|error| errno(&error))?,
        }
        Ok(Piece::Done)
    }

    /// A word that lies in one map and can be reached by atomic operations; `None` where only bytes can.
    pub(super) fn word(&self, address: u64, bytes: usize, write: bool) -> Result<Option<VolatileSlice<'_>>, Errno> {
        let (map, within) = self.find(address, write)?;
        match &map.way {
            Way::Mapped(region) => region.get_slice(within as usize, bytes).map(Some).map_err(|_| Errno::FAULT),
            Way::File(..) | Way::Messages => Ok(None),
        }
    }

    /// Writes to one map; the bytes are known to lie in it.
    pub(super) fn write(&self, address: u64, data: &[u8]) -> Result<Piece, Errno> {
        let (map, within) = self.find(address, true)?;
        match &map.way {
            Way::Messages => return Ok(Piece::ByMessage),
            Way::Mapped(region) => region
                .get_slice(within as usize, data.len())
                .and_then(|slice| slice.write_slice(data, 0))
                .map_err(|_| Errno::FAULT)?,
            Way::File(file, offset) => {
                // A file that was cut is not made longer again.
                let there = file.metadata().map_err(|error| errno(&error))?.len();
                let end = offset + within + data.len() as u64;
                if end > there {
                    return Err(Errno::FAULT);
                }
                file.write_all_at(data, offset + within).map_err(|error| errno(&error))?;
            }
        }
        Ok(Piece::Done)
    }
}

fn errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::FAULT, Errno::from_raw_os_error)
}

/// What was written since a client asked to log it, or last read it. It is as long as there are pages that were written.
pub(super) struct Log {
    page: u64,
    /// First and last address of each; everything, without any.
    ranges: Vec<(u64, u64)>,
    /// Bits of 64 pages each, by the number of the first divided by 64.
    written: BTreeMap<u64, u64>,
}

impl Log {
    /// Of these ranges; the page size that was wished for, if it is possible.
    pub(super) fn new(start: &LoggingStart) -> Result<Self, Errno> {
        let possible = start.page_size.is_power_of_two() && (PAGE..=MOST_PAGE).contains(&start.page_size);
        let page = if possible { start.page_size } else { PAGE };
        let mut ranges = Vec::with_capacity(start.ranges.len());
        for &(address, length) in &start.ranges {
            let last = length.checked_sub(1).and_then(|more| address.checked_add(more)).ok_or(Errno::INVAL)?;
            ranges.push((address, last));
        }
        ranges.sort_unstable();
        if ranges.windows(2).any(|pair| pair[0].1 >= pair[1].0) {
            return Err(Errno::INVAL);
        }
        Ok(Self { page, ranges, written: BTreeMap::new() })
    }

    pub(super) fn save(&self) -> SavedLog {
        SavedLog {
            page: self.page,
            ranges: self.ranges.iter().flat_map(|(first, last)| [*first, *last]).collect(),
            written: self.written.iter().flat_map(|(chunk, bits)| [*chunk, *bits]).collect(),
        }
    }

    pub(super) fn load(saved: &SavedLog) -> Result<Self, String> {
        let pairs = |list: &[u64]| match list.as_chunks() {
            (pairs, []) => Ok(pairs.iter().map(|[a, b]| (*a, *b)).collect::<Vec<_>>()),
            _ => Err("half of a range in a log".to_owned()),
        };
        let (page, ranges) = (saved.page, pairs(&saved.ranges)?);
        let ordered =
            ranges.iter().all(|(first, last)| first <= last) && ranges.windows(2).all(|two| two[0].1 < two[1].0);
        if !(page.is_power_of_two() && (PAGE..=MOST_PAGE).contains(&page) && ordered) {
            return Err(format!("a log of pages of {page} bytes in {ranges:x?}"));
        }
        Ok(Self { page, ranges, written: pairs(&saved.written)?.into_iter().collect() })
    }

    pub(super) fn page(&self) -> u64 {
        self.page
    }

    /// Notes that these bytes were written.
    pub(super) fn mark(&mut self, address: u64, count: u64) {
        let Some(more) = count.checked_sub(1) else { return };
        let last = address.saturating_add(more);
        if self.ranges.is_empty() {
            return self.mark_pages(address / self.page, last / self.page);
        }
        let first = self.ranges.partition_point(|range| range.1 < address);
        for at in first..self.ranges.len() {
            let (start, end) = self.ranges[at];
            if start > last {
                break;
            }
            self.mark_pages(start.max(address) / self.page, end.min(last) / self.page);
        }
    }

    fn mark_pages(&mut self, first: u64, last: u64) {
        for chunk in first / 64..=last / 64 {
            let low = first.saturating_sub(chunk * 64).min(63);
            let high = (last - chunk * 64).min(63);
            *self.written.entry(chunk).or_default() |= u64::MAX << low & u64::MAX >> (63 - high);
        }
    }

    /// The bitmap of a range. What was told is forgotten; but a page that lies in the range only in part stays, for who asks about
    /// the rest.
    pub(super) fn take(&mut self, report: &LoggingReport) -> Result<Vec<u64>, Malformed> {
        let mut bitmap = vec![0; report.words()?];
        let (first, last) = (report.address, report.address + (report.length - 1));
        let (low, high) = (first / self.page / 64, last / self.page / 64);
        for (chunk, bits) in self.written.range_mut(low..=high) {
            for bit in (0..64).filter(|bit| *bits >> bit & 1 != 0).collect::<Vec<_>>() {
                let start = (chunk * 64 + bit) * self.page;
                let end = start + (self.page - 1);
                if end < first || start > last {
                    continue;
                }
                let from = (start.max(first) - first) / report.page_size;
                for unit in from..=(end.min(last) - first) / report.page_size {
                    bitmap[(unit / 64) as usize] |= 1 << (unit % 64);
                }
                if start >= first && end <= last {
                    *bits &= !(1 << bit);
                }
            }
        }
        self.written.retain(|_, bits| *bits != 0);
        Ok(bitmap)
    }
}

#[cfg(test)]
mod tests {
    use super::{Log, PAGE};
    use crate::payload::{LoggingReport, LoggingStart};

    fn log(page_size: u64, ranges: &[(u64, u64)]) -> Log {
        Log::new(&LoggingStart { page_size, ranges: ranges.to_vec() }).unwrap()
    }

    fn take(log: &mut Log, address: u64, length: u64, page_size: u64) -> Vec<u64> {
        log.take(&LoggingReport { address, length, page_size }).unwrap()
    }

    #[test]
    fn bit_n_is_page_n_and_is_told_once() {
        let mut log = log(PAGE, &[]);
        log.mark(0x10_0fff, 2);
        log.mark(0x10_0000 + 70 * PAGE, 1);
        assert_eq!(take(&mut log, 0x10_0000, 128 * PAGE, PAGE), [0b11, 1 << 6]);
        assert_eq!(take(&mut log, 0x10_0000, 128 * PAGE, PAGE), [0, 0]);
    }

    #[test]
    fn larger_and_smaller_pages_are_reported_by_what_they_touch() {
        let mut log = log(PAGE, &[]);
        log.mark(5 * PAGE, 1);
        assert_eq!(take(&mut log, 0, 16 * PAGE, 4 * PAGE), [0b10]);
        log.mark(PAGE, 1);
        assert_eq!(take(&mut log, 0, 2 * PAGE, 1024), [0b1111_0000]);
    }

    #[test]
    fn a_page_that_is_asked_for_in_parts_is_told_to_each() {
        let mut log = log(16 * PAGE, &[]);
        log.mark(3 * PAGE, 1);
        assert_eq!(take(&mut log, 0, 8 * PAGE, PAGE), [0xff]);
        assert_eq!(take(&mut log, 8 * PAGE, 8 * PAGE, PAGE), [0xff]);
        assert_eq!(take(&mut log, 0, 16 * PAGE, PAGE), [0xffff]);
        assert_eq!(take(&mut log, 0, 16 * PAGE, PAGE), [0]);
    }

    #[test]
    fn only_what_lies_in_the_ranges_is_logged() {
        let mut log = log(PAGE, &[(8 * PAGE, 2 * PAGE), (2 * PAGE, PAGE)]);
        log.mark(0, 64 * PAGE);
        assert_eq!(take(&mut log, 0, 64 * PAGE, PAGE), [0b11_0000_0100]);
    }

    #[test]
    fn the_last_page_of_all_is_one_like_the_others() {
        let mut log = log(PAGE, &[]);
        log.mark(u64::MAX - 1, 2);
        assert_eq!(take(&mut log, u64::MAX - 2 * PAGE + 1, 2 * PAGE, PAGE), [0b10]);
    }

    #[test]
    fn ranges_that_overlap_wrap_or_are_empty_are_refused() {
        for ranges in [&[(0, 0)][..], &[(u64::MAX, 2)], &[(0, 2 * PAGE), (PAGE, PAGE)]] {
            assert!(Log::new(&LoggingStart { page_size: PAGE, ranges: ranges.to_vec() }).is_err(), "{ranges:?}");
        }
        assert_eq!(log(3, &[]).page(), PAGE);
        assert_eq!(log(1 << 40, &[]).page(), PAGE);
        assert_eq!(log(2 << 20, &[]).page(), 2 << 20);
    }
}
