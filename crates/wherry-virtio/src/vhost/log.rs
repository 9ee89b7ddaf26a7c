//! What a back end has written: a bitmap in shared memory that it sets bits of, as a dirty source.
//!
//! The back end writes memory first and logs it then. A page that is read in between is found dirty by the next look, and
//! the last look is when the back end is at rest.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};
use wherry_memory::{Block, BlockId, DirtyError, DirtySource, GRANULE, PageSet, Ram};

use super::orders::Orders;

/// The bitmap: a bit for each granule of guest addresses, from 0.
pub(super) struct Log {
    map: MmapRegion,
    /// The back end was lost: what it wrote last may not be in the bitmap.
    doubtful: AtomicBool,
}

impl Log {
    fn new(ram: &Ram) -> io::Result<Self> {
        let end = ram.blocks().iter().map(|block| block.spec().guest_base + block.spec().size).max().unwrap_or(0);
        let bytes = end.div_ceil(GRANULE * 8).next_multiple_of(GRANULE);
        let memfd = rustix::fs::memfd_create("wherry-dirty-log", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&memfd, bytes)?;
        rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let file = FileOffset::new(memfd.into(), 0);
        let map = MmapRegion::from_file(file, bytes as usize).map_err(io::Error::other)?;
        Ok(Self { map, doubtful: AtomicBool::new(false) })
    }

    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.map.file_offset().map(|offset| offset.file().as_fd())
    }

    pub(super) fn bytes(&self) -> u64 {
        self.map.size() as u64
    }

    pub(super) fn doubt(&self) {
        self.doubtful.store(true, Ordering::Release);
    }

    /// Takes the bits of a block away.
    fn take(&self, block: &Block) -> io::Result<Vec<u64>> {
        let spec = block.spec();
        // Blocks begin at multiples of 64 granules in every layout; a bit of a neighbour would only be sent once more.
        let first = spec.guest_base / GRANULE / 64;
        let words = block.pages().div_ceil(64);
        (first..first + words)
            .map(|word| {
                let bits = self.map.get_atomic_ref::<AtomicU64>(word as usize * 8).map_err(io::Error::other)?;
                // Most words are clean: looking does not take the cache line away from the back end.
                Ok(if bits.load(Ordering::Relaxed) == 0 { 0 } else { bits.swap(0, Ordering::AcqRel) })
            })
            .collect()
    }
}

/// What one back end tells of its writes.
pub struct VhostLog {
    name: String,
    ram: Arc<Ram>,
    orders: Arc<Orders>,
    log: Mutex<Option<Arc<Log>>>,
}

impl VhostLog {
    pub(super) fn new(name: String, ram: Arc<Ram>, orders: Arc<Orders>) -> Self {
        Self { name, ram, orders, log: Mutex::default() }
    }

    fn error(&self, what: &'static str, block: BlockId, cause: io::Error) -> DirtyError {
        DirtyError { dirty_source: self.name.clone(), what, block, cause }
    }

    fn present(&self) -> Option<Arc<Log>> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, log: Option<Arc<Log>>) -> io::Result<()> {
        self.orders.log(log.clone()).map_err(io::Error::other)?;
        *self.log.lock().unwrap_or_else(PoisonError::into_inner) = log;
        Ok(())
    }
}

impl DirtySource for VhostLog {
    fn name(&self) -> &str {
        &self.name
    }

    fn start(&self) -> Result<(), DirtyError> {
        let started = Log::new(&self.ram).and_then(|log| self.set(Some(Arc::new(log))));
        started.map_err(|cause| self.error("switching the log on", BlockId(0), cause))
    }

    fn stop(&self) -> Result<(), DirtyError> {
        if self.present().is_none() {
            return Ok(());
        }
        self.set(None).map_err(|cause| self.error("switching the log off", BlockId(0), cause))
    }

    fn collect(&self, block: &Block, into: &mut PageSet) -> Result<(), DirtyError> {
        let Some(log) = self.present() else { return Ok(()) };
        let id = block.spec().id;
        into.union_words(&log.take(block).map_err(|cause| self.error("reading the log", id, cause))?);
        match log.doubtful.swap(false, Ordering::AcqRel) {
            true => Err(self.error("reading the log", id, io::Error::other("the back end has gone"))),
            false => Ok(()),
        }
    }

    fn rearm(&self, _block: &Block, _range: Range<u64>, _taken: &PageSet) -> Result<(), DirtyError> {
        Ok(())
    }
}
