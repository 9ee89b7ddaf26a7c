//! What a device writes, as a dirty source.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use wherry_memory::{Block, BlockId, DirtyError, DirtySource, GRANULE, PageSet, Ram};

use crate::function::Function;
use crate::owner::OwnerError;

/// What one function writes. One that cannot tell is taken to write all there is.
///
/// The owner's log is read and cleared in one step; it is read once more when the function is at rest.
pub struct DmaLog {
    name: String,
    function: Weak<Function>,
    ram: Arc<Ram>,
    /// Bytes of a page of the owner's log; 0 while there is none.
    page: AtomicU64,
}

impl DmaLog {
    pub(crate) fn new(name: String, function: Weak<Function>, ram: Arc<Ram>) -> Self {
        Self { name, function, ram, page: AtomicU64::new(0) }
    }

    fn error(&self, what: &'static str, block: BlockId, cause: OwnerError) -> DirtyError {
        DirtyError { dirty_source: self.name.clone(), what, block, cause: io::Error::other(cause) }
    }

    /// Pages written since it was last read, if it is on. To be asked of a function at rest, when its log has been read at rest.
    pub(crate) fn late(&self) -> Result<u64, DirtyError> {
        let mut pages = 0;
        if self.page.load(Ordering::Acquire) != 0 {
            for block in self.ram.blocks() {
                let mut set = PageSet::new(block.pages());
                self.collect(block, &mut set)?;
                pages += set.count();
            }
        }
        Ok(pages)
    }

    fn function(&self) -> Option<Arc<Function>> {
        self.function.upgrade().filter(|function| function.owner().facts().logging)
    }
}

impl DirtySource for DmaLog {
    fn name(&self) -> &str {
        &self.name
    }

    fn start(&self) -> Result<(), DirtyError> {
        let Some(function) = self.function() else {
            tracing::warn!(
                device = self.name,
                "it cannot tell what it writes: all allocated memory is taken as written"
            );
            return Ok(());
        };
        // An earlier journey may have left it on, with what was written since.
        self.stop()?;
        let ranges: Vec<_> =
            self.ram.blocks().iter().map(|block| (block.spec().guest_base, block.spec().size)).collect();
        let page = function.owner().start_log(&ranges);
        let page = page.map_err(|cause| self.error("switching the log on", BlockId(0), cause))?;
        self.page.store(page, Ordering::Release);
        Ok(())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        if self.page.swap(0, Ordering::AcqRel) == 0 {
            return Ok(());
        }
        let Some(function) = self.function() else { return Ok(()) };
        function.owner().stop_log().map_err(|cause| self.error("switching the log off", BlockId(0), cause))
    }

    fn collect(&self, block: &Block, into: &mut PageSet) -> Result<(), DirtyError> {
        const WHAT: &str = "reading the log";
        let spec = block.spec();
        let Some(function) = self.function() else {
            for run in block.data_runs(0..spec.size) {
                let run = run.map_err(|cause| DirtyError {
                    dirty_source: self.name.clone(),
                    what: "looking for allocated pages",
                    block: spec.id,
                    cause,
                })?;
                into.insert_range(run.start / GRANULE..run.end.div_ceil(GRANULE));
            }
            return Ok(());
        };
        let page = self.page.load(Ordering::Acquire);
        if page == 0 {
            let cause = io::Error::other("it was not started");
            return Err(DirtyError { dirty_source: self.name.clone(), what: WHAT, block: spec.id, cause });
        }
        // A range has to begin at a page of the log.
        let start = spec.guest_base / page * page;
        let end = (spec.guest_base + spec.size).next_multiple_of(page);
        let words = function.owner().read_log(start, end - start, page);
        let words = words.map_err(|cause| self.error(WHAT, spec.id, cause))?;
        if page == GRANULE {
            into.union_words(&words);
            return Ok(());
        }
        for (n, word) in words.iter().enumerate() {
            for bit in (0..64).filter(|bit| word >> bit & 1 != 0) {
                let at = start + (n as u64 * 64 + bit) * page;
                let (from, to) = (at.max(spec.guest_base), (at + page).min(spec.guest_base + spec.size));
                if from < to {
                    let granules = |address: u64| address - spec.guest_base;
                    into.insert_range(granules(from) / GRANULE..granules(to).div_ceil(GRANULE));
                }
            }
        }
        Ok(())
    }

    fn rearm(&self, _block: &Block, _range: Range<u64>, _taken: &PageSet) -> Result<(), DirtyError> {
        Ok(())
    }
}
