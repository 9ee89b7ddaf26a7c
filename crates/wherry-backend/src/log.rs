//! The dirty log: a bitmap in memory of the front end, a bit for each 4 KiB of guest addresses from 0.
//!
//! It is switched on and off while rings are served, and every region writes into the same one, those that come later, too.

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use arc_swap::ArcSwapOption;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};
use wherry_memory::{GRANULE, WriteLog};

use crate::memory::whole;

/// What was written, for a front end that asks.
#[derive(Debug, Default)]
pub(crate) struct DirtyLog {
    map: ArcSwapOption<MmapRegion>,
    on: AtomicBool,
}

impl DirtyLog {
    /// From now on into this bitmap.
    pub(crate) fn set(&self, fd: OwnedFd, bytes: u64, offset: u64) -> Result<(), String> {
        let file = File::from(fd);
        let size = whole("a log", &file, bytes, offset)?;
        let map = MmapRegion::from_file(FileOffset::new(file, offset), size);
        self.map.store(Some(map.map_err(|e| format!("mapping a log of {bytes} bytes: {e}"))?.into()));
        Ok(())
    }

    /// The bitmap: its file, bytes, and where it begins.
    pub(crate) fn map(&self) -> Option<Arc<MmapRegion>> {
        self.map.load_full()
    }

    /// Whether what is written from now on is noted.
    pub(crate) fn switch(&self, on: bool) {
        self.on.store(on, Ordering::Release);
    }

    pub(crate) fn is_on(&self) -> bool {
        self.on.load(Ordering::Acquire)
    }

    /// Whether guest addresses up to this one have bits; also if there is no log.
    pub(crate) fn covers(&self, end: u64) -> bool {
        self.map.load().as_ref().is_none_or(|map| end.div_ceil(GRANULE * 8) <= map.size() as u64)
    }
}

impl WriteLog for DirtyLog {
    fn wrote(&self, granules: Range<u64>) {
        if !self.is_on() {
            return;
        }
        let map = self.map.load();
        let Some(map) = map.as_ref() else { return };
        for granule in granules {
            // No region lies behind the end of its log: that is seen to when either comes.
            if let Ok(byte) = map.get_atomic_ref::<AtomicU8>((granule / 8) as usize) {
                byte.fetch_or(1 << (granule % 8), Ordering::AcqRel);
            }
        }
    }

    fn is_marked(&self, granule: u64) -> bool {
        let map = self.map.load();
        let byte = map.as_ref().and_then(|map| map.get_atomic_ref::<AtomicU8>((granule / 8) as usize).ok());
        byte.is_some_and(|byte| byte.load(Ordering::Acquire) & 1 << (granule % 8) != 0)
    }
}
