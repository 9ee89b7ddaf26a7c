//! What the service keeps of one block: page states, the way it receives, and units that are not whole yet.
#![expect(unsafe_code, reason = "reads and writes pages through the engine map")]

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use wherry_memory::{Block, BlockId, GRANULE};

use crate::{FaultError, PageStates, Way, lock};

/// One block on the destination.
pub(crate) struct BlockFaults {
    pub block: Arc<Block>,
    pub states: PageStates,
    pub gate: Gate,
    /// Way `Copy` with large pages: the bytes of units that lack granules, by first granule. Held while a unit is
    /// completed, so that it is copied before its last granule is published.
    pub staged: Mutex<HashMap<u64, Vec<u8>>>,
    zeros: OnceLock<Vec<u8>>,
}

impl BlockFaults {
    pub fn new(block: Arc<Block>) -> Self {
        let unit = block.spec().page_size.bytes() / GRANULE;
        Self {
            states: PageStates::new(block.pages(), unit),
            block,
            gate: Gate::default(),
            staged: Mutex::default(),
            zeros: OnceLock::new(),
        }
    }

    pub fn id(&self) -> BlockId {
        self.block.spec().id
    }

    /// Bytes of a unit.
    pub fn unit(&self) -> u64 {
        self.block.spec().page_size.bytes()
    }

    /// One unit of zeros.
    pub fn zeros(&self) -> &[u8] {
        self.zeros.get_or_init(|| vec![0; self.unit() as usize])
    }

    /// Zeroes pages that are in memory and that the caller has claimed.
    pub fn zero(&self, pages: &Range<u64>) -> Result<(), FaultError> {
        let len = (pages.end - pages.start) * GRANULE;
        let start = self.block.engine_range(pages.start * GRANULE, len)?;
        // SAFETY: inside the engine map, and the caller owns the pages until it publishes them.
        unsafe { start.write_bytes(0, len as usize) };
        Ok(())
    }

    /// The runs of pages inside a range that are in memory. Made for ranges far smaller than the block: `SEEK_HOLE` has
    /// no end to stop at, and would walk over all that is in memory behind the range.
    pub fn data(&self, pages: Range<u64>) -> Result<Vec<Range<u64>>, FaultError> {
        let failed = |source| FaultError::Os { what: "looking for holes", source };
        let bytes = pages.start * GRANULE..pages.end * GRANULE;
        if self.unit() != GRANULE {
            let runs = self.block.data_runs(bytes).map(|run| run.map(|r| r.start / GRANULE..r.end / GRANULE));
            return runs.collect::<Result<_, _>>().map_err(failed);
        }
        let mut runs: Vec<Range<u64>> = Vec::new();
        let mut at = bytes.start;
        while at < bytes.end {
            let data = match seek(self.block.fd(), SeekFrom::Data(at)) {
                Ok(data) if data < bytes.end => data / GRANULE,
                Ok(_) | Err(Errno::NXIO) => break,
                Err(error) => return Err(failed(error.into())),
            };
            match runs.last_mut() {
                Some(run) if run.end == data => run.end += 1,
                _ => runs.push(data..data + 1),
            }
            at = (data + 1) * GRANULE;
        }
        Ok(runs)
    }

    /// Has a page of the file allocated, as zeros, if it is a hole.
    pub fn touch(&self, page: u64) {
        if let Ok(start) = self.block.engine_range(page * GRANULE, GRANULE) {
            // SAFETY: inside the engine map; the value is not used.
            unsafe { start.read_volatile() };
        }
    }

    /// Makes what is in memory fit another way. Nothing is received meanwhile.
    pub fn convert(&self, way: Way) -> Result<(), FaultError> {
        match (way, self.unit() == GRANULE) {
            (Way::Copy, true) => {
                let all = 0..self.states.pages();
                self.states.lacking_runs(all).into_iter().try_for_each(|run| self.take_out(run))
            }
            (Way::Copy, false) => {
                let granules = self.states.unit_granules();
                let units = (0..self.states.pages()).step_by(granules as usize);
                units.filter(|unit| self.states.unit_lacks(*unit) > 0).try_for_each(|unit| self.unit_out(unit))
            }
            (Way::InPlace, _) => {
                let mut staged = lock(&self.staged);
                staged.iter().try_for_each(|(unit, bytes)| self.unit_in(*unit, bytes))?;
                staged.clear();
                Ok(())
            }
        }
    }

    /// Punches pages, and looks whether they are gone.
    fn take_out(&self, pages: Range<u64>) -> Result<(), FaultError> {
        for run in self.data(pages)? {
            self.block.punch(run.start * GRANULE..run.end * GRANULE)?;
            if let Some(left) = self.data(run)?.first() {
                return Err(FaultError::StillData { block: self.id(), start: left.start, end: left.end });
            }
        }
        Ok(())
    }

    /// Takes a unit out that is not whole; what was received of it goes to staging.
    fn unit_out(&self, unit: u64) -> Result<(), FaultError> {
        let pages = self.states.unit_of(unit);
        if self.states.unit_lacks(unit) < self.states.unit_granules() {
            let mut bytes = vec![0; self.unit() as usize];
            for page in pages.clone().filter(|page| self.states.state(*page) == crate::PageState::Received) {
                let from = self.block.engine_range(page * GRANULE, GRANULE)?;
                let to = &mut bytes[((page - unit) * GRANULE) as usize..][..GRANULE as usize];
                // SAFETY: `from` is one page of the engine map, `to` as many bytes of a fresh buffer. The unit is not
                // whole, so it is in no guest map, and nothing is received: nobody writes these bytes.
                unsafe { from.copy_to_nonoverlapping(to.as_mut_ptr(), to.len()) };
            }
            lock(&self.staged).insert(unit, bytes);
        }
        let taken = self.take_out(pages);
        if taken.is_err()
            && let Some(bytes) = lock(&self.staged).remove(&unit)
        {
            self.unit_in(unit, &bytes)?;
        }
        taken
    }

    /// Puts a staged unit into memory.
    fn unit_in(&self, unit: u64, bytes: &[u8]) -> Result<(), FaultError> {
        let to = self.block.engine_range(unit * GRANULE, bytes.len() as u64)?;
        // SAFETY: one unit of the engine map that is not whole, so it is in no guest map, and nothing is received.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// Waits for the way of the block to be settled, and keeps it so until the guard is dropped.
    pub fn fill(&self) -> Fill<'_> {
        let mut state = lock(&self.gate.state);
        while state.phase != Phase::Open {
            state = self.gate.wait(state);
        }
        self.enter(state)
    }

    /// The same for a step inside of what may be a fill: does not wait for fills to end, which would be for itself.
    pub fn arrive(&self) -> Fill<'_> {
        let mut state = lock(&self.gate.state);
        while state.phase == Phase::Converting {
            state = self.gate.wait(state);
        }
        self.enter(state)
    }

    fn enter(&self, mut state: MutexGuard<'_, GateState>) -> Fill<'_> {
        state.fills += 1;
        Fill { gate: &self.gate, way: state.way }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Open,
    /// The way is to be changed: new fills wait, running ones end.
    Draining,
    /// Nothing is received.
    Converting,
}

struct GateState {
    way: Way,
    phase: Phase,
    fills: u64,
}

/// The way of a block, which changes only while nothing is received there.
pub(crate) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

impl Default for Gate {
    fn default() -> Self {
        let state = GateState { way: Way::InPlace, phase: Phase::Open, fills: 0 };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }
}

impl Gate {
    pub fn way(&self) -> Way {
        lock(&self.state).way
    }

    /// Lets fills end, converts, and opens again. Only one thread at a time may call it.
    pub fn change(
        &self,
        block: BlockId,
        way: Way,
        limit: Duration,
        convert: impl FnOnce() -> Result<(), FaultError>,
    ) -> Result<(), FaultError> {
        let started = Instant::now();
        let mut state = lock(&self.state);
        if state.way == way {
            return Ok(());
        }
        state.phase = Phase::Draining;
        while state.fills > 0 {
            let Some(left) = limit.checked_sub(started.elapsed()) else {
                let fills = state.fills;
                state.phase = Phase::Open;
                self.changed.notify_all();
                return Err(FaultError::Busy { block, fills, waited: limit });
            };
            state = match self.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        state.phase = Phase::Converting;
        drop(state);
        let result = convert();
        let mut state = lock(&self.state);
        if result.is_ok() {
            state.way = way;
        }
        state.phase = Phase::Open;
        self.changed.notify_all();
        result
    }

    fn wait<'a>(&self, state: MutexGuard<'a, GateState>) -> MutexGuard<'a, GateState> {
        self.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Held by a channel from before it claims pages until they are published or given up: meanwhile the way of the block
/// stays as it is. Hold it for a frame, not for a round.
#[must_use = "the way may change as soon as it is dropped"]
pub struct Fill<'a> {
    gate: &'a Gate,
    way: Way,
}

impl Fill<'_> {
    /// How pages are received: into the engine map and then `received`, or into staging and then `received_copy`.
    pub fn way(&self) -> Way {
        self.way
    }
}

impl Drop for Fill<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.gate.state);
        state.fills -= 1;
        if state.fills == 0 && state.phase != Phase::Open {
            self.gate.changed.notify_all();
        }
    }
}
