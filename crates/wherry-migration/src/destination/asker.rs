//! Asking the source for what the guest misses, and for what it will miss next.
//!
//! A guest that walks through its memory is followed like a reader of a file: who has just missed a page shortly before
//! this one gets the next ones, too. One that jumps gets what it touches alone: pages it does not need would only stand
//! before those it waits for next.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use wherry_fault::{FaultService, Requester, Wanted};
use wherry_memory::BlockId;
use wherry_stream::{Extent, ExtentKind, FrameWriter, MAX_EXTENTS};

use crate::journey::lock;

/// Pages that are asked for behind one that is missed in a walk.
const NEIGHBOURS: u64 = 7;
/// A page is part of a walk if one of so many pages before it was missed lately.
const STRIDE: u64 = 2 * (NEIGHBOURS + 1);
/// Misses that are remembered: so many walks can be followed at once.
const WALKS: usize = 32;
/// Pages asked for in one extent, at most: a huge page.
const MOST: u32 = 512;

/// Asks the source for what the guest misses. Called on the fault thread.
pub(super) struct Asker {
    writer: Mutex<FrameWriter>,
    faults: Weak<FaultService>,
    asked: Arc<Asked>,
    walks: Mutex<Walks>,
}

/// What has been asked for, and what came in answer, over all links.
#[derive(Default)]
pub(super) struct Asked {
    pub(super) requests: AtomicU64,
    pub(super) pages: AtomicU64,
    pub(super) answered: AtomicU64,
}

/// The pages that were missed last, each with those behind it that were asked for.
#[derive(Default)]
struct Walks {
    missed: [Option<(BlockId, u64)>; WALKS],
    next: usize,
}

impl Walks {
    /// Takes a miss; whether it goes on where another was.
    fn goes_on(&mut self, block: BlockId, page: u64) -> bool {
        let before = self.missed.iter_mut().flatten().find(|(of, missed)| {
            *of == block && page.checked_sub(*missed).is_some_and(|step| (1..=STRIDE).contains(&step))
        });
        match before {
            Some(walk) => {
                walk.1 = page;
                true
            }
            None => {
                self.missed[self.next] = Some((block, page));
                self.next = (self.next + 1) % WALKS;
                false
            }
        }
    }
}

impl Asker {
    pub(super) fn new(writer: FrameWriter, faults: &Arc<FaultService>, asked: Arc<Asked>) -> Self {
        Self { writer: Mutex::new(writer), faults: Arc::downgrade(faults), asked, walks: Mutex::default() }
    }

    pub(super) fn asked(&self) -> &Arc<Asked> {
        &self.asked
    }

    fn ask(&self, extents: &[Extent]) {
        for part in extents.chunks(MAX_EXTENTS) {
            if let Err(error) = lock(&self.writer).write_request(part) {
                // The conductor finds the link gone; what was asked for is asked again when there is one.
                tracing::debug!(%error, "a request was lost");
            }
            self.asked.requests.fetch_add(1, Ordering::Relaxed);
            self.asked.pages.fetch_add(pages_of(part), Ordering::Relaxed);
        }
    }
}

pub(super) fn pages_of(extents: &[Extent]) -> u64 {
    extents.iter().map(|extent| u64::from(extent.count)).sum()
}

impl Requester for Asker {
    fn request(&self, pages: &[Wanted]) {
        let extent =
            |wanted: &Wanted, first, count| Extent { block: wanted.block.0, kind: ExtentKind::Data, first, count };
        let mut missed: Vec<Extent> = Vec::with_capacity(pages.len());
        for wanted in pages {
            match missed.last_mut() {
                Some(last)
                    if last.block == wanted.block.0
                        && last.first + u64::from(last.count) == wanted.page
                        && last.count < MOST =>
                {
                    last.count += 1;
                }
                _ => missed.push(extent(wanted, wanted.page, 1)),
            }
        }
        self.ask(&missed);
        let Some(faults) = self.faults.upgrade() else { return };
        let mut around = Vec::new();
        let mut walks = lock(&self.walks);
        for wanted in pages {
            if !walks.goes_on(wanted.block, wanted.page) {
                continue;
            }
            let first = wanted.page.saturating_add(1);
            for run in faults.prefetch(wanted.block, first..first.saturating_add(NEIGHBOURS)) {
                around.push(extent(wanted, run.start, (run.end - run.start) as u32));
            }
        }
        drop(walks);
        self.ask(&around);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: BlockId = BlockId(0);

    #[test]
    fn a_walk_is_followed_and_a_jump_is_not() {
        let mut walks = Walks::default();
        assert!(!walks.goes_on(BLOCK, 100));
        // The next one that was not asked for with it, and so on; also a few pages further.
        assert!(walks.goes_on(BLOCK, 101) && walks.goes_on(BLOCK, 109) && walks.goes_on(BLOCK, 109 + STRIDE));
        assert!(!walks.goes_on(BLOCK, 109), "a step back");
        assert!(!walks.goes_on(BlockId(1), 110), "another block");
        assert!(!walks.goes_on(BLOCK, 4000));
    }

    #[test]
    fn many_walks_at_once_are_followed_and_old_ones_forgotten() {
        let mut walks = Walks::default();
        let at = |walk: usize| walk as u64 * 1000;
        assert!((0..WALKS).all(|walk| !walks.goes_on(BLOCK, at(walk))));
        assert!((0..WALKS).all(|walk| walks.goes_on(BLOCK, at(walk) + 8)));
        assert!(!walks.goes_on(BLOCK, at(WALKS)));
        assert!(!walks.goes_on(BLOCK, at(0) + 16), "the oldest one made room");
        assert!(walks.goes_on(BLOCK, at(2) + 16));
    }
}
