//! What channels call when pages have arrived, and what makes a page visible to those who wait for it.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Instant;

use wherry_memory::{BlockId, GRANULE};

use crate::block::BlockFaults;
use crate::place::{Stopped, Target};
use crate::service::{FaultService, Shared, Trouble, bytes};
use crate::{FaultError, Outcome, PageState, SourceId, Way, lock, read};

impl FaultService {
    /// The bytes of pages that the caller has claimed are in the engine map (way [`Way::InPlace`]): publishes them, places
    /// those that somebody waits for, and then the others, so that they never fault.
    ///
    /// A page whose placement fails is [told of](Self::take_troubles), and placed when it is touched.
    pub fn received(&self, block: BlockId, pages: Range<u64>) -> Result<(), FaultError> {
        let arrived = Instant::now();
        let faults = self.shared.block_with(block, &pages)?;
        let fill = faults.arrive();
        if fill.way() != Way::InPlace {
            return Err(FaultError::Way { block, want: Way::Copy, got: Way::InPlace });
        }
        self.shared.publish(faults, pages.clone(), false, true, arrived);
        self.shared.place_rest(faults, pages);
        Ok(())
    }

    /// The bytes of pages that the caller has claimed are in `staged` (way [`Way::Copy`]): places and publishes them,
    /// and wakes those who wait.
    ///
    /// On an error the pages before the one that it names are published, the others still belong to the caller.
    pub fn received_copy(&self, block: BlockId, pages: Range<u64>, staged: &[u8]) -> Result<(), FaultError> {
        let arrived = Instant::now();
        let faults = self.shared.block_with(block, &pages)?;
        if staged.len() as u64 != (pages.end - pages.start) * GRANULE {
            return Err(FaultError::Staging { block, start: pages.start, end: pages.end, got: staged.len() });
        }
        let fill = faults.arrive();
        if fill.way() != Way::Copy {
            return Err(FaultError::Way { block, want: Way::InPlace, got: Way::Copy });
        }
        if faults.unit() != GRANULE {
            return self.shared.stage(faults, pages, Some(staged), arrived);
        }
        let stopped = self.shared.copy(faults, &pages, staged);
        // What was copied is visible, and a guest may have written to it already: it must not be filled again.
        let end = stopped.as_ref().map_or(pages.end, |s| s.at / GRANULE);
        self.shared.publish(faults, pages.start..end, false, false, arrived);
        faults.states.set_placed(pages.start..end);
        place_error(block, pages.end, stopped)
    }

    /// Pages that the caller has claimed are zero. Those that are not in memory stay holes until they are touched.
    pub fn received_zero(&self, block: BlockId, pages: Range<u64>) -> Result<(), FaultError> {
        let arrived = Instant::now();
        let faults = self.shared.block_with(block, &pages)?;
        let fill = faults.arrive();
        if fill.way() == Way::Copy && faults.unit() != GRANULE {
            return self.shared.stage(faults, pages, None, arrived);
        }
        let mut stale = Vec::new();
        for run in faults.states.filling_runs(pages.clone()) {
            stale.extend(faults.data(run)?);
        }
        let mut next = pages.start;
        for run in stale {
            let by_copy = fill.way() == Way::Copy;
            if by_copy {
                faults.block.punch(bytes(&run))?;
            } else {
                faults.zero(&run)?;
            }
            self.shared.publish(faults, next..run.start, true, true, arrived);
            self.shared.publish(faults, run.clone(), by_copy, true, arrived);
            next = run.end;
        }
        self.shared.publish(faults, next..pages.end, true, true, arrived);
        Ok(())
    }

    /// Marks pages that are whole before the switch: precopy brought them, or they are holes and zero.
    ///
    /// This is done in the blackout, so the memfd is not asked which they are (it takes long to answer for much memory):
    /// that a page of them was punched is found out only once it has been placed.
    pub fn mark_received(&self, block: BlockId, pages: Range<u64>) -> Result<(), FaultError> {
        let faults = self.shared.block_with(block, &pages)?;
        // Faults that wait already are events that nobody has read: whoever reads them looks at the state.
        if !self.has_started() {
            faults.states.preset_received(pages, true);
            return Ok(());
        }
        for page in faults.states.mark_received(pages, true) {
            self.shared.resolve(faults, faults.states.unit_of(page));
        }
        Ok(())
    }
}

fn place_error(block: BlockId, end: u64, stopped: Option<Stopped>) -> Result<(), FaultError> {
    match stopped {
        None => Ok(()),
        Some(Stopped { at, reason }) => Err(FaultError::Place { block, start: at / GRANULE, end, reason }),
    }
}

impl Shared {
    /// Publishes pages, and serves those who wait for them: `place` says whether their pages are still to be placed,
    /// `arrived` since when their bytes are there.
    fn publish(&self, block: &BlockFaults, pages: Range<u64>, hole: bool, place: bool, arrived: Instant) {
        let mut waited = Vec::new();
        for page in pages {
            if block.states.settle(page, hole).is_some_and(|published| published.waited) {
                waited.push(block.states.unit_of(page));
            }
        }
        for unit in waited {
            if place {
                self.place_or_retry(block, unit.clone());
            }
            self.finish((block.id(), unit.start), unit, Some(arrived));
        }
    }

    /// Places what has arrived in place, and nobody waits for, of the units in which these pages lie.
    fn place_rest(&self, block: &BlockFaults, pages: Range<u64>) {
        let (Some(first), Some(last)) = (pages.clone().next(), pages.last()) else { return };
        for run in block.states.unplaced_runs(block.states.unit_of(first).start..block.states.unit_of(last).end) {
            if let Err(FaultError::Place { start, reason, .. }) = self.map_run(block, run) {
                self.trouble(Trouble::Placement { block: block.id(), page: start, reason });
            }
        }
    }

    /// Makes a received unit visible, and wakes all who wait for it.
    pub fn resolve(&self, block: &BlockFaults, unit: Range<u64>) {
        self.place_or_retry(block, unit.clone());
        self.finish((block.id(), unit.start), unit, None);
    }

    /// Places; if that fails, says so and wakes those who wait here, so that they fault again.
    fn place_or_retry(&self, block: &BlockFaults, pages: Range<u64>) {
        let Err(stopped) = self.place(block, pages.clone()) else { return };
        self.trouble(Trouble::Placement { block: block.id(), page: stopped.at / GRANULE, reason: stopped.reason });
        self.with_target(block, |target| {
            if let Some(target) = target {
                let rest = bytes(&pages);
                let _ = target.calls.wake(target.base + rest.start, rest.end - rest.start);
            }
        });
    }

    /// Makes received pages (whole units) visible in the guest map and wakes who waits there. Holes that are explained
    /// become zeros; others too, but they are told of and the sources that map the block are quarantined.
    pub fn place(&self, block: &BlockFaults, pages: Range<u64>) -> Result<(), Stopped> {
        let mut punched = Vec::new();
        let result = self.with_target(block, |target| {
            let Some(target) = target else {
                // Nobody can wait in a guest map; who waits elsewhere needs the page in the file.
                pages.clone().for_each(|page| block.touch(page));
                return Ok(());
            };
            target.in_place(bytes(&pages), true, &mut |at| {
                let page = at / GRANULE;
                if !block.states.hole_is_explained(page) {
                    // Another thread may have made it between the two looks; what it made is in the file now.
                    match target.calls.continue_range(target.base + at, target.unit, true) {
                        Ok(Outcome::Fault) => punched.push(page),
                        _ => {
                            return target
                                .in_place(at..at + target.unit, true, &mut |at| stop(at, "it comes and goes"));
                        }
                    }
                }
                target.zero(at..at + target.unit, block.zeros())
            })
        });
        let placed = result.as_ref().err().map_or(pages.end, |stopped| stopped.at / GRANULE);
        block.states.set_placed(pages.start..placed);
        for page in punched {
            self.punched(block, page);
        }
        result
    }

    fn punched(&self, block: &BlockFaults, page: u64) {
        let sources: Vec<_> = read(&self.sources).values().filter(|s| !s.is_guest()).cloned().collect();
        let mut suspects = Vec::new();
        for source in sources.iter().filter(|s| s.maps(block.id())) {
            suspects.push(source.id);
            self.quarantine(source, format!("page {page} of RAM block {} was punched, which it maps", block.id()));
        }
        self.punched_pages.fetch_add(block.unit() / GRANULE, Ordering::Relaxed);
        self.trouble(Trouble::Punched { block: block.id(), page, suspects });
    }

    /// Copies staged bytes into missing units; tells where it stopped.
    fn copy(&self, block: &BlockFaults, pages: &Range<u64>, staged: &[u8]) -> Option<Stopped> {
        let range = bytes(pages);
        self.with_target(block, |target| {
            let target = match target {
                Some(target) => target,
                None => return stop(range.start, "the guest maps are not registered with userfaultfd").err(),
            };
            let occupied = &mut |at: u64| {
                // Somebody allocated it since the block became shared, or it was stale. Nothing was received there, so
                // taking it away loses nothing, and whoever has it mapped faults again.
                let unit = block.states.unit_of(at / GRANULE);
                if !unit.clone().any(|page| block.states.state(page) == PageState::Filling) {
                    return stop(at, "the page was not claimed");
                }
                self.replaced_pages.fetch_add(unit.end - unit.start, Ordering::Relaxed);
                block.block.punch(bytes(&unit)).map_err(|e| Stopped { at, reason: e.to_string() })
            };
            target.copy(range.start, staged, true, occupied).err()
        })
    }

    /// Way copy, large pages: keeps granules until their unit is whole, then copies it, and only then publishes the
    /// last of them. `None`: they are zero.
    fn stage(
        &self,
        block: &BlockFaults,
        pages: Range<u64>,
        bytes: Option<&[u8]>,
        arrived: Instant,
    ) -> Result<(), FaultError> {
        let mut staged = lock(&block.staged);
        let mut page = pages.start;
        while page < pages.end {
            let unit = block.states.unit_of(page);
            let part = page..pages.end.min(unit.end);
            page = part.end;
            let filling: Vec<_> = part.clone().filter(|page| block.states.state(*page) == PageState::Filling).collect();
            if let Some(bytes) = bytes {
                let buffer = staged.entry(unit.start).or_insert_with(|| vec![0; block.unit() as usize]);
                for page in &filling {
                    let (to, from) =
                        (((page - unit.start) * GRANULE) as usize, ((page - pages.start) * GRANULE) as usize);
                    buffer[to..to + GRANULE as usize].copy_from_slice(&bytes[from..from + GRANULE as usize]);
                }
            }
            let whole = block.states.unit_lacks(unit.start) == filling.len() as u64;
            let mut placed = false;
            if whole && let Some(buffer) = staged.remove(&unit.start) {
                if let Some(stopped) = self.copy(block, &unit, &buffer) {
                    staged.insert(unit.start, buffer);
                    return place_error(block.id(), part.start.max(pages.start), Some(stopped));
                }
                placed = true;
            }
            self.publish(block, part, bytes.is_none(), !placed, arrived);
            if placed {
                block.states.set_placed(unit);
            }
        }
        Ok(())
    }

    /// Calls `f` with the guest map of a block, or with nothing if it is not registered.
    pub fn with_target<R>(&self, block: &BlockFaults, f: impl FnOnce(Option<&Target<'_>>) -> R) -> R {
        let source = self.source(SourceId::GUEST);
        let uffd = source.as_ref().map(|source| read(&source.uffd));
        match uffd.as_ref().and_then(|uffd| uffd.as_ref()) {
            None => f(None),
            Some(calls) => f(Some(&Target {
                calls,
                base: block.block.guest_map() as u64,
                unit: block.unit(),
                // The fault thread reads events all the time; and no kind of event is asked for that would be pending.
                drain: &std::thread::yield_now,
            })),
        }
    }
}

fn stop(at: u64, reason: &str) -> Result<(), Stopped> {
    Err(Stopped { at, reason: reason.into() })
}
