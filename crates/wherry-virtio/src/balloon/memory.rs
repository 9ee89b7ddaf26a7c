//! Gives memory back to the host, when and where that may be.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use wherry_fault::FaultService;
use wherry_memory::{GRANULE, PageSet, Ram};

use super::lock;
use crate::saved::SavedPages;

/// RAM, and what keeps it from being given back.
pub(super) struct Memory {
    ram: Arc<Ram>,
    /// Serves what has not come yet.
    faults: Option<Arc<FaultService>>,
    /// Why nothing is ever given back.
    pinned: Option<String>,
    /// Held while memory is given back, so that whoever holds it back knows that it is over.
    state: Mutex<State>,
}

struct State {
    /// RAM is read by a journey.
    held: bool,
    /// Pages in the balloon that could not be given back yet, by block.
    waiting: Vec<PageSet>,
    /// There may be some.
    waits: bool,
}

impl Memory {
    pub(super) fn new(ram: Arc<Ram>, faults: Option<Arc<FaultService>>, pinned: Option<String>) -> Self {
        let waiting = none(&ram);
        Self { ram, faults, pinned, state: Mutex::new(State { held: false, waiting, waits: false }) }
    }

    pub(super) fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// Why nothing is ever given back, if so.
    pub(super) fn pinned(&self) -> Option<&str> {
        self.pinned.as_deref()
    }

    /// A set of none of the pages, for each block.
    pub(super) fn none(&self) -> Vec<PageSet> {
        none(&self.ram)
    }

    pub(super) fn hold(&self) {
        lock(&self.state).held = true;
    }

    pub(super) fn release(&self) {
        lock(&self.state).held = false;
    }

    /// Once no more, always no more: maps are registered before the guest runs.
    fn comes_still(&self) -> bool {
        self.faults.as_ref().is_some_and(|faults| faults.serves_guest_maps())
    }

    /// The whole granules of a range of guest memory, by block.
    pub(super) fn granules(&self, address: u64, len: u64) -> Vec<(usize, Range<u64>)> {
        let mut parts = Vec::new();
        for (index, block) in self.ram.blocks().iter().enumerate() {
            let spec = block.spec();
            let start = address.clamp(spec.guest_base, spec.guest_base + spec.size) - spec.guest_base;
            let end = address.saturating_add(len).clamp(spec.guest_base, spec.guest_base + spec.size) - spec.guest_base;
            let pages = start.div_ceil(GRANULE)..end / GRANULE;
            if pages.start < pages.end {
                parts.push((index, pages));
            }
        }
        parts
    }

    /// These pages are free: gives them back if that may be now.
    pub(super) fn give_back(&self, address: u64, len: u64) {
        let state = lock(&self.state);
        if state.held || self.pinned.is_some() || self.comes_still() {
            return;
        }
        for (index, pages) in self.granules(address, len) {
            self.punch(index, pages);
        }
        drop(state);
    }

    /// These pages are in the balloon: gives them back, now or, if they are told of before they are used again, later.
    pub(super) fn inflate(&self, index: usize, pages: Range<u64>, later: bool) {
        let mut state = lock(&self.state);
        if self.pinned.is_some() {
            return;
        }
        if !state.held && !self.comes_still() {
            self.punch_waiting(&mut state);
            self.punch(index, pages);
        } else if later {
            state.waiting[index].insert_range(pages);
            state.waits = true;
        }
    }

    /// These pages are taken out of the balloon.
    pub(super) fn deflate(&self, index: usize, pages: Range<u64>) {
        lock(&self.state).waiting[index].remove_range(pages);
    }

    /// Gives back what waits, if that may be now.
    pub(super) fn catch_up(&self) {
        let mut state = lock(&self.state);
        if state.held || self.pinned.is_some() || self.comes_still() {
            return;
        }
        self.punch_waiting(&mut state);
    }

    fn punch_waiting(&self, state: &mut State) {
        if !std::mem::take(&mut state.waits) {
            return;
        }
        for (index, set) in state.waiting.iter_mut().enumerate() {
            for run in set.runs(0..set.limit()) {
                self.punch(index, run);
            }
            set.clear();
        }
    }

    /// Nothing waits any more: the driver has begun anew, with an empty balloon.
    pub(super) fn forget(&self) {
        lock(&self.state).waiting.iter_mut().for_each(PageSet::clear);
    }

    fn punch(&self, index: usize, pages: Range<u64>) {
        let block = &self.ram.blocks()[index];
        if let Err(error) = block.punch(pages.start * GRANULE..pages.end * GRANULE) {
            // The guest has lost nothing.
            tracing::warn!(%error, "memory in the balloon is not given back");
        }
    }

    /// What waits, in at most so many runs.
    pub(super) fn waiting(&self, most: usize) -> Vec<SavedPages> {
        let state = lock(&self.state);
        let blocks = self.ram.blocks().iter().zip(&state.waiting);
        let runs = blocks.flat_map(|(block, set)| {
            let id = block.spec().id.0.into();
            set.runs(0..set.limit()).map(move |run| SavedPages {
                block: id,
                first: run.start,
                count: run.end - run.start,
            })
        });
        runs.take(most).collect()
    }

    /// Takes what waited elsewhere. The error is for a person.
    pub(super) fn restore(&self, waiting: &[SavedPages]) -> Result<(), String> {
        let mut sets = self.none();
        for saved in waiting {
            let index = self.ram.blocks().iter().position(|block| u32::from(block.spec().id.0) == saved.block);
            let set = index.and_then(|index| sets.get_mut(index));
            let pages = saved.range();
            match (set, pages) {
                (Some(set), Some(pages)) if pages.end <= set.limit() => set.insert_range(pages),
                _ => {
                    let SavedPages { block, first, count } = saved;
                    return Err(format!(
                        "{count} pages in the balloon from page {first} of RAM block {block}, which are not there"
                    ));
                }
            }
        }
        let mut state = lock(&self.state);
        (state.waiting, state.waits) = (sets, true);
        Ok(())
    }
}

fn none(ram: &Ram) -> Vec<PageSet> {
    ram.blocks().iter().map(|block| PageSet::new(block.pages())).collect()
}
