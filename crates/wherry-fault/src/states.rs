//! What is known of each page of one block on the destination.
//!
//! ```text
//!            want, prefetch            claim               publish
//!  missing ----------------> requested ------> filling --------------> received
//!     |                          ^      claim     |
//!     +---------------------------------------->--+
//!     ^------------------------- unclaim ---------+   (its channel died)
//! ```
//!
//! The state of a page and the flag that somebody waits for it are in one atomic byte, and every method is one atomic
//! step on it. So whoever publishes a page sees every wait that came before, and whoever comes after sees that it is
//! received: no wake is lost. A channel must win [`claim`](PageStates::claim) *before* it reads a byte into the page;
//! the loser drains its copy to scratch, because a late duplicate would undo what the guest wrote meanwhile.
//!
//! In blocks of large pages only a whole unit can be placed. There the wait flag sits in one word with the number of
//! granules received, so that the one who publishes the last granule, and nobody else, sees the unit become whole.
//!
//! Orderings: [`publish`](PageStates::publish) releases what its caller wrote into the page, every read of a state
//! acquires it. The memory comes from zeroed pages: a sparse block of 256 GiB costs nothing until it is used.

use std::ops::Range;

use wherry_memory::PageSet;

use crate::sync::{AtomicU8, AtomicU16, AtomicU64, Ordering, fence, zeroed_u8, zeroed_u16};

const STATE: u8 = 3;
const MISSING: u8 = 0;
const REQUESTED: u8 = 1;
const FILLING: u8 = 2;
const RECEIVED: u8 = 3;
/// Somebody waits. Never together with `RECEIVED`.
const WAIT: u8 = 1 << 2;
/// Received as zeros, or as a hole: that it is not in memory is explained.
const HOLE: u8 = 1 << 3;
/// Was made visible in the guest map.
const PLACED: u8 = 1 << 4;
/// Was asked for as a neighbour of a page that somebody touched, and has not been touched itself since.
const NEIGHBOUR: u8 = 1 << 5;

/// Somebody waits for the unit; the bits below count its received granules.
const UNIT_WAIT: u16 = 1 << 15;

/// State of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageState {
    /// Nobody has asked for it.
    Missing,
    /// It has been asked for.
    Requested,
    /// A channel owns it and reads bytes into it.
    Filling,
    /// Its bytes are complete.
    Received,
}

/// What a fault on a page calls for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// The caller, and only the caller, asks for the page.
    Request,
    /// It was asked for, or a channel fills it: who publishes it will see that somebody waits.
    Wait,
    /// It is there: resolve the fault now. No flag was left.
    Received,
}

/// What became of a page that was published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Published {
    /// Its unit is whole now, and nobody else is told so.
    pub whole: bool,
    /// The unit is whole and somebody waits for it. The flag is cleared: the caller must place and wake.
    pub waited: bool,
}

/// The states of all granules of one block.
pub struct PageStates {
    pages: Box<[AtomicU8]>,
    /// Empty if a unit is one granule.
    units: Box<[AtomicU16]>,
    unit: u64,
    received: AtomicU64,
}

impl std::fmt::Debug for PageStates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageStates")
            .field("pages", &self.pages.len())
            .field("unit", &self.unit)
            .field("received", &self.received_count())
            .finish()
    }
}

impl PageStates {
    /// All pages missing, in a block of `pages` granules that are placed in units of `unit_granules`.
    ///
    /// # Panics
    /// If `unit_granules` is not within 1..=16384 or does not divide `pages`.
    pub fn new(pages: u64, unit_granules: u64) -> Self {
        assert!((1..=16384).contains(&unit_granules), "a unit has 1 to 16384 granules, not {unit_granules}");
        assert!(pages.is_multiple_of(unit_granules), "{pages} granules are no whole number of units");
        let units = if unit_granules == 1 { 0 } else { pages / unit_granules };
        Self {
            pages: zeroed_u8(pages as usize),
            units: zeroed_u16(units as usize),
            unit: unit_granules,
            received: AtomicU64::new(0),
        }
    }

    /// How many granules the block has.
    pub fn pages(&self) -> u64 {
        self.pages.len() as u64
    }

    /// How many granules are placed together.
    pub fn unit_granules(&self) -> u64 {
        self.unit
    }

    /// The granules of the unit that `page` belongs to.
    pub fn unit_of(&self, page: u64) -> Range<u64> {
        let start = page / self.unit * self.unit;
        start..start + self.unit
    }

    /// The state of a page. If it is received, its bytes can be read.
    pub fn state(&self, page: u64) -> PageState {
        match self.load(page) & STATE {
            MISSING => PageState::Missing,
            REQUESTED => PageState::Requested,
            FILLING => PageState::Filling,
            _ => PageState::Received,
        }
    }

    /// A fault on a page: leaves the wait flag unless the page (its whole unit, in blocks of large pages) is received.
    pub fn want(&self, page: u64) -> Want {
        let Some(unit) = self.unit_word(page) else {
            let before = self.update(page, |bits| match bits & STATE {
                RECEIVED => None,
                MISSING => Some(bits & !STATE | REQUESTED | WAIT),
                _ => Some(bits | WAIT),
            });
            return match before {
                Err(_) => Want::Received,
                Ok(bits) if bits & STATE == MISSING => Want::Request,
                Ok(_) => Want::Wait,
            };
        };
        let before = unit.fetch_or(UNIT_WAIT, Ordering::AcqRel);
        if u64::from(before & !UNIT_WAIT) == self.unit {
            unit.fetch_and(!UNIT_WAIT, Ordering::AcqRel);
            return Want::Received;
        }
        // Against `unclaim`, which gives the page up and then looks for the flag: one of the two sees the other.
        fence(Ordering::SeqCst);
        if self.ask(page) { Want::Request } else { Want::Wait }
    }

    /// Asks for a page that nobody waits for, because it belongs to a unit that somebody waits for; `true` if the caller
    /// is to ask.
    pub(crate) fn ask(&self, page: u64) -> bool {
        self.update(page, |bits| (bits & STATE == MISSING).then_some(bits & !STATE | REQUESTED)).is_ok()
    }

    /// Asks for a page that nobody waits for, because it is the neighbour of one; `true` if the caller is to ask.
    pub fn prefetch(&self, page: u64) -> bool {
        self.update(page, |bits| (bits & STATE == MISSING).then_some(bits & !STATE | REQUESTED | NEIGHBOUR)).is_ok()
    }

    /// [`prefetch`](Self::prefetch) for each page of a range; the runs that the caller is to ask for, ascending.
    pub(crate) fn prefetch_range(&self, range: Range<u64>) -> Vec<Range<u64>> {
        collect_runs(range.start..range.end.min(self.pages()), |page| self.prefetch(page))
    }

    /// Whether a page was asked for as a neighbour, and this is the first that asks: it was worth it.
    pub fn take_neighbour(&self, page: u64) -> bool {
        self.update(page, |bits| (bits & NEIGHBOUR != 0).then_some(bits & !NEIGHBOUR)).is_ok()
    }

    /// Takes a page for filling. `false`: it is received, or somebody else fills it; the bytes go to scratch.
    pub fn claim(&self, page: u64) -> bool {
        self.update(page, |bits| (bits & STATE < FILLING).then_some(bits & !STATE | FILLING)).is_ok()
    }

    /// Takes all pages of a range that can be taken; the runs that were won, ascending.
    pub fn claim_range(&self, range: Range<u64>) -> Vec<Range<u64>> {
        collect_runs(range, |page| self.claim(page))
    }

    /// Publishes a page that the caller has claimed and filled; `true` if somebody waits, and then the caller places
    /// the page (in blocks of large pages: the unit, of which it was the last page) and wakes.
    ///
    /// A page that is not being filled is left as it is.
    pub fn publish(&self, page: u64) -> bool {
        self.settle(page, false).is_some_and(|published| published.waited)
    }

    /// [`publish`](Self::publish) that also tells when a unit becomes whole. With `hole`, the page is zero and need
    /// not be in memory. `None`: the page was not being filled.
    pub fn settle(&self, page: u64, hole: bool) -> Option<Published> {
        let hole = if hole { HOLE } else { 0 };
        let before =
            self.update(page, |bits| (bits & STATE == FILLING).then_some(bits & NEIGHBOUR | RECEIVED | hole)).ok()?;
        let published = self.settled(page, before);
        self.received.fetch_add(1, Ordering::AcqRel);
        Some(published)
    }

    /// Gives up a page whose channel died; `true` if somebody waits, and then it stays requested and the caller must
    /// ask for it again.
    pub fn unclaim(&self, page: u64) -> bool {
        let Some(unit) = self.unit_word(page) else {
            let before = self.update(page, |bits| {
                let next = if bits & WAIT != 0 { bits & !STATE | REQUESTED } else { bits & !(STATE | NEIGHBOUR) };
                (bits & STATE == FILLING).then_some(next)
            });
            return before.is_ok_and(|bits| bits & WAIT != 0);
        };
        if self.update(page, |bits| (bits & STATE == FILLING).then_some(bits & !(STATE | NEIGHBOUR))).is_err() {
            return false;
        }
        fence(Ordering::SeqCst);
        unit.load(Ordering::Acquire) & UNIT_WAIT != 0 && self.ask(page)
    }

    /// Marks pages that are whole before the switch. `hole`: they may be holes of the file, which read as zeros.
    ///
    /// Pages that a channel fills are left to it. Returns the pages for which somebody waits already.
    pub fn mark_received(&self, range: Range<u64>, hole: bool) -> Vec<u64> {
        let hole = if hole { HOLE } else { 0 };
        let mut waited = Vec::new();
        let mut count = 0;
        for page in range {
            if let Ok(before) = self.update(page, |bits| (bits & STATE < FILLING).then_some(RECEIVED | hole)) {
                count += 1;
                if self.settled(page, before).waited {
                    waited.push(page);
                }
            }
        }
        self.received.fetch_add(count, Ordering::AcqRel);
        waited
    }

    /// [`mark_received`](Self::mark_received) while nobody else uses these states: in the blackout of a switch a plain
    /// store for each page (0.3 ms a GiB) is much less than an atomic step (5 ms).
    pub(crate) fn preset_received(&self, range: Range<u64>, hole: bool) {
        let bits = RECEIVED | if hole { HOLE } else { 0 };
        let range = range.start..range.end.min(self.pages());
        let mut fresh = 0;
        for (page, word) in range.clone().zip(&self.pages[range.start as usize..range.end as usize]) {
            if word.load(Ordering::Relaxed) == MISSING {
                word.store(bits, Ordering::Relaxed);
                fresh += 1;
                if let Some(unit) = self.unit_word(page) {
                    unit.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        self.received.fetch_add(fresh, Ordering::Release);
    }

    /// How many pages are received.
    pub fn received_count(&self) -> u64 {
        self.received.load(Ordering::Acquire)
    }

    /// Whether all pages are received.
    pub fn is_complete(&self) -> bool {
        self.received_count() == self.pages()
    }

    /// Whether the unit that the page belongs to is received as a whole.
    pub fn unit_complete(&self, page: u64) -> bool {
        match self.unit_word(page) {
            None => self.load(page) & STATE == RECEIVED,
            Some(unit) => u64::from(unit.load(Ordering::Acquire) & !UNIT_WAIT) == self.unit,
        }
    }

    /// How many granules of the page's unit are not received.
    pub(crate) fn unit_lacks(&self, page: u64) -> u64 {
        match self.unit_word(page) {
            None => u64::from(self.load(page) & STATE != RECEIVED),
            Some(unit) => self.unit - u64::from(unit.load(Ordering::Acquire) & !UNIT_WAIT),
        }
    }

    /// Whether somebody waits for the page (for its unit, in blocks of large pages).
    pub fn is_waited(&self, page: u64) -> bool {
        match self.unit_word(page) {
            None => self.load(page) & WAIT != 0,
            Some(unit) => {
                let unit = unit.load(Ordering::Acquire);
                unit & UNIT_WAIT != 0 && u64::from(unit & !UNIT_WAIT) != self.unit
            }
        }
    }

    /// The received pages, which a recovery tells the source.
    pub fn received_set(&self) -> PageSet {
        let mut set = PageSet::new(self.pages());
        for run in self.runs(0..self.pages(), |bits| bits & STATE == RECEIVED) {
            set.insert_range(run);
        }
        set
    }

    /// The runs of pages inside a range that nobody has asked for.
    pub fn missing_runs(&self, range: Range<u64>) -> Vec<Range<u64>> {
        self.runs(range, |bits| bits & STATE == MISSING)
    }

    /// The runs of pages inside a range that are not received.
    pub(crate) fn lacking_runs(&self, range: Range<u64>) -> Vec<Range<u64>> {
        self.runs(range, |bits| bits & STATE != RECEIVED)
    }

    /// The runs of pages inside a range that a channel fills.
    pub(crate) fn filling_runs(&self, range: Range<u64>) -> Vec<Range<u64>> {
        self.runs(range, |bits| bits & STATE == FILLING)
    }

    /// The pages that are requested or being filled and for which somebody waits.
    pub fn outstanding(&self) -> Vec<u64> {
        self.pick(|bits| matches!(bits & STATE, REQUESTED | FILLING))
    }

    /// After a lost link: every page that was requested can be requested again. Returns the missing pages for which
    /// somebody waits; [`want`](Self::want) makes a request of each. Pages of dead channels are to be given up before.
    pub fn rewind_requests(&self) -> Vec<u64> {
        for page in 0..self.pages() {
            if self.load(page) & STATE == REQUESTED {
                let _ = self.update(page, |bits| (bits & STATE == REQUESTED).then_some(bits & !(STATE | NEIGHBOUR)));
            }
        }
        self.pick(|bits| bits & STATE == MISSING)
    }

    /// Remembers that received pages are visible in the guest map.
    pub(crate) fn set_placed(&self, range: Range<u64>) {
        for page in range {
            let _ = self.update(page, |bits| (bits & (STATE | PLACED) == RECEIVED).then_some(bits | PLACED));
        }
    }

    /// Whether nothing is known to be in memory for this unit: all of it came as zeros and was never made visible.
    pub(crate) fn hole_is_explained(&self, page: u64) -> bool {
        self.unit_of(page).all(|page| self.load(page) & (STATE | HOLE | PLACED) == RECEIVED | HOLE)
    }

    /// The runs of received pages inside a range that have not been made visible.
    pub(crate) fn unplaced_runs(&self, range: Range<u64>) -> Vec<Range<u64>> {
        self.runs(range, |bits| bits & (STATE | PLACED) == RECEIVED)
    }

    /// What follows from a page having just become received; its bits were `before`.
    fn settled(&self, page: u64, before: u8) -> Published {
        match self.unit_word(page) {
            None => Published { whole: true, waited: before & WAIT != 0 },
            Some(unit) => {
                let count = unit.fetch_add(1, Ordering::AcqRel);
                let whole = u64::from(count & !UNIT_WAIT) + 1 == self.unit;
                let waited = whole && count & UNIT_WAIT != 0;
                if waited {
                    unit.fetch_and(!UNIT_WAIT, Ordering::AcqRel);
                }
                Published { whole, waited }
            }
        }
    }

    fn pick(&self, of: impl Fn(u8) -> bool) -> Vec<u64> {
        (0..self.pages()).filter(|page| of(self.load(*page)) && self.is_waited(*page)).collect()
    }

    fn runs(&self, range: Range<u64>, of: impl Fn(u8) -> bool) -> Vec<Range<u64>> {
        collect_runs(range.start..range.end.min(self.pages()), |page| of(self.load(page)))
    }

    fn load(&self, page: u64) -> u8 {
        self.pages[page as usize].load(Ordering::Acquire)
    }

    fn unit_word(&self, page: u64) -> Option<&AtomicU16> {
        self.units.get((page / self.unit) as usize)
    }

    /// One atomic step: what `next` makes of the bits, or nothing. Returns the bits before, `Err` if they were left.
    fn update(&self, page: u64, next: impl Fn(u8) -> Option<u8>) -> Result<u8, u8> {
        let cell = &self.pages[page as usize];
        let mut bits = cell.load(Ordering::Acquire);
        loop {
            let Some(new) = next(bits) else { return Err(bits) };
            match cell.compare_exchange_weak(bits, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(bits),
                Err(now) => bits = now,
            }
        }
    }
}

/// The maximal runs of pages of a range for which `of`, asked once for each in ascending order, says yes.
fn collect_runs(range: Range<u64>, of: impl Fn(u64) -> bool) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for page in range {
        if of(page) {
            match runs.last_mut() {
                Some(run) if run.end == page => run.end += 1,
                _ => runs.push(page..page + 1),
            }
        }
    }
    runs
}
