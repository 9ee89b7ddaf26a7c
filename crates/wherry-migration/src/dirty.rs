//! All dirty sources of a machine as one: what has been written since it was last taken, for every block.
//!
//! Bits go one way: from the sources by [`Tracker::collect`] into a [`Dirty`], from there into a round. What a round
//! did not send, because it failed or because the guest was resumed, is given back by [`Dirty::union`], or the journey
//! ends and the next one begins with all that is allocated.
//!
//! While the sources run, nobody gives memory back: whoever reads a page that has become a hole would fill it again, and a
//! destination that holds the page would never hear of it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use wherry_memory::{Block, DirtyError, FreePages, GRANULE, MemoryError, PageSet, Ram};

use crate::error::Cause;
use crate::machine::Machine;

/// One page set for each block, in the order of `Ram::blocks`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Dirty(pub(crate) Vec<PageSet>);

impl Dirty {
    pub(crate) fn none(ram: &Ram) -> Self {
        Self(ram.blocks().iter().map(|b| PageSet::new(b.pages())).collect())
    }

    /// Everything allocated; holes are not looked at.
    pub(crate) fn allocated(ram: &Ram) -> Result<Self, MemoryError> {
        let mut all = Self::none(ram);
        for (block, set) in ram.blocks().iter().zip(&mut all.0) {
            insert_allocated(block, set)?;
        }
        Ok(all)
    }

    pub(crate) fn pages(&self) -> u64 {
        self.0.iter().map(PageSet::count).sum()
    }

    pub(crate) fn union(&mut self, other: &Dirty) {
        for (mine, other) in self.0.iter_mut().zip(&other.0) {
            mine.union(other);
        }
    }
}

fn insert_allocated(block: &Block, set: &mut PageSet) -> Result<(), MemoryError> {
    for run in block.data_runs(0..block.spec().size) {
        let run =
            run.map_err(|source| MemoryError::Os { what: "looking for allocated pages", id: block.spec().id, source })?;
        set.insert_range(run.start / GRANULE..run.end.div_ceil(GRANULE));
    }
    Ok(())
}

/// The dirty sources of one machine while a journey lasts.
pub(crate) struct Tracker {
    machine: Arc<dyn Machine>,
    started: usize,
    /// For each source, whether it has failed before.
    failed: Vec<bool>,
    /// Who gives no memory back meanwhile.
    free: Option<Arc<dyn FreePages>>,
}

impl Tracker {
    pub(crate) fn new(machine: Arc<dyn Machine>) -> Self {
        let failed = vec![false; machine.dirty_sources().len()];
        Self { machine, started: 0, failed, free: None }
    }

    /// Starts all of them. Before the first page is looked at.
    pub(crate) fn start(&mut self) -> Result<(), Cause> {
        if let Some(free) = self.machine.free_pages() {
            free.hold();
            self.free = Some(free);
        }
        for source in self.machine.dirty_sources().iter() {
            // Counted before, so that one that failed half way is stopped too.
            self.started += 1;
            source.start()?;
        }
        Ok(())
    }

    /// Asks the guest which pages it does not use. After the start, and before the first round, for which the answers are.
    pub(crate) fn ask_for_free_pages(&self) -> Option<Arc<dyn FreePages>> {
        self.free.as_ref().inspect(|free| free.ask()).cloned()
    }

    /// The first round is over.
    pub(crate) fn enough(&self) {
        if let Some(free) = &self.free {
            free.enough();
        }
    }

    /// Stops those that were started. It can take long for a large VM, so never in a blackout.
    pub(crate) fn stop(&mut self) {
        for source in self.machine.dirty_sources().iter().take(self.started) {
            if let Err(error) = source.stop() {
                tracing::warn!(%error, "a dirty source could not be stopped; it goes on costing a little");
            }
        }
        self.started = 0;
        if let Some(free) = self.free.take() {
            free.enough();
            free.release();
        }
    }

    /// Adds to `into` what was written. A source that fails makes everything allocated dirty, once; the second time the
    /// journey fails.
    pub(crate) fn collect(&mut self, into: &mut Dirty) -> Result<(), Cause> {
        let machine = self.machine.clone();
        for (n, source) in machine.dirty_sources().iter().enumerate() {
            for (block, set) in machine.ram().blocks().iter().zip(&mut into.0) {
                match source.collect(block, set) {
                    Ok(()) => {}
                    Err(error) if !self.failed[n] => {
                        tracing::warn!(%error, "everything allocated is taken as dirty");
                        self.failed[n] = true;
                        into.union(&Dirty::allocated(machine.ram())?);
                        break;
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    /// For the threads of a round.
    pub(crate) fn rearm(
        machine: &dyn Machine,
        block: &Block,
        range: Range<u64>,
        taken: &PageSet,
    ) -> Result<(), DirtyError> {
        machine.dirty_sources().iter().try_for_each(|source| source.rearm(block, range.clone(), taken))
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Granules that were sent at least once, for one block. What is not in it is a hole at the destination, too; what is
/// in it is certainly no hole that would be allocated by reading it (unless the guest gave it back since, which costs
/// one page).
pub(crate) struct Known {
    words: Vec<AtomicU64>,
}

impl Known {
    pub(crate) fn new(pages: u64) -> Self {
        Self { words: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Adds a range of granules.
    pub(crate) fn insert(&self, range: Range<u64>) {
        let mut page = range.start;
        while page < range.end {
            let bit = page % 64;
            let n = (64 - bit).min(range.end - page);
            let mask = if n == 64 { u64::MAX } else { ((1u64 << n) - 1) << bit };
            self.words[(page / 64) as usize].fetch_or(mask, Ordering::Relaxed);
            page += n;
        }
    }

    /// Splits a range into its longest first part that is wholly known or wholly unknown: its end, and which.
    pub(crate) fn split(&self, range: Range<u64>) -> (u64, bool) {
        let word = |page: u64| self.words[(page / 64) as usize].load(Ordering::Relaxed);
        let known = word(range.start) >> (range.start % 64) & 1 == 1;
        let mut page = range.start;
        while page < range.end {
            let bits = if known { !word(page) } else { word(page) } >> (page % 64);
            if bits != 0 {
                return ((page + u64::from(bits.trailing_zeros())).min(range.end), known);
            }
            page = (page / 64 + 1) * 64;
        }
        (range.end, known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_ranges_split_where_knowledge_ends() {
        let known = Known::new(300);
        known.insert(10..70);
        known.insert(128..300);
        assert_eq!(known.split(0..300), (10, false));
        assert_eq!(known.split(10..300), (70, true));
        assert_eq!(known.split(10..40), (40, true));
        assert_eq!(known.split(70..300), (128, false));
        assert_eq!(known.split(128..300), (300, true));
        assert_eq!(known.split(64..65), (65, true));
    }
}
