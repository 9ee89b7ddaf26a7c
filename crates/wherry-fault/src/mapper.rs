//! The background mapper: places what was whole before the switch, so that it never faults. What arrives later is placed
//! by whoever receives it.

use std::sync::atomic::Ordering;

use wherry_memory::GRANULE;

use crate::service::{FaultService, Shared, Trouble, bytes};
use crate::{FaultError, lock};

/// Pages looked at and mapped in one step: short enough for a fault not to notice (some 50 us).
const STEP: u64 = 256;

/// How far the background mapper came in one call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mapped {
    /// Pages that it placed.
    pub pages: u64,
    /// It reached the end of the last block; the next call starts anew.
    pub wrapped: bool,
}

impl FaultService {
    /// Places up to about `budget` pages that are received, in memory and not placed, going on where the last call
    /// ended. Holes stay holes. For callers who do not [start the mapper](Self::start_mapper).
    pub fn map_background(&self, budget: u64) -> Result<Mapped, FaultError> {
        self.shared.map_background(budget)
    }
}

/// Where the mapper goes on.
#[derive(Default)]
pub(crate) struct Cursor {
    block: usize,
    page: u64,
    /// Up to here pages were in memory when it was asked.
    data_end: u64,
}

/// Passes over all blocks once, unless the service is stopped.
pub(crate) fn run(shared: &Shared) {
    *lock(&shared.cursor) = Cursor::default();
    while !shared.stopping.load(Ordering::SeqCst) {
        match shared.map_background(STEP) {
            Ok(mapped) if mapped.wrapped => return,
            Ok(_) => {}
            // Everything had come, and the guest maps were unregistered meanwhile.
            Err(FaultError::NotRegistered) => return,
            // Only the time is lost that faults take instead.
            Err(error) => return shared.trouble(Trouble::Guest(format!("the background mapper ends: {error}"))),
        }
    }
}

impl Shared {
    fn map_background(&self, budget: u64) -> Result<Mapped, FaultError> {
        let mut mapped = Mapped::default();
        let mut cursor = lock(&self.cursor);
        while mapped.pages < budget {
            let Some(block) = self.blocks.get(cursor.block) else {
                *cursor = Cursor::default();
                mapped.wrapped = true;
                break;
            };
            if cursor.page >= cursor.data_end {
                // Asked once for each run: the kernel walks over all of it to find its end.
                let rest = cursor.page * GRANULE..block.states.pages() * GRANULE;
                let os = |source| FaultError::Os { what: "looking for holes", source };
                match block.block.data_runs(rest).next().transpose().map_err(os)? {
                    Some(data) => (cursor.page, cursor.data_end) = (data.start / GRANULE, data.end.div_ceil(GRANULE)),
                    None => *cursor = Cursor { block: cursor.block + 1, ..Cursor::default() },
                }
                continue;
            }
            let step = STEP.min(budget).max(block.states.unit_granules());
            let (start, end) = (cursor.page, cursor.data_end.min(cursor.page + step));
            cursor.page = end;
            for run in block.states.unplaced_runs(start..end) {
                mapped.pages += self.map_run(block, run)?;
            }
            // Faults go first.
            while self.serving.load(Ordering::Relaxed) && !self.stopping.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
        }
        self.background_pages.fetch_add(mapped.pages, Ordering::Relaxed);
        Ok(mapped)
    }

    /// Maps a run of received pages, of which only whole units are taken.
    pub fn map_run(&self, block: &crate::block::BlockFaults, run: std::ops::Range<u64>) -> Result<u64, FaultError> {
        let unit = block.states.unit_granules();
        let whole = run.start.next_multiple_of(unit)..run.end / unit * unit;
        if whole.is_empty() {
            return Ok(0);
        }
        // A hole may have been made since we looked: who touches it is answered then.
        let stopped = self
            .with_target(block, |target| target.map(|target| target.in_place(bytes(&whole), true, &mut |_| Ok(()))));
        match stopped {
            None => Err(FaultError::NotRegistered),
            Some(Ok(())) => {
                block.states.set_placed(whole.clone());
                Ok(whole.end - whole.start)
            }
            Some(Err(stopped)) => Err(FaultError::Place {
                block: block.id(),
                start: stopped.at / GRANULE,
                end: whole.end,
                reason: stopped.reason,
            }),
        }
    }
}
