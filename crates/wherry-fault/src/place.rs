//! Making received bytes visible, whatever the kernel answers.
//!
//! Two ways, chosen for each block. *In place*: the bytes are in the file already, written through the engine map, and
//! CONTINUE maps them. *Copy*: COPY puts a page into file and map in one step; needed where another process maps the
//! block, since it would see a page that is half filled. Pages that are zero and not in the file are made by ZEROPAGE,
//! or in hugetlb blocks by a COPY of zeros.
//!
//! | answer | what is done |
//! |---|---|
//! | EAGAIN, some mapped | go on behind them |
//! | EAGAIN, none mapped | an event is pending: have it read, retry |
//! | EEXIST | one unit is there: wake it, step over it |
//! | EFAULT of CONTINUE | a hole: ask the caller whether that is explained |
//!
//! Nothing counts as placed until the kernel has answered for the whole range.

use std::ops::Range;
use std::time::{Duration, Instant};

use wherry_memory::GRANULE;

use crate::{Outcome, UffdError, Userfault};

/// How the pages of a block become visible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Received through the engine map, made visible by CONTINUE: no other process maps the block.
    InPlace,
    /// Received into staging, made visible by COPY: other processes may map the block.
    Copy,
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Way::InPlace => "in place",
            Way::Copy => "by copy",
        })
    }
}

/// How long a pending event may keep placement from going on.
const AGAIN_LIMIT: Duration = Duration::from_secs(10);
/// How often a page that is there when it should not be is taken away for one COPY.
const OCCUPIED_LIMIT: u32 = 8;

/// The calls that placement needs, so that a test can answer in the kernel's stead.
pub(crate) trait Calls {
    fn continue_range(&self, start: u64, len: u64, wake: bool) -> Result<Outcome, UffdError>;
    fn copy(&self, start: u64, source: &[u8], wake: bool) -> Result<Outcome, UffdError>;
    fn zeropage(&self, start: u64, len: u64, wake: bool) -> Result<Outcome, UffdError>;
    fn wake(&self, start: u64, len: u64) -> Result<(), UffdError>;
}

impl Calls for Userfault {
    fn continue_range(&self, start: u64, len: u64, wake: bool) -> Result<Outcome, UffdError> {
        self.continue_range(start, len, wake)
    }
    fn copy(&self, start: u64, source: &[u8], wake: bool) -> Result<Outcome, UffdError> {
        self.copy(start, source, wake)
    }
    fn zeropage(&self, start: u64, len: u64, wake: bool) -> Result<Outcome, UffdError> {
        self.zeropage(start, len, wake)
    }
    fn wake(&self, start: u64, len: u64) -> Result<(), UffdError> {
        self.wake(start, len)
    }
}

/// Placement stopped.
#[derive(Debug)]
pub(crate) struct Stopped {
    /// Offset in the block of the first byte that is not placed.
    pub at: u64,
    /// Why.
    pub reason: String,
}

/// The guest map of one block, as placement sees it.
pub(crate) struct Target<'a> {
    /// The calls.
    pub calls: &'a dyn Calls,
    /// Address of the guest map.
    pub base: u64,
    /// Bytes of a unit.
    pub unit: u64,
    /// Has pending events read.
    pub drain: &'a dyn Fn(),
}

impl Target<'_> {
    /// Maps a range of the file, in whole units. `hole` is asked about each unit that is not in the file, and fills it
    /// or refuses.
    pub fn in_place(
        &self,
        bytes: Range<u64>,
        wake: bool,
        hole: &mut dyn FnMut(u64) -> Result<(), Stopped>,
    ) -> Result<(), Stopped> {
        let mut cursor = Cursor::new(self, bytes);
        while let Some((at, len)) = cursor.next() {
            match self.calls.continue_range(self.base + at, len, wake) {
                Ok(Outcome::Fault) => {
                    hole(at)?;
                    cursor.skip(self.unit);
                }
                Ok(Outcome::Exists) => {
                    self.wake(at)?;
                    cursor.skip(self.unit);
                }
                other => cursor.advance("UFFDIO_CONTINUE", other)?,
            }
        }
        Ok(())
    }

    /// Fills a range, in whole units, from staged bytes. `occupied` is told of each unit that is in the file although
    /// nothing was received there, and takes it away or refuses.
    pub fn copy(
        &self,
        start: u64,
        staged: &[u8],
        wake: bool,
        occupied: &mut dyn FnMut(u64) -> Result<(), Stopped>,
    ) -> Result<(), Stopped> {
        let mut cursor = Cursor::new(self, start..start + staged.len() as u64);
        let (mut unit, mut tries) = (0, 0);
        while let Some((at, _)) = cursor.next() {
            match self.calls.copy(self.base + at, &staged[(at - start) as usize..], wake) {
                Ok(Outcome::Exists) => {
                    tries = if unit == at { tries + 1 } else { 1 };
                    unit = at;
                    if tries > OCCUPIED_LIMIT {
                        return Err(Stopped { at, reason: "somebody keeps allocating the page".into() });
                    }
                    occupied(at)?;
                }
                other => cursor.advance("UFFDIO_COPY", other)?,
            }
        }
        Ok(())
    }

    /// Makes a range, in whole units, of holes visible as zeros. `zeros` is one unit of them.
    pub fn zero(&self, bytes: Range<u64>, zeros: &[u8]) -> Result<(), Stopped> {
        let mut cursor = Cursor::new(self, bytes);
        while let Some((at, len)) = cursor.next() {
            let (call, answer) = if self.unit == GRANULE {
                ("UFFDIO_ZEROPAGE", self.calls.zeropage(self.base + at, len, true))
            } else {
                ("UFFDIO_COPY", self.calls.copy(self.base + at, &zeros[..self.unit as usize], true))
            };
            match answer {
                Ok(Outcome::Exists) => {
                    // In the file; perhaps not in the map.
                    match self.calls.continue_range(self.base + at, self.unit, true) {
                        Ok(Outcome::Done) => cursor.skip(self.unit),
                        Ok(Outcome::Exists) => {
                            self.wake(at)?;
                            cursor.skip(self.unit);
                        }
                        // It has gone again in between.
                        Ok(Outcome::Fault) => cursor.pause("a page that comes and goes")?,
                        other => cursor.advance("UFFDIO_CONTINUE", other)?,
                    }
                }
                Ok(Outcome::Done) if self.unit != GRANULE => cursor.skip(self.unit),
                other => cursor.advance(call, other)?,
            }
        }
        Ok(())
    }

    fn wake(&self, at: u64) -> Result<(), Stopped> {
        self.calls.wake(self.base + at, self.unit).map_err(|e| Stopped { at, reason: e.to_string() })
    }
}

/// How far placement has come.
struct Cursor<'a> {
    target: &'a Target<'a>,
    at: u64,
    end: u64,
    waiting: Option<Instant>,
}

impl<'a> Cursor<'a> {
    fn new(target: &'a Target<'a>, bytes: Range<u64>) -> Self {
        Self { target, at: bytes.start, end: bytes.end, waiting: None }
    }

    /// What is left: offset and length.
    fn next(&self) -> Option<(u64, u64)> {
        (self.at < self.end).then(|| (self.at, self.end - self.at))
    }

    fn skip(&mut self, len: u64) {
        self.at += len;
        self.waiting = None;
    }

    /// Has events read, and gives up if that does not help for long.
    fn pause(&mut self, what: &str) -> Result<(), Stopped> {
        let since = *self.waiting.get_or_insert_with(Instant::now);
        if since.elapsed() > AGAIN_LIMIT {
            let reason = format!("{what} has kept it from going on for {AGAIN_LIMIT:?}");
            return Err(Stopped { at: self.at, reason });
        }
        (self.target.drain)();
        Ok(())
    }

    fn advance(&mut self, call: &str, answer: Result<Outcome, UffdError>) -> Result<(), Stopped> {
        let stopped = |reason: String| Err(Stopped { at: self.at, reason });
        match answer {
            Ok(Outcome::Done) => self.skip(self.end - self.at),
            Ok(Outcome::Partial(n)) if n < self.end - self.at && n.is_multiple_of(self.target.unit) => self.skip(n),
            Ok(Outcome::Again) => self.pause("a pending event")?,
            Ok(Outcome::Partial(n)) => return stopped(format!("{call} answered {n} bytes, which are no whole units")),
            Ok(Outcome::Gone) => return stopped(format!("{call}: the process has gone")),
            Ok(Outcome::NotRegistered) => return stopped(format!("{call}: the range is not registered")),
            Ok(Outcome::NoMemory) => return stopped(format!("{call}: no memory for the page")),
            Ok(Outcome::Fault) => return stopped(format!("{call}: bad address")),
            Ok(Outcome::Exists) => return stopped(format!("{call}: the page is there already")),
            Err(error) => return stopped(error.to_string()),
        }
        Ok(())
    }
}
