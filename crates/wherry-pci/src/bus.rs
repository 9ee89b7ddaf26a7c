//! Address buses: which device answers an access of the guest.
//!
//! A machine has two, one for port I/O and one for MMIO. Devices come and go while vCPUs run: a guest moves a BAR, a
//! device is hot-plugged. So the table is replaced as a whole by whoever changes it, and a vCPU that dispatches takes
//! no lock.
//!
//! Contract: addresses, sizes and data come from the guest and are hostile. An access of any size at any address is
//! legal; what no device claims reads as ones and is otherwise ignored, and an access that crosses the border between
//! devices is split at it. A device may change the bus from inside its own `read` or `write`. An access that began
//! before a device was removed may still reach it.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;

/// A device that answers accesses to a range of a bus.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes at `offset` into the range that begins at `base`. The whole access is inside the range.
    fn read(&self, base: u64, offset: u64, data: &mut [u8]);

    /// Writes `data` at `offset` into the range that begins at `base`. The whole access is inside the range.
    fn write(&self, base: u64, offset: u64, data: &[u8]);
}

/// A range cannot be added to a bus or taken from it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The range is empty or wraps around.
    #[error("a bus range of {len:#x} bytes at {base:#x} is empty or wraps around the address space")]
    BadRange {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Another device has part of the range.
    #[error("bus range {base:#x}..{end:#x} overlaps {:#x}..{:#x}, which a device has already", .taken.start, .taken.end)]
    Overlap {
        /// First address asked for.
        base: u64,
        /// End of what was asked for.
        end: u64,
        /// The range that is in the way.
        taken: Range<u64>,
    },
    /// No range begins there.
    #[error("no device has a bus range that begins at {0:#x}")]
    Absent(u64),
}

#[derive(Clone)]
struct Entry {
    range: Range<u64>,
    device: Arc<dyn BusDevice>,
}

/// One address space with its devices.
#[derive(Default)]
pub struct Bus {
    /// Sorted by address, never overlapping.
    entries: ArcSwap<Vec<Entry>>,
    /// Serialises changes; dispatch does not take it. Held for no longer than a copy of the table takes.
    changes: Mutex<()>,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.ranges().iter().map(|r| format!("{:#x}..{:#x}", r.start, r.end))).finish()
    }
}

impl Bus {
    /// A bus without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives `len` bytes from `base` to a device. The last byte of the address space cannot be given away.
    pub fn insert(&self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let end = base.checked_add(len).filter(|_| len > 0).ok_or(BusError::BadRange { base, len })?;
        let _changing = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entries = Vec::clone(&self.entries.load());
        let at = entries.partition_point(|e| e.range.end <= base);
        if let Some(next) = entries.get(at).filter(|e| e.range.start < end) {
            return Err(BusError::Overlap { base, end, taken: next.range.clone() });
        }
        entries.insert(at, Entry { range: base..end, device });
        self.entries.store(Arc::new(entries));
        Ok(())
    }

    /// Takes the range that begins at `base` away from its device.
    pub fn remove(&self, base: u64) -> Result<(), BusError> {
        let _changing = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entries = Vec::clone(&self.entries.load());
        let at = entries.binary_search_by_key(&base, |e| e.range.start).map_err(|_| BusError::Absent(base))?;
        entries.remove(at);
        self.entries.store(Arc::new(entries));
        Ok(())
    }

    /// The ranges that devices have, in ascending order.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        self.entries.load().iter().map(|e| e.range.clone()).collect()
    }

    /// Reads at `address`. False if no device claimed any of it; bytes that none claimed are ones.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let mut claimed = false;
        let entries = self.entries.load();
        pieces(&entries, address, data.len(), |entry, at, piece| match entry {
            Some(entry) => {
                claimed = true;
                entry.device.read(entry.range.start, at - entry.range.start, &mut data[piece]);
            }
            None => data[piece].fill(0xff),
        });
        claimed
    }

    /// Writes at `address`. False if no device claimed any of it.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let mut claimed = false;
        let entries = self.entries.load();
        pieces(&entries, address, data.len(), |entry, at, piece| {
            if let Some(entry) = entry {
                claimed = true;
                entry.device.write(entry.range.start, at - entry.range.start, &data[piece]);
            }
        });
        claimed
    }
}

/// Cuts an access at the borders of entries: calls `each` with the entry if there is one, the address, and which bytes
/// of the access lie there. What wraps around the address space belongs to nobody.
fn pieces(entries: &[Entry], address: u64, len: usize, mut each: impl FnMut(Option<&Entry>, u64, Range<usize>)) {
    let mut index = entries.partition_point(|e| e.range.end <= address);
    let mut done = 0;
    while done < len {
        let left = len - done;
        let Some(at) = address.checked_add(done as u64) else {
            return each(None, 0, done..len);
        };
        let (entry, border) = match entries.get(index) {
            Some(entry) if entry.range.start <= at => {
                index += 1;
                (Some(entry), entry.range.end - at)
            }
            Some(next) => (None, next.range.start - at),
            None => (None, u64::MAX),
        };
        let take = usize::try_from(border).map_or(left, |border| border.min(left));
        each(entry, at, done..done + take);
        done += take;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Weak;

    /// Answers with the low byte of the address it is asked for, and notes what is written.
    #[derive(Default)]
    struct Echo(Mutex<Vec<(u64, u64, Vec<u8>)>>);

    impl BusDevice for Echo {
        fn read(&self, base: u64, offset: u64, data: &mut [u8]) {
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = (base + offset) as u8 + i as u8;
            }
        }
        fn write(&self, base: u64, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((base, offset, data.to_vec()));
        }
    }

    #[test]
    fn an_access_reaches_the_device_that_has_the_address() {
        let (bus, echo) = (Bus::new(), Arc::new(Echo::default()));
        bus.insert(0x20, 8, echo.clone()).unwrap();
        bus.insert(0x10, 8, Arc::new(Echo::default())).unwrap();
        let mut data = [0; 4];
        assert!(bus.read(0x22, &mut data));
        assert_eq!(data, [0x22, 0x23, 0x24, 0x25]);
        assert!(bus.write(0x27, &[9]));
        assert_eq!(*echo.0.lock().unwrap(), [(0x20, 7, vec![9])]);
    }

    #[test]
    fn what_nobody_claims_reads_as_ones() {
        let bus = Bus::new();
        let mut data = [0; 2];
        assert!(!bus.read(0x18, &mut data));
        assert_eq!(data, [0xff; 2]);
        assert!(!bus.write(u64::MAX, &[1, 2]));
    }

    #[test]
    fn an_access_over_a_border_is_split_at_it() {
        let (bus, echo) = (Bus::new(), Arc::new(Echo::default()));
        bus.insert(0x10, 2, echo.clone()).unwrap();
        bus.insert(0x12, 1, echo.clone()).unwrap();
        bus.insert(0x14, 4, echo.clone()).unwrap();
        let mut data = [0; 8];
        assert!(bus.read(0xf, &mut data));
        assert_eq!(data, [0xff, 0x10, 0x11, 0x12, 0xff, 0x14, 0x15, 0x16]);
        assert!(bus.write(0x11, &[1, 2, 3, 4]));
        assert_eq!(*echo.0.lock().unwrap(), [(0x10, 1, vec![1]), (0x12, 0, vec![2]), (0x14, 0, vec![4])]);
    }

    #[test]
    fn overlapping_empty_and_wrapping_ranges_are_refused() {
        let (bus, echo) = (Bus::new(), Arc::new(Echo::default()));
        bus.insert(0x10, 0x10, echo.clone()).unwrap();
        for (base, len) in [(0x10, 1), (0x1f, 1), (0xf, 2), (0, 0x100)] {
            let refused = bus.insert(base, len, echo.clone());
            assert_eq!(refused, Err(BusError::Overlap { base, end: base + len, taken: 0x10..0x20 }));
        }
        assert!(matches!(bus.insert(5, 0, echo.clone()), Err(BusError::BadRange { .. })));
        assert!(matches!(bus.insert(u64::MAX, 2, echo.clone()), Err(BusError::BadRange { .. })));
        bus.insert(0x20, 1, echo.clone()).unwrap();
        bus.insert(0xf, 1, echo).unwrap();
        assert_eq!(bus.ranges(), [0xf..0x10, 0x10..0x20, 0x20..0x21]);
    }

    #[test]
    fn a_removed_range_is_free_again() {
        let (bus, echo) = (Bus::new(), Arc::new(Echo::default()));
        bus.insert(0x10, 0x10, echo.clone()).unwrap();
        assert_eq!(bus.remove(0x11), Err(BusError::Absent(0x11)));
        bus.remove(0x10).unwrap();
        assert!(!bus.read(0x10, &mut [0]));
        bus.insert(0x18, 0x10, echo).unwrap();
    }

    /// Moves itself when it is written to, as a BAR does.
    struct Mover(Weak<Bus>);

    impl BusDevice for Mover {
        fn read(&self, base: u64, _: u64, data: &mut [u8]) {
            data.fill(base as u8);
        }
        fn write(&self, base: u64, _: u64, data: &[u8]) {
            let bus = self.0.upgrade().unwrap();
            bus.remove(base).unwrap();
            bus.insert(data[0].into(), 4, Arc::new(Mover(self.0.clone()))).unwrap();
        }
    }

    #[test]
    fn a_device_may_change_the_bus_while_it_is_accessed() {
        let bus = Arc::new(Bus::new());
        bus.insert(0, 4, Arc::new(Mover(Arc::downgrade(&bus)))).unwrap();
        assert!(bus.write(0, &[0x40]));
        let mut data = [0];
        assert!(bus.read(0x41, &mut data));
        assert_eq!(data, [0x40]);
        assert!(!bus.read(0, &mut data));
    }

    proptest! {
        #[test]
        fn every_byte_of_any_access_comes_from_its_owner_or_is_ones(
            ranges in proptest::collection::vec((0u64..200, 1u64..20), 0..12),
            address in prop_oneof![0u64..220, Just(u64::MAX - 3)],
            len in 0usize..16,
        ) {
            let (bus, echo) = (Bus::new(), Arc::new(Echo::default()));
            for (base, len) in ranges {
                let _ = bus.insert(base, len, echo.clone());
            }
            let owned = |a: u64| bus.ranges().iter().any(|r| r.contains(&a));
            let mut data = vec![0; len];
            let claimed = bus.read(address, &mut data);
            let mut any = false;
            for (i, byte) in data.iter().enumerate() {
                let expected = address.checked_add(i as u64).filter(|a| owned(*a));
                any |= expected.is_some();
                prop_assert_eq!(*byte, expected.map_or(0xff, |a| a as u8));
            }
            prop_assert_eq!(claimed, any);
            prop_assert_eq!(bus.write(address, &data), any);
        }
    }
}
