//! What this process writes through a guest map by way of `vm-memory`: where it is noted.

use std::fmt::Debug;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

use crate::GRANULE;

/// A log that belongs to somebody else, such as the front end of a device process.
pub trait WriteLog: Debug + Send + Sync {
    /// Granules of guest addresses were written. Called after the bytes are there.
    fn wrote(&self, granules: Range<u64>);

    /// Whether a granule is marked.
    fn is_marked(&self, granule: u64) -> bool;
}

/// Where the writes into one region are noted.
#[derive(Debug)]
pub enum Written {
    /// Here, for [`VmmWrites`](crate::VmmWrites): a bit for each granule of the region.
    Here(AtomicBitmap),
    /// In somebody else's log.
    There {
        /// Guest address of the region, in granules.
        first: u64,
        /// The log.
        log: Arc<dyn WriteLog>,
    },
}

impl Written {
    /// Noted here, for a region of so many bytes.
    pub fn here(bytes: usize) -> Self {
        let granule = const { NonZeroUsize::new(GRANULE as usize).expect("4096 is not zero") };
        Self::Here(AtomicBitmap::new(bytes, granule))
    }
}

impl Default for Written {
    fn default() -> Self {
        Self::here(0)
    }
}

impl NewBitmap for Written {
    fn with_len(len: usize) -> Self {
        Self::here(len)
    }
}

impl<'a> WithBitmapSlice<'a> for Written {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for Written {
    fn mark_dirty(&self, offset: usize, len: usize) {
        match self {
            Self::Here(bitmap) => bitmap.mark_dirty(offset, len),
            Self::There { .. } if len == 0 => {}
            Self::There { first, log } => {
                let (start, end) = (offset as u64, (offset as u64).saturating_add(len as u64));
                log.wrote(first + start / GRANULE..first + end.div_ceil(GRANULE));
            }
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        match self {
            Self::Here(bitmap) => bitmap.dirty_at(offset),
            Self::There { first, log } => log.is_marked(first + offset as u64 / GRANULE),
        }
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::{GuestMemory, GuestRegion};

    #[derive(Debug, Default)]
    struct Noted(Mutex<Vec<Range<u64>>>);

    impl WriteLog for Noted {
        fn wrote(&self, granules: Range<u64>) {
            self.0.lock().unwrap().push(granules);
        }

        fn is_marked(&self, granule: u64) -> bool {
            self.0.lock().unwrap().iter().any(|range| range.contains(&granule))
        }
    }

    #[test]
    fn writes_are_told_to_another_log_by_guest_address() {
        let log = Arc::new(Noted::default());
        let written = Written::There { first: 0x100, log: log.clone() };
        let map = MmapRegionBuilder::new_with_bitmap(0x10000, written)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
            .build()
            .unwrap();
        let region = Arc::new(GuestRegion::new(map, GuestAddress(0x100_000)).unwrap());
        let memory = GuestMemory::from_arc_regions(vec![region]).unwrap();
        memory.write_slice(&[1; 2], GuestAddress(0x100_fff)).unwrap();
        memory.write_slice(&[], GuestAddress(0x105_000)).unwrap();
        memory.write_obj(7u64, GuestAddress(0x10f_ff8)).unwrap();
        let _: u64 = memory.read_obj(GuestAddress(0x108_000)).unwrap();
        let marked: Vec<_> = (0x100..0x110).filter(|granule| log.is_marked(*granule)).collect();
        assert_eq!(marked, [0x100, 0x101, 0x10f]);
    }
}
